"""Data without conversion labels: the CTR head alone is trained, measured, calibrated and served."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from raw_tables import column, prepare_text
from scipy.optimize import minimize

from pipeline.config.strict_config import load
from pipeline.conformance import check_evaluation_is_deterministic, check_export_predicts, check_losses_are_shares
from pipeline.data.contract import describe, verify
from pipeline.data.schema import DataSchema
from pipeline.errors import UserError
from pipeline.maths.calibration import PRIOR_SD, fit_click
from pipeline.runs.launch import train_run
from pipeline.runtime.console import Console
from pipeline.serving import load_predictor
from pipeline.tasks.base import TOTAL
from pipeline.tasks.mmoe.config import CLICK_METRIC, MmoeConfig
from pipeline.tasks.mmoe.prepare.prepare_ctr import figures
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Training

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clicks(impressions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated impressions without their conversions."""
    folder, schema = tmp_path_factory.mktemp("clicks"), DataSchema.read(impressions)
    (folder / "vocabulary.parquet").write_bytes((impressions / "vocabulary.parquet").read_bytes())
    for split in schema.splits:
        table = pq.read_table(impressions / f"{split}.parquet").drop_columns(["p_ctr", "p_cvr"])
        zeros = pq.read_table(impressions / f"{split}.parquet")["click"].to_numpy() * 0
        pq.write_table(table.set_column(1, table.field(1), [zeros]), folder / f"{split}.parquet")
    describe(folder, schema.features, click_only=True)
    return folder


def trained(config: MmoeConfig, folder: Path) -> tuple[MemoryRun, dict[str, torch.Tensor]]:
    run = MemoryRun(folder=folder)
    folder.mkdir(exist_ok=True)
    training = Training(MmoeTask(config), run, Console(0, quiet=True), "cpu")
    training.advance()
    training.recorder.drain()
    return run, {name: value.clone() for name, value in training.model.state_dict().items()}


@pytest.mark.parametrize("extra", [
    {}, {"model.gate.entropy_weight": 0.1, "model.gate.balance_weight": 0.1, "model.heads.ctr.wide": "true",
         "training.accumulation_steps": 2, "optim.dense.weight_decay": 0.01, "model.experts.dropout": 0.1},
])  # fmt: skip
def test_training_is_that_of_a_model_whose_conversion_losses_weigh_nothing(
    clicks: Path, impressions: Path, small: Callable[..., Any], tmp_path: Path, extra: dict[str, Any]
) -> None:
    """Bit for bit: the same weights start, and a loss of weight 0 adds exact zeros to the gradients of the rest."""
    extra = {key.replace(".", "__"): value for key, value in extra.items()} | {"loss__aux_focal__enabled": "false"}
    alone, weights = trained(small(data__path=clicks, **extra), tmp_path / "alone")
    whole = small(data__path=impressions, esmm__lambda_ctcvr=0, esmm__lambda_cvr_aux=0, **extra)
    # its conversions decide where the bias of the CVR head begins, and nothing else
    reference, expected = trained(whole, tmp_path / "whole")
    assert float(expected["bias"][1]) != float(weights["bias"][1])
    for name, value in expected.items():
        one, other = (value[0], weights[name][0]) if name == "bias" else (value, weights[name])
        assert torch.equal(one, other), name
    steps = [values for _, values in alone.points if "global_step" in values]
    losses = [{name: value for name, value in values.items() if name.startswith("loss_")} for values in steps]
    gates = {"loss_gate_entropy", "loss_gate_balance"} if len(extra) > 1 else set()
    assert len(losses) == 12
    assert all(values.keys() == {"loss_ctr", TOTAL} | gates for values in losses)
    assert not gates or all(values[TOTAL] != values["loss_ctr"] for values in losses[1:])
    assert gates or all(values[TOTAL] == values["loss_ctr"] for values in losses)
    others = [values for _, values in reference.points if "global_step" in values]
    assert [values["loss_ctr"] for values in losses] == [values["loss_ctr"] for values in others]
    scores, references = ({name: value for _, values in run.points for name, value in values.items()
                           if name.startswith("valid/")} for run in (alone, reference))  # fmt: skip
    assert scores == {name: references[name] for name in scores}
    assert scores.keys() == {f"valid/{kind}_ctr" for kind in ("auc", "pr_auc", "logloss", "ece", "calibration", "loss")}
    assert not [name for values in steps for name in values if "focal" in name or "ctcvr" in name or "cvr" in name]


