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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import ROOT, SHRUNK
from hypothesis import given, strategies
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from pipeline.__main__ import ENTRIES

RECIPE = ROOT / "docs/kubernetes"
PAGE = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
IMAGE = "registry.example.com/team/focal-pipeline:0123abc"
DIGEST = f"sha256:{'5' * 64}"
WORKDIR = "/mlflow/projects/code"
OLDEST, NEWEST = "1.31", "1.37"  # podFailurePolicy is stable from 1.31 on
FIRST, LAST = 40, 600  # steps: when the pod is evicted, and all

pytestmark = pytest.mark.xdist_group("kubernetes")
Job = dict[str, Any]


def load_recipe(name: str) -> Job:
    return dict(yaml.safe_load((RECIPE / name).read_text(encoding="utf-8")))


@pytest.fixture
def derived(tmp_path: Path) -> Path:
    """The folder that docs/kubernetes.md has a user make."""
    folder = tmp_path / "derived"
    command = [sys.executable, str(RECIPE / "project.py"), IMAGE, str(folder)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    return folder


# ---------------------------------------------------------------- the project


def test_the_derived_project_differs_in_its_environment_alone(derived: Path) -> None:
    from mlflow.projects import env_type
    from mlflow.projects.utils import load_project

    ours, theirs = load_project(ROOT), load_project(derived)
    assert [file.name for file in derived.iterdir()] == ["MLproject"]
    assert (ours.env_type, theirs.env_type) == (env_type.CONDA, env_type.DOCKER)
    assert theirs.docker_env == {"image": IMAGE}
    assert theirs.name == ours.name == "focal-pipeline"
    assert list(theirs._entry_points) == list(ours._entry_points)
    assert set(theirs._entry_points) == set(ENTRIES)
    for name in ENTRIES:
        one, other = ours.get_entry_point(name), theirs.get_entry_point(name)
        assert one.command == other.command
        assert [vars(parameter) for parameter in one.parameters.values()] == [
            vars(parameter) for parameter in other.parameters.values()
        ]


@pytest.mark.parametrize("text", ["name: focal-pipeline\n", "conda_env: conda.yaml\nconda_env: conda.yaml\n"])
def test_another_mlproject_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPE))
    from project import in_image

    with pytest.raises(ValueError, match=f"found {text.count('conda_env')} lines"):
        in_image(text, IMAGE)


# ---------------------------------------------------------------- the job


class Docker:
    """What MLflow asks of Docker: the image is here, is pushed, and the registry tells its digest."""

    def __init__(self) -> None:
        self.pushed: list[str] = []
        self.images = SimpleNamespace(
            list=lambda name: [name],
            get=lambda name: SimpleNamespace(tags=[name], id="sha256:of-this-machine"),
            push=self.push,
            get_registry_data=lambda _: SimpleNamespace(id=DIGEST),
        )

    def push(self, repository: str, **_: Any) -> Iterator[dict[str, str]]:
        self.pushed.append(repository)
        yield {"status": "Pushed"}


@dataclass
class Cluster:
    """What came to Docker and to the cluster: nothing of either is here."""

    machine: Docker
    jobs: list[Job]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """MLflow's own backend, with the calls that leave this machine taken here; jobs complete at once."""
    kubernetes = pytest.importorskip("kubernetes", reason="needs `pip install mlflow[kubernetes]`")
    import docker

    found = Cluster(Docker(), [])

    def create(_: Any, namespace: str, body: Job, **__: Any) -> None:
        assert namespace == body["metadata"]["namespace"]
        found.jobs.append(json.loads(json.dumps(body)))

    def status(_: Any, name: str, namespace: str, **__: Any) -> SimpleNamespace:
        assert [name, namespace] == [found.jobs[-1]["metadata"][key] for key in ("name", "namespace")]
        complete = SimpleNamespace(status="True", type="Complete", message="done")
        return SimpleNamespace(status=SimpleNamespace(start_time="now", conditions=[complete]))

    monkeypatch.setattr(docker, "from_env", lambda **_: found.machine)
    monkeypatch.setattr("mlflow.projects.docker.validate_docker_installation", lambda: None)
    monkeypatch.setattr(kubernetes.config, "load_kube_config", lambda **_: None)
    monkeypatch.setattr(kubernetes.client.BatchV1Api, "create_namespaced_job", create)
    monkeypatch.setattr(kubernetes.client.BatchV1Api, "read_namespaced_job_status", status)
    monkeypatch.chdir(ROOT)  # where the page's commands are typed
    return found


