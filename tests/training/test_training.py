"""The loop, on small data: what a step is made of, what a run leaves, and that it can be trusted bit for bit."""

import gc
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.compute.device import amp_warning, precision, resolve_device
from pipeline.config.strict_config import load, to_yaml
from pipeline.data.schema import DataSchema
from pipeline.errors import TrainingError, UserError
from pipeline.names import MEASURED, NOTE_LENGTH
from pipeline.runs.launch import train_run
from pipeline.runs.run_artifacts import note
from pipeline.runtime.console import Console, optional
from pipeline.tasks.base import evaluate, evaluating, undefined
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.impressions.embedded_impressions import generate
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Result, Training
from pipeline.training.recorder import NonFiniteError

Make = Callable[..., MmoeConfig]


def train(config: MmoeConfig, folder: Path | None = None) -> tuple[MemoryRun, Result]:
    torch.set_num_threads(1)
    run = MemoryRun(folder=folder)
    return run, Training(MmoeTask(config), run, Console(0, quiet=True), "cpu").train()


def history(run: MemoryRun) -> list[tuple[int, dict[str, float]]]:
    """Every point but wall-clock measurements."""
    return [
        (step, kept)
        for step, values in run.points
        if (kept := {name: value for name, value in values.items() if not name.startswith(MEASURED)})
    ]


def steps(run: MemoryRun) -> list[dict[str, float]]:
    return [values for _, values in history(run) if "loss_total" in values]


def final(run: MemoryRun) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "final" / "model.safetensors")


