"""What a task declares decides what sweeps, comparisons and the last line of a run show of it."""

from pathlib import Path
from typing import Any, ClassVar, Self

import pandas as pd
import pytest
import yaml
from test_report import comparison

from pipeline.comparison.page.view import panel_metrics
from pipeline.comparison.selection import side_metrics
from pipeline.config.run_config import EvaluationConfig, RunConfig
from pipeline.config.strict_config import Config, load
from pipeline.errors import UserError
from pipeline.runs.run_artifacts import headline
from pipeline.sweeps.sweep_config import SweepConfig
from pipeline.sweeps.sweep_plan import Plan, resolve
from pipeline.tasks import registry
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.registry import TaskEntry, declarations
from pipeline.tasks.visobert.config import VisobertConfig


class TableConfig(Config):
    path: str = "table.csv"
    """file"""


class PenaltyConfig(Config):
    weight: float = 0.0
    """weight"""
    power: int = 1
    """exponent"""


class ToyConfig(RunConfig):
    task: ClassVar[str] = "toy"
    data_keys: ClassVar[tuple[str, ...]] = ("table.", "rows")
    side_metrics: ClassVar[tuple[str, ...]] = ("recall_at_", "auc", "ece")
    gates: ClassVar[tuple[str, ...]] = ("penalty_on",)
    charts: ClassVar[tuple[str, ...]] = ("loss_penalty",)
    headline: ClassVar[tuple[str, ...]] = ("recall_at_10", "auc")

    evaluation: EvaluationConfig = EvaluationConfig(metric="valid/auc")
    table: TableConfig = TableConfig()
    rows: int = 100
    """rows to read"""
    penalty: PenaltyConfig = PenaltyConfig()

    def arm_name(self) -> str:
        return f"p{self.penalty.weight:g}^{self.penalty.power}"

    def control(self) -> Self | None:
        return self.with_values(penalty={"weight": -self.penalty.weight}) if self.penalty.weight > 0 else None


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = TaskEntry("", f"{__name__}:ToyConfig", f"{__name__}:ToyConfig", "toy.yaml")
    monkeypatch.setitem(registry.SHIPPED, "train_toy", entry)


def plan_of(folder: Path, **sweep: Any) -> Plan:
    (folder / "toy.yaml").write_text("{}")
    tree = {"task": "train_mmoe", "config": "toy.yaml", "baseline": {}} | sweep
    (folder / "sweep.yaml").write_text(yaml.safe_dump(tree))
    file = folder / "sweep.yaml"
    return resolve(load(SweepConfig, file), file, ToyConfig, [folder])


@pytest.mark.parametrize("key", ["table.path", "rows", "seed"])
def test_a_search_leaves_the_declared_data_alone(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"search.space: found {key}, allowed: keys that leave seed and data alone"):
        plan_of(tmp_path, search={"space": {key: {"choices": [1]}}})


def test_a_search_varies_a_key_that_is_no_data_of_this_task(tmp_path: Path) -> None:
    assert plan_of(tmp_path, search={"space": {"penalty.power": {"choices": [1, 2]}}}).arms[0].name == "baseline"


def test_a_control_keeps_the_overrides_of_the_blocks_that_it_leaves_alone(tmp_path: Path) -> None:
    """The power of a penalty that the control turns round is none of the control's own overrides."""
    arm = {"penalty.weight": 0.5, "penalty.power": 1, "training.max_steps": 7}
    plan = plan_of(tmp_path, arms=[arm], controls="reweight", settings={"batch_size": 64})
    _, own, control = plan.arms
    assert own.overridden == {"penalty.weight", "penalty.power", "training.max_steps"}
    assert (control.role, control.control_of, control.overridden) == ("control", (own.name,), {"training.max_steps"})


def test_controls_of_arms_that_have_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="controls is reweight, but no arm has a control; allowed: off"):
        plan_of(tmp_path, arms=[{"rows": 50}], controls="reweight")


def test_side_metrics_are_the_declared_kinds_in_their_order() -> None:
    """The first two kinds, then that of the primary metric's event, then the rest."""
    names = ("ece_b", "ece_a", "auc", "recall_at_5", "recall_at_1", "logloss", "auc_bayes", "pr_auc_a", "auc/x")
    runs = pd.DataFrame({f"metrics.test/{name}": [0.5] for name in names} | {"metrics.valid/auc": [0.5]})
    shown = side_metrics(runs, "test/pr_auc_a", ToyConfig.side_metrics)
    assert shown == tuple(f"test/{name}" for name in ("recall_at_1", "recall_at_5", "auc", "ece_a", "ece_b"))
    assert side_metrics(runs, "test/pr_auc_a", ()) == ()


def test_panels_show_the_validation_metrics_of_the_first_declared_kind(toy: None) -> None:
    names = ["valid/recall_at_1", "valid/auc", "valid/auc_b", "valid/loss_a", "valid/ece"]
    compared = comparison(task="toy", metric="test/auc")
    assert panel_metrics(compared, names)["Validation"] == ["valid/auc", "valid/recall_at_1", "valid/loss_a"]
    compared = comparison(task="nowhere", metric="test/auc")
    assert panel_metrics(compared, names)["Validation"] == ["valid/auc", "valid/auc_b", "valid/loss_a"]


def test_the_last_line_of_a_run() -> None:
    metrics = {"valid/auc": 0.9, "test/auc": 0.81234, "test/recall_at_10": 0.5, "test/f1/a": 0.4, "test/ece": 0.1}
    assert headline(metrics, ToyConfig.headline) == "test/recall_at_10 0.5000  test/auc 0.8123"
    assert headline(metrics) == "test/auc 0.8123"
    assert headline({"valid/auc": 0.9, "valid/recall_at_10": 0.25}, ("recall_at_10",)) == "valid/recall_at_10 0.2500"
    assert headline({"test/error": 0.25, "test/mae": 1.0}) == "test/error 0.2500  test/mae 1.0000"
    assert headline({"test/error": 0.25}, ("missing",)) == "test/error 0.2500"


def test_declarations_of_the_tasks(toy: None) -> None:
    assert declarations("toy") is ToyConfig
    assert declarations("mmoe").gates == ("aux_focal_on",)
    assert MmoeConfig.charts + VisobertConfig.charts == ("loss_ctcvr_bce", "loss_ctcvr_focal", "loss_sentiment")
    assert VisobertConfig.gates == RunConfig.gates == ()
    kinds = ("auc_", "f1_", "ece_", "logloss_", "calibration_")
    assert MmoeConfig.side_metrics == VisobertConfig.side_metrics == RunConfig.side_metrics == kinds
