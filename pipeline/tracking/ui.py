"""`make ui`: open MLflow's web interface on the newest sweep.

By default, MLflow plots only the first ten runs of a list, and shows one chart for each of about a hundred metrics. The
sweep therefore gets a shared view, as MLflow's Share button creates it: it plots all runs of the sweep and no others,
and shows the most important charts first.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

from pipeline.errors import UserError
from pipeline.names import SWEEP
from pipeline.runtime.console import info, warn
from pipeline.runtime.platform_support import allow_closed_port, known_signals, stop_process_tree
from pipeline.tracking.client import DEFAULT_EXPERIMENT, connect, experiments
from pipeline.tracking.store import configure_mlflow, tracking_uri
from pipeline.tracking.store_creation import ensure_store
from pipeline.tracking.store_errors import one_line
from pipeline.tracking.stored_runs import runs_of_sweep, runs_of_tag, store_exists

HOST = "127.0.0.1"
START_SECONDS = 600  # how long to wait for the first answer of a server that runs, on the busiest machine
STOP_SECONDS = 5  # how long to wait before killing the server
VIEW_TAG = "mlflow.sharedViewState."  # prefix of an experiment's tag; the rest of the tag is the key in the link
TRAINING = "workflowType=machine_learning"  # in a link; by default, MLflow shows its GenAI pages
Charts = Callable[[str], Sequence[str]]  # name of a task -> metrics to chart if the sweep logged them
QUIET = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # avoids seven processes that evaluate chats
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "PYTHONWARNINGS": "ignore",
}


def ui(port: int, charts: Charts) -> None:
    """Run MLflow's server until Ctrl-C; if the store is a server itself, only show the link.

    Raises:
        UserError: the port is in use, the store does not answer, or the server ends by itself.
    """
    configure_mlflow()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # report an unreachable server within seconds
    uri = tracking_uri()
    if uri.startswith(("http://", "https://")):
        sweep = newest_sweep(charts)
        show(link(uri.rstrip("/"), sweep), sweep)
        return
    base = f"http://{HOST}:{port}"
    check_free(port)
    address = link(base, sweep := newest_sweep(charts))  # before the server starts, since both may create the store
    for number in known_signals("INT", "TERM", "HUP"):
        if signal.getsignal(number) is not signal.SIG_IGN:  # with nohup, keep ignoring SIGHUP
            signal.signal(number, _end)
    with suppress(KeyboardInterrupt), serving(port) as server:
        wait_until_up(server, base)
        show(address, sweep)
        info("Ctrl-C ends the server")
        raise UserError(f"MLflow's server ended with code {server.wait()}")


@dataclass(frozen=True)
class SweepView:
    """A sweep, and the charts to show first."""

    sweep_id: str
    experiment_id: str
    metric: str  # the metric of the verdict
    charts: tuple[str, ...]
    adopted: bool = False  # whether some of its runs began in another sweep

    @property
    def filter(self) -> str:
        """MLflow's filter for the runs of the sweep, without its summary."""
        if self.adopted:
            return f"tags.`{SWEEP}{self.sweep_id}` LIKE '%'"
        return f"tags.sweep_id = '{self.sweep_id}' and tags.role != 'summary'"

    @property
    def state(self) -> dict[str, Any]:
        """The view's state in the format of MLflow's web interface; missing keys have their defaults."""
        return {
            "searchFilter": self.filter,
            "orderByAsc": True,  # by start time: the baseline, then the arms, seed by seed
            "selectedColumns": [f"metrics.`{self.metric}`"],
            "runsHiddenMode": "SHOW_ALL",
            "isAccordionReordered": True,  # otherwise the sections are sorted by name
            "compareRunSections": [{"uuid": "sweep", "name": "The sweep", "display": True, "isReordered": True}],
            "compareRunCharts": [_line_chart(metric) for metric in self.charts],
        }


def _line_chart(metric: str) -> dict[str, Any]:
    return {
        "type": "LINE", "uuid": f"sweep {metric}", "metricSectionId": "sweep", "metricKey": metric,
        "selectedMetricKeys": [metric], "displayName": metric,
        "xAxisKey": "step", "xAxisScaleType": "linear", "yAxisKey": "metric", "scaleType": "linear",
        "selectedXAxisMetricKey": "", "lineSmoothness": 0, "deleted": False, "isGenerated": False,
        "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
    }  # fmt: skip


