"""docs/kubernetes: what MLflow makes of it without a cluster, and what a pod would start, started here."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml
from conftest import ROOT, SHRUNK, only_full

RECIPE = ROOT / "docs/kubernetes"
PAGE = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
IMAGE = "registry.example.com/team/focal-pipeline:0123abc"
DIGEST = f"sha256:{'5' * 64}"
WORKDIR = "/mlflow/projects/code"
OLDEST, NEWEST = "1.31", "1.37"  # podFailurePolicy is stable from 1.31 on

SECRET = re.compile("password|token|secret|credential|key", re.IGNORECASE)

pytestmark = pytest.mark.xdist_group("kubernetes")
Job = dict[str, Any]


def load_recipe(name: str) -> Job:
    return dict(yaml.safe_load((RECIPE / name).read_text(encoding="utf-8")))


def pod_of(job: Job) -> tuple[Job, Job]:
    """The pod's spec, and that of its only container."""
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


@pytest.fixture
def derived(tmp_path: Path) -> Path:
    """The folder that docs/kubernetes.md has a user make."""
    folder = tmp_path / "derived"
    command = [sys.executable, str(RECIPE / "project.py"), IMAGE, str(folder)]
    subprocess.run(command, cwd=tmp_path, check=True)
    return folder


# ---------------------------------------------------------------- the project


