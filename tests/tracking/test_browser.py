"""`make ui`: MLflow's pages on a sweep, looked at with a real browser, and how the command behaves.

What needs Chromium skips without it, and fails instead where CI_BROWSER=1 says that it has to be there.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from conftest import ROOT, Call, in_laboratory
from laboratory import ARMS, Laboratory
from server import free_port

from pipeline.__main__ import ui_command
from pipeline.errors import UserError
from pipeline.tasks.registry import declarations
from pipeline.tracking.ui import (
    HOST,
    VIEW_TAG,
    check_free,
    has_desktop,
    link,
    newest_sweep,
    serving,
    show,
    wait_until_up,
)

CHARTS = ("valid/logloss_ctcvr", "loss_ctcvr_bce", "loss_ctcvr_focal")
CARD = "[data-testid=experiment-view-compare-runs-card]"
# Of each chart that is drawn: metric -> run id -> what its line is made of
DRAWN = """() => {
  const found = {};
  for (const plot of document.querySelectorAll('CARD .js-plotly-plot'))
    for (const line of plot.data)
      ((found[line.metricKey] ??= {})[line.uuid] ??= []).push(
        {name: line.name, color: line.marker.color, x: [...line.x], y: [...line.y]});
  return found;
}""".replace("CARD", CARD)


def charts(task: str) -> tuple[str, ...]:
    return declarations(task).charts


def make_ui(port: int) -> list[str]:
    """`make ui`'s own command line, without the interpreter."""
    command = ["make", "--no-print-directory", "--dry-run", "-o", "setup", "ui", f"PORT={port}"]
    recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    _, *arguments = recipe.strip().splitlines()[-1].split()
    assert arguments[:3] == ["-m", "pipeline", "ui"]
    return arguments


def start_ui(folder: Path, port: int) -> subprocess.Popen[str]:
    """`make ui` as it is run in a terminal, with no desktop around it."""
    hidden = ("DISPLAY", "WAYLAND_DISPLAY")
    return subprocess.Popen(
        [sys.executable, *make_ui(port)],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in hidden} | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a process that is started in the background ignores Ctrl-C, and hands that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )


