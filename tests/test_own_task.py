"""The worked example in docs/your_own_task: conforms, and is trained by the command line from a package of its own."""

import math
import os
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, mlflow_run, only_full, project_in, run_pipeline, without
from mlflow import MlflowClient
from test_architecture import broken

from pipeline.config.strict_config import load
from pipeline.conformance import CHECKS, Check
from pipeline.errors import UserError

EXAMPLE = ROOT / "docs" / "your_own_task"
sys.path.append(str(EXAMPLE))

from focal_fraud.config import FraudConfig  # noqa: E402
from focal_fraud.data import DataConfig, Encoder, FraudData, Transactions, generate  # noqa: E402
from focal_fraud.task import FraudTask  # noqa: E402

TINY = {"data.rows": "3000", "training.batch_size": "64", "training.max_steps": "8", "training.threads": "1",
        "loss.focal.warmup_steps": "3", "loss.focal.lambda": "0.5", "evaluation.every_steps": "4"}  # fmt: skip
TYPED = [part for key, value in TINY.items() for part in (f"--{key}", value)]


def example(**overrides: str) -> FraudConfig:
    return load(FraudConfig, EXAMPLE / "focal_fraud" / "fraud.yaml", TINY | overrides)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_example_conforms(check: Check, tmp_path: Path) -> None:
    check(FraudTask, example(**{"training.accumulation_steps": "2"}), tmp_path)


# --- its parts -------------------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    """Odds of 1 and of 3: a fraud at p = 1/2 and an ordinary transaction at p = 3/4, of a step of 4 rows."""
    config = example(**{"loss.focal.gamma": "2", "loss.pos_weight.static": "5"})
    task = FraudTask(config)
    batch = Transactions(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1.0, 0.0]))
    output, counts = torch.tensor([0.0, math.log(3)]), {"rows": torch.tensor(4.0)}
    bce = (5 * math.log(2) + math.log(4)) / 4
    focal = (0.5**2 * math.log(2) + 0.75**2 * math.log(4)) / 4
    before = task.losses(output, batch, counts, 2)
    assert before.keys() == {"loss_bce", "loss_total"}
    assert float(before["loss_total"]) == pytest.approx(bce, rel=1e-6)
    after = task.losses(output, batch, counts, 3)
    assert float(after["loss_focal"]) == pytest.approx(focal, rel=1e-6)
    assert float(after["loss_total"]) == pytest.approx(bce + 0.5 * focal, rel=1e-6)
    assert [task.scheduled_values(step)["focal_on"] for step in (2, 3)] == [False, True]


def test_the_focal_term_is_computed_in_reduced_precision_on_request() -> None:
    """In bf16, which has 8 bits, the value differs from that of fp32, by less than 2%."""
    batch = Transactions(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1.0, 0.0]))
    output, counts = torch.tensor([0.1, 1.1]), {"rows": torch.tensor(2.0)}
    focal = {}
    for fp32 in ("true", "false"):
        task = FraudTask(example(**{"training.amp": "bf16", "loss.focal.compute_fp32": fp32}))
        focal[fp32] = float(task.losses(output, batch, counts, 3)["loss_focal"])
    assert focal["false"] != focal["true"]
    assert focal["false"] == pytest.approx(focal["true"], rel=0.02)


def test_the_control_raises_the_weight_of_frauds_from_the_gate_on() -> None:
    config = example(**{"loss.pos_weight.static": "5"})
    control = config.control()
    assert control is not None
    assert not control.loss.focal.enabled
    assert [control.loss.pos_weight.at(step) for step in (2, 3)] == [5, 5.5]
    assert control.control() is None
    for arm in (config, control):
        prefix, step = arm.shared_prefix()
        assert step == 3
        assert not prefix.loss.focal.enabled
        assert prefix.loss.pos_weight.at(1000) == 5


