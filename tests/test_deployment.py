"""docs/deployment.md: its commands make a server, and what they made holds what is trained.

`FAULTS=full` starts a server on what was restored, too.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import FULL, ROOT, SHRUNK, Call
from server import Postgres, free_port, need_postgres

PAGE = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
SET_UP = ("2. Settings", "3. Database")
SERVE = ("4. Start", "5. Accounts", "Training against it")
SECRETS = ("DB_PASSWORD", "ADMIN_PASSWORD", "TRAINER_PASSWORD")
Variables = dict[str, str]

pytestmark = pytest.mark.xdist_group("deployment")


def blocks(kind: str) -> dict[str, str]:
    """The page's fenced blocks of a kind, under the headings they stand below."""
    found = dict[str, str]()
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE):
        heading = section.partition("\n")[0]
        for block in re.findall(rf"^```{kind}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE):
            found[heading] = found.get(heading, "") + block
    return found


def commands(*headings: str) -> str:
    """What the page says below these headings."""
    return "".join(blocks("bash")[heading] for heading in headings)


@contextmanager
def shell(script: str, folder: Path, **settings: str) -> Iterator[Variables]:
    """Run commands as a shell does; the variables that they left. What they started in the background ends with it."""
    folder.mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PG"))}
    clean |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "MLFLOW_WORKERS": "1"}
    clean |= {"SERVER": str(folder / "server"), "HOME": str(folder)} | settings
    variables, said = folder / "variables", folder / "said"
    with said.open("ab") as output:
        process = subprocess.Popen(
            ["bash", "-c", f"set -euo pipefail\n{script}\nset -a\nDB_PASSWORD=${{DB_PASSWORD:-}}\n"
                           f"ADMIN_PASSWORD=${{ADMIN_PASSWORD:-}}\nenv -0 > '{variables}'"],
            cwd=folder, env=clean, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        code = process.wait(900)
        logs = [file for file in (said, folder / "server" / "server.log") if file.exists()]
        assert code == 0, "\n".join(file.read_text()[-3000:] for file in logs)
        yield dict(line.split("=", 1) for line in variables.read_text().split("\0") if line)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deployment")


@pytest.fixture(scope="module")
def served(place: Path) -> Iterator[Variables]:
    """A server that the page's commands made, and the variables they left in the shell."""
    need_postgres()
    with Postgres() as postgres, shell(commands(*SET_UP, *SERVE), place / "first", **reach(postgres)) as variables:
        yield variables


def reach(postgres: Postgres) -> Variables:
    """The page's settings for this PostgreSQL; its superuser comes in by the socket."""
    superuser = f"env PGHOST={postgres.folder} PGUSER=postgres"
    return {"DB_PORT": str(postgres.port), "AS_POSTGRES": superuser, "PORT": str(free_port())}


def clients(variables: Variables) -> Variables:
    return {name: value for name, value in variables.items() if name.startswith("MLFLOW_TRACKING_")}


Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def train(impressions: Path, call_pipeline: Call, monkeypatch: pytest.MonkeyPatch) -> Train:
    """`train(folder, NAME=value, ...)`: `train_mmoe`, shrunk, in a folder of its own and with this environment."""

    def call(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        folder.mkdir(parents=True)
        settings = SHRUNK | {"data.path": str(impressions), "output_dir": str(folder / "outputs"),
                             "tracking.log_report": "false"}  # fmt: skip
        arguments = [part for key, value in settings.items() for part in (f"--{key}", value)]
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            for name, value in environment.items():
                patch.setenv(name, value)
            return call_pipeline("train_mmoe", "--config", str(ROOT / "configs/mtl_mmoe.yaml"), *arguments)

    return call


def files(folder: Path) -> Iterator[tuple[Path, bytes]]:
    return ((file, file.read_bytes()) for file in folder.rglob("*") if file.is_file())


@contextmanager
def client(variables: Variables, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """MLflow's own client, as the account of these variables."""
    import mlflow

    with monkeypatch.context() as patch:
        for name, value in clients(variables).items():
            patch.setenv(name, value)
        mlflow.set_tracking_uri(variables["MLFLOW_TRACKING_URI"])
        try:
            yield mlflow.MlflowClient()
        finally:
            mlflow.set_tracking_uri(None)


@pytest.fixture
def trained(served: Variables, place: Path, train: Train) -> str:
    """What a training printed: the first test that asks for it trains."""
    output = place / "output"
    if not output.exists():
        done = train(place / "trained", **clients(served))
        assert done.returncode == 0, done.stderr
        output.write_text(done.stdout + done.stderr)
    return output.read_text()


def only_run(found: Any) -> Any:
    runs = found.search_runs(["0"])
    assert len(runs) == 1
    return runs[0]


def test_the_page_has_the_commands_that_are_run_here() -> None:
    assert list(blocks("bash")) == [*SET_UP, *SERVE, "Backup"]
    assert list(blocks("bash restore")) == ["Backup"]
    assert blocks("bash")["Backup"].startswith("umask 077\n")  # before the first file of it is there


def test_a_training_arrives_with_its_artifacts(
    served: Variables, trained: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client(served, monkeypatch) as found:
        run = only_run(found)
        assert run.info.status == "FINISHED"
        assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
        assert {"config.yaml", "history.parquet"} <= {file.path for file in found.list_artifacts(run.info.run_id)}
        steps = [point.step for point in found.get_metric_history(run.info.run_id, "loss_total")]
        assert steps == list(range(12))
    kept = place / "first" / "server" / "artifacts" / "0" / run.info.run_id / "artifacts" / "config.yaml"
    assert "lambda" in kept.read_text()


def test_no_password_is_left_anywhere(
    served: Variables, trained: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passwords = [served[name] for name in SECRETS]
    assert len(set(passwords)) == 3
    assert all(len(password) >= 24 for password in passwords)
    with client(served, monkeypatch) as found:
        output = str(only_run(found).to_dictionary()) + trained
    assert not [password for password in passwords if password in output]
    looked = list(files(place / "trained"))
    assert [file for file, _ in looked if file.name == "journal.jsonl"]
    assert not [file for file, content in looked for password in passwords if password.encode() in content]


def test_the_secrets_are_for_the_server_alone(served: Variables, place: Path) -> None:
    server = place / "first" / "server"
    secret = [file for file, content in files(server) if any(served[name].encode() in content for name in SECRETS[:2])]
    assert {file.name for file in secret} == {"pgpass", "admin_password"}
    assert {file.name: file.stat().st_mode & 0o777 for file in [*secret, server / "server.env"]} == {
        "pgpass": 0o600, "admin_password": 0o600, "server.env": 0o600}  # fmt: skip


def test_a_wrong_password_is_told_in_one_line(served: Variables, place: Path, train: Train) -> None:
    refused = train(place / "refused", **clients(served) | {"MLFLOW_TRACKING_PASSWORD": "n0t-the-one"})
    assert refused.returncode == 2
    errors = refused.stderr.strip().splitlines()
    assert len(errors) == 1, refused.stderr
    assert f"http://127.0.0.1:{served['PORT']}" in errors[0]
    assert "n0t-the-one" not in refused.stdout + refused.stderr
    assert not [file for file, content in files(place / "refused") if b"n0t-the-one" in content]


def test_a_wrong_password_in_the_uri_is_told_in_one_line(
    served: Variables, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the writer process opens a run, which is called here; what it refuses becomes the trainer's one line."""
    from pipeline.tracking.messages import RunRequest
    from pipeline.tracking.run_opening import Opening
    from pipeline.tracking.store import CLIENT_SETTINGS
    from pipeline.tracking.store_errors import refusal

    address = served["MLFLOW_TRACKING_URI"].replace("//", "//trainer:n0t-the-one@")
    for name, value in CLIENT_SETTINGS.items():
        monkeypatch.setenv(name, value)
    with client({"MLFLOW_TRACKING_URI": address}, monkeypatch):
        with pytest.raises(Exception, match="401") as caught:
            Opening(RunRequest("refused"), place / "outputs", {}).open()
        output = refusal(caught.value)
    assert f"http://127.0.0.1:{served['PORT']}" in output
    assert "\n" not in output
    assert "n0t-the-one" not in output + "".join(capfd.readouterr())


def test_the_credentials_file_is_enough(served: Variables, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = re.findall(r"^```ini\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    example = next(text for text in examples if "mlflow_tracking_password" in text)
    (place / "home" / ".mlflow").mkdir(parents=True)
    (place / "home" / ".mlflow" / "credentials").write_text(example.replace("...", served["TRAINER_PASSWORD"]))
    monkeypatch.setenv("HOME", str(place / "home"))
    with client({"MLFLOW_TRACKING_URI": served["MLFLOW_TRACKING_URI"]}, monkeypatch) as found:
        assert found.get_experiment("0").name == "Default"


def test_an_account_cannot_delete_what_others_made(served: Variables, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException

    with client(served, monkeypatch) as found, pytest.raises(MlflowException, match="403"):
        found.delete_experiment("0")


def dumped(name: str, variables: Variables) -> set[str]:
    """Every row of a database, and the statements that bring them in."""
    server = ["--host", variables["DB_HOST"], "--port", variables["DB_PORT"], "--username", "mlflow"]
    command = ["pg_dump", "--data-only", *server, name]
    environment = os.environ | {"PGPASSFILE": str(Path(variables["SERVER"]) / "pgpass")}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return {line for line in shown.splitlines() if not line.startswith(("\\restrict", "\\unrestrict"))}  # a new word


@pytest.mark.faults
def test_a_backup_brings_runs_accounts_and_artifacts_back(
    served: Variables, trained: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("DB_HOST", "DB_PORT", "SERVER")
    backup = str(place / "backup")
    with shell(commands("Backup"), place / "saving", BACKUP=backup, **{name: served[name] for name in names}):
        pass
    assert {file.stat().st_mode & 0o077 for file in (place / "backup").iterdir()} == {0}
    with client(served, monkeypatch) as found:
        before = only_run(found)
    script = commands(*SET_UP) + blocks("bash restore")["Backup"] + (commands("4. Start") if FULL else "")
    with Postgres() as postgres, shell(script, place / "second", BACKUP=backup, **reach(postgres)) as variables:
        for name, holds in {"mlflow": before.info.run_id, "mlflow_auth": "\ttrainer\t"}.items():
            rows = dumped(name, variables)
            assert rows == dumped(name, served)
            assert [row for row in rows if holds in row]
        kept = Path(variables["SERVER"]) / "artifacts" / "0" / before.info.run_id / "artifacts" / "config.yaml"
        assert "lambda" in kept.read_text()
        if not FULL:
            return
        account = {name: served[name] for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")}
        address = f"http://127.0.0.1:{variables['PORT']}"
        assert address != served["MLFLOW_TRACKING_URI"]
        with client(account | {"MLFLOW_TRACKING_URI": address}, monkeypatch) as found:
            after = only_run(found)
            assert after.to_dictionary() == before.to_dictionary()
            kept = Path(found.download_artifacts(after.info.run_id, "config.yaml", str(place)))
            assert "lambda" in kept.read_text()