def assert_same_weights(one: MemoryRun, other: MemoryRun) -> None:
    first, second = final(one), final(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_logged_parts_make_the_logged_total(small: Make) -> None:
    config = small(**{"loss.aux_focal.lambda": 0.2, "esmm.lambda_ctr": 0.7, "model.gate.entropy_weight": 0.3,
                      "model.gate.balance_weight": 0.4})  # fmt: skip
    run, _ = train(config)
    logged = steps(run)
    assert [values["global_step"] for values in logged] == list(range(12))
    for step, values in enumerate(logged):
        on = step >= 5
        assert values["aux_focal_on"] == on
        assert ("loss_ctcvr_focal" in values) == on
        ctcvr = values["loss_ctcvr_bce"] + (0.2 * values["loss_ctcvr_focal"] if on else 0)
        assert values["loss_ctcvr"] == pytest.approx(ctcvr, rel=1e-6)  # at most 16 roundings of fp32; all terms > 0
        parts = (0.7 * values["loss_ctr"], values["loss_ctcvr"], 0.1 * values["loss_cvr_aux"])
        total = sum(parts) + values["loss_gate_entropy"] + values["loss_gate_balance"]
        assert values["loss_total"] == pytest.approx(total, rel=1e-6)
        assert (values["aux_focal_lambda"], values["aux_focal_gamma"]) == (0.2, 1.0)


def test_the_first_logged_losses_are_those_of_the_first_batch(small: Make) -> None:
    """Computed here from logits with textbook formulas in float64."""
    config = small(**{"loss.aux_focal.warmup_steps": 0, "loss.aux_focal.gamma": 2})
    run, _ = train(config)
    torch.manual_seed(config.seed)
    task = MmoeTask(config)
    batch = task.batch(task.plan(0)[0])
    z = task.model()(batch).logits.detach().double().numpy()
    p_ctr, p_cvr = 1 / (1 + np.exp(-z.T))
    p, click, bought = p_ctr * p_cvr, batch.click.numpy(), batch.conversion.numpy()
    expected = {
        "loss_ctr": -np.mean(24.7 * click * np.log(p_ctr) + (1 - click) * np.log(1 - p_ctr)),
        "loss_ctcvr_bce": -np.mean(300 * bought * np.log(p) + (1 - bought) * np.log(1 - p)),
        "loss_ctcvr_focal": -np.mean(bought * (1 - p) ** 2 * np.log(p) + (1 - bought) * p**2 * np.log(1 - p)),
        "loss_cvr_aux": -np.sum(click * (bought * np.log(p_cvr) + (1 - bought) * np.log(1 - p_cvr))) / click.sum(),
    }
    for name, value in expected.items():
        assert steps(run)[0][name] == pytest.approx(value, rel=2e-5), name


def test_disabled_missing_and_zero_lambda_are_the_same_training(small: Make, tmp_path: Path) -> None:
    tree = small().model_dump(by_alias=True)
    del tree["loss"]["aux_focal"]
    configs = {
        "disabled": small(**{"loss.aux_focal.enabled": "false"}),
        "missing": MmoeConfig.model_validate(tree),
        "zero": small(**{"loss.aux_focal.lambda": 0}),
    }
    runs = {name: train(config)[0] for name, config in configs.items()}
    focal_only = {"loss_ctcvr_focal", "aux_focal_on"}
    logged = {
        name: [{key: value for key, value in values.items() if key not in focal_only} for _, values in history(run)]
        for name, run in runs.items()
    }
    assert logged["disabled"] == logged["missing"] == logged["zero"]
    assert_same_weights(runs["disabled"], runs["missing"])
    assert_same_weights(runs["disabled"], runs["zero"])
    assert any("loss_ctcvr_focal" in values for values in steps(runs["zero"]))
    other, _ = train(small(**{"loss.aux_focal.lambda": 0.2}))
    assert not all(torch.equal(final(other)[name], weight) for name, weight in final(runs["zero"]).items())


def test_the_same_seed_gives_the_same_bits_and_another_does_not(small: Make, tmp_path: Path) -> None:
    noisy = {"model.experts.dropout": 0.2, "model.gate.noise": 0.5, "model.embedding_dropout": 0.1}
    config = small(**noisy)
    first, _ = train(config)
    again, _ = train(config)
    assert history(first) == history(again)
    assert_same_weights(first, again)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert history(train(load(MmoeConfig, file))[0]) == history(first)
    assert history(train(small(**noisy, seed=1))[0]) != history(first)


@pytest.mark.parametrize("table", ["sparse_adam", "adam"])
def test_accumulating_is_one_large_batch(small: Make, table: str) -> None:
    """Four micro-batches of 16 rows and one batch of 64: the same means, whatever clicks each part holds."""
    common = {"optim.embedding.name": table, "loss.aux_focal.warmup_steps": 2}
    whole, _ = train(small(**common))
    parts, _ = train(small(**common, **{"training.batch_size": 16, "training.accumulation_steps": 4}))
    for one, other in zip(steps(whole)[:4], steps(parts)[:4], strict=True):
        for name in one:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
    first, other_first = steps(whole)[0], steps(parts)[0]
    for name in ("loss_total", "loss_cvr_aux", "grad_norm/dense", "grad_norm/embedding"):
        # 64 rows and 80 inputs in another order: 144 roundings of 6e-8. A mean of means would be off by 1e-2
        assert other_first[name] == pytest.approx(first[name], rel=1e-4)


@pytest.mark.parametrize(("accumulated", "an_epoch"), [(1, 14), (4, 4)])  # 4000 rows: 14 batches, 4 + 4 + 4 + 2
def test_every_row_is_seen_once_an_epoch(
    small: Make, monkeypatch: pytest.MonkeyPatch, accumulated: int, an_epoch: int
) -> None:
    config = small(**{"training.max_steps": "null", "training.num_train_epochs": 2, "training.batch_size": 300,
                      "training.accumulation_steps": accumulated})  # fmt: skip
    seen, load_batch = list[Any](), MmoeTask.batch
    monkeypatch.setattr(MmoeTask, "batch", lambda task, rows: seen.append(rows) or load_batch(task, rows))
    run, result = train(config)
    assert result.steps == len(steps(run)) == 2 * an_epoch
    for batches in (seen[:14], seen[14:]):
        assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(4000))
    assert not np.array_equal(seen[0], seen[14])


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("fp32", ["true", "false"])
def test_mixed_precision_stays_near_full_precision(small: Make, amp: str, fp32: str) -> None:
    full, _ = train(small(**{"loss.aux_focal.warmup_steps": 0}))
    mixed, _ = train(small(**{"training.amp": amp, "loss.aux_focal.compute_fp32": fp32,
                              "loss.aux_focal.warmup_steps": 0}))  # fmt: skip
    for name in ("loss_ctr", "loss_ctcvr_bce", "loss_ctcvr_focal"):
        near, exact = steps(mixed)[0][name], steps(full)[0][name]
        assert near == pytest.approx(exact, rel=0.05)  # bf16 rounds by 2^-8, some ten times from ids to loss
        assert near != exact
    assert all(math.isfinite(value) for values in steps(mixed) for value in values.values())


