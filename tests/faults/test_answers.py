"""Each call of a run to its server is answered with each error, once and for good: the run ends as docs/resume.md says.

The calls are those that an undisturbed run makes. What was lost to an error is there once `sync` has run.
"""

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest
from conftest import only_full
from server import HOST, MlflowServer

from pipeline.errors import Undelivered, UserError
from pipeline.tracking import __main__ as writing
from pipeline.tracking import run_opening, store_calls
from pipeline.tracking.delivery import Delivery
from pipeline.tracking.inbox import Inbox
from pipeline.tracking.messages import AbandonRun, DeliveryReport, FinishRun, OpenedRun, Refused, RunRequest
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.run_opening import Opening
from pipeline.tracking.sync import sync

pytestmark = [pytest.mark.faults, only_full]

HTML, CUT = "200 with HTML", "a cut body"
UNAVAILABLE, REFUSED, FAILED, NOT_ALLOWED = "unavailable", "refused", "failed", "not allowed"
ANSWERS: dict[int | str, str] = {
    400: REFUSED, 401: NOT_ALLOWED, 403: REFUSED, 404: REFUSED, 408: UNAVAILABLE, 413: REFUSED,
    429: UNAVAILABLE, 500: FAILED, 502: UNAVAILABLE, 503: UNAVAILABLE, HTML: UNAVAILABLE, CUT: UNAVAILABLE,
}  # fmt: skip
STEPS = 3