def test_a_whole_run(
    clicks: Path, small: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The default metric of the conversions becomes that of the clicks, in the config that the run keeps too."""
    config = small(data__path=clicks, loss__aux_focal__enabled="false", tracking__log_model="true")
    runs: list[MemoryRun] = []

    class Kept(MemoryRun):
        def __init__(self, name: str = "") -> None:
            super().__init__(name, tmp_path / "run")
            runs.append(self)

    (tmp_path / "run").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.runs.run_start.MemoryRun", Kept)
        train_run(config, MmoeTask, None)
    [run] = runs
    kept = load(MmoeConfig, run.folder / "config.yaml")
    assert (config.evaluation.metric, kept.evaluation.metric) == ("valid/auc_ctcvr", CLICK_METRIC)
    assert run.params["evaluation.metric"] == CLICK_METRIC
    assert MmoeTask(kept).config == kept  # running it again is the same run
    assert run.params["calibration.ctr.scale"]
    assert "calibration.cvr.scale" not in run.params
    metrics = {name for _, values in run.points for name in values}
    assert {"best_step", "test/auc_ctr", "test/logloss_ctr_calibrated"} <= metrics
    assert not {name for name in metrics if "cvr" in name}
    assert pq.read_schema(run.folder / "report" / "evaluation" / "test_rows.parquet").names == [
        "label/auc_ctr", "score/auc_ctr",
    ]  # fmt: skip
    assert run.inputs[0]["profile"]["train"].keys() == {"rows", "clicks"}
    assert "no conversion" not in capfd.readouterr().err
    export = run.models[0]
    assert list(export["outputs"]) == ["p_ctr"]
    predict = load_predictor(export["predictor"], Path(export["folder"]))
    frame = pd.DataFrame(export["example"])
    raw, calibrated = predict(frame, raw=True), predict(frame)
    assert list(raw.columns) == list(calibrated.columns) == ["p_ctr"]
    scale, shift = (float(run.params[f"calibration.ctr.{name}"]) for name in ("scale", "shift"))
    logit = np.log(raw["p_ctr"]) - np.log1p(-raw["p_ctr"])
    np.testing.assert_allclose(calibrated["p_ctr"], 1 / (1 + np.exp(-(scale * logit + shift))), rtol=1e-9)


def test_the_task_is_what_the_loop_expects(clicks: Path, small: Callable[..., Any], tmp_path: Path) -> None:
    config = small(data__path=clicks, loss__aux_focal__enabled="false")
    for check in (check_losses_are_shares, check_evaluation_is_deterministic, check_export_predicts):
        check(MmoeTask, config, tmp_path)
    known = MmoeTask(config).known_metrics("valid")
    lacks = "needs conversion labels: the data are of clicks alone"
    assert {name for name, why in known.items() if why == lacks} == {name for name in known if "cvr" in name}


@pytest.mark.parametrize(("overrides", "message"), [
    ({}, r"loss\.aux_focal\.enabled: found true, but clicks\d* has no conversion labels; allowed: false"),
    ({"loss__aux_focal__enabled": "false", "loss__late_pos_weight__ctcvr": 3},
     r"loss\.late_pos_weight\.ctcvr: found 3, but clicks\d* has no conversion labels; allowed: 0"),
    ({"loss__aux_focal__enabled": "false", "esmm__lambda_ctr": 0}, r"esmm\.lambda_ctr: found 0, but "),
])  # fmt: skip
def test_losses_on_conversions_are_refused(
    clicks: Path, small: Callable[..., Any], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        MmoeTask(small(data__path=clicks, **overrides))


@pytest.mark.parametrize(("overrides", "given"), [
    ({"evaluation__metric": "valid/logloss_ctcvr"}, frozenset()),
    ({"evaluation__metric": "valid/auc_ctcvr"}, frozenset({"evaluation.metric"})),
])  # fmt: skip
def test_a_metric_of_conversions_that_was_chosen_is_refused(
    clicks: Path, small: Callable[..., Any], overrides: dict[str, Any], given: frozenset[str]
) -> None:
    config = small(data__path=clicks, loss__aux_focal__enabled="false", **overrides)
    with pytest.raises(UserError, match=r"^evaluation\.metric: valid/\w+_ctcvr needs conversion labels: the data are"):
        train_run(config, MmoeTask, None, given=given)


def test_preparation(tmp_path: Path) -> None:
    text = "click,city\n1,a\n0,b\n0,a\n"
    for labels in ({"click": "click"}, {"click": "click", "conversion": None}):
        schema = prepare_text(tmp_path, text, {"city": "categorical"}, labels=labels)
        assert schema.click_only
        assert (column(tmp_path, "click"), column(tmp_path, "conversion")) == ([1, 0, 0], [0, 0, 0])
        assert verify(tmp_path / "out") == schema
        assert schema.warnings() == []  # that no conversion is there is no surprise
    assert {name for name in figures(schema) if "cvr" in name or "conversion" in name} == set()
    both = prepare_text(tmp_path, "click,bought,city\n1,0,a\n0,0,b\n0,0,a\n", {"city": "categorical"})
    assert both.warnings() == ["train has no conversion: there is none to learn from"]
    assert both.digest != schema.digest
    assert "click_only" not in json.loads(
        (tmp_path / "out" / "schema.json").read_text()
    )  # as earlier versions wrote it


def test_conversions_in_click_only_data_are_not_described(impressions: Path, clicks: Path, tmp_path: Path) -> None:
    for file in clicks.glob("*.parquet"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "train.parquet").write_bytes((impressions / "train.parquet").read_bytes())
    with pytest.raises(UserError, match=r"train\.parquet: column conversion is not .* allowed: 0 in click-only data"):
        describe(tmp_path, DataSchema.read(clicks).features, click_only=True)


def test_calibration_of_clicks_is_the_maximum_that_scipy_finds() -> None:
    random = np.random.default_rng(0)
    z = random.normal(1, 2, 500)
    click = (random.random(500) < 1 / (1 + np.exp(1 - 0.5 * z))).astype(float)

    def loss(x: Any) -> float:
        scaled = np.exp(x[0]) * z + x[1]
        return float(np.sum(np.logaddexp(0, scaled) - click * scaled) + x[0] ** 2 / (2 * PRIOR_SD**2))

    best = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12}).x
    fitted = fit_click(torch.from_numpy(z), torch.from_numpy(click))
    assert fitted is not None
    np.testing.assert_allclose([np.log(fitted.scale), fitted.shift], best, atol=1e-5)
    for same in (0.0, 1.0):
        assert fit_click(torch.zeros(3), torch.full((3,), same)) is None


def test_the_shipped_config_trains_clicks_with_one_override(clicks: Path) -> None:
    config = load(
        MmoeConfig, ROOT / "configs/mtl_mmoe.yaml", {"loss.aux_focal.enabled": "false", "data.path": str(clicks)}
    )
    assert MmoeTask(config).config.evaluation.metric == CLICK_METRIC
