"""Several processes at one search: every trial once, whoever dies, and a study on PostgreSQL that says so."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import pytest
import yaml
from conftest import ROOT, Call
from optuna.trial import TrialState
from server import Postgres, need_postgres
from test_sweep import by_arm, sweep_file, sweep_id_of, table_of
from test_sweep_plan import plan_of

pytestmark = pytest.mark.xdist_group("search")

SPACE = {"lambda": {"low": 0.01, "high": 1.0}}


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    need_postgres()
    with Postgres() as server:
        yield server


@pytest.fixture
def database(postgres: Postgres, request: pytest.FixtureRequest) -> str:
    """A URL of a database of its own."""
    return postgres.database(re.sub(r"\W", "_", request.node.name)[:50].lower())


def search_file(folder: Path, url: str | None, jobs: int = 2, **changes: Any) -> Path:
    search = {"trials": 40, "space": SPACE, "settings": {"aux_focal": True, "gamma": 1.0}, "grace_seconds": 2,
              "storage": url}  # fmt: skip
    sweep = {"task": "train_mmoe", "config": str(ROOT / "configs/mtl_mmoe.yaml"), "baseline": {"aux_focal": False},
             "settings": {"output_dir": str(folder / "outputs")}, "search": search | changes, "jobs": jobs}  # fmt: skip
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep))
    return file


class Searchers:
    """Processes that search together in a folder."""

    def __init__(
        self, server: "subprocess.Popen[str]", file: Path, die: list[str | None], seconds: float = 0.01
    ) -> None:
        self.folder = file.parent
        asked = {"folder": str(self.folder), "file": str(file), "die": die, "seconds": seconds}
        assert server.stdin
        assert server.stdout
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        self.group = int(server.stdout.readline())

    def codes(self, seconds: float = 120) -> list[int]:
        """Wait for all; their exit codes."""
        file, end = self.folder / "codes.json", time.monotonic() + seconds
        while not file.exists():
            if time.monotonic() > end:
                os.killpg(self.group, signal.SIGKILL)
                raise AssertionError(f"still searching: {self.stderr}")
            time.sleep(0.05)
        assert "Traceback" not in self.stderr, self.stderr
        codes: list[int] = json.loads(file.read_text())
        return codes

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr.txt").read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        file = self.folder / "log.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [line for line in lines if line["event"] == name]

    def wait_for(self, name: str, seconds: float = 60) -> dict[str, Any]:
        _wait_until(lambda: self.events(name), seconds)
        return self.events(name)[0]


def _wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


Start = Callable[..., Searchers]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """`start(file, [None, "training"])`: two processes, of which the second dies."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "searchers.py")], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
    )  # fmt: skip
    yield partial(Searchers, server)
    assert server.stdin
    server.stdin.close()
    server.wait(60)


def study_of(url: str) -> optuna.Study:
    (name,) = optuna.get_all_study_names(url.replace("postgresql://", "postgresql+psycopg://"))
    return optuna.load_study(study_name=name, storage=url.replace("postgresql://", "postgresql+psycopg://"))


def states(study: optuna.Study) -> Counter[str]:
    return Counter(trial.state.name for trial in study.get_trials(deepcopy=False))


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def assert_each_once(searchers: Searchers, study: optuna.Study, trials: int) -> None:
    """As many trials as asked for, nothing left over, and each setting trained once."""
    done = finished(study)
    assert len(done) == trials
    assert set(states(study)) <= {"COMPLETE", "PRUNED", "FAIL"}
    trained = Counter(event["key"] for event in searchers.events("trained"))
    assert set(trained.values()) == {1}
    assert set(trained) == {trial.user_attrs["run_key"] for trial in done}


def test_four_processes_one_of_them_killed(tmp_path: Path, database: str, start: Start) -> None:
    searchers = start(search_file(tmp_path, database), [None, None, None, "training"])
    assert sorted(searchers.codes()) == [-signal.SIGKILL, 0, 0, 0]
    study = study_of(database)
    assert_each_once(searchers, study, 40)
    (killed,) = searchers.events("killed")
    (retry,) = (trial for trial in finished(study) if trial.user_attrs["run_key"] == killed["key"])
    assert retry.system_attrs["retry_history"][0] == killed["trial"]
    assert len({tuple(trial.params.items()) for trial in finished(study)}) == 40  # no two alike
    begun = [event for event in searchers.events("begin") if event["key"] == killed["key"]]
    assert [event["resumed"] for event in begun] == [None, killed["key"]]  # the same run goes on
    assert len({event["pid"] for event in searchers.events("trained")}) >= 3
    assert len(searchers.events("compare")) == 1
    assert searchers.stderr.count("another process compares") == 2