@dataclass
class Proxy:
    """Stands before a server, and answers calls of one kind by itself."""

    server: MlflowServer
    answer: int | str | None = None
    call: str = ""  # method and path, with its ids left out
    times: int = 1 << 30
    calls: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                connection = HTTPConnection(HOST, proxy.server.port)
                call = named(self.command, self.path)
                proxy.calls.append(call)
                disturbed = proxy.answer is not None and call == proxy.call and proxy.times > 0
                if disturbed:
                    proxy.times -= 1
                if disturbed and proxy.answer != CUT:
                    code, text = (
                        (200, "<html>log in</html>") if proxy.answer == HTML else (proxy.answer, "<html>no</html>")
                    )
                    self.send_response(int(code))
                    self.send_header("Content-Type", "text/html")
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text.encode())
                    return
                kept = {
                    name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")
                }
                connection.request(self.command, self.path, body, kept)
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if disturbed else content)
                if disturbed:  # the server has done it, and nobody hears so
                    self.close_connection = True

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = forward  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Nothing is printed."""

        self.listening = ThreadingHTTPServer((HOST, 0), Handler)
        threading.Thread(target=self.listening.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listening.shutdown()
        self.listening.server_close()

    @property
    def uri(self) -> str:
        return f"http://{HOST}:{self.listening.server_address[1]}"


def named(method: str, path: str) -> str:
    """A call without ids and queries."""
    path = re.sub(r"[0-9a-f]{32}", "<id>", path.partition("?")[0])
    return f"{method} {re.sub(r'/(experiments|artifacts)/[0-9]+/', r'/<experiment>/', path)}"


class Here:
    """The writer's part of a run's opening, in this process."""

    def ask(self, request: Any, _: type[OpenedRun]) -> OpenedRun:
        self.opening = Opening(request.run, Path(request.output_dir), request.last_steps)
        done = threading.Thread()
        done.start()
        reply = writing._open(request, self.opening, Inbox(None), done)
        if isinstance(reply, Refused):
            raise UserError(reply.error)
        assert isinstance(reply, OpenedRun)
        return reply

    def send(self, request: Any) -> None:
        if isinstance(request, AbandonRun):
            writing._abandon(self.opening, request.failure)


@dataclass
class Ended:
    """How a run ended."""

    refused: str = ""  # why it was not begun
    report: DeliveryReport | None = None
    folder: Path | None = None


def make_run(name: str, patience: float = 60.0) -> Ended:
    """A run that logs one of everything."""
    try:
        run = MlflowRun(Here(), RunRequest(name, tags={"asked": name}), Path("outputs"))  # type: ignore[arg-type]
    except UserError as error:
        return Ended(refused=str(error))
    run.log_params({"seed": "3"})
    run.set_tags({"tag": "set"})
    run.log_input("data", "ab" * 32, "a file", {"rows": 3})
    (run.folder / "note.txt").write_text("read me")
    run.log_artifact(run.folder / "note.txt")
    for step in range(STEPS):
        run.log_metrics(step, {"loss_total": step / 3}, 1000 + step)
    run.journal.append({"op": "finish", "status": "FINISHED", "time": 5000})
    run.journal.close()
    inbox = Inbox(None, FinishRun("FINISHED", patience=patience))
    report = Delivery(run.folder, run.owner.number, inbox, lambda _: None, run.claim).follow()
    run.owner.release()
    return Ended(report=report, folder=run.folder)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with MlflowServer(tmp_path_factory.mktemp("server")) as server, Proxy(server) as proxy:
        yield proxy


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, proxy: Proxy) -> None:
    from pipeline.tracking.store import CLIENT_SETTINGS

    monkeypatch.chdir(tmp_path)
    for name, value in {**CLIENT_SETTINGS, "MLFLOW_TRACKING_URI": proxy.uri}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(writing, "ABANDON_SECONDS", 0.05)
    monkeypatch.setattr(run_opening, "LATE_SECONDS", 0.3)
    monkeypatch.setattr(run_opening, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(store_calls, "CLAIM_SECONDS", 0.0)
    for module in (writing, store_calls):
        monkeypatch.setattr(module, "PAUSE_SECONDS", (0.05, 0.1))


def limit_retries(monkeypatch: pytest.MonkeyPatch, *, lasting: bool) -> float:
    """Give up soon on an error that lasts, and wait long for a store that answers again; returns the patience."""
    monkeypatch.setattr(writing, "OPEN_SECONDS", 0.5 if lasting else 60.0)
    monkeypatch.setattr(store_calls, "FAILING_SECONDS", 0.3 if lasting else 60.0)
    return 1.0 if lasting else 60.0


def whole(client: Any, run: Any) -> bool:
    """All of a run is there, each point once."""
    points = sorted((p.step, p.value, p.timestamp) for p in client.get_metric_history(run.info.run_id, "loss_total"))
    assert len(points) == len(set(points))
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    return (
        points == [(step, step / 3, 1000 + step) for step in range(STEPS)]
        and run.data.params == {"seed": "3"} and run.data.tags.get("tag") == "set"
        and len(run.inputs.dataset_inputs) == 1
        and files == {"note.txt", "history.parquet"} and (run.info.status, run.info.end_time) == ("FINISHED", 5000)
    )  # fmt: skip


def test_every_answer_to_every_call(proxy: Proxy, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(proxy.server.uri)
    proxy.answer = None
    proxy.calls.clear()
    ended = make_run("undisturbed")
    assert ended.report
    assert (ended.report.problems, ended.report.waiting) == ((), 0)
    calls = sorted({call for call in proxy.calls if not call.endswith("/health")})
    assert len(calls) >= 8, calls
    wrong: list[str] = []
    pairs = [(call, answer, times) for call in calls for answer in ANSWERS for times in (1, 1 << 30)]
    for number, (call, answer, times) in enumerate(pairs):
        name = f"run {number}"
        case = f"{call}: {answer} {'once' if times == 1 else 'for good'}"
        proxy.call, proxy.answer, proxy.times = call, answer, times
        ended = make_run(name, limit_retries(monkeypatch, lasting=times > 1))
        proxy.answer = None
        limit_retries(monkeypatch, lasting=False)
        unnoticed = call.startswith("PUT") and answer == HTML  # 200 is a file's whole answer: `doctor` sees it
        runs = client.search_runs(["0"], f"tags.asked = '{name}'")
        kind = ANSWERS[answer]
        passing = times == 1 and kind in (UNAVAILABLE, FAILED)
        if ended.refused:
            if passing:
                wrong.append(f"{case}: refused: {ended.refused}")
            if any(run.info.status == "RUNNING" for run in runs):
                wrong.append(f"{case}: stays RUNNING")
            continue
        assert ended.report
        assert ended.folder
        (run,) = runs if len(runs) == 1 else [None]
        if run is None:
            wrong.append(f"{case}: {len(runs)} runs")
            continue
        if (passing or (times == 1 and kind == NOT_ALLOWED)) and not unnoticed:
            if not whole(client, run):
                wrong.append(f"{case}: not whole: {ended.report}")
            continue
        if kind in (UNAVAILABLE, NOT_ALLOWED) and ended.report.problems:
            wrong.append(f"{case}: refused by {ended.report}")
        if ended.report.waiting and not ended.report.reason:
            wrong.append(f"{case}: waits for no reason")
        try:
            sync(ended.folder, again=unnoticed)
        except (UserError, Undelivered) as error:
            wrong.append(f"{case}: {error} after {ended.report}")
            continue
        if not whole(client, client.get_run(run.info.run_id)):
            wrong.append(f"{case}: not whole after sync: {ended.report}")
    print(f"{len(pairs)} pairs of {len(calls)} calls: {json.dumps(calls, indent=1)}")
    assert not wrong, "\n".join(wrong)