def test_compute_fp32_off_computes_the_focal_term_alone_in_low_precision(small: Make) -> None:
    base = {"training.amp": "bf16", "loss.aux_focal.warmup_steps": 0, "training.max_steps": 1}
    exact, rough = (
        steps(train(small(**base, **{"loss.aux_focal.compute_fp32": flag}))[0])[0] for flag in ("true", "false")
    )
    assert exact["loss_ctcvr_bce"] == rough["loss_ctcvr_bce"]
    assert exact["loss_ctcvr_focal"] != rough["loss_ctcvr_focal"]


def test_a_loss_that_explodes_is_named_with_its_step(small: Make) -> None:
    config = small(**{"optim.dense.lr": 1e30, "optim.embedding.lr": 1e30})
    run = MemoryRun()
    with pytest.raises(NonFiniteError, match=r"loss_ctr is (nan|inf) at step 1;"):
        Training(MmoeTask(config), run, Console(0, quiet=True), "cpu").train()
    assert [values["global_step"] for values in steps(run)] == [0]  # what came before is there


def test_log_every_thins_and_log_components_off_leaves_the_total(small: Make) -> None:
    all_of_it, _ = train(small())
    thinned, _ = train(small(**{"tracking.log_every": 5}))
    assert [values["global_step"] for values in steps(thinned)] == [0, 5, 10]
    assert steps(thinned) == steps(all_of_it)[::5]
    bare, _ = train(small(**{"loss.aux_focal.log_components": "false"}))
    assert {name for values in steps(bare) for name in values if name.startswith("loss_")} == {"loss_total"}
    assert [v["loss_total"] for v in steps(bare)] == [v["loss_total"] for v in steps(all_of_it)]


def test_learning_rates_follow_the_schedule(small: Make) -> None:
    run, _ = train(
        small(**{"optim.schedule.warmup_steps": 4, "optim.schedule.final_ratio": 0.1, "optim.dense.lr": 0.01})
    )
    rates = [values["lr/dense"] for values in steps(run)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    expected = [0.01 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / 8)) / 2) for step in range(4, 12)]
    assert rates[4:] == pytest.approx(expected)


def test_clipping_bounds_the_dense_gradient_only(small: Make) -> None:
    """After its first step, Adam's mean of the gradients is (1 - beta1) times the gradient that it was given."""
    torch.set_num_threads(1)
    run = MemoryRun()
    config = small(**{"training.clip_norm": 0.01, "training.max_steps": 1})
    training = Training(MmoeTask(config), run, Console(0, quiet=True), "cpu")
    training.train()
    given = {}
    for name, optimizer in training.optimizers.items():
        states = [state for state in optimizer.state.values() if state]
        means = [state["moments"][:, 0] if "moments" in state else state["exp_avg"] for state in states]
        length = torch.cat([mean.flatten() for mean in means]).norm().item()
        given[name] = length / (1 - optimizer.param_groups[0]["betas"][0])
    (logged,) = steps(run)  # the norms before clipping
    assert logged["grad_norm/dense"] > 0.1
    assert logged["grad_norm/embedding"] > 0.02
    # torch divides by the norm + 1e-6
    assert given == pytest.approx({"dense": 0.01, "embedding": logged["grad_norm/embedding"]}, rel=1e-4)


def test_evaluations_stand_at_completed_steps_and_the_test_split_once(small: Make) -> None:
    run, _ = train(small(**{"training.max_steps": 10, "evaluation.every_steps": 4}))
    assert [step for step, values in run.points if "valid/auc_ctr" in values] == [4, 8, 10]
    assert [step for step, values in run.points if "test/auc_ctr" in values] == [10]
    evaluated = next(values for _, values in run.points if "valid/auc_ctr" in values)
    for event in ("ctr", "cvr", "ctcvr"):
        for name in ("logloss", "ece"):
            assert f"valid/{name}_{event}" in evaluated
    for task in ("ctr", "cvr"):
        shares = [evaluated[f"gate/{task}/expert_{expert}"] for expert in range(4)]
        assert sum(shares) == pytest.approx(1)
        assert 0 <= evaluated[f"gate/{task}/entropy"] <= math.log(4) + 1e-9


