"""The aspect sentiment task: losses, optimizers, plans, warnings, evaluation and exported models."""

import csv
import math
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from pipeline.config.strict_config import load
from pipeline.errors import UserError
from pipeline.runtime.console import Console
from pipeline.tasks.base import evaluate, evaluating, undefined
from pipeline.tasks.visobert import evaluation, predict
from pipeline.tasks.visobert.config import EMBEDDED, VisobertConfig
from pipeline.tasks.visobert.model import AspectSentimentModel, Output
from pipeline.tasks.visobert.reviews.review_table import ReviewBatch
from pipeline.tasks.visobert.reviews.sentiments import MENTIONED, NOT_MENTIONED, UNKNOWN
from pipeline.tasks.visobert.scoring import baselines, report
from pipeline.tasks.visobert.scoring.scores import tuned_thresholds
from pipeline.tasks.visobert.task import VisobertTask
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Training, Window

torch.set_num_threads(1)
pytestmark = pytest.mark.xdist_group("review model")  # one process imports transformers

P, N, U = 0, 1, 2
O, M, X = NOT_MENTIONED, MENTIONED, UNKNOWN  # noqa: E741 (nothing, mention, unknown: tables stay readable)
ASPECTS = ("Pin", "Camera", "Khác")
WORD = {P: "Positive", N: "Negative", U: "Neutral", O: "", M: "Neutral", X: "?"}


def reviews_file(file: Path, count: int, seed: int) -> str:
    """Reviews of very different lengths and label densities; some cells are bad labels, which are dropped."""
    random = np.random.Generator(np.random.PCG64(seed))
    words = ("pin", "trâu", "camera", "đẹp", "máy", "lag", "quá", "tệ", "bình", "thường", "giao", "nhanh", "nhé", "ok")
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["data", *ASPECTS])
        for row in range(count):
            text = " ".join(random.choice(words, int(random.integers(2, 25)))) + f" {row} {seed}"
            sparse = row % 3 == 0
            codes = random.choice([P, P, P, N, U, O, X], 2, p=[0.02, 0.02, 0.02, 0.02, 0.01, 0.9, 0.01] if sparse
                                  else [0.2, 0.1, 0.1, 0.15, 0.1, 0.3, 0.05]).tolist()  # fmt: skip
            writer.writerow([text, *(WORD[code] for code in codes), WORD[M if random.random() < 0.4 else O]])
    return str(file)