Submit = Callable[..., Job]


@pytest.fixture
def submit(derived: Path, client: Any, cluster: Cluster) -> Submit:
    """`submit("train_mmoe", gamma="2")`: the job that `mlflow run --backend kubernetes` sends to the cluster."""
    import mlflow.projects

    def run(entry: str, **parameters: str) -> Job:
        mlflow.projects.run(
            str(derived), entry, parameters=parameters, experiment_id="0", backend="kubernetes",
            backend_config=str(RECIPE.relative_to(ROOT) / "backend.json"), synchronous=False,
        )  # fmt: skip
        return cluster.jobs[-1]

    return run


def pod_of(job: Job) -> tuple[Job, Job]:
    """The pod's spec, and that of its only container."""
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


@pytest.mark.parametrize("entry", ENTRIES)
def test_mlflow_makes_the_job_of_every_entry_point(
    entry: str, submit: Submit, client: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBE_MLFLOW_TRACKING_URI", "http://mlflow.training:5000")
    job = submit(entry, gamma="2")
    _, container = pod_of(job)
    (run,) = client.search_runs(["0"])
    assert container["image"] == f"{IMAGE}@{DIGEST}"
    assert container["command"] == ["exec", "python", "-m", "pipeline", entry, "--config", ENTRIES[entry].file,
                                    "--gamma", "2"]  # fmt: skip
    given = {item["name"]: item["value"] for item in container["env"] if item["name"].startswith("MLFLOW_")}
    assert given == {"MLFLOW_RUN_ID": run.info.run_id, "MLFLOW_EXPERIMENT_ID": "0",
                     "MLFLOW_TRACKING_URI": "http://mlflow.training:5000"}  # fmt: skip
    assert run.data.tags["mlflow.docker.image.id"] == DIGEST
    assert_kubernetes_takes(job)


def test_the_command_of_the_page(derived: Path, client: Any, cluster: Cluster) -> None:
    from click.testing import CliRunner
    from mlflow.cli import cli

    (typed,) = re.findall("^mlflow (run .*)$", PAGE, re.MULTILINE)
    words = shlex.split(typed.replace("outputs/kubernetes", str(derived)))
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert cluster.machine.pushed == [IMAGE]
    (job,) = cluster.jobs
    assert pod_of(job)[1]["command"][2:] == ["-m", "pipeline", "train_mmoe", "--config", "configs/mtl_mmoe.yaml",
                                             "--lambda", "0.1", "--resume", "auto"]  # fmt: skip
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED"  # MLflow's word, once the job is complete


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


def assert_kubernetes_takes(job: Job) -> None:
    """What the API server checks: the schema, and rules that no schema tells."""
    validation = pytest.importorskip("kubernetes_validate", reason="needs `pip install kubernetes-validate`")
    for version in (OLDEST, NEWEST):
        assert validation.validate(job, version, strict=True) == version
    label = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
    pod, container = pod_of(job)
    names = [job["metadata"]["name"], job["metadata"]["namespace"], container["name"]]
    names += [volume["name"] for volume in pod["volumes"]]
    assert not [name for name in names if not label.fullmatch(name)]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    places = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert len(set(places)) == len(places)
    set_twice = [item["name"] for item in container["env"]]
    assert len(set(set_twice)) == len(set_twice)
    policy = job["spec"]["podFailurePolicy"]["rules"]
    assert pod["restartPolicy"] == "Never"  # the only one that podFailurePolicy goes with
    for rule in policy:
        codes = rule.get("onExitCodes", {"operator": "In", "values": [1]})
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        assert codes["values"] == sorted(set(codes["values"]))
        assert 0 not in codes["values"]
    for name, asked in container["resources"]["requests"].items():
        assert container["resources"]["limits"][name] == asked


def test_the_volume_is_the_one_that_jobs_mount() -> None:
    validation = pytest.importorskip("kubernetes_validate", reason="needs `pip install kubernetes-validate`")
    volume, job = load_recipe("volume.yaml"), load_recipe("job.yaml")
    for version in (OLDEST, NEWEST):
        assert validation.validate(volume, version, strict=True) == version
    claims = [item["persistentVolumeClaim"]["claimName"] for item in pod_of(job)[0]["volumes"]
              if "persistentVolumeClaim" in item]  # fmt: skip
    assert claims == [volume["metadata"]["name"]]
    assert volume["metadata"]["namespace"] == job["metadata"]["namespace"]


def test_a_volume_lies_wherever_a_config_writes() -> None:
    """The pod's own files are read-only; what is written has to be where a volume is."""
    _, container = pod_of(load_recipe("job.yaml"))
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    from pipeline.compare_config import CompareConfig
    from pipeline.tasks.mmoe.config import MmoeConfig, PrepareCtrConfig
    from pipeline.tasks.visobert.config import DataPrepConfig, VisobertConfig

    folders = [
        model.model_fields[field].default
        for model in (MmoeConfig, VisobertConfig, DataPrepConfig, PrepareCtrConfig, CompareConfig)
        for field in ("output_dir", "runs_dir")
        if isinstance(getattr(model.model_fields.get(field), "default", None), str)
    ]
    assert len(folders) >= 5
    assert {f"{WORKDIR}/{folder.split('/')[0]}" for folder in [*folders, "data_cache"]} <= mounted
    assert {"/tmp", "/dev/shm"} <= mounted  # noqa: S108
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
    asked = {extras: subprocess.run(["sh", "-c", install.replace("pip", "echo", 1)], env={"EXTRAS": extras},
                                    capture_output=True, text=True, check=True).stdout
             for extras in ("", "server,ray")}  # fmt: skip
    assert asked == {"": "install --no-cache-dir --editable .\n",
                     "server,ray": "install --no-cache-dir --editable .[server,ray]\n"}  # fmt: skip
    assert not [rest for _, rest in instructions() if "==" in rest]
    assert ("FROM", "python:3.11-slim") in instructions()
    assert "2.13.0+cpu" in SpecifierSet("==2.13.0")  # as the comment says of torch
    assert Version("2.13.0+cpu") > Version("2.13.0")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.12"
    copied = [source for sources, _ in copies() for source in sources]
    assert {"pyproject.toml", project["readme"], "pipeline/__init__.py"} <= set(copied)  # what the install reads
    assert all((ROOT / source).exists() for source in copied)
    assert not set(copied) & {".", "mlruns", "outputs", ".git"}


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
    below = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "files"]
    assert all(Path(path).parent == Path(WORKDIR) for path in below)
    assert json.loads((RECIPE / "backend.json").read_text()) == {
        "kube-job-template-path": "docs/kubernetes/job.yaml", "repository-uri": IMAGE.rpartition(":")[0]}  # fmt: skip