def test_the_derived_project_differs_in_its_environment_and_starts_of_commands_alone(
    derived: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = derived.iterdir()
    ours, theirs = (yaml.safe_load((folder / "MLproject").read_text()) for folder in (ROOT, derived))
    assert (file.name, ours.pop("conda_env"), theirs.pop("docker_env")) == ("MLproject", "conda.yaml", {"image": IMAGE})
    for name, entry in ours["entry_points"].items():
        assert theirs["entry_points"][name].pop("command") == f"exec {entry.pop('command')}"
    assert theirs == ours
    monkeypatch.syspath_prepend(str(RECIPE))
    from project import in_image

    with pytest.raises(ValueError, match="found 2 lines"):
        in_image("conda_env: conda.yaml\n" * 2, IMAGE)


# ---------------------------------------------------------------- the job


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What MLflow's own backend sends to the cluster. Jobs complete at once; Docker has the image and its digest."""
    kubernetes = pytest.importorskip("kubernetes", reason="needs `pip install mlflow[kubernetes]`")
    import docker

    sent: list[Job] = []
    machine = MagicMock()
    machine.images.get.side_effect = lambda name: SimpleNamespace(tags=[name], id=DIGEST)
    machine.images.get_registry_data.return_value.id = DIGEST
    complete = MagicMock(status="True", type="Complete")
    cluster = MagicMock()
    cluster.create_namespaced_job.side_effect = lambda body, **_: sent.append(json.loads(json.dumps(body)))
    cluster.read_namespaced_job_status.return_value.status.conditions = [complete]
    monkeypatch.setattr(docker, "from_env", lambda **_: machine)
    monkeypatch.setattr("mlflow.projects.docker.validate_docker_installation", lambda: None)
    monkeypatch.setattr(kubernetes.config, "load_kube_config", lambda **_: None)
    monkeypatch.setattr(kubernetes.client, "BatchV1Api", lambda: cluster)
    monkeypatch.chdir(ROOT)  # where the page's commands are typed
    return sent


def test_the_command_of_the_page(derived: Path, client: Any, jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes a job that Kubernetes takes, in a run that MLflow has opened and ends."""
    from click.testing import CliRunner
    from mlflow.cli import cli

    monkeypatch.setenv("KUBE_MLFLOW_TRACKING_URI", "http://mlflow.training:5000")
    (typed,) = re.findall("^mlflow (run .*)$", PAGE, re.MULTILINE)
    words = shlex.split(typed.replace("outputs/kubernetes", str(derived)))
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    ((job,), (run,)) = jobs, client.search_runs(["0"])
    _, container = pod_of(job)
    assert container["image"] == f"{IMAGE}@{DIGEST}"
    assert container["command"] == ["exec", "python", "-m", "pipeline", "train_mmoe", "--config",
                                    "configs/mtl_mmoe.yaml", "--lambda", "0.1", "--resume", "auto"]  # fmt: skip
    given = {item["name"]: item["value"] for item in container["env"] if item["name"].startswith("MLFLOW_")}
    assert given == {"MLFLOW_RUN_ID": run.info.run_id, "MLFLOW_EXPERIMENT_ID": "0",
                     "MLFLOW_TRACKING_URI": "http://mlflow.training:5000"}  # fmt: skip
    assert (run.data.tags["mlflow.docker.image.id"], run.info.status) == (DIGEST, "FINISHED")
    assert_kubernetes_takes(job)


def assert_kubernetes_takes(job: Job) -> None:
    """What the API server checks: the schema, and rules that no schema tells."""
    validation = pytest.importorskip("kubernetes_validate", reason="needs `pip install kubernetes-validate`")
    for version in (OLDEST, NEWEST):
        assert validation.validate(job, version, strict=True) == version
    label = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
    pod, container = pod_of(job)
    volumes = [volume["name"] for volume in pod["volumes"]]
    names = [job["metadata"]["name"], job["metadata"]["namespace"], container["name"], *volumes]
    assert not [name for name in names if not label.fullmatch(name)]
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    for once in (
        [mount["mountPath"] for mount in container["volumeMounts"]],
        [one["name"] for one in container["env"]],
    ):
        assert len(set(once)) == len(once)
    assert pod["restartPolicy"] == "Never"  # the only one that podFailurePolicy goes with


def test_the_page_names_what_is_there() -> None:
    assert {file.name for file in RECIPE.iterdir() if file.is_file() and "ignore" not in file.name} == set(
        re.findall(r"\]\(kubernetes/([\w.]+)\)", PAGE)
    )
    assert not [name for name in re.findall(r"docs/kubernetes/[\w.]+", PAGE) if not (ROOT / name).is_file()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (version,) = re.findall(r"mlflow\[kubernetes\]==([\d.]+)", PAGE)
    assert f"mlflow=={version}" in project["dependencies"]
    (extras,) = re.findall(r"EXTRAS=([\w,]+)", PAGE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert OLDEST in PAGE


def test_what_is_written_lies_on_a_volume() -> None:
    """The pod's own files are read-only; the volume is the one that volume.yaml makes."""
    from pipeline.comparison.compare_config import CompareConfig
    from pipeline.tasks.mmoe.config import MmoeConfig, PrepareCtrConfig
    from pipeline.tasks.visobert.config import DataPrepConfig, VisobertConfig

    validation = pytest.importorskip("kubernetes_validate", reason="needs `pip install kubernetes-validate`")
    volume, job = load_recipe("volume.yaml"), load_recipe("job.yaml")
    for version in (OLDEST, NEWEST):
        assert validation.validate(volume, version, strict=True) == version
    pod, container = pod_of(job)
    claims = [one["persistentVolumeClaim"]["claimName"] for one in pod["volumes"] if "persistentVolumeClaim" in one]
    assert claims == [volume["metadata"]["name"]]
    assert volume["metadata"]["namespace"] == job["metadata"]["namespace"]
    folders = [
        model.model_fields[field].default
        for model in (MmoeConfig, VisobertConfig, DataPrepConfig, PrepareCtrConfig, CompareConfig)
        for field in ("output_dir", "runs_dir")
        if isinstance(getattr(model.model_fields.get(field), "default", None), str)
    ]
    assert len(folders) >= 5
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {f"{WORKDIR}/{folder.split('/')[0]}" for folder in [*folders, "data_cache"]} <= {
        path for path, name in mounted.items() if name == "files"
    }
    assert {"/tmp", "/dev/shm"} <= set(mounted)  # noqa: S108
    assert container["securityContext"]["readOnlyRootFilesystem"]


# ---------------------------------------------------------------- the image


def instructions() -> list[tuple[str, str]]:
    """(word, the rest) of every instruction of the Dockerfile."""
    lines = (RECIPE / "Dockerfile").read_text(encoding="utf-8").splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines if line and not line.startswith("#")]


def copies() -> list[tuple[list[str], str]]:
    """(sources, target) of every COPY."""
    words = [[word for word in shlex.split(rest) if not word.startswith("--")] for name, rest in instructions()
             if name == "COPY"]  # fmt: skip
    return [(parts[:-1], parts[-1]) for parts in words]


def test_the_image_has_the_pins_of_pyproject_and_no_others() -> None:
    (install,) = [rest for name, rest in instructions() if name == "RUN" and "pip" in rest]
    for extras, asked in (("", "."), ("server,ray", ".[server,ray]")):
        shown = subprocess.run(["sh", "-c", install.replace("pip", "echo", 1)], env={"EXTRAS": extras},
                               capture_output=True, text=True, check=True).stdout  # fmt: skip
        assert shown == f"install --no-cache-dir --editable {asked}\n"
    assert not [rest for _, rest in instructions() if "==" in rest]
    assert ("FROM", "python:3.11-slim") in instructions()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    copied = {source for sources, _ in copies() for source in sources}
    assert {"pyproject.toml", project["readme"], "pipeline/__init__.py"} <= copied  # what the install reads
    assert not copied & {".", "mlruns", "outputs", ".git"}
    assert not [rest for name, rest in instructions() if name in ("ENV", "ARG") and SECRET.search(rest)]


def test_image_and_job_agree() -> None:
    from mlflow.projects.utils import MLFLOW_DOCKER_WORKDIR_PATH

    image = dict(instructions())
    pod, container = pod_of(load_recipe("job.yaml"))
    user = pod["securityContext"]["runAsUser"]
    assert image["USER"] == f"{user}:{pod['securityContext']['runAsGroup']}"
    assert any(name == "RUN" and f"useradd --uid {user} " in rest for name, rest in instructions())
    assert user > 0
    assert pod["securityContext"]["runAsNonRoot"]
    assert image["WORKDIR"] == WORKDIR == MLFLOW_DOCKER_WORKDIR_PATH.rstrip("/")
    assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["mlflow-credentials"]
    assert not [item for item in container["env"] if SECRET.search(item["name"])]


# ---------------------------------------------------------------- the pod


@pytest.mark.parametrize("text", ["", " ", "it's", '"$HOME" `id`', "a\nb\\n", "*; exit 1 #", "~ %s & pin trâu"])
def test_the_image_undoes_the_quotes_that_mlflow_puts_around_words(text: str) -> None:
    """MLflow sends every word quoted for a shell, and Kubernetes has none."""
    words = ["printf", "%s", shlex.quote(text)]  # as MLflow's _get_run_command
    shown = subprocess.run([str(RECIPE / "exec"), *words], capture_output=True, check=True)
    assert shown.stdout.decode() == text


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The root folder of the image: what the Dockerfile's COPY lines make, and nothing else."""
    root = tmp_path / "image"
    for sources, target in copies():
        place = root / WORKDIR.lstrip("/") / target if target[0] != "/" else root / target.lstrip("/")
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, dirs_exist_ok=True)  # with what numba has compiled, if it has
            else:
                into = place / Path(source).name if target.endswith("/") else place
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, into)
    return root


