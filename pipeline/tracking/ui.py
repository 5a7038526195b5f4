"""`make ui`: MLflow's own pages, opened on the newest sweep.

MLflow draws only the first ten runs of a list and a chart for each of a hundred metrics. The sweep therefore gets a
shared view, as MLflow's button Share makes one: its runs alone, all of them drawn, the charts of its question on top.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

import click

from pipeline.errors import UserError
from pipeline.runtime.console import say
from pipeline.runtime.text import visible
from pipeline.tracking.client import connect, experiments
from pipeline.tracking.creation import ensure_store
from pipeline.tracking.store import one_line, settle, tracking_uri
from pipeline.tracking.stored_runs import runs_of_sweep, runs_of_tag, store_exists

HOST = "127.0.0.1"
START_SECONDS = 120  # how long the server may take until it answers
STOP_SECONDS = 5  # how long it may take to end by itself
DEFAULT_EXPERIMENT = "0"
VIEW_TAG = "mlflow.sharedViewState."  # of an experiment; what follows is the key in the link
TRAINING = "workflowType=machine_learning"  # in a link: without it a new browser gets MLflow's pages for GenAI
LOSSES = ("loss_ctcvr_bce", "loss_ctcvr_focal", "loss_sentiment")  # charted where a sweep has them
QUIET = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes for judging chats, which nobody here has
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class SweepView:
    """A sweep, and what the charts on top of its page show."""

    sweep_id: str
    experiment_id: str
    metric: str  # of the verdict
    charts: tuple[str, ...]

    @property
    def filter(self) -> str:
        """MLflow's filter for the runs that are compared, without the one that stands for the whole."""
        return f"tags.sweep_id = '{self.sweep_id}' and tags.role != 'summary'"

    @property
    def state(self) -> dict[str, Any]:
        """The view in the words of MLflow's page: what is not named stays as it is without a view."""
        return {
            "searchFilter": self.filter,
            "orderByAsc": True,  # by time of start: baseline, then the arms, seed by seed
            "selectedColumns": [f"metrics.`{self.metric}`"],
            "runsHiddenMode": "SHOW_ALL",
            "isAccordionReordered": True,  # else the sections are sorted by name
            "compareRunSections": [{"uuid": "sweep", "name": "The sweep", "display": True, "isReordered": True}],
            "compareRunCharts": [_chart(metric) for metric in self.charts],
        }


def _chart(metric: str) -> dict[str, Any]:
    """A line for each run over steps."""
    own = {"type": "LINE", "uuid": f"sweep {metric}", "metricSectionId": "sweep", "metricKey": metric}
    plain = {"selectedXAxisMetricKey": "", "lineSmoothness": 0, "deleted": False, "isGenerated": False}
    scales = {"xAxisKey": "step", "xAxisScaleType": "linear", "yAxisKey": "metric", "scaleType": "linear"}
    shared = {"useGlobalXaxisKey": True, "useGlobalLineSmoothing": True}
    return own | {"selectedMetricKeys": [metric], "displayName": metric} | scales | plain | shared


def newest_sweep() -> SweepView | None:
    """The sweep that was started last, if there is one.

    Raises:
        UserError: the store does not answer.
    """
    import mlflow

    summaries = runs_of_tag("role", "summary") if store_exists() else []
    if not summaries:
        return None
    summary = summaries[-1]
    sweep_id, metric = summary.tags["sweep_id"], summary.tags["metric"]
    logged = {name for run in runs_of_sweep(sweep_id) for name in run.metrics}
    validated = metric.replace("test/", "valid/", 1)
    experiment_id = mlflow.MlflowClient().get_run(summary.run_id).info.experiment_id
    return SweepView(sweep_id, experiment_id, metric, tuple(name for name in (validated, *LOSSES) if name in logged))


def newest_experiment() -> str:
    """The experiment of the run that was started last; MLflow's default where there is none."""
    if not store_exists():
        return DEFAULT_EXPERIMENT
    client = connect()
    ids = [found.experiment_id for found in experiments(client)]
    runs = client.search_runs(ids, order_by=["attributes.start_time DESC"], max_results=1)
    return runs[0].info.experiment_id if runs else DEFAULT_EXPERIMENT