def test_generated_transactions() -> None:
    frame = generate(60_000, 0)
    assert 0.01 < frame["fraud"].mean() < 0.02
    pd.testing.assert_frame_equal(frame, generate(60_000, 0))
    assert not frame.equals(generate(60_000, 1))
    data = FraudData(DataConfig(rows=60_000))
    assert sum(counts["rows"] for counts in data.counts.values()) == 60_000
    assert sum(counts["frauds"] for counts in data.counts.values()) == frame["fraud"].sum()
    assert len({row for rows in data.frames.values() for row in rows.index}) == 60_000
    for name, share in {"train": 0.8, "valid": 0.1, "test": 0.1}.items():
        assert data.counts[name]["rows"] / 60_000 == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_file_gives_the_same_data(suffix: str, tmp_path: Path) -> None:
    frame, file = generate(2000, 0), tmp_path / f"transactions{suffix}"
    frame.to_csv(file, index=False) if suffix == ".csv" else frame.to_parquet(file)
    generated, own = FraudData(DataConfig(rows=2000)), FraudData(DataConfig(path=str(file)))
    assert own.name == f"transactions{suffix}"
    assert own.digest == generated.digest
    for name, split in generated.splits.items():
        for tensor, expected in zip(vars(own.splits[name]).values(), vars(split).values(), strict=True):
            assert torch.equal(tensor, expected)