@pytest.mark.faults
@only_full
def test_an_evicted_pod_saves_and_is_followed_by_another(
    derived: Path, image: Path, impressions: Path, client: Any, jobs: list[Job]
) -> None:
    """In the image's files, with the job's words and environment alone, without a shell."""
    import mlflow.projects

    settings = SHRUNK | {"data.path": str(impressions), "training.max_steps": "100000", "run_name": "it's a run",
                         "training.num_train_epochs": "100000", "evaluation.every_steps": "100000",
                         "tracking.log_report": "false"}  # fmt: skip
    mlflow.projects.run(str(derived), "train_mmoe", parameters=settings, experiment_id="0", backend="kubernetes",
                        backend_config="docs/kubernetes/backend.json", synchronous=False)  # fmt: skip
    (job,), (opened,) = jobs, client.search_runs(["0"])
    _, container = pod_of(job)
    limit = {"limits.cpu": container["resources"]["limits"]["cpu"]}
    environment = {one["name"]: one.get("value") or limit[one["valueFrom"]["resourceFieldRef"]["resource"]]
                   for one in container["env"]}  # fmt: skip
    environment["PATH"] = os.pathsep.join([str(image / "usr/local/bin"), str(Path(sys.executable).parent), os.defpath])
    folder = image / WORKDIR.lstrip("/")
    with (image / "stderr").open("w") as log:
        process = subprocess.Popen(container["command"], cwd=folder, env=environment, stdout=subprocess.PIPE,
                                   stderr=log, start_new_session=True)  # fmt: skip
    try:
        assert process.stdout
        process.stdout.readline()  # of a step
        process.send_signal(signal.SIGTERM)  # to the container's first process alone
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, (image / "stderr").read_text()
    rules = job["spec"]["podFailurePolicy"]["rules"]
    failing = [code for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]]
    assert process.returncode not in failing  # the next pod starts, in the same run: see test_tracking
    run = client.get_run(opened.info.run_id)
    assert (run.info.status, run.info.run_name) == ("KILLED", "it's a run")
    assert list((folder / "outputs" / run.info.run_id / "checkpoints").iterdir())