def test_a_setting_that_is_proposed_twice_at_once_is_trained_once(tmp_path: Path, database: str, start: Start) -> None:
    space = {"lambda": {"choices": [0.1, 0.2, 0.3]}}
    file = search_file(tmp_path, database, trials=8, space=space, grace_seconds=3)
    searchers = start(file, [None] * 4, seconds=1.2)  # 3.6 s a training, longer than the grace
    assert searchers.codes() == [0] * 4
    study = study_of(database)
    assert_each_once(searchers, study, 8)
    assert states(study)["FAIL"] == 0  # each gave signs of life
    values = {(trial.user_attrs["run_key"], trial.value) for trial in finished(study) if trial.state.name == "COMPLETE"}
    assert len(values) == len({key for key, _ in values})
    assert len(searchers.events("trained")) <= 3


@pytest.mark.parametrize("where", ["asked", "failed"])
def test_killed_where_only_the_study_knows_of_it(where: str, tmp_path: Path, database: str, start: Start) -> None:
    """Between asking for a trial and its first sign of life; between failing a dead one's trial and queueing it."""
    die = ["asked", None] if where == "asked" else ["training", "failed", None]
    searchers = start(search_file(tmp_path, database, trials=12), die, seconds=0.05)
    assert searchers.codes().count(-signal.SIGKILL) == len(searchers.events("killed")) == len(die) - 1
    assert_each_once(searchers, study_of(database), 12)


def test_taken_for_dead_a_process_keeps_its_run(tmp_path: Path, database: str, start: Start) -> None:
    """Stopped for longer than the grace: others get the trial, not the run, which is trained once, by whom began it."""
    searchers = start(search_file(tmp_path, database, trials=6), ["stopped", None], seconds=0.05)
    stopped = searchers.wait_for("stopped")
    study = study_of(database)
    _wait_until(lambda: states(study)["FAIL"] and len(finished(study)) == 5)
    time.sleep(1.5)  # the other looks at the run meanwhile
    assert len(searchers.events("trained")) == 5
    os.kill(stopped["pid"], signal.SIGCONT)
    assert searchers.codes() == [0, 0]
    assert_each_once(searchers, study, 6)
    assert "gave no sign of life for 2 s" in searchers.stderr
    (trained,) = (event for event in searchers.events("trained") if event["key"] == stopped["key"])
    assert trained["pid"] == stopped["pid"]


def test_who_is_asked_to_end_gives_its_trials_back(tmp_path: Path, database: str, start: Start) -> None:
    searchers = start(search_file(tmp_path, database, trials=6, grace_seconds=600), ["interrupted", None], seconds=0.1)
    assert sorted(searchers.codes()) == [0, 130]  # nobody has waited for the grace
    assert_each_once(searchers, study_of(database), 6)
    (key,) = {event["key"] for event in searchers.events("interrupted")}
    begun = [event["resumed"] for event in searchers.events("begin") if event["key"] == key]
    assert begun == [None, key]


def test_the_server_goes_away_and_comes_back(postgres: Postgres, tmp_path: Path, database: str, start: Start) -> None:
    searchers = start(search_file(tmp_path, database, trials=12), [None] * 3, seconds=0.1)
    searchers.wait_for("trained")
    postgres.kill()
    time.sleep(3)  # longer than the grace
    postgres.start()
    assert searchers.codes() == [0] * 3
    assert_each_once(searchers, study_of(database), 12)
    assert "waiting for it" in searchers.stderr
    assert postgres.password not in searchers.stderr


def test_a_trial_that_kills_its_processes_is_left_out(tmp_path: Path, database: str, start: Start) -> None:
    searchers = start(search_file(tmp_path, database, jobs=1, trials=3), ["poison"] * 3)  # of which one retry is made
    assert sorted(searchers.codes()) == [-signal.SIGKILL] * 2 + [0]
    assert searchers.stderr.count("its process died 2 times; it is left out") == 1
    assert len(finished(study_of(database))) == 3
    (poison,) = {event["key"] for event in searchers.events("killed")}
    assert [(event["key"], event["status"]) for event in searchers.events("ended")] == [(poison, "FAILED")]


def test_failed_trainings_are_not_tried_again(tmp_path: Path, database: str, start: Start) -> None:
    space = {"gamma": {"choices": [1.5, 1.0, 2.0, 1.25]}}
    searchers = start(search_file(tmp_path, database, trials=6, space=space, settings={"aux_focal": True}), [None] * 3)
    assert searchers.codes() == [0] * 3
    study = study_of(database)
    assert_each_once(searchers, study, 6)
    failed = study.get_trials(states=(TrialState.FAIL,))
    assert {trial.user_attrs["failed"] for trial in failed} == {"loss_ctr is nan at step 3"}
    assert not any("retry_history" in trial.system_attrs for trial in study.trials)