def test_the_best_weights_are_tested_and_patience_stops(small: Make) -> None:
    overrides = {"training.max_steps": 60, "evaluation.every_steps": 2, "evaluation.metric": "valid/logloss_ctr"}
    # weighing positives drives the probabilities, and so the log loss, up from the base rates it starts with
    run, result = train(small(**overrides, **{"evaluation.mode": "min", "evaluation.patience": 3}))
    scores = {step: values["valid/logloss_ctr"] for step, values in run.points if "valid/logloss_ctr" in values}
    best = min(scores, key=lambda step: scores[step])
    assert result.steps == max(scores) == best + 2 * 3 < 60  # stopped after three evaluations without a gain
    kept = load_file(run.folder / "best" / "model.safetensors")
    assert all(torch.equal(weight, result.model.state_dict()[name]) for name, weight in kept.items())
    assert not all(torch.equal(weight, final(run)[name]) for name, weight in kept.items())
    task = MmoeTask(small(**overrides))
    assert evaluate(task, result.model, "valid", "cpu")["valid/logloss_ctr"] == scores[best]


def test_deepfm_parts_and_shared_bottom_train(small: Make) -> None:
    parts = {f"model.heads.{task}.{part}": "true" for task in ("ctr", "cvr") for part in ("wide", "fm")}
    for overrides in (parts, {"model.kind": "shared_bottom"}, parts | {"model.heads.ctr.deep": "false"}):
        run, _ = train(small(**overrides))
        assert all(math.isfinite(values["loss_total"]) for values in steps(run))
        gated = any("gate/ctr/expert_0" in values for _, values in run.points)
        assert gated == (overrides is parts)