def test_no_secret_is_in_the_recipe() -> None:
    _, container = pod_of(load_recipe("job.yaml"))
    assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["mlflow-credentials"]
    secret = re.compile("password|token|secret|credential|key", re.IGNORECASE)
    assert not [item for item in container["env"] if secret.search(item["name"])]
    assert not [rest for name, rest in instructions() if name in ("ENV", "ARG") and secret.search(rest)]


# ---------------------------------------------------------------- the pod


@given(strategies.text(strategies.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_the_image_undoes_the_quotes_that_mlflow_puts_around_words(text: str) -> None:
    """MLflow sends every word quoted for a shell, and Kubernetes has none."""
    pytest.importorskip("kubernetes", reason="needs `pip install mlflow[kubernetes]`")
    from mlflow.projects._project_spec import EntryPoint
    from mlflow.projects.kubernetes import _get_run_command

    command = EntryPoint("show", {"text": "string"}, "exec printf %s {text}").compute_command({"text": text}, None)
    words = _get_run_command([command])
    assert words[0] == "exec"
    shown = subprocess.run([str(RECIPE / "exec"), *words[1:]], capture_output=True, check=True, timeout=30)
    assert shown.stdout.decode() == text


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The working folder of the image, as the Dockerfile's COPY make it, with the volume's folders in it."""
    root = tmp_path / "image"
    folder = root / WORKDIR.lstrip("/")
    folder.mkdir(parents=True)
    for sources, target in copies():
        place = root / target.lstrip("/") if target.startswith("/") else folder / target
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                into = place / Path(source).name if target.endswith("/") else place
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, into)
    for mount in pod_of(load_recipe("job.yaml"))[1]["volumeMounts"]:
        (root / mount["mountPath"].lstrip("/")).mkdir(parents=True, exist_ok=True)
    return root


@contextmanager
def started(job: Job, image: Path) -> Iterator["subprocess.Popen[str]"]:
    """The container's process as a container runtime starts it: these words, no shell, this environment alone."""
    _, container = pod_of(job)
    values = {"limits.cpu": container["resources"]["limits"]["cpu"]}
    environment = {item["name"]: item.get("value") or values[item["valueFrom"]["resourceFieldRef"]["resource"]]
                   for item in container["env"]}  # fmt: skip
    environment["PATH"] = os.pathsep.join([str(image / "usr/local/bin"), str(Path(sys.executable).parent), os.defpath])
    with (image / "stderr").open("a+") as told:
        process = subprocess.Popen(container["command"], cwd=image / WORKDIR.lstrip("/"), env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=told, start_new_session=True)  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


def test_an_evicted_pod_is_followed_by_one_that_goes_on(
    submit: Submit, image: Path, impressions: Path, client: Any
) -> None:
    """The second pod of a job has the first one's command and environment, and with them its MLflow run."""
    settings = SHRUNK | {"data.path": str(impressions), "training.max_steps": str(LAST), "run_name": "it's a run",
                         "training.num_train_epochs": str(LAST), "evaluation.every_steps": "300",
                         "tracking.log_report": "false", "resume": "auto"}  # fmt: skip
    job = submit("train_mmoe", **settings)
    (opened,) = client.search_runs(["0"])
    with started(job, image) as process:
        assert process.stdout
        for line in process.stdout:
            if json.loads(line)["global_step"] >= FIRST:
                process.send_signal(signal.SIGTERM)  # to the container's first process alone
                break
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, (image / "stderr").read_text()
    failing = [code for rule in job["spec"]["podFailurePolicy"]["rules"] for code in
               rule.get("onExitCodes", {"values": []})["values"]]  # fmt: skip
    assert process.returncode not in failing  # so that there is a second pod
    assert client.get_run(opened.info.run_id).info.status == "KILLED"
    with started(job, image) as process:
        lines = [json.loads(line) for line in process.communicate(timeout=120)[0].splitlines()]
    assert process.returncode == 0, (image / "stderr").read_text()
    assert FIRST < lines[0]["global_step"] < LAST
    (run,) = client.search_runs(["0"])
    assert (run.info.run_id, run.info.status, run.info.run_name) == (opened.info.run_id, "FINISHED", "it's a run")
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss_total")]
    assert steps == list(range(LAST))
    assert (image / WORKDIR.lstrip("/") / "outputs" / run.info.run_id / "checkpoints").is_dir()