def scrambled(model: nn.Module, std: float = 0.3) -> Any:
    """Every weight random: what starts at 0 or 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        nn.init.normal_(weight, std=std, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reviews")
    sizes = {"train": 90, "validation": 40, "test": 30}
    paths = {f"data.{name}": reviews_file(folder / f"{name}.csv", size, seed)
             for seed, (name, size) in enumerate(sizes.items())}  # fmt: skip
    return paths | {"data.cache": str(folder / "cache")}


STILL = {
    "model.name": EMBEDDED,
    "model.dropout": "0",
    "model.embedded.width": "16",
    "model.embedded.vocabulary": "300",
    "model.embedded.dropout": "0",
    "model.embedded.token_dropout": "0",
    "data.on_bad_label": "drop",
    "data.detection_only": "[Khác]",
    "training.max_steps": "6",
    "training.batch_size": "8",
    "baselines": "false",
}
Make = Callable[..., VisobertTask]


@pytest.fixture
def make(files: dict[str, str]) -> Make:
    """`make(key=value, ...)`: a task on a small model without dropout, with dotted overrides on top."""

    def task(**overrides: Any) -> VisobertTask:
        return VisobertTask(load(VisobertConfig, None, files | STILL | {k: str(v) for k, v in overrides.items()}))

    return task


def hand_losses(task: VisobertTask, output: Output, labels: Tensor) -> dict[str, float]:
    """Cell by cell in double precision."""
    config = task.config.multi_label
    z, d = output.sentiment.detach().double().numpy(), output.aspect
    sums = {"sentiment": 0.0, "aspect": 0.0}
    counts = {"sentiment": 0, "aspect": 0}
    for row, codes in enumerate(labels.tolist()):
        for aspect, code in enumerate(codes):
            if code in (P, N, U):
                shares = np.exp(z[row, aspect] - z[row, aspect].max())
                p = (shares / shares.sum())[code]
                weight = task.alpha.vector[code] * (1 - p) ** config.focal_gamma if config.use_focal_loss else 1.0
                sums["sentiment"] -= weight * math.log(p)
                counts["sentiment"] += 1
            if code != X and d is not None:
                p = 1 / (1 + math.exp(-d[row, aspect].item()))
                right = p if code != O else 1 - p
                weight = 1.0
                if config.aspect.loss == "focal":
                    weight = (1 - right) ** config.aspect.gamma
                    if config.aspect.alpha is not None:
                        weight *= config.aspect.alpha if code != O else 1 - config.aspect.alpha
                sums["aspect"] -= weight * math.log(right)
                counts["aspect"] += 1
    losses = {f"loss_{name}": total / max(1, counts[name]) for name, total in sums.items()}
    if d is None:
        del losses["loss_aspect"]
    total = config.lambda_sentiment * losses["loss_sentiment"] + config.lambda_aspect * losses.get("loss_aspect", 0)
    return losses | {"loss_total": total}


LOSSES: list[dict[str, Any]] = [
    {},
    {"multi_label.focal_gamma": 0.5, "multi_label.focal_alpha": "[0.5, 1.0, 2.0]", "multi_label.lambda_aspect": 0.3},
    {"multi_label.use_focal_loss": "false", "multi_label.lambda_sentiment": 0.7},
    {"multi_label.focal_alpha": "null", "multi_label.aspect.loss": "focal", "multi_label.aspect.gamma": 1.5},
    {"multi_label.aspect.loss": "focal", "multi_label.aspect.alpha": 0.75, "multi_label.lambda_aspect": 3},
    {"model.aspect_detection": "false", "multi_label.lambda_sentiment": 2},
    {"model.pooling": "cls", "model.hidden": 8},
]


@pytest.mark.parametrize("options", LOSSES, ids=" ".join)
def test_losses_are_those_of_a_formula(make: Make, options: dict[str, Any]) -> None:
    task = make(**options)
    torch.manual_seed(0)
    model = scrambled(task.model())
    batch = task.batch(np.arange(40))
    assert {P, N, U, O, M, X} == set(batch.labels.flatten().tolist())
    losses = task.losses(
        task.forward(model, batch), batch, task.counts(batch), 1
    )  # at step 0 influence is measured beside them
    expected = hand_losses(task, model(batch.ids, batch.mask), batch.labels)
    assert list(losses) == [*[name for name in ("loss_sentiment", "loss_aspect") if name in expected], "loss_total"]
    # some twenty operations of fp32 a cell, from logits that may be rounded otherwise beside the influence
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4)


def test_counts_by_hand(make: Make) -> None:
    task = make()
    labels = torch.tensor([[P, O, M], [X, X, O], [U, N, M]], dtype=torch.int8)
    counts = task.counts(ReviewBatch(torch.zeros(3, 1), torch.ones(3, 1), labels))
    assert {name: int(value) for name, value in counts.items()} == {
        "positive": 1, "negative": 1, "neutral": 1, "labelled": 3, "known": 7,
    }  # fmt: skip


def test_unknown_cells_take_no_part(make: Make) -> None:
    """No gradient reaches their logits; a mention has one for detection alone, an absent aspect none for sentiment.

    Where nothing is labelled, nothing is lost.
    """
    task = make(**{"multi_label.aspect.loss": "focal", "multi_label.aspect.alpha": 0.25})

    def losses_and_slopes(codes: list[list[int]]) -> tuple[dict[str, float], Tensor, Tensor]:
        labels = torch.tensor(codes, dtype=torch.int8)
        output = Output(torch.randn(2, 3, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True))
        losses = task.objective.terms(output, labels, task.counts(ReviewBatch(labels, labels, labels)))
        losses["loss_total"].backward()
        values = {name: loss.item() for name, loss in losses.items()}
        return values, *((part.grad != 0) for part in output.parts if part.grad is not None)

    _, sentiment, aspect = losses_and_slopes([[P, O, M], [X, U, X]])
    assert sentiment.any(-1).tolist() == [[True, False, False], [False, True, False]]
    assert aspect.tolist() == [[True, True, True], [False, True, False]]
    nothing, sentiment, aspect = losses_and_slopes([[X] * 3] * 2)
    assert nothing == {"loss_sentiment": 0, "loss_aspect": 0, "loss_total": 0}
    assert not sentiment.any()
    assert not aspect.any()


def training_of(task: VisobertTask) -> Training:
    return Training(task, MemoryRun(), Console(0, quiet=True), "cpu")


# the same rows in one piece, in pieces of other sizes, and in pieces of one kind: without any label, with few, with all
def parts_of(task: VisobertTask) -> list[list[npt.NDArray[np.int64]]]:
    rows = np.arange(30)
    labelled = ((task.data.splits.train.labels[:30] >= 0) & (task.data.splits.train.labels[:30] < 3)).sum(1)
    by_density = rows[np.argsort(labelled, kind="stable")]
    return [[rows], [rows[:1], rows[1:9], rows[9:]], np.split(by_density, [8, 20, 21]), np.split(rows, 30)]


@pytest.mark.parametrize("options", [LOSSES[0], LOSSES[4], LOSSES[5]], ids=" ".join)
def test_a_window_may_be_cut_anywhere(make: Make, options: dict[str, Any]) -> None:
    """Losses, gradients and the update are the same, however dense the labels of a micro-batch are.

    But for rounding: batches of other shapes, whose sums over 30 reviews of up to 24 tokens are added up otherwise. It
    is some 700 times 6e-8 of a gradient at the most; Adam's first step divides it by eps or more, here 1e-3. A mean of
    means would be off by tens of percents.
    """
    task = make(**options, **{"optim.encoder.eps": 1e-3, "optim.head.eps": 1e-3, "optim.encoder.lr": 1e-3,
                              "optim.head.lr": 1e-3})  # fmt: skip
    results = []
    for parts in parts_of(task):
        training = training_of(task)
        training.model.train()
        losses, _ = training._backward(Window(parts, False), [task.batch(part) for part in parts], 0)
        gradients = {name: weight.grad.clone() for name, weight in training.model.named_parameters()
                     if weight.grad is not None}  # fmt: skip
        for optimizer in training.optimizers.values():
            optimizer.zero_grad()
        training._step(Window(parts, False), [task.batch(part) for part in parts])
        results.append((losses, gradients, training.model.state_dict()))
    densities = [int(task.counts(task.batch(rows))["labelled"]) for rows in parts_of(task)[2]]
    assert densities[0] == 0
    assert max(densities) > 10
    torch.manual_seed(task.config.seed)
    started = task.model().state_dict()
    moved = [name for name, weight in started.items() if (weight - results[0][2][name]).abs().max() > 1e-5]
    assert len(moved) >= len(started) - 1  # all but the thresholds
    for losses, gradients, weights in results[1:]:
        for name, loss in losses.items():
            torch.testing.assert_close(loss, results[0][0][name], rtol=1e-4, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-3, atol=1e-5, msg=name)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, results[0][2][name], rtol=0, atol=1e-3 * 1e-5 / 1e-3, msg=name)


@pytest.mark.parametrize("pooling", ["cls", "aspect_attention"])
def test_detection_starts_from_how_often_aspects_are_mentioned(make: Make, pooling: str) -> None:
    task = make(**{"model.pooling": pooling})
    labels = task.data.splits.train.labels
    rates = [(np.isin(column, [P, N, U, M]).sum() + 1) / ((column != X).sum() + 2) for column in labels.T]
    bias = task.model().heads["aspect"].bias
    assert torch.sigmoid(bias).flatten().tolist() == pytest.approx(rates, rel=1e-5)


# ---------------------------------------------------------------- optimizers


def rates_of(task: VisobertTask) -> dict[str, tuple[str, float, float]]:
    """Parameter -> (optimizer, learning rate, weight decay)."""
    model = task.model()
    names = {id(weight): name for name, weight in model.named_parameters()}
    rates: dict[str, tuple[str, float, float]] = {}
    for kind, optimizer in task.optimizers(model).items():
        for group in optimizer.param_groups:
            for weight in group["params"]:
                assert names[id(weight)] not in rates
                rates[names[id(weight)]] = (kind, group["lr"], group["weight_decay"])
    assert set(rates) == set(names.values())
    return rates


def test_a_layers_rate_is_that_of_the_one_above_times_the_decay(make: Make) -> None:
    task = make(**{"model.embedded.layers": 2, "optim.encoder.lr": 0.01, "optim.encoder.layer_decay": 0.5,
                   "optim.head.lr": 0.3})  # fmt: skip
    steps = {"embedding": 4, "layers.0": 3, "layers.1": 2, "layers.2": 1, "layers.3": 0, "norm": 0}
    for name, (kind, rate, _) in rates_of(task).items():
        assert kind == ("encoder" if name.startswith("encoder.") else "head")
        if kind == "head":
            assert rate == 0.3
        else:
            prefix = next(name_part for name_part in steps if name.removeprefix("encoder.").startswith(name_part))
            assert rate == pytest.approx(0.01 * 0.5 ** steps[prefix]), name
    optimizers = task.optimizers(task.model())
    assert list(optimizers) == ["encoder", "head"]
    assert optimizers["encoder"].param_groups[0]["lr"] == 0.01  # the one that is logged as lr/encoder
    assert optimizers["encoder"].param_groups[0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize("pooling", ["cls", "aspect_attention"])
def test_biases_and_norms_do_not_decay(make: Make, pooling: str) -> None:
    task = make(**{"model.pooling": pooling, "model.hidden": 8, "optim.encoder.weight_decay": 0.1,
                   "optim.head.weight_decay": 0.2})  # fmt: skip
    for name, (kind, _, decay) in rates_of(task).items():
        free = name.endswith("bias") or "norm" in name
        assert decay == (0.0 if free else {"encoder": 0.1, "head": 0.2}[kind]), name


# ---------------------------------------------------------------- alpha, plans and warnings


def test_alpha_of_oversampled_data_is_that_of_what_an_epoch_draws(make: Make) -> None:
    task = make(**{"data.oversampling": "capped", "data.oversampling_ratio": 1.4,
                   "multi_label.alpha_from": "oversampled"})  # fmt: skip
    labels = task.data.splits.train.labels
    drawn = np.zeros(3)
    for epoch in range(60):
        rows = np.concatenate(list(task.plan(epoch)))
        drawn += [(labels[rows] == code).sum() for code in (P, N, U)]
    expected = drawn.sum() / (3 * drawn)
    assert task.alpha.vector == pytest.approx(expected.tolist(), rel=0.02)


@pytest.mark.parametrize("oversampling", ["none", "capped"])
def test_alpha_of_the_original_does_not_depend_on_oversampling(make: Make, oversampling: str) -> None:
    labels = make().data.splits.train.labels
    counts = np.array([(labels == code).sum() for code in (P, N, U)])
    alpha = make(**{"data.oversampling": oversampling}).alpha
    assert alpha.vector == pytest.approx((counts.sum() / (3 * counts)).tolist())


def test_an_epochs_plan(make: Make) -> None:
    task, again, other = make(seed=3), make(seed=3), make(seed=4)
    drawn = [task.plan(0), again.plan(0), task.plan(1), other.plan(0)]
    plans = [[rows.tolist() for rows in plan] for plan in drawn]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert plans[0] != plans[3]
    assert all(sorted(sum(plan, [])) == list(range(90)) for plan in plans)  # noqa: RUF017
    assert max(map(len, plans[0])) <= 8


def test_a_note_of_the_file_is_reported_once(make: Make, tmp_path: Path, files: dict[str, str]) -> None:
    """Also where one file is cut into training and validation split."""
    frame = pd.read_csv(files["data.train"], keep_default_na=False)
    frame["Sạc"] = ""
    frame.to_csv(tmp_path / "train.csv", index=False)
    values = {"data.train": tmp_path / "train.csv", "data.validation": "null", "data.test": "null"}
    warnings = list(make(**values, **{"data.validation_share": 0.3}).warnings(10))
    assert [note for note in warnings if "Sạc" in note] == [f"{tmp_path / 'train.csv'}: no review mentions Sạc"]


def test_truncated_texts_are_reported(make: Make) -> None:
    """In how many reviews, and how much of all that was written; a review of exactly the limit is whole."""
    whole = {name: task.tokenizer.encode(reviews.texts).lengths for task in [make().data]
             for name, reviews in task.splits.by_name.items()}  # fmt: skip
    longest = np.unique(whole["train"])
    reported = []
    for limit in (longest[-1], longest[-2], longest[len(longest) // 2]):
        warnings = make(**{"model.max_tokens": int(limit)}).warnings(10)
        for name, lengths in whole.items():
            cut, share = (lengths > limit).sum(), np.maximum(lengths - limit, 0).sum() / lengths.sum()
            line = (
                f"model.max_tokens {limit} truncates {cut} of {len(lengths)} {name} reviews: {share:.1%} of all tokens"
            )
            reported.append(line in warnings)
            assert reported[-1] == (cut > 0.01 * len(lengths)), line
    assert not reported[0]
    assert reported[-3:] == [True] * 3


def test_the_worked_example_gives_no_warning(tmp_path: Path) -> None:
    values = {"data.embedded.rows": "400", "data.cache": str(tmp_path)}
    task = VisobertTask(load(VisobertConfig, ROOT / "configs" / "config_multi_embedded.yaml", values))
    assert task.warnings(10) == []


def test_copies_unknown_tokens_and_missing_texts_are_reported(
    make: Make, tmp_path: Path, files: dict[str, str]
) -> None:
    """Copies, tokens that nobody knows, and reviews without a text, which take no part in the training."""
    train = pd.read_csv(files["data.train"], keep_default_na=False)
    assert len(make().data.splits.train) == len(train)
    train.loc[:4, "data"] = ""
    train.to_csv(tmp_path / "train.csv", index=False)
    train[5:25].assign(data=lambda frame: frame["data"].str.upper() + " ").to_csv(tmp_path / "copies.csv", index=False)
    train[:6].assign(data="中").to_csv(tmp_path / "unknown.csv", index=False)  # <s>, the mark of a word, <unk>
    values = {"data.train": tmp_path / "train.csv", "data.validation": "null", "data.validation_share": 0.3}
    task = make(**values, **{"data.test": tmp_path / "copies.csv"})
    sizes = [len(reviews) for reviews in (task.data.splits.train, task.data.splits.valid)]
    assert sum(sizes) == len(train) - 5
    assert all(task.data.splits.train.texts)
    warnings = list(task.warnings(10))
    assert "20 of 20 test reviews are in train" in warnings  # or in the share of it that validates
    assert [note for note in warnings if note.startswith(f"{tmp_path / 'train.csv'}: 5 labelled reviews have no text")]
    warnings = list(make(**values, **{"data.test": tmp_path / "unknown.csv"}).warnings(10))
    assert "33.3% of the tokens of test are unknown to the tokenizer" in warnings
    assert not [note for note in warnings if "reviews are in train" in note]
    warnings = list(make(**{"data.validation": files["data.train"]}).warnings(10))
    assert f"{len(train)} of {len(train)} valid reviews are in train" in warnings


def test_copies_in_another_spelling_are_reported(make: Make, tmp_path: Path, files: dict[str, str]) -> None:
    """The tone on another vowel, decomposed letters, and HTML entities."""
    train = pd.read_csv(files["data.train"], keep_default_na=False)
    train.loc[0, "data"] = "Hòa thì thích, thủy thì không"
    train.to_csv(tmp_path / "train.csv", index=False)
    test = pd.concat([train[:1]] * 4, ignore_index=True)
    test["data"] = ["Hoà thì thích, thuỷ thì không", unicodedata.normalize("NFD", train.loc[0, "data"]),
                    "H&ograve;a th&#236; th&iacute;ch, thủy thì&nbsp;không", "Hoa thì thích"]  # fmt: skip
    test.to_csv(tmp_path / "test.csv", index=False)
    warnings = make(**{"data.train": tmp_path / "train.csv", "data.test": tmp_path / "test.csv"}).warnings(10)
    assert "3 of 4 test reviews are in train" in warnings


# ---------------------------------------------------------------- evaluation and predictions


def trained(task: VisobertTask) -> AspectSentimentModel:
    torch.manual_seed(task.config.seed)
    model = scrambled(task.model(), std=1.0)
    evaluate(task, model, "valid", "cpu")
    return model  # type: ignore[no-any-return]


def test_evaluation_scores_the_split_in_its_own_order(make: Make) -> None:
    task = make(**{"evaluation.batch_size": 7})
    model = scrambled(task.model(), std=0.5)
    before = model.training
    metrics = evaluate(task, model, "valid", "cpu")
    assert model.training is before
    table, reviews = task.data.table("valid"), task.data.splits.valid
    assert table is not None
    with torch.no_grad():
        alone = [model(batch.ids, batch.mask) for row in range(len(table)) for batch in [table.batch(np.array([row]))]]
    output = Output(torch.cat([batch.sentiment for batch in alone]), torch.cat([batch.aspect for batch in alone]))
    assert output.aspect is not None
    probability = torch.sigmoid(output.aspect.double()).numpy()
    np.testing.assert_allclose(model.thresholds, tuned_thresholds(reviews.labels, probability), rtol=0, atol=1e-4)
    expected = hand_losses(task, output, torch.from_numpy(reviews.labels))
    assert {name: metrics[f"valid/{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)
    cells = np.isin(reviews.labels, [P, N, U])
    guess = output.sentiment.argmax(-1).numpy()
    assert metrics["valid/sentiment_accuracy"] == pytest.approx((guess == reviews.labels)[cells].mean())
    mentioned = probability >= model.thresholds.double().numpy()
    known, truth = reviews.labels != X, reviews.labels > O
    for index, aspect in enumerate(ASPECTS):
        hits = (mentioned & truth & known)[:, index].sum()
        both = (mentioned & known)[:, index].sum() + (truth & known)[:, index].sum()
        assert metrics[f"valid/aspect_f1/{aspect}"] == pytest.approx(2 * hits / both)
    contract = {"aspect_f1_macro", "sentiment_f1_macro", "pair_f1_micro", "f1/Pin", "f1/Camera"}
    assert {f"valid/{name}" for name in contract} <= set(metrics)
    assert "valid/f1/Khác" not in metrics


def test_optional_parts_may_fail(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A baseline, a picture, the rows of a metric, the calibration: each costs a line, and nothing else."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken\nfor good")

    for module, name in (
        (baselines, "TfidfBaseline"),
        (evaluation, "write_pair_rows"),
        (evaluation, "fit_temperature"),
    ):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(report.plots, "confusion", fail)
    task = make(baselines="true")
    model = trained(task)
    names = set(evaluate(task, model, "test", "cpu"))
    assert {name.rpartition("_")[2] for name in names if name.startswith("test/pair_f1_micro_")} == {"majority"}
    with evaluating(model):
        assert task.calibrate(model, "cpu") == {}
    with evaluating(model):
        task.report(model, tmp_path, "cpu")
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {
        f"test_{name}.csv" for name in ("aspects", "confusion", "predictions", "errors")
    }
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(" (test_review_task.py, line ")[0] for line in lines] == [
        f"warning: {what} is left out: RuntimeError: broken for good"
        for what in ("the TF-IDF baseline", "the calibration of sentiment", "the calibration of aspect",
                     "plots/test_confusion.png", "evaluation/test_rows.parquet")
    ]  # fmt: skip
    monkeypatch.setattr(evaluation, "write_report", fail)
    with evaluating(model):
        task.report(model, tmp_path / "no", "cpu")
    assert "warning: the report of test is left out: RuntimeError: broken for good" in capsys.readouterr().err


def test_the_test_split_does_not_move_the_thresholds(make: Make) -> None:
    task = make()
    model = trained(task)
    before = model.thresholds.clone()
    metrics = evaluate(task, model, "test", "cpu")
    assert torch.equal(model.thresholds, before)
    assert {name.split("/")[0] for name in metrics} == {"test"}
    assert evaluate(make(**{"data.test": "null"}), model, "test", "cpu") == {}


@pytest.mark.parametrize(
    "options", [{"baselines": "true"}, {"model.aspect_detection": "false"}, {"model.calibrate": "false"}]
)
def test_known_metrics_are_those_of_an_evaluation(make: Make, options: dict[str, str]) -> None:
    task = make(**options)
    model = task.model()
    with evaluating(model):
        task.calibrate(model, "cpu")
    for split in ("valid", "test"):
        assert set(evaluate(task, model, split, "cpu")) == set(task.known_metrics(split))
        assert not any(task.known_metrics(split).values())


def test_undefined_metrics_name_the_missing_labels(make: Make) -> None:
    task = make(**{"data.test": "null"})
    assert set(task.known_metrics("test").values()) == {"needs a test split: there is none"}
    camera = task.evaluation.names.index("Camera")
    task.data.splits.valid.labels[:, camera] = X
    lacks = task.known_metrics("valid")
    assert set(evaluate(task, task.model(), "valid", "cpu")) == {name for name, why in lacks.items() if not why}
    assert {name: why for name, why in lacks.items() if why} == {
        f"valid/{kind}/Camera": "needs labels of Camera: validation has none in 40 reviews"
        for kind in ("f1", "aspect_f1")
    }
    with pytest.raises(UserError, match=r"^evaluation.metric: found valid/f1/Pni, .* did you mean valid/f1/Pin\?$"):
        undefined(task, "evaluation.metric", "valid/f1/Pni")


def assert_same_predictions(frame: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert list(frame.columns) == list(expected.columns)
    for name in frame.columns:
        if "/" in name:
            # batches of other shapes: logits of size 50 are off by up to 1e-4, probabilities by a quarter of that
            np.testing.assert_allclose(frame[name], expected[name], rtol=0, atol=1e-4)
        else:
            assert frame[name].fillna("-").tolist() == expected[name].fillna("-").tolist()


@pytest.mark.parametrize("options", [{}, {"model.aspect_detection": "false"}, {"model.pooling": "cls"}], ids=str)
def test_an_exported_model_predicts_as_the_task_does(make: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    task = make(**options)
    model = trained(task)
    with evaluating(model):
        assert set(task.calibrate(model, "cpu")) == {"sentiment", *(["aspect"] if model.detects else [])}
    export = task.export(model, tmp_path / "model")
    table, reviews = task.data.table("test"), task.data.splits.test
    assert table is not None
    assert reviews is not None
    expected = task.evaluation.predictions(model, task.evaluation.predict(model, "test", "cpu")).frame()
    frame = predict.load(tmp_path / "model")(list(reviews.texts))
    assert_same_predictions(frame, expected)
    task.evaluation.calibration = {}
    plain = task.evaluation.predictions(model, task.evaluation.predict(model, "test", "cpu")).frame()
    assert_same_predictions(predict.load(tmp_path / "model")(list(reviews.texts), raw=True), plain)
    assert (frame.filter(like="/") - plain.filter(like="/")).abs().max().max() > 1e-3
    assert list(frame.columns) == list(export.outputs)
    assert frame.filter(like="/").std().max() > 0.01  # not all the same
    assert export.inputs is None
    assert all(isinstance(text, str) and text for text in export.example)


@pytest.fixture
def answer(make: Make, tmp_path: Path) -> Callable[[Any], pd.DataFrame]:
    task = make()
    task.export(trained(task), tmp_path / "model")
    return predict.load(tmp_path / "model")


def test_texts_in_any_form(answer: Callable[[Any], pd.DataFrame]) -> None:
    texts = ["pin trâu", "camera tệ lắm nhé shop ơi", "ok", "pin trâu"]
    expected = answer(texts)
    assert expected.index.tolist() == [0, 1, 2, 3]
    forms = [np.array(texts, dtype=object), np.array(texts), pd.Series(texts), tuple(texts), pd.DataFrame(texts),
             pd.DataFrame({"data": texts}), pd.DataFrame({"stars": [1, 2, 3, 4], "data": texts}), {"data": texts},
             [{"id": str(row), "data": text} for row, text in enumerate(texts)], np.array(texts)[:, None]]  # fmt: skip
    for form in forms:
        pd.testing.assert_frame_equal(answer(form), expected)
    for form in (texts[0], {"data": texts[0], "id": "r1"}):
        assert_same_predictions(answer(form), expected[:1])
    index = pd.Index(["a", "b", "c", "d"])
    for form in (pd.Series(texts, index=index), pd.DataFrame({"data": texts}, index=index)):
        assert answer(form).index.tolist() == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (pd.DataFrame({"id": ["r1"]}), "texts: found column 'id'; allowed: column 'data', or a list"),
        (pd.DataFrame({"id": ["r1"], "text": ["ok"]}), "texts: found column 'id', 'text'; allowed: column 'data'"),
        (pd.DataFrame([["ok", "tốt"]], columns=["data", "data"]), "texts: found column 'data', 'data'; allowed"),
        ({"id": ["r1"]}, "texts: found column 'id'; allowed"),
        ([["r1", "ok"]], "texts: found 2 columns without names; allowed"),
        (["ok", ["tốt"]], "texts: row 2: found list \"['tốt']\", allowed: text"),
        ({"data": ["ok", 5]}, "texts: row 2: found int '5', allowed: text"),
        (pd.Series([b"ok"]), "texts: row 1: found bytes"),
    ],
)
def test_input_without_texts_is_refused(answer: Callable[[Any], pd.DataFrame], form: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        answer(form)
    assert str(caught.value).startswith(message)


def test_no_text_and_empty_texts(answer: Callable[[Any], pd.DataFrame]) -> None:
    columns = list(answer(["ok"]).columns)
    for nothing in ([], pd.Series([], dtype=object), pd.DataFrame({"data": []})):
        frame = answer(nothing)
        assert (len(frame), list(frame.columns)) == (0, columns)
    blank = answer(["", None, float("nan"), " "])
    probabilities = blank[[name for name in columns if "/" in name]].to_numpy()
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities, probabilities[[0] * 4], rtol=0, atol=1e-4)


def test_a_pretrained_model_there_and_back(make: Make, tmp_path: Path) -> None:
    """From a folder with BERT's files to an exported model that no longer needs it."""
    from transformers import BertConfig, BertModel

    folder = tmp_path / "bert"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    BertModel(BertConfig(vocab_size=40, max_position_embeddings=24, **sizes)).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "pin", "trau", "camera", "may", "lag", "qua", "te", "shop"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    options = {"model.name": folder, "model.max_tokens": 24, "model.hidden": 8, "training.amp": "no"}
    task = make(**options)
    model = trained(task)
    assert task.parameters == sum(weight.numel() for weight in model.parameters())
    task.export(model, tmp_path / "model")
    reviews, table = task.data.splits.test, task.data.table("test")
    assert reviews is not None
    assert table is not None
    expected = task.evaluation.predictions(model, task.evaluation.predict(model, "test", "cpu")).frame()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    answer = predict.load(tmp_path / "model")
    assert_same_predictions(answer(list(reviews.texts)), expected)
    assert len(answer([])) == 0
