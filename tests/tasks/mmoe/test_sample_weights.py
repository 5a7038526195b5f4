"""Sample weights: a row of weight 2 is a row that is there twice, in every loss; and how weights are prepared."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from raw_tables import column, prepare_text
from torch import Tensor

from pipeline.conformance import check_losses_are_shares
from pipeline.data.contract import describe, verify
from pipeline.data.schema import SAMPLE_WEIGHT, DataSchema
from pipeline.errors import UserError
from pipeline.runtime.console import Console
from pipeline.tasks.base import TOTAL
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.impressions.impression_batch import Impressions
from pipeline.tasks.mmoe.model import Output
from pipeline.tasks.mmoe.objective import Objective
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Training, Window

torch.set_num_threads(1)

CONFIG = MmoeConfig.model_validate({
    "loss": {"aux_focal": {"enabled": True, "warmup_steps": 0, "lambda": 0.3, "gamma": 1.5, "use_alpha": True},
             "static_pos_weight": {"ctr": 3, "ctcvr": 7}, "late_pos_weight": {"warmup_steps": 0, "ctcvr": 2}},
    "model": {"gate": {"entropy_weight": 0.2, "balance_weight": 0.3}},
    "esmm": {"lambda_cvr_aux": 0.4},
    "tracking": {"influence_every": 1},
})  # fmt: skip
LOSSES = {"loss_ctr", "loss_ctcvr_bce", "loss_ctcvr_focal", "loss_cvr_aux", "loss_ctcvr", "loss_gate_entropy",
          "loss_gate_balance", TOTAL}  # fmt: skip


def batch_of(labels: Sequence[int], weight: Tensor | None) -> Impressions:
    """labels: click + conversion."""
    label = torch.tensor(labels)
    nothing = torch.empty(0)
    return Impressions(
        (label > 0).double(), (label > 1).double(), torch.empty(len(label), 0), nothing, nothing, nothing,
        sample_weight=weight,
    )  # fmt: skip


def step_losses(parts: Sequence[tuple[Output, Impressions]]) -> dict[str, float]:
    """Losses of an optimizer step of these micro-batches."""
    objective = Objective(CONFIG)
    each = [objective.counts(batch) for _, batch in parts]
    counts = {name: torch.stack([part[name] for part in each]).sum() for name in each[0]}
    shares = [objective.losses(output, batch, counts, 0) for output, batch in parts]
    return {name: float(sum(share[name] for share in shares)) for name in shares[0]}


@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=8), min_size=1,
                max_size=3), st.integers(0, 2**32), st.sampled_from([1.0, 0.01, 300.0]))  # fmt: skip
def test_a_weight_of_two_is_the_row_twice_in_every_loss(
    window: list[list[tuple[int, int]]], seed: int, scale: float
) -> None:
    """In float64; windows of micro-batches of any sizes. Only ratios of weights matter: any scale is the same."""
    generator = torch.Generator().manual_seed(seed)
    weighted, repeated = [], []
    for rows in window:
        logits = 3 * torch.randn(len(rows), 2, generator=generator, dtype=torch.float64)
        gates = torch.softmax(torch.randn(len(rows), 2, 4, generator=generator, dtype=torch.float64), -1)
        labels, times = [label for label, _ in rows], torch.tensor([count for _, count in rows])
        weighted.append((Output(logits, gates), batch_of(labels, times.double() * scale)))
        more = [label for label, count in rows for _ in range(count)]
        again = Output(logits.repeat_interleave(times, 0), gates.repeat_interleave(times, 0))
        repeated.append((again, batch_of(more, None)))
    one, other = step_losses(weighted), step_losses(repeated)
    assert one.keys() == other.keys() >= LOSSES | {"influence/focal_factor_positive", "influence/focal_factor_negative"}
    for name, value in other.items():
        # the focal terms are summed in fp32
        assert one[name] == pytest.approx(value, rel=1e-6, abs=1e-12, nan_ok=True), name


@pytest.fixture(scope="module")
def folders(impressions: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[int]]:
    """The same rows twice: with weights 1 to 3, and so many times; and the weights of the training rows."""
    place, random = tmp_path_factory.mktemp("weights"), np.random.default_rng(0)
    schema, times = DataSchema.read(impressions), random.integers(1, 4, 240)
    for name in ("weighted", "repeated"):
        (place / name).mkdir()
        (place / name / "vocabulary.parquet").write_bytes((impressions / "vocabulary.parquet").read_bytes())
        for split in schema.splits:
            table = pq.read_table(impressions / f"{split}.parquet").drop_columns(["p_ctr", "p_cvr"])
            clicked = np.flatnonzero(table["click"].to_numpy())[:60]
            table = table.take(np.unique(np.concatenate([clicked, np.arange(300)]))[:240])  # not only non-clicks
            if split == "train" and name == "repeated":
                table = table.take(np.repeat(np.arange(240), times))
            if name == "weighted":
                table = table.append_column(SAMPLE_WEIGHT, pa.array(times.astype(np.float32)))
            pq.write_table(table, place / name / f"{split}.parquet")
        describe(place / name, schema.features, sample_weight=name == "weighted")
    return place / "weighted", place / "repeated", times.tolist()


def training_on(folder: Path, small: Callable[..., Any], tmp_path: Path) -> Training:
    config = small(
        data__path=folder, loss__aux_focal__warmup_steps=0, training__accumulation_steps=3, training__batch_size=80,
        model__gate__entropy_weight=0.2, model__gate__balance_weight=0.3, tracking__influence_every=1,
    )  # fmt: skip
    training = Training(MmoeTask(config), MemoryRun(folder=tmp_path), Console(0, quiet=True), "cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in training.model.parameters():  # zeros would hide mistakes
            parameter.normal_(std=0.3, generator=generator)
    return training


def test_steps_of_weighted_rows_are_those_of_repeated_rows(
    folders: tuple[Path, Path, list[int]], small: Callable[..., Any], tmp_path: Path
) -> None:
    """Losses, influence and gradients of the loop, with accumulation over three micro-batches of different sizes."""
    weighted, repeated, times = folders
    ends = np.cumsum(times)
    parts = [np.arange(0, 20), np.arange(20, 100), np.arange(100, 240)]
    more = [np.concatenate([np.arange(ends[row] - times[row], ends[row]) for row in part]) for part in parts]
    found = []
    for folder, rows in ((weighted, parts), (repeated, more)):
        training = training_on(folder, small, tmp_path)
        window = Window(list(rows), False)
        losses, influence = training._backward(window, training._load(window), 0)
        gradients = {name: p.grad.to_dense() for name, p in training.model.named_parameters() if p.grad is not None}
        found.append((losses, influence, gradients))
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            # sums over 500 rows in fp32: an error of 1e-5 of the largest term would be a wrong weight of 1 in 100,000
            tolerance = 1e-5 * max(1e-3, float(value.abs().max()))
            np.testing.assert_allclose(one[name].numpy(), value.numpy(), rtol=1e-5, atol=tolerance, err_msg=name)
    assert found[0][0].keys() >= LOSSES
    for name, value in found[1][0].items():
        assert float(found[0][0][name]) == pytest.approx(float(value), rel=1e-6, abs=1e-6), name


def test_weighted_losses_are_shares_and_metrics_are_unweighted(
    folders: tuple[Path, Path, list[int]], small: Callable[..., Any], tmp_path: Path
) -> None:
    weighted, _, _ = folders
    config = small(data__path=weighted, model__gate__balance_weight=0, model__gate__entropy_weight=0.1)
    check_losses_are_shares(MmoeTask, config, tmp_path)
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in weighted.glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(
            table.drop_columns([SAMPLE_WEIGHT]) if "vocabulary" not in file.name else table, plain / file.name
        )
    describe(plain, DataSchema.read(weighted).features)
    tasks = [MmoeTask(config.with_values(data={"path": str(folder)})) for folder in (weighted, plain)]
    torch.manual_seed(0)
    model = tasks[0].model().eval()
    with torch.inference_mode():
        metrics = [dict(task.evaluate(model, "valid", "cpu")) for task in tasks]
    assert metrics[0] == metrics[1]
    assert [task.summary().get("sample_weight") for task in tasks] == [
        "in training losses alone; metrics are unweighted", None,
    ]  # fmt: skip


# ---------------------------------------------------------------- preparation

TEXT = "click,bought,city,w\n1,1,a,2\n1,0,b,0.5\n0,0,a,3\n0,0,a, 2.5\n"


def test_weights_by_hand(tmp_path: Path) -> None:
    schema = prepare_text(tmp_path, TEXT, {"city": "categorical"}, sample_weight="w")
    assert column(tmp_path, SAMPLE_WEIGHT) == [2, 0.5, 3, 2.5]
    # of a weight of 8 in all, 2.5 are clicks; of these 2 are conversions
    assert schema.base_rates.model_dump() == {"ctr": 2.5 / 8, "cvr": 2 / 2.5}
    assert schema.sample_weight
    assert schema.splits["train"].clicks == 2  # rows are counted
    assert verify(tmp_path / "out") == schema
    (tmp_path / "out" / "schema.json").unlink()
    described = describe(tmp_path / "out", schema.features, sample_weight=True)
    assert (described.digest, described.base_rates) == (schema.digest, schema.base_rates)


def test_folders_without_weights_are_what_they_were(tmp_path: Path) -> None:
    """Neither schema.json nor the digest has keys that an earlier version does not know."""
    schema = prepare_text(tmp_path, TEXT, {"city": "categorical"})
    assert pq.read_schema(tmp_path / "out" / "train.parquet").names == ["click", "conversion", "city"]
    file = tmp_path / "out" / "schema.json"
    tree = json.loads(file.read_text())
    assert list(tree) == ["format", "features", "splits", "base_rates", "vocabulary_sha256", "missing_values", "strip",
                          "truth", "source", "counts"]  # fmt: skip
    known = {key: tree[key] for key in ("format", "features", "splits", "vocabulary_sha256", "truth")}
    del known["features"][0]["spelling"]  # text
    assert hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest() == schema.digest
    assert DataSchema.read(tmp_path / "out") == schema
    assert schema.model_copy(update={"sample_weight": True}).digest != schema.digest


@pytest.mark.parametrize(("cell", "found"), [
    ("0", "'0'"), ("-1", "'-1'"), ("", "''"), ("inf", "'inf'"), ("1e-60", "'1e-60'"), ("1e39", "'1e39'"), ("x", "'x'"),
])  # fmt: skip
def test_a_weight_is_a_number_above_0(tmp_path: Path, cell: str, found: str) -> None:
    allowed = "a finite number above 0 as the row's weight"
    with pytest.raises(UserError) as caught:
        prepare_text(tmp_path, TEXT.replace("0.5", cell), {"city": "categorical"}, sample_weight="w")
    assert f"row 2, column w: found {found}, allowed: {allowed}" in str(caught.value)


def test_names_of_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sample_weight: no column v"):
        prepare_text(tmp_path, TEXT, {"city": "categorical"}, sample_weight="v")
    text = TEXT.replace("city", SAMPLE_WEIGHT)
    prepare_text(tmp_path, text, {SAMPLE_WEIGHT: "categorical"})  # a feature like any other, where rows weigh the same
    assert column(tmp_path, SAMPLE_WEIGHT) == [2, 3, 2, 2]
    with pytest.raises(UserError, match=rf"features\.{SAMPLE_WEIGHT}: the prepared files have a column"):
        prepare_text(tmp_path, text, {SAMPLE_WEIGHT: "categorical"}, sample_weight="w")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
def test_invalid_weights_are_not_described(tmp_path: Path, value: float) -> None:
    schema = prepare_text(tmp_path, TEXT, {"city": "categorical"}, sample_weight="w")
    file = tmp_path / "out" / "train.parquet"
    table = pq.read_table(file)
    weights = pa.array([value, 1, 1, 1], pa.float32())
    pq.write_table(table.set_column(2, SAMPLE_WEIGHT, weights), file)
    with pytest.raises(UserError, match="column sample_weight is not as the contract says, allowed: a finite number"):
        describe(tmp_path / "out", schema.features, sample_weight=True)