def link(base: str, sweep: SweepView | None) -> str:
    """Where the sweep's charts are, on the server at `base`; without a sweep, the newest run's experiment."""
    import mlflow
    from mlflow.exceptions import MlflowException

    page = f"{base}/#/experiments/{sweep.experiment_id if sweep else newest_experiment()}/runs?{TRAINING}"
    if sweep is None:
        return page
    try:
        key = VIEW_TAG + sweep.sweep_id
        mlflow.MlflowClient().set_experiment_tag(sweep.experiment_id, key, json.dumps(sweep.state))
    except MlflowException as error:  # a store that we may only read: its runs are shown all the same
        say(f"warning: no view of the sweep could be saved: {one_line(error)}")
        return f"{page}&searchFilter={quote(sweep.filter, safe='')}&compareRunsMode=CHART"
    return f"{page}&viewStateShareKey={quote(sweep.sweep_id, safe='')}&compareRunsMode=CHART"


def has_desktop() -> bool:
    """Whether a browser that we open is in front of the user."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


def show(address: str, sweep: SweepView | None) -> None:
    """Print the link on standard output, and open it where there is a desktop."""
    say(f"sweep {sweep.sweep_id}:" if sweep else f"no sweep in {tracking_uri()} yet:")
    print(address, flush=True)
    if has_desktop():
        webbrowser.open(address)


@contextmanager
def serving(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """MLflow's server on the tracking store, for as long as the block lasts."""
    import mlflow

    ensure_store(mlflow.get_tracking_uri())
    artifacts = str(Path("mlruns").resolve())  # of experiments to come: where a client without a server has them
    command = [sys.executable, "-m", "mlflow", "ui", "--host", HOST, "--port", str(port), "--workers", "1",
               "--default-artifact-root", artifacts, "--uvicorn-opts", "--log-level warning"]  # fmt: skip
    # by the environment: a database's password is not for every user's list of processes
    environment = QUIET | os.environ | {"MLFLOW_BACKEND_STORE_URI": mlflow.get_tracking_uri()}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield server
    finally:
        _stop(server)


def check_free(port: int) -> None:
    """Raise a UserError where another program has the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else one that was closed just now is in use
        try:
            probe.bind((HOST, port))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"port {port}: {reason}, allowed: a free one, as in `make ui PORT={port + 1}`") from None


def wait_until_up(server: subprocess.Popen[bytes], base: str) -> None:
    """Return when the server answers.

    Raises:
        UserError: it ended, or did not answer in time.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise UserError(f"MLflow's server ended with code {server.returncode}; its own words are above")
        with suppress(URLError, ConnectionError, TimeoutError), urlopen(f"{base}/health", timeout=5):  # noqa: S310
            return
        time.sleep(0.2)
    raise UserError(f"MLflow's server did not answer within {START_SECONDS} s")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        end = time.monotonic() + STOP_SECONDS
        while time.monotonic() < end:
            server.poll()  # a child that ended counts until it is asked for
            os.killpg(server.pid, 0)
            time.sleep(0.05)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _end(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 (a signal's handler)
    raise KeyboardInterrupt


@click.command(help="Open MLflow on the newest sweep of the tracking store (MLFLOW_TRACKING_URI, else ./mlflow.db).")
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="where to serve")
def ui(port: int) -> None:
    """Serve until Ctrl-C; a store that is a server already needs only the link."""
    settle()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a server that is away is told within seconds
    where = tracking_uri()
    if where.startswith(("http://", "https://")):
        sweep = newest_sweep()
        show(link(where.rstrip("/"), sweep), sweep)
        return
    base = f"http://{HOST}:{port}"
    check_free(port)
    address = link(base, sweep := newest_sweep())  # before the server: two at once must not make a store
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup make ui &` outlives its terminal
            signal.signal(number, _end)
    with suppress(KeyboardInterrupt), serving(port) as server:
        wait_until_up(server, base)
        show(address, sweep)
        say("Ctrl-C ends the server")
        raise UserError(f"MLflow's server ended with code {server.wait()}")


if __name__ == "__main__":
    try:
        ui()
    except UserError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