@pytest.mark.parametrize(("change", "reason"), [
    (lambda frame: frame.drop(columns="hour"), "found no column hour"),
    (lambda frame: frame.assign(fraud=2), "column fraud: found other values, allowed: 0, 1"),
    (lambda frame: frame.head(2), "rows and none for"),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(change: Any, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "transactions.csv"
    change(generate(1000, 0)).to_csv(file, index=False)
    with pytest.raises(UserError, match=reason):
        FraudData(DataConfig(path=str(file)))


def test_encoding_by_hand() -> None:
    train = pd.DataFrame({
        "amount": [1.0, 3.0], "hour": [0, 0], "account_days": [5.0, 5.0],
        "merchant": ["b", "a"], "country": ["x", "x"], "channel": ["c", None],
    })  # fmt: skip
    encoder = Encoder.fit(train)
    assert encoder.sizes == [2, 1, 1]
    new = train.assign(amount=[2.0, 1000.0], hour=["3", None], merchant=["a", "new"])
    batch = encoder.encode(new)
    assert batch.numeric.tolist() == [[0.0, 3.0, 0.0], [5.0, 0.0, 0.0]]  # 1000 is limited to 5 deviations
    assert batch.ids.tolist() == [[1, 1, 1], [0, 1, 0]]
    assert batch.label.tolist() == [0.0, 0.0]
    with pytest.raises(UserError, match="found no column amount, allowed: amount, hour"):
        encoder.encode(new.drop(columns="amount"))


# --- as users run it -------------------------------------------------------------------------------------------------


def installed(folder: Path) -> Path:
    """Put into the folder what pip leaves of the example, with the entry points of its pyproject.toml."""
    shutil.copytree(EXAMPLE / "focal_fraud", folder / "focal_fraud", ignore=shutil.ignore_patterns("__pycache__"))
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    facts = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [line for group, entries in project["entry-points"].items()
             for line in (f"[{group}]", *(f"{name} = {reference}" for name, reference in entries.items()))]  # fmt: skip
    (facts / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_a_package_of_its_own_is_trained_and_its_model_needs_neither_package(workplace: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(installed(tmp_path / "site")), str(ROOT)])
    done = run_pipeline("train_fraud", *TYPED, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    client = MlflowClient()
    (run,) = client.search_runs(["0"])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "fraud l0.5 g2 w3 s0")
    assert run.data.tags["task"] == "fraud"
    assert run.data.params["lambda"] == "0.5"
    points = {
        name: {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}
        for name in ("focal_on", "loss_bce", "loss_focal", "loss_total")
    }
    assert points["focal_on"] == {step: float(step >= 3) for step in range(8)}
    assert list(points["loss_focal"]) == [3, 4, 5, 6, 7]
    for step, total in points["loss_total"].items():
        expected = points["loss_bce"][step] + 0.5 * points["loss_focal"].get(step, 0.0)
        assert total == pytest.approx(expected, rel=1e-6)
    for split in ("valid", "test"):
        assert {f"{split}/{name}_fraud" for name in ("auc", "pr_auc", "logloss", "ece")} <= run.data.metrics.keys()

    (model,) = client.search_logged_models(["0"])
    with without("pipeline", "focal_fraud"):
        loaded = mlflow.pyfunc.load_model(model.artifact_location)
        answer = loaded.predict(loaded.input_example)["p_fraud"]
    assert len(answer) == 5
    assert answer.between(0, 1, inclusive="neither").all()


@only_full
@pytest.mark.faults
def test_a_sweep_of_a_package_of_its_own(workplace: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(installed(tmp_path / "site")), str(ROOT)])
    sweep = {"task": "train_fraud", "settings": {key: value for key, value in TINY.items() if "focal" not in key},
             "baseline": {"focal": False}, "arms": [{"focal": True, "lambda": 0.5, "warmup_steps": 3}], "seeds": [0],
             "controls": "reweight", "jobs": 1}  # fmt: skip
    (workplace / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    done = run_pipeline("sweep", "--config", "sweep.yaml", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    client = MlflowClient()
    runs = {run.data.tags["role"]: run for run in client.search_runs(["0"])}
    assert runs.keys() == {"baseline", "arm", "control", "summary"}
    for role, weights in {"baseline": [5.0] * 8, "arm": [5.0] * 8, "control": [5.0] * 3 + [5.5] * 5}.items():
        points = client.get_metric_history(runs[role].info.run_id, "pos_weight_fraud")
        assert [point.value for point in points] == weights
        assert runs[role].data.tags["branch_step"] == "3"  # all three share the steps before the gate
    assert "gate opens at step 3" in next(workplace.glob("outputs/sweeps/*/comparison.html")).read_text()
    lines = [line for line in done.stderr.splitlines() if "logloss_fraud" in line]
    assert [line.split()[:3] for line in lines] == [["pr_auc_fraud", "logloss_fraud", "ece_fraud"]]


@only_full
@pytest.mark.faults
def test_a_folder_of_the_project_is_trained_through_mlflow_run(workplace: Path) -> None:
    """As the documentation says: a folder, a YAML, an entry of the registry and a block of MLproject."""
    project = project_in(workplace)
    shutil.copytree(ROOT / "pipeline", project / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    folder = project / "pipeline" / "tasks" / "fraud"
    shutil.copytree(EXAMPLE / "focal_fraud", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "__init__.py").write_text("")
    (folder / "fraud.yaml").rename(project / "configs" / "fraud.yaml")
    registry = project / "pipeline" / "tasks" / "registry.py"
    entry = ('"train_fraud": TaskEntry("Fraud.", "pipeline.tasks.fraud.config:FraudConfig", '
             '"pipeline.tasks.fraud.task:FraudTask", "configs/fraud.yaml"),')  # fmt: skip
    text = registry.read_text(encoding="utf-8")
    assert text.count('    "train_visobert": TaskEntry(') == 1
    changed = text.replace('    "train_visobert": TaskEntry(', f'    {entry}\n    "train_visobert": TaskEntry(')
    registry.write_text(changed, encoding="utf-8")
    declared = yaml.safe_load((project / "MLproject").read_text(encoding="utf-8"))
    declared["entry_points"]["train_fraud"] = {
        "parameters": {"config": {"type": "string", "default": "configs/fraud.yaml"}},
        "command": "python -m pipeline train_fraud --config {config}",
    }
    (project / "MLproject").write_text(yaml.safe_dump(declared), encoding="utf-8")
    assert list(broken(project)) == []
    done = mlflow_run("train_fraud", project, **TINY)
    assert done.returncode == 0, done.stderr
    (run,) = MlflowClient().search_runs(["0"])
    assert (run.info.status, run.data.tags["task"]) == ("FINISHED", "fraud")
    (model,) = MlflowClient().search_logged_models(["0"])
    assert model.status == "READY"