def test_warnings_that_need_data_and_steps(small: Make) -> None:
    task = MmoeTask(small(**{"loss.aux_focal.warmup_steps": 12}))
    assert "will never switch on" in task.warnings(total_steps=12)[0]
    assert task.warnings(total_steps=13) == []
    assert MmoeTask(small(**{"loss.aux_focal.compute_fp32": "false"})).warnings(100)[0].endswith("training.amp: no")
    shares = {f"gate/ctr/expert_{expert}": share for expert, share in enumerate((0.85, 0.145, 0.005))}
    findings = task.findings(shares | {"gate/ctr/entropy": 0.005})
    assert [text.split(" of")[0] for text in findings] == ["expert 0 has 85.0%", "expert 2 has 0.5%"]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder whose validation and test splits have no conversion."""
    folder = tmp_path_factory.mktemp("few")
    generate(folder, rows=1000, seed=0)
    return folder


def test_known_metrics_are_those_that_an_evaluation_gives(small: Make, few: Path) -> None:
    for settings in ({}, {"data.path": few}):
        task = MmoeTask(small(**settings))
        model = task.model()
        with evaluating(model):
            assert bool(task.calibrate(model, "cpu")) == (not settings)
        for split in ("valid", "test"):
            known = task.known_metrics(split)
            given = {name for name in evaluate(task, model, split, "cpu") if name.startswith(f"{split}/")}
            assert given == {name for name, lacks in known.items() if not lacks}
            assert len(given) == len(known) or settings
    schema = DataSchema.read(few).splits["validation"]
    assert (schema.rows, schema.conversions) == (100, 0)
    assert undefined(task, "metric", "valid/auc_ctcvr") == (
        "valid/auc_ctcvr needs both classes: validation has 0 conversions of 100 rows"
    )
    assert undefined(task, "metric", "valid/calibration_cvr") == (
        f"valid/calibration_cvr needs conversions: validation has 0 conversions of {schema.clicks} clicks"
    )
    with pytest.raises(UserError, match=r"^metric: found test/auc_ctrr, allowed: .*; did you mean test/auc_ctr\?"):
        undefined(task, "metric", "test/auc_ctrr")
    with pytest.raises(UserError, match=r"^metric: found valid/x, allowed: valid/auc_ctr, valid/pr_auc_ctr, "):
        undefined(task, "metric", "valid/x")


@pytest.mark.parametrize("relying", [{"evaluation.patience": 3}, {"evaluation.metric": "valid/pr_auc_ctcvr"}])
def test_an_undefined_metric_is_refused_where_it_is_relied_on(small: Make, few: Path, relying: dict[str, Any]) -> None:
    config = small(**{"data.path": few} | relying)
    with pytest.raises(UserError, match="auc_ctcvr needs both classes: validation has 0 conversions of 100 rows"):
        train_run(config, MmoeTask, None)


def test_where_the_default_metric_is_undefined_the_last_weights_are_kept(small: Make, few: Path, capsys: Any) -> None:
    config = small(**{"data.path": few, "evaluation.every_steps": 4})
    trained = train_run(config, MmoeTask, None, quiet=True)
    message = capsys.readouterr().err
    assert message.count("valid/auc_ctcvr needs both classes: validation has 0 conversions of 100 rows") == 1
    assert "the weights of the last step are kept as the best" in message
    run, result = train(config)
    assert all(torch.equal(weight, result.model.state_dict()[name]) for name, weight in final(run).items())
    assert trained.metrics == result.metrics


def test_the_note_has_test_scores_or_those_of_validation_at_the_kept_weights() -> None:
    scores, head = {"valid/a": 0.2, "loss_total": 9.0}, "at the {} weights | |\n|---|---|\n"
    points: list[tuple[int, dict[str, float]]] = [
        (6, {"loss_total": 1.0}),
        (6, {"valid/a": 0.5}),
        (12, {"valid/a": 0.2}),
    ]
    tested = Result(torch.nn.Identity(), 12, scores | {"test/a": 0.25})
    assert note(tested, 6, points) == f"| test, {head.format('best')}| test/a | 0.2500 |"
    assert note(tested, None, points) == f"| test, {head.format('last')}| test/a | 0.2500 |"
    untested = Result(torch.nn.Identity(), 12, scores)
    assert note(untested, 6, points) == f"| validation, {head.format('best')}| valid/a | 0.5000 |"
    assert note(untested, None, points) == f"| validation, {head.format('last')}| valid/a | 0.2000 |"
    assert note(untested, 3, points) == ""
    many = Result(torch.nn.Identity(), 12, {f"test/f1/{aspect:0200}": 0.5 for aspect in range(99)})
    text = note(many, 6, [])
    assert 7700 < len(text) <= NOTE_LENGTH == 8000
    assert text.endswith(" | 0.5000 |")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_refused() -> None:
    assert resolve_device("auto") == "cpu"
    with pytest.raises(UserError, match="allowed here: auto, cpu"):
        resolve_device("cuda")


@pytest.mark.parametrize(
    ("amp", "device", "found", "warns"),
    [
        ("bf16", "cpu", {"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": False}, True),
        ("bf16", "cpu", {"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": True}, False),
        ("bf16", "cpu", {"architecture": "aarch64"}, False),
        ("bf16", "cuda", {"architecture": "x86_64"}, False),
        ("no", "cpu", {"architecture": "x86_64"}, False),
    ],
)
def test_emulated_bf16_is_told(
    amp: str, device: str, found: dict[str, Any], warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert (amp_warning(amp, device) is not None) == warns


@pytest.mark.parametrize(("having", "expected"), [("amx_bf16", "bf16"), ("avx512_bf16", "bf16"), ("avx2", "no")])
def test_auto_is_bf16_where_there_are_instructions_for_it(
    having: str, expected: str, small: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", having: True})
    assert precision("auto", "cpu") == expected
    assert amp_warning("auto", "cpu") is None
    settings = {"training.max_steps": 3}
    auto, _ = train(small(**settings | {"training.amp": "auto"}))
    same, _ = train(small(**settings | {"training.amp": expected}))
    assert [values["loss_total"] for values in steps(auto)] == [values["loss_total"] for values in steps(same)]


def test_what_a_training_can_do_without_costs_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with optional("the picture"):
        raise ValueError("no\nfont")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"warning: the picture is left out: ValueError: no font \(test_training\.py, line \d+\)", line)
    for error in (TrainingError("taken over"), KeyboardInterrupt()):
        with pytest.raises(type(error)), optional("the picture"):
            raise error


def test_a_run_in_memory_leaves_no_folder() -> None:
    run = MemoryRun()
    folder = run.folder
    (folder / "best.safetensors").write_bytes(b"weights")
    del run
    gc.collect()
    assert not folder.exists()