def newest_sweep(charts: Charts) -> SweepView | None:
    """The most recently started sweep; None if there is none.

    Raises:
        UserError: the store does not answer.
    """
    import mlflow

    summaries = runs_of_tag("role", "summary") if store_exists() else []
    if not summaries:
        return None
    summary = summaries[-1]
    sweep_id, metric = summary.tags["sweep_id"], summary.tags["metric"]
    runs = runs_of_sweep(sweep_id)
    logged = {name for run in runs for name in run.metrics}
    adopted = any(run.tags.get("sweep_id") != sweep_id for run in runs)
    validation_metric = metric.replace("test/", "valid/", 1)
    experiment_id = mlflow.MlflowClient().get_run(summary.run_id).info.experiment_id
    wanted = [validation_metric, *charts(summary.tags.get("task", ""))]
    return SweepView(sweep_id, experiment_id, metric, tuple(name for name in wanted if name in logged), adopted)


def newest_experiment() -> str:
    """The experiment id of the most recently started run."""
    if not store_exists():
        return DEFAULT_EXPERIMENT
    client = connect()
    ids = [experiment.experiment_id for experiment in experiments(client)]
    runs = client.search_runs(ids, order_by=["attributes.start_time DESC"], max_results=1)
    return runs[0].info.experiment_id if runs else DEFAULT_EXPERIMENT


def link(base: str, sweep: SweepView | None) -> str:
    """The link to the sweep's charts on the server at `base`; without a sweep, to the newest run's experiment."""
    import mlflow
    from mlflow.exceptions import MlflowException

    page = f"{base}/#/experiments/{sweep.experiment_id if sweep else newest_experiment()}/runs?{TRAINING}"
    if sweep is None:
        return page
    try:
        key = VIEW_TAG + sweep.sweep_id
        mlflow.MlflowClient().set_experiment_tag(sweep.experiment_id, key, json.dumps(sweep.state))
    except MlflowException as error:  # the store may be read-only for this user
        warn(f"no view of the sweep could be saved: {one_line(error)}")
        return f"{page}&searchFilter={quote(sweep.filter, safe='')}&compareRunsMode=CHART"
    return f"{page}&viewStateShareKey={quote(sweep.sweep_id, safe='')}&compareRunsMode=CHART"


def show(address: str, sweep: SweepView | None) -> None:
    """Print the link on standard output, and open it in the user's browser if there is a desktop."""
    info(f"sweep {sweep.sweep_id}:" if sweep else f"no sweep in {tracking_uri()} yet:")
    print(address, flush=True)
    if has_desktop():
        webbrowser.open(address)


def has_desktop() -> bool:
    """Whether a browser that is opened here appears on the user's screen."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


@contextmanager
def serving(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run MLflow's server on the tracking store within the block."""
    import mlflow

    ensure_store(mlflow.get_tracking_uri())
    artifacts = str(Path("mlruns").resolve())  # for new experiments, the same as without a server
    command = [sys.executable, "-m", "mlflow", "ui", "--host", HOST, "--port", str(port), "--workers", "1",
               "--default-artifact-root", artifacts, "--uvicorn-opts", "--log-level warning"]  # fmt: skip
    # in the environment, since other users can see process arguments and the URI may contain a password
    environment = QUIET | os.environ | {"MLFLOW_BACKEND_STORE_URI": mlflow.get_tracking_uri()}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield server
    finally:
        stop_process_tree(server, STOP_SECONDS)


def check_free(port: int) -> None:
    """Raise a UserError if another program uses the port."""
    with socket.socket() as listener:
        allow_closed_port(listener)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"port {port}: {reason}, allowed: a free one, as in `make ui PORT={port + 1}`") from None


def wait_until_up(server: subprocess.Popen[bytes], base: str) -> None:
    """Wait until the server answers.

    Raises:
        UserError: the server ended, or did not answer in time.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise UserError(f"MLflow's server ended with code {server.returncode}; see its output above")
        with suppress(URLError, ConnectionError, TimeoutError), urlopen(f"{base}/health", timeout=5):  # noqa: S310
            return
        time.sleep(0.2)
    raise UserError(f"MLflow's server did not answer within {START_SECONDS} s")


def _end(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 (a signal handler)
    raise KeyboardInterrupt