# ---------------------------------------------------------------- what is refused, and what is not told


def refused(call: Call, file: Path, *arguments: str) -> str:
    result = call("sweep", "--config", str(file), *arguments)
    assert result.returncode == 2
    line: str = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in result.stderr
    for text in (result.stderr, *(path.read_text(errors="replace") for path in file.parent.rglob("*.log"))):
        assert "hunter" not in text
    return line


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("mysql://user:hunter2@127.0.0.1/base", "search.storage: found mysql://..., allowed: null, or postgresql://"),
        ("sqlite:///search.db", "search.storage: found sqlite://..., allowed: null, or postgresql://"),
        ("user:hunter2@127.0.0.1/base", "search.storage: found something else, allowed"),
        ("postgresql://user:hunter2@127.0.0.1:x/base", "search.storage: found a URL that cannot be read, allowed"),
        ("postgresql://user:a@hunter2@127.0.0.1/base", "search.storage: found a URL that cannot be read, allowed"),
        ("postgresql://user:hunter%2F2@127.0.0.1:1/base", "search.storage postgresql://127.0.0.1:1/base: "),
        ("postgresql+psycopg://user:hunter%2F2@127.0.0.1:1/base?sslmode=disable", "search.storage postgresql://127."),
        ("postgresql://127.0.0.1:1/base?user=u&password=hunter2", "search.storage postgresql://127.0.0.1:1/base: "),
    ],
)
def test_a_url_that_is_none_or_where_nobody_answers(url: str, told: str, workplace: Path, call_pipeline: Call) -> None:
    assert told in refused(call_pipeline, search_file(workplace, url))


def test_a_server_that_does_not_let_us_in(workplace: Path, database: str, call_pipeline: Call) -> None:
    wrong = re.sub(r"//postgres:[^@]*@", "//postgres:hunter%2F2@", database)
    assert "password authentication failed" in refused(call_pipeline, search_file(workplace, wrong))
    nowhere = re.sub(r"/\w+$", "/nowhere", database)
    assert 'database "nowhere" does not exist' in refused(call_pipeline, search_file(workplace, nowhere))


def test_a_database_that_is_mlflows(workplace: Path, database: str, call_pipeline: Call) -> None:
    import psycopg

    with psycopg.connect(database) as connection:
        connection.execute("create table alembic_version (version_num text)")
    assert "another program's tables" in refused(call_pipeline, search_file(workplace, database))