def listening(port: int) -> set[str]:
    """Local addresses (hex, as the kernel lists them) at which somebody waits on the port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text(encoding="utf-8").splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.split(":")[1], 16) == port:
                found.add(address.split(":")[0])
    return found


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of Debian's Chromium."""
    chromium = shutil.which("chromium")
    lacking = [name for name, there in (("chromium", chromium), ("playwright", importlib.util.find_spec("playwright")))
               if not there]  # fmt: skip
    if lacking:
        reason = f"needs {' and '.join(lacking)}: apt-get install chromium, pip install playwright"
        (pytest.fail if os.environ.get("CI_BROWSER") == "1" else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    quiet = ["--disable-gpu", "--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=quiet, chromium_sandbox=os.geteuid() != 0)
        new_page = browser.new_page(viewport={"width": 1600, "height": 900})
        new_page.set_default_timeout(600_000)  # ms, which only guard against hanging
        yield new_page
        browser.close()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The link that the command gives, on this machine alone; it ends by Ctrl-C and leaves nothing on the port."""
    port = free_port()
    process = start_ui(folder, port)
    try:
        assert process.stdout
        address = process.stdout.readline().strip()
        assert address.startswith(f"http://{HOST}:{port}/"), process.communicate()[1]
        if Path("/proc/net/tcp").exists():
            assert listening(port) == {"0100007F"}  # 127.0.0.1, least byte first
        yield address
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=600)
        assert process.returncode == 0, complaints
        assert "Traceback" not in complaints
        check_free(port)
    finally:
        process.terminate()
        process.wait(timeout=600)


@in_laboratory
def test_the_ui_shows_the_newest_sweep(
    page: Any,
    laboratory: Laboratory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mlflow import MlflowClient

    shutil.copyfile(laboratory.folder / "mlflow.db", tmp_path / "mlflow.db")  # the laboratory's own is for reading
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client, sweep = MlflowClient(uri), f"tags.sweep_id = '{laboratory.sweep('mmoe')}' and tags.role != 'summary'"
    names = [f"{arm} s{seed}" for arm in ARMS for seed in (0, 1)] + more_seeds(client, sweep)
    runs = {run.info.run_name: run for run in client.search_runs(["0"], sweep)}
    assert sorted(runs) == sorted(names)
    client.create_run("0", run_name="of no sweep", tags={"role": "arm"})

    with served(tmp_path) as address:
        page.goto(address)
        page.get_by_role("button", name="Close", exact=True).click()  # the assistant takes a quarter of the width
        charts_overlay_the_arms(page, client, runs)
        page.locator("label:has(input[name=runs-view-mode][value=TABLE])").click()
        list_is_flat(page, runs)
        compare_lists_what_differs(page, [runs["baseline s0"], runs["l5 g1 w3 s0"], runs["l0 g2 w3 s1"]])

        # a store that is a server needs no other: the same link, at once
        call_ui(address.split("/#/")[0], monkeypatch)
        assert capsys.readouterr().out.strip() == address


def call_ui(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make ui` on the store, with no desktop, in this process."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # it would set it for this process too
    ui_command.main([], standalone_mode=False)


def more_seeds(client: Any, sweep: str) -> list[str]:
    """Runs of the baseline with four more seeds: MLflow would draw ten runs and hide the others."""
    (model,) = client.search_runs(["0"], f"{sweep} and tags.role = 'baseline' and tags.seed = '0'")
    names = [f"baseline s{seed}" for seed in (2, 3, 4, 5)]
    for name in names:
        run = client.create_run("0", run_name=name, tags=model.data.tags | {"mlflow.runName": name})
        for step in (6, 12):
            client.log_metric(run.info.run_id, CHARTS[0], 0.5 + step / 100, step=step)
        client.set_terminated(run.info.run_id)
    return names


def charts_overlay_the_arms(page: Any, client: Any, runs: dict[str, Any]) -> None:
    """On top are three charts, each with a line for each run that logged its metric: all points, the arm's colour."""
    page.wait_for_function(f"names => names.every(name => name in ({DRAWN})())", arg=list(CHARTS))
    cards = page.locator(CARD)
    assert tuple(cards.nth(number).inner_text().split("\n")[0] for number in range(len(CHARTS))) == CHARTS
    drawn = page.evaluate(DRAWN)
    for metric in CHARTS:
        logged = {run.info.run_id: run for run in runs.values() if metric in run.data.metrics}
        # the baseline and the controls have no focal loss, the runs with more seeds have no loss at all
        assert len(logged) == {CHARTS[0]: 12, "loss_ctcvr_bce": 8, "loss_ctcvr_focal": 4}[metric]
        assert drawn[metric].keys() == logged.keys()
        for run_id, run in logged.items():
            points = sorted((point.step, point.value) for point in client.get_metric_history(run_id, metric))
            assert len(points) == {CHARTS[0]: 2, "loss_ctcvr_bce": 12, "loss_ctcvr_focal": 9}[metric]
            lines = drawn[metric][run_id]
            assert {line["name"] for line in lines} == {run.info.run_name}
            assert {line["color"][:7] for line in lines} == {run.data.tags["mlflow.runColor"]}  # one is faint
            assert all(list(zip(line["x"], line["y"], strict=True)) == points for line in lines)


def list_is_flat(page: Any, runs: dict[str, Any]) -> None:
    """A row for each run of the sweep and no other: a run below another one would be folded away."""
    page.locator(".ag-header-cell", has_text="test/logloss_ctcvr").wait_for()
    page.wait_for_function(f"document.querySelectorAll('.ag-row[row-id] a').length >= {len(runs)}")
    shown = page.evaluate("""[...document.querySelectorAll('.ag-row[row-id]')].filter(row => row.querySelector('a'))
        .map(row => [row.getAttribute('row-id'), row.querySelector('a').innerText])""")
    assert sorted(shown) == sorted([run.info.run_id, name] for name, run in runs.items())


def compare_lists_what_differs(page: Any, runs: list[Any]) -> None:
    """Picked in the list and compared, with the difference filter: exactly the params with several values."""
    for run in runs:
        page.locator(f".ag-row[row-id='{run.info.run_id}'] .ag-selection-checkbox input").check()
    page.get_by_test_id("runs-compare-button").click()
    names = {name for run in runs for name in run.data.params}
    differing = {name for name in names if len({run.data.params.get(name) for run in runs}) > 1}
    focal = {f"loss.aux_focal.{key}" for key in ("enabled", "lambda", "gamma", "warmup_steps")}
    settings = {name for name in differing if "." in name and not name.startswith("calibration.")}
    assert settings == focal  # what the three arms were given, and no more
    table = page.locator("table").filter(has=page.get_by_role("rowheader", name="loss.aux_focal.lambda", exact=True))
    headers = table.get_by_role("rowheader")
    headers.first.wait_for()
    assert set(headers.all_inner_texts()) == names
    page.get_by_role("switch", name="Parameters - Show diff only").click()
    page.wait_for_function(f"document.querySelectorAll('table')[1].rows.length < {len(names)}")
    rows = [row.locator("th, td").all_inner_texts() for row in table.locator("tr").all()]
    assert {name for name, *_ in rows} == differing
    order = table.page.locator("table").first.get_by_role("link").all_inner_texts()  # run ids, of the columns
    by_id = {run.info.run_id: run.data.params for run in runs}
    assert {name: values for name, *values in rows} == {
        name: [by_id[run_id].get(name, "") for run_id in order[: len(runs)]] for name in differing
    }


def make_run(client: Any, experiment: str, metrics: tuple[str, ...] = (), **tags: str) -> str:
    run = client.create_run(experiment, tags=tags)
    for metric in metrics:
        client.log_metric(run.info.run_id, metric, 0.5)
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def test_the_newest_sweep_is_shared_as_a_view(client: Any) -> None:
    elsewhere = client.create_experiment("elsewhere")
    make_run(client, "0", role="summary", sweep_id="a" * 16, metric="test/auc_ctcvr")
    make_run(client, elsewhere, role="summary", sweep_id="b" * 16, metric="test/pair_f1_micro", task="visobert")
    make_run(client, "0", ("valid/auc_ctcvr", "loss_ctcvr_bce"), role="arm", sweep_id="a" * 16)
    logged = ("loss_aspect", "loss_sentiment", "valid/pair_f1_micro", "test/pair_f1_micro")
    make_run(client, elsewhere, logged, role="arm", sweep_id="b" * 16)

    sweep = newest_sweep(charts)
    assert sweep
    assert (sweep.sweep_id, sweep.experiment_id) == ("b" * 16, elsewhere)
    assert sweep.charts == ("valid/pair_f1_micro", "loss_sentiment")
    address = link("http://host:1", sweep)
    page = f"http://host:1/#/experiments/{elsewhere}/runs?workflowType=machine_learning"
    assert address == f"{page}&viewStateShareKey={'b' * 16}&compareRunsMode=CHART"
    state = json.loads(client.get_experiment(elsewhere).tags[VIEW_TAG + "b" * 16])
    assert [chart["metricKey"] for chart in state["compareRunCharts"]] == list(sweep.charts)
    assert state["searchFilter"] == sweep.filter


def test_a_store_that_refuses_the_view_gets_a_link_with_the_filter(
    client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.exceptions import MlflowException

    make_run(client, "0", role="launcher", sweep_plan="c" * 16)
    make_run(client, "0", role="summary", sweep_id="a" * 16, metric="test/auc_ctcvr")
    wanted = {make_run(client, "0", role=role, sweep_id="a" * 16) for role in ("baseline", "arm", "control")}
    make_run(client, "0", role="arm", sweep_id="b" * 16)
    make_run(client, "0")

    def refuse(*_: Any) -> None:
        raise MlflowException("you may only read")

    monkeypatch.setattr("mlflow.MlflowClient.set_experiment_tag", refuse)
    page, _, query = link("http://host:1", newest_sweep(charts)).partition("?")
    assert page == "http://host:1/#/experiments/0/runs"
    assert "you may only read" in capsys.readouterr().err
    given = parse_qs(query, strict_parsing=True)
    assert given["compareRunsMode"] == ["CHART"]
    assert {run.info.run_id for run in client.search_runs(["0"], given["searchFilter"][0])} == wanted


def test_without_a_sweep_the_newest_runs_experiment_is_shown(client: Any) -> None:
    assert newest_sweep(charts) is None
    assert link("http://host:1", None) == "http://host:1/#/experiments/0/runs?workflowType=machine_learning"
    make_run(client, elsewhere := client.create_experiment("elsewhere"), role="baseline")
    assert newest_sweep(charts) is None
    assert link("http://host:1", None) == f"http://host:1/#/experiments/{elsewhere}/runs?workflowType=machine_learning"


@pytest.mark.parametrize(
    ("environment", "desktop"),
    [({}, False), ({"DISPLAY": ":0"}, True), ({"WAYLAND_DISPLAY": "wayland-0"}, True),
     ({"DISPLAY": ":10", "SSH_CONNECTION": "host"}, False)],
)  # fmt: skip
def test_a_browser_is_opened_where_there_is_a_desktop(
    environment: dict[str, str], desktop: bool, client: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    show("http://host:1/", None)
    assert has_desktop() == desktop
    assert opened == (["http://host:1/"] if desktop else [])
    assert capsys.readouterr().out == "http://host:1/\n"


class Started(Exception):  # noqa: N818 (no error)
    """In place of a process: its command line."""


def test_the_server_listens_on_this_machine_alone(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen where it is really started, too, by the test that needs Chromium."""

    def start(command: list[str], **_: Any) -> None:
        raise Started(command)

    monkeypatch.setattr("pipeline.tracking.ui.subprocess.Popen", start)
    with pytest.raises(Started) as started, serving(5000):
        pass
    (command,) = started.value.args
    assert command[command.index("--host") + 1] == "127.0.0.1"


def test_a_port_in_use_is_one_line(call_pipeline: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # it would set it for this process too
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = call_pipeline("ui", "--port", str(port))
    complaint = result.stderr
    assert (result.returncode, result.stdout) == (2, "")
    reason = "Address already in use" if sys.platform == "linux" else ""
    assert complaint.startswith(f"error: port {port}: {reason}")
    assert complaint.endswith(f"allowed: a free one, as in `make ui PORT={port + 1}`\n")
    assert complaint.count("\n") == 1


def test_a_server_that_is_away_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"http://{HOST}:{free_port()}"
    with pytest.raises(UserError) as caught:
        call_ui(uri, monkeypatch)
    assert str(caught.value).startswith(f"tracking store {uri}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert capsys.readouterr().out == ""


def test_a_server_that_ends_at_once_is_an_error() -> None:
    server = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(UserError, match="ended with code 3"):
        wait_until_up(server, f"http://{HOST}:{free_port()}")