def test_without_psycopg(workplace: Path, call_pipeline: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    line = refused(call_pipeline, search_file(workplace, "postgresql://user:hunter2@127.0.0.1:1/base"))
    assert "psycopg is not installed; pip install -e '.[server]'" in line


def test_a_password_on_the_command_line(workplace: Path, call_pipeline: Call) -> None:
    file = search_file(workplace, None)
    typed = json.dumps({"space": SPACE, "storage": "postgresql://user:hunter2@127.0.0.1:1/base"})
    assert "search.storage: found a password on the command line" in refused(call_pipeline, file, "--search", typed)


@pytest.mark.parametrize(("url", "held"), [(None, fcntl.LOCK_SH), (None, fcntl.LOCK_EX)])
def test_on_a_file_one_process_is_alone(url: str | None, held: int, workplace: Path, call_pipeline: Call) -> None:
    """Whether the other one is made for company or not."""
    file = search_file(workplace, url)
    sweep = yaml.safe_load(file.read_text())
    plan = plan_of(workplace, **sweep, arms=...)
    lock = workplace / "outputs/sweeps" / f"{plan.identity()}.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("ab") as other:
        fcntl.flock(other, held)
        line = refused(call_pipeline, file)
    assert line == (f"error: this sweep is already running (it holds {lock}); allowed: one process, or several that "
                    "all have search.storage: postgresql://...")  # fmt: skip


def test_where_the_study_lies_is_no_other_sweep(tmp_path: Path) -> None:
    def identity(**search: Any) -> str:
        return plan_of(tmp_path, arms=..., search={"space": SPACE} | search).identity("d")

    assert identity() == identity(storage="postgresql://a:b@c/d", grace_seconds=7)
    assert identity() != identity(trials=21)


def test_the_url_is_in_no_text_of_the_config(tmp_path: Path) -> None:
    sweep = plan_of(tmp_path, arms=..., search={"space": SPACE, "storage": "postgresql://u:hunter2@h/d"}).sweep
    for text in (str(sweep), repr(sweep), str(sweep.model_dump()), sweep.model_dump_json()):
        assert "hunter" not in text


# ---------------------------------------------------------------- the real thing


@pytest.fixture
def reached(database: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> str:
    """The database by a URL without a password, which the environment has."""
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    return f"postgresql://postgres@{database.partition('@')[2]}"


def test_a_sweep_whose_study_is_on_postgresql(
    reached: str, client: Any, impressions: Path, call_pipeline: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"trials": 2, "space": SPACE, "settings": {"aux_focal": True}, "storage": reached, "grace_seconds": 6}
    file = sweep_file(Path.cwd(), impressions, arms=None, search=search, seeds=[0])
    dead, launcher = (client.create_run("0", run_name="legendary-gnat-695").info.run_id for _ in range(2))
    result = call_pipeline("sweep", "--config", str(file))
    assert result.returncode == 0, result.stderr
    sweep_id = sweep_id_of(result.stderr)
    assert {run.data.tags["trial"] for run in by_arm(client, sweep_id, ("trial",)).values()} == {"0", "1"}
    assert len(by_arm(client, sweep_id)) == 2  # the baseline and the best
    (summary,) = (run for run in client.search_runs(["0"]) if run.data.tags.get("role") == "summary")
    for name, value in (("role", "launcher"), ("sweep_plan", summary.data.tags["sweep_plan"])):
        client.set_tag(dead, name, value)  # of a start that was killed
    monkeypatch.setenv("MLFLOW_RUN_ID", launcher)
    again = call_pipeline("sweep", "--config", str(file))
    assert again.returncode == 0, again.stderr
    assert table_of(again.stderr) == table_of(result.stderr)
    assert again.stderr.count("finished before") == 2
    assert {run.info.run_id: run.info.status for run in client.search_runs(["0"])}[dead] == "KILLED"
    assert len(client.search_runs(["0"])) == 2 + 2 + 1 + 2


@pytest.mark.skipif(os.environ.get("FAULTS") != "full", reason="takes minutes; FAULTS=full runs it")
def test_the_whole_sweep_by_four_processes(reached: str, workplace: Path, client: Any, impressions: Path) -> None:
    """`python -m pipeline sweep` four times, one killed with all that it started while it trains."""
    space = {"lambda": {"low": 0.01, "high": 10.0, "log": True}}
    search = {"trials": 40, "space": space, "grace_seconds": 10, "settings": {"aux_focal": True}, "storage": reached}
    settings = {"training.max_steps": 60}
    file = sweep_file(workplace, impressions, arms=None, search=search, settings=settings)
    command = [sys.executable, "-m", "pipeline", "sweep", "--config", str(file)]
    started = []
    for number in range(4):
        with (workplace / f"{number}.txt").open("w") as log:
            started.append(subprocess.Popen(command, cwd=workplace, stderr=log, start_new_session=True))
    try:
        _wait_until(lambda: _trains(started[-1]), 240)
        os.killpg(started[-1].pid, signal.SIGKILL)
        codes = [process.wait(900) for process in started]
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    texts = [(workplace / f"{number}.txt").read_text() for number in range(4)]
    assert codes == [0, 0, 0, -signal.SIGKILL], texts
    study = study_of(reached.replace("postgres@", f"postgres:{quote(os.environ['PGPASSWORD'], safe='')}@"))
    done = finished(study)
    assert len(done) == 40
    assert states(study)["FAIL"] == 1
    assert set(states(study)) <= {"COMPLETE", "PRUNED", "FAIL"}
    (cut,) = study.get_trials(states=(TrialState.FAIL,))
    (retry,) = (trial for trial in done if trial.user_attrs["run_key"] == cut.user_attrs["run_key"])
    assert retry.system_attrs["retry_history"] == [cut.number]

    runs = client.search_runs(["0"])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert max(Counter(run.data.tags.get("run_key", run.info.run_id) for run in runs).values()) == 1
    trained = {run.data.tags["run_key"]: run for run in by_arm(client, sweep_id_of(texts[0]), ("trial",)).values()}
    assert set(trained) == {trial.user_attrs["run_key"] for trial in done}
    for trial in done:
        run_id = trained[trial.user_attrs["run_key"]].info.run_id
        steps = [point.step for point in client.get_metric_history(run_id, "loss_total")]
        assert len(steps) == len(set(steps))
        assert len(steps) == 60 or trial.state == TrialState.PRUNED
    assert {seed for _, seed in by_arm(client, sweep_id_of(texts[0]))} == {0, 1}
    assert sum("\nreport: " in text for text in texts) == 1
    assert sum("another process compares" in text for text in texts) == 2
    for text in (*texts, *(path.read_text(errors="replace") for path in (workplace / "outputs").rglob("*.*"))):
        assert os.environ["PGPASSWORD"] not in text


def _trains(process: "subprocess.Popen[bytes]") -> bool:
    """The process trains a trial."""
    assert process.poll() is None
    logs = Path("outputs/sweeps").glob(f"*/*-{process.pid}/*.log")
    return any(" steps on " in log.read_text() for log in logs)
