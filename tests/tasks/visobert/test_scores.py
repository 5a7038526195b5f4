"""Scores, thresholds, baselines, predictions and reports: against scikit-learn, sets in plain Python, and by hand."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from pipeline.tasks.visobert.model import Output
from pipeline.tasks.visobert.prepare.review_statistics import ALL
from pipeline.tasks.visobert.reviews.reviews import Reviews
from pipeline.tasks.visobert.reviews.sentiments import MENTIONED, NOT_MENTIONED, SENTIMENTS, UNKNOWN
from pipeline.tasks.visobert.scoring.baselines import TfidfBaseline, majority
from pipeline.tasks.visobert.scoring.predictions import PredictedLabels, Predictions, column_types
from pipeline.tasks.visobert.scoring.report import MAX_ERRORS, confident_errors, write_report
from pipeline.tasks.visobert.scoring.scores import aspect_table, known_scores, score, tuned_thresholds

torch.set_num_threads(1)

P, N, U = 0, 1, 2
O, M, X = NOT_MENTIONED, MENTIONED, UNKNOWN  # noqa: E741 (nothing, mention, unknown: tables stay readable)

Labels = npt.NDArray[np.int8]


def table(rows: Sequence[Sequence[int]]) -> Labels:
    return np.array(rows, dtype=np.int8)


def reviews_of(labels: Labels, aspects: Sequence[str], texts: Sequence[str] | None = None) -> Reviews:
    texts = texts or [f"review {row}" for row in range(len(labels))]
    return Reviews("a.csv", "0" * 64, tuple(texts), labels, tuple(aspects), np.arange(len(texts)))


# ---------------------------------------------------------------- scores by hand

# pin, camera with sentiments; khác is detection-only
LABELS = table([[P, O, M], [N, U, O], [P, X, M], [O, M, O], [U, N, X]])
PREDICTED = PredictedLabels(
    sentiment=table([[P, P, P], [P, U, P], [P, N, N], [N, N, N], [U, P, P]]),
    mentioned=np.array([[1, 1, 1], [1, 1, 1], [0, 1, 0], [0, 1, 0], [1, 0, 1]], dtype=bool),
)
POLAR = np.array([True, True, False])
NAMES = ("pin", "camera", "khác")


def test_by_hand() -> None:
    """Labelled cells, truth/said: P/P, N/P, U/U, P/P, U/U, N/P. So F1 of positive is 2*2/(4+2), negative 0, neutral 1.

    Pairs judged on pin and camera, camera's X and M left out: wanted (0,pin,P) (1,pin,N) (1,cam,U) (2,pin,P) (4,pin,U)
    (4,cam,N); given (0,pin,P) (0,cam,P) (1,pin,P) (1,cam,U) (4,pin,U): 3 hits of 6 wanted and 5 given.
    By pair: pin P 1 of 2+2, pin N 0 of 1+0, pin U 1 of 1+1, camera N 0, camera U 1 of 1+1; camera P does not occur.
    """
    scores = score(LABELS, PREDICTED, NAMES, POLAR)
    expected = {
        "sentiment_f1_macro": 5 / 9,
        "sentiment_f1_macro_present": 5 / 9,
        "sentiment_accuracy": 4 / 6,
        "sentiment_f1/positive": 2 / 3,
        "sentiment_f1/negative": 0,
        "sentiment_f1/neutral": 1,
        "support/positive": 2,
        "support/negative": 2,
        "support/neutral": 2,
        "f1/pin": (4 / 5 + 0 + 1) / 3,  # P/P N/P P/P U/U
        "f1/camera": (0 + 0 + 1) / 3,  # U/U N/P
        # detection, truth and said: pin 11101, 11001; camera 01-11, 11-10; khác 1010-, 1100-
        "aspect_f1/pin": 6 / 7,
        "aspect_f1/camera": 4 / 6,
        "aspect_f1/khác": 2 / 4,
        "aspect_f1_macro": (6 / 7 + 2 / 3) / 2,
        "aspect_f1_micro": 10 / 13,
        "aspect_f1_macro_all": (6 / 7 + 2 / 3 + 1 / 2) / 3,
        "pair_f1_micro": 6 / 11,
        "pair_f1_macro": (0.5 + 0 + 1 + 0 + 1) / 5,
        "pair_precision": 3 / 5,
        "pair_recall": 3 / 6,
        "exact_match": 1 / 5,  # review 3: nothing is judged but pin, which is rightly absent
    }
    assert scores == pytest.approx(expected, abs=1e-12)


def test_an_aspect_without_labels() -> None:
    labels, polar = table([[P, O], [N, O]]), np.array([True, True])
    mentioned = np.array([[True, False], [True, False]])
    scores = score(labels, PredictedLabels(table([[P, P], [N, P]]), mentioned), ("pin", "sạc"), polar)
    assert "f1/sạc" not in scores
    assert scores["aspect_f1/sạc"] == 0
    assert scores["aspect_f1_macro"] == 0.5
    assert scores["pair_f1_micro"] == scores["pair_f1_macro"] == scores["exact_match"] == 1
    assert scores["sentiment_f1_macro"] == pytest.approx(2 / 3)  # neutral neither occurs nor is predicted: 0
    assert "aspect_f1_macro_all" not in scores


def test_the_macro_over_the_sentiments_that_occur() -> None:
    """Truth P P N, said P U N: F1 of positive is 2/3, of negative 1; neutral is said, but does not occur."""
    labels, said = table([[P], [P], [N]]), PredictedLabels(table([[P], [U], [N]]), None)
    scores = score(labels, said, ("pin",), np.array([True]))
    assert scores["sentiment_f1_macro"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores["sentiment_f1_macro_present"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["sentiment_f1_macro_present"] == pytest.approx(
        f1_score([P, P, N], [P, U, N], labels=[P, N], average="macro")
    )


def test_a_split_in_which_an_aspect_is_unknown_throughout() -> None:
    """Every cell of a column was a bad label that was dropped: it is not judged, and the others are."""
    labels = table([[P, X], [N, X]])
    said = PredictedLabels(table([[P, P], [N, P]]), np.ones((2, 2), dtype=bool))
    scores = score(labels, said, ("pin", "sạc"), np.array([True, True]))
    assert scores["pair_f1_micro"] == 1
    assert scores["aspect_f1/pin"] == 1
    rows = aspect_table(labels, said, ("pin", "sạc"), np.array([True, True]))
    assert rows[0]["aspect_f1"] == 1


@given(
    labels=st.lists(st.lists(st.sampled_from([P, N, U, O, M, X]), min_size=3, max_size=3), max_size=4),
    polar=st.lists(st.booleans(), min_size=3, max_size=3),
    said=st.integers(0, 99),
    detection=st.booleans(),
)
def test_known_scores_do_not_depend_on_predictions(
    labels: list[list[int]], polar: list[bool], said: int, detection: bool
) -> None:
    truth, flags, generator = (
        np.array(labels, dtype=np.int8).reshape(-1, 3),
        np.array(polar),
        np.random.default_rng(said),
    )
    truth[:, ~flags] = np.where(np.isin(truth[:, ~flags], (P, N, U)), M, truth[:, ~flags])
    mentioned = generator.random(truth.shape) < 0.5 if detection else None
    scores = score(
        truth, PredictedLabels(generator.integers(0, 3, truth.shape, dtype=np.int8), mentioned), NAMES, flags
    )
    known = known_scores(truth, NAMES, flags, detection)
    assert set(scores) == {name for name, missing in known.items() if not missing}
    assert list(known_scores(None, NAMES, flags, detection)) == list(known)
    for name, missing in known.items():
        assert missing in ("", f"labels of {name.rpartition('/')[2]}" if name.endswith(NAMES) else "labels")


def test_a_split_without_reviews_or_without_sentiments() -> None:
    nothing = np.zeros((0, 2), dtype=np.int8)
    polar = np.array([True, True])
    assert score(nothing, PredictedLabels(nothing, None), ("a", "b"), polar) == {}
    said = PredictedLabels(table([[P, P]]), np.array([[False, True]]))
    scores = score(table([[O, M]]), said, ("a", "b"), polar)
    assert scores == {"aspect_f1/a": 0, "aspect_f1/b": 1, "aspect_f1_macro": 0.5, "aspect_f1_micro": 1}


# ---------------------------------------------------------------- scores against others

codes = st.sampled_from([P, N, U, O, O, O, M, X])


@st.composite
def judged(draw: st.DrawFn) -> tuple[Labels, PredictedLabels, npt.NDArray[np.bool_]]:
    rows, aspects = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**31))
    random = np.random.Generator(np.random.PCG64(seed))
    labels = random.choice([P, N, U, O, O, O, M, X], (rows, aspects)).astype(np.int8)
    labels[0] = random.choice([P, N, U, O, M], aspects)  # not all unknown
    polar = random.random(aspects) < 0.8
    labels[:, ~polar] = np.where((labels[:, ~polar] >= 0) & (labels[:, ~polar] < 3), M, labels[:, ~polar])
    sentiment = random.integers(0, 3, (rows, aspects)).astype(np.int8)
    agree = random.random((rows, aspects)) < 0.6
    sentiment = np.where(agree & (labels >= 0) & (labels < 3), labels, sentiment).astype(np.int8)
    return labels, PredictedLabels(sentiment, random.random((rows, aspects)) < 0.5), polar


def f1_of_sets(wanted: set[Any], given_: set[Any]) -> float:
    hits = len(wanted & given_)
    return 2 * hits / (len(wanted) + len(given_)) if wanted or given_ else 0.0


@settings(deadline=None, max_examples=60)
@given(judged())
def test_pair_scores_equal_set_arithmetic(case: tuple[Labels, PredictedLabels, npt.NDArray[np.bool_]]) -> None:
    labels, said, polar = case
    assert said.mentioned is not None
    wanted, given_, right = set(), set(), 0
    for row, codes_ in enumerate(labels.tolist()):
        mistakes = 0
        for aspect, code in enumerate(codes_):
            if not polar[aspect] or code in (X, M):
                continue
            truth = {(row, aspect, code)} if code != O else set()
            guess = {(row, aspect, int(said.sentiment[row, aspect]))} if said.mentioned[row, aspect] else set()
            mistakes += truth != guess
            wanted |= truth
            given_ |= guess
        right += not mistakes
    scores = score(labels, said, [f"a{index}" for index in range(len(polar))], polar)
    if not wanted:
        assert "pair_f1_micro" not in scores
        return
    hits = len(wanted & given_)
    assert scores["pair_f1_micro"] == pytest.approx(f1_of_sets(wanted, given_))
    assert scores["pair_precision"] == pytest.approx(hits / len(given_) if given_ else 0)
    assert scores["pair_recall"] == pytest.approx(hits / len(wanted))
    assert scores["exact_match"] == pytest.approx(right / len(labels))
    kinds = {pair[1:] for pair in wanted}
    each = [f1_of_sets({p for p in wanted if p[1:] == kind}, {p for p in given_ if p[1:] == kind}) for kind in kinds]
    assert scores["pair_f1_macro"] == pytest.approx(np.mean(each))


def test_the_table_of_aspects_by_hand() -> None:
    pin, camera, other = aspect_table(LABELS, PREDICTED, NAMES, POLAR)
    assert (pin["mentions"], camera["mentions"], other["mentions"]) == (4, 3, 2)
    assert [pin["aspect_f1"], camera["aspect_f1"], other["aspect_f1"]] == pytest.approx([6 / 7, 2 / 3, 1 / 2])
    assert [pin[f"f1_{name}"] for name in SENTIMENTS] == pytest.approx([4 / 5, 0, 1])
    assert [pin[f"support_{name}"] for name in SENTIMENTS] == [2, 1, 1]
    assert camera["sentiment_f1_macro"] == pytest.approx(1 / 3)
    assert set(other) == {"aspect", "mentions", "aspect_f1"}
    assert "aspect_f1" not in aspect_table(LABELS, PredictedLabels(PREDICTED.sentiment, None), NAMES, POLAR)[0]


# ---------------------------------------------------------------- thresholds


def best_cut(truth: Sequence[bool], value: Sequence[float]) -> float:
    """Try every threshold half-way between two neighbouring values, and below the lowest; of equal ones the highest."""
    points = sorted({*value, 0.0}, reverse=True)
    cuts = [(high + low) / 2 for high, low in itertools.pairwise(points)]
    scores = [f1_score(truth, np.array(value) >= cut, zero_division=0) for cut in cuts]
    return cuts[int(np.argmax(np.array(scores) > max(scores) - 1e-12))]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(codes, st.integers(1, 20)), min_size=1, max_size=15),
    st.integers(0, 2**31),
)
def test_thresholds_are_best_cuts_shrunk_towards_one_half(listed: list[tuple[int, int]], seed: int) -> None:
    """Values are twentieths, so that many are equal."""
    labels = table([[code] for code, _ in listed])
    probability = np.array([[value / 20] for _, value in listed])
    threshold = tuned_thresholds(labels, probability)[0]
    known = [(code != O, value / 20) for code, value in listed if code != X]
    mentions = sum(truth for truth, _ in known)
    if not mentions:
        assert threshold == 0.5
        return
    best = best_cut([truth for truth, _ in known], [value for _, value in known])
    assert threshold == pytest.approx((mentions * best + 30 * 0.5) / (mentions + 30), abs=1e-12)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(labels))
    assert tuned_thresholds(labels[order], probability[order])[0] == pytest.approx(threshold, abs=1e-12)


def test_thresholds_by_hand() -> None:
    """First aspect: mentions at .9 and .3, none at .5 and .1. From .9: F1 2/3, from .5: 1/2, from .3: 4/5, all: 2/3.
    So the cut is .2, drawn to (2 * .2 + 30 * .5) / 32. Second: no mention, third: 60 at .8 above 60 at .2."""
    labels = np.full((120, 3), O, dtype=np.int8)
    labels[4:, 0] = X
    labels[:4, 0] = [P, O, M, O]
    labels[:60, 2] = N
    probability = np.full((120, 3), 0.4)
    probability[:4, 0] = [0.9, 0.5, 0.3, 0.1]
    probability[:, 2] = np.where(labels[:, 2] == N, 0.8, 0.2)
    thresholds = tuned_thresholds(labels, probability)
    assert thresholds.tolist() == pytest.approx([(2 * 0.2 + 15) / 32, 0.5, (60 * 0.5 + 15) / 90])


# ---------------------------------------------------------------- baselines


def test_the_majority_by_hand() -> None:
    """Pin: 2 negative against 1, mentioned in 3 of 4 known; camera: half of 4 is no majority; khác: never."""
    training = table([[N, U, O], [N, P, X], [P, O, O], [O, O, O], [X, X, O], [X, X, O], [X, X, O]])
    predicted = majority(training, 3)
    assert predicted.sentiment[:, :2].tolist() == [[N, P]] * 3  # camera: a tie goes to the first
    assert predicted.mentioned is not None
    assert predicted.mentioned.tolist() == [[True, False, False]] * 3
    assert predicted.sentiment.dtype == np.int8
    assert majority(training, 0).sentiment.shape == (0, 3)


def toy(count: int = 120) -> tuple[list[str], Labels]:
    """A word for each aspect with a word for its sentiment; khác is a mention alone; rows without any."""
    texts, rows = [], []
    words = {P: "tốt", N: "tệ", U: "thường"}
    for index in range(count):
        pin, camera = [(P, O), (N, P), (U, N), (O, U), (O, O), (P, O)][index % 6]
        parts = [] if pin == O else [f"pin {words[pin]}pin"]
        parts += [] if camera == O else [f"camera {words[camera]}cam"]
        parts += ["giao hàng"] if index % 4 == 0 else []
        texts.append(", ".join([*parts, "nhé bạn ơi"]))
        rows.append([pin, camera, M if index % 4 == 0 else O])
    return texts, table(rows)


def test_tfidf_learns_a_toy() -> None:
    texts, labels = toy()
    predicted = TfidfBaseline(texts, labels, (texts, labels)).predict(texts)
    assert predicted.mentioned is not None
    assert (predicted.mentioned == (labels != O)).all()
    cells = np.isin(labels, [P, N, U])
    assert (predicted.sentiment[cells] == labels[cells]).all()
    scores = score(labels, predicted, ("pin", "camera", "khác"), np.array([True, True, False]))
    assert scores["pair_f1_micro"] == scores["aspect_f1_macro_all"] == scores["exact_match"] == 1
    again = TfidfBaseline(texts, labels, (texts, labels)).predict(texts)
    assert (again.sentiment == predicted.sentiment).all()


def test_tfidf_with_sentiments_that_do_not_occur() -> None:
    """Pin is always negative, camera never positive, sạc never labelled: what cannot be told apart is constant."""
    texts, labels = toy()
    labels = labels.copy()
    labels[:, 0] = np.where(labels[:, 0] == O, O, N)
    labels[labels[:, 1] == P, 1] = U
    labels[:, 2] = X
    predicted = TfidfBaseline(texts, labels, (texts, labels)).predict(texts)
    assert predicted.mentioned is not None
    assert set(predicted.sentiment[:, 0].tolist()) == {N}
    assert set(predicted.sentiment[:, 1].tolist()) == {N, U}
    cells = np.isin(labels, [P, N, U])
    assert (predicted.sentiment[cells] == labels[cells]).all()
    assert not predicted.mentioned[:, 2].any()


def test_tfidf_takes_its_thresholds_from_validation() -> None:
    """Where validation never mentions camera, though training does, its threshold is 1/2."""
    texts, labels = toy()
    silent = labels.copy()
    silent[:, 1] = O
    baseline = TfidfBaseline(texts, labels, (texts, silent))
    assert baseline.thresholds[1] == 0.5
    assert TfidfBaseline(texts, labels, (texts, labels)).thresholds[1] != 0.5


def test_tfidf_of_a_handful_of_reviews() -> None:
    """No word comes twice: there is nothing to learn, but no reason to stop a run either."""
    labels = table([[P], [N], [O]])
    baseline = TfidfBaseline(["pin trâu", "máy lag", "giao chậm"], labels, (["ok"], table([[P]])))
    assert baseline.predict(["pin", "xyz"]).sentiment.shape == (2, 1)


def test_tfidf_where_no_word_comes_twice() -> None:
    """As in Chinese: every review is one word, and its letters are what there is to learn from."""
    things = [chr(0x4E00 + number) for number in range(60)]
    texts = [f"{thing}{verdict}" for thing in things for verdict in ("真的很好", "真的太差")]
    labels = table([[P], [N]] * 60)
    predicted = TfidfBaseline(texts, labels, (texts, labels)).predict(texts)
    assert (predicted.sentiment == labels).all()
    with pytest.raises(ValueError, match="no word is in 2 of the training reviews, and no letters are in 3"):
        TfidfBaseline(things, table([[P]] * 60), (things, table([[P]] * 60)))


# ---------------------------------------------------------------- predictions


ASPECTS = ("pin", "giá cả", "khác")
PREDICTIONS = Predictions(
    Output(
        torch.log(torch.tensor([[[0.5, 0.3, 0.2]] * 3, [[0.1, 0.2, 0.7]] * 3, [[0.2, 0.6, 0.2]] * 3])),
        torch.logit(torch.tensor([[0.9, 0.3, 0.6], [0.2, 0.5, 0.4], [0.7, 0.1, 0.1]])),
    ),
    np.array([0.6, 0.4, 0.5]),
    ASPECTS,
    np.array([True, True, False]),
)


def assert_cells(column: pd.Series, expected: list[str | None]) -> None:
    """None is None: neither NaN nor text."""
    cells = column.tolist()
    assert cells == expected
    assert all(cell is None or isinstance(cell, str) for cell in cells)


def test_the_frame_by_hand() -> None:
    frame = PREDICTIONS.frame()
    assert_cells(frame["pin"], ["positive", None, "negative"])
    assert_cells(frame["giá cả"], [None, "neutral", None])
    assert_cells(frame["khác"], ["mentioned", None, None])
    assert list(frame.columns) == [
        *ASPECTS,
        "pin/mentioned", "pin/positive", "pin/negative", "pin/neutral",
        "giá cả/mentioned", "giá cả/positive", "giá cả/negative", "giá cả/neutral",
        "khác/mentioned",
    ]  # fmt: skip
    np.testing.assert_allclose(frame["giá cả/mentioned"], [0.3, 0.5, 0.1], rtol=1e-5)
    np.testing.assert_allclose(frame["pin/positive"], [0.5, 0.1, 0.2], rtol=1e-5)
    np.testing.assert_allclose(frame["pin/neutral"], [0.2, 0.7, 0.2], rtol=1e-5)
    np.testing.assert_allclose(frame["khác/mentioned"], [0.6, 0.4, 0.1], rtol=1e-5)


def test_calibration_changes_probabilities_but_no_label() -> None:
    calibration = {"aspect": {"temperature": 0.5}, "sentiment": {"temperature": 2.0}}
    frame = dataclasses.replace(PREDICTIONS, calibration=calibration).frame()
    pd.testing.assert_frame_equal(frame[list(ASPECTS)], PREDICTIONS.frame()[list(ASPECTS)])
    assert frame["giá cả/mentioned"].tolist() == pytest.approx([9 / 58, 0.5, 1 / 82])  # odds squared: 9:49, 1:1, 1:81
    roots = np.sqrt([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.2, 0.6, 0.2]])
    probabilities = frame[[f"pin/{name}" for name in ("positive", "negative", "neutral")]].to_numpy()
    np.testing.assert_allclose(probabilities, roots / roots.sum(1, keepdims=True), rtol=1e-5)


def test_columns_that_are_all_none() -> None:
    frame = Predictions(PREDICTIONS.output, np.ones(3), ASPECTS, PREDICTIONS.polar).frame()
    for aspect in ASPECTS:
        assert_cells(frame[aspect], [None, None, None])


def test_the_frame_without_detection() -> None:
    predictions = Predictions(
        Output(PREDICTIONS.output.sentiment, None), PREDICTIONS.thresholds, ASPECTS, PREDICTIONS.polar
    )
    frame = predictions.frame()
    assert predictions.labels.mentioned is None
    assert_cells(frame["pin"], ["positive", "neutral", "negative"])
    assert_cells(frame["khác"], [None, None, None])
    assert list(frame.columns) == [*ASPECTS, *(f"{aspect}/{name}" for aspect in ASPECTS[:2] for name in SENTIMENTS)]


@pytest.mark.parametrize("detection", [True, False])
def test_no_review_is_an_empty_frame(detection: bool) -> None:
    output = Output(torch.empty(0, 3, 3), torch.empty(0, 3) if detection else None)
    frame = Predictions(output, PREDICTIONS.thresholds, ASPECTS, PREDICTIONS.polar).frame()
    types = column_types(ASPECTS, PREDICTIONS.polar, detection)
    assert len(frame) == 0
    assert list(frame.columns) == list(types)
    assert {name for name, kind in types.items() if kind == "string"} == set(ASPECTS)
    assert {kind for name, kind in types.items() if name not in ASPECTS} == {"double"}


# ---------------------------------------------------------------- reports


def test_the_most_confident_errors_come_first() -> None:
    labels = table([[P, O, O], [N, U, O], [X, M, O]])
    errors = confident_errors(reviews_of(labels, ASPECTS), PREDICTIONS)
    rows = [tuple(row) for row in errors.drop(columns="probability").itertuples(index=False)]
    # review 0: right in pin and price, khác is mentioned but should not be (.6)
    # review 1: pin is negative, said neutral (.7), not mentioned (.8 sure); price right
    # review 2: pin unknown; price is mentioned (without a polarity), said absent (.9 sure)
    assert rows == [
        ("mention", "giá cả", "mentioned", "-", "review 2"),
        ("mention", "pin", "negative", "-", "review 1"),
        ("sentiment", "pin", "negative", "neutral", "review 1"),
        ("mention", "khác", "-", "mentioned", "review 0"),
    ]
    np.testing.assert_allclose(errors["probability"], [0.9, 0.8, 0.7, 0.6], rtol=1e-5)


def test_the_number_of_errors_is_limited() -> None:
    count = MAX_ERRORS + 50
    output = Output(torch.zeros(count, 1, 3), torch.linspace(1, 5, count).unsqueeze(1))
    predictions = Predictions(output, np.array([0.5]), ("pin",), np.array([True]))
    errors = confident_errors(reviews_of(np.full((count, 1), O, np.int8), ("pin",)), predictions)
    assert len(errors) == MAX_ERRORS
    assert errors["text"][0] == f"review {count - 1}"


def test_the_files_of_a_report(tmp_path: Path) -> None:
    texts = ["pin\ntrâu", 'giá "rẻ", tốt', "ok"]
    labels = table([[P, O, M], [N, U, O], [X, M, O]])
    write_report(tmp_path, "test", reviews_of(labels, ASPECTS, texts), PREDICTIONS)
    tables = tmp_path / "evaluation"
    assert (tmp_path / "plots" / "test_confusion.png").read_bytes().startswith(b"\x89PNG")
    counts = pd.read_csv(tables / "test_confusion.csv", index_col=["aspect", "truth"])
    assert list(dict.fromkeys(aspect for aspect, _ in counts.index)) == [ALL, "pin", "giá cả"]
    matrices = {aspect: counts.loc[aspect].to_numpy().tolist() for aspect in (ALL, "pin", "giá cả")}
    assert matrices == {
        ALL: [[1, 0, 0], [0, 0, 1], [0, 0, 1]],
        "pin": [[1, 0, 0], [0, 0, 1], [0, 0, 0]],
        "giá cả": [[0, 0, 0], [0, 0, 0], [0, 0, 1]],
    }
    predictions = pd.read_csv(tables / "test_predictions.csv", keep_default_na=False)
    assert predictions["text"].tolist() == texts
    assert predictions["labels"].tolist() == ["{pin#Positive};{khác}", "{pin#Negative};{giá cả#Neutral}", "{giá cả}"]
    assert predictions["pin"].tolist() == ["positive", "", "negative"]
    assert pd.read_csv(tables / "test_aspects.csv")["mentions"].tolist() == [2, 2, 1]
    assert len(pd.read_csv(tables / "test_errors.csv")) == 3


def test_a_report_where_an_aspect_has_no_labelled_cell(tmp_path: Path) -> None:
    """Rare aspects may be missing from a test split."""
    write_report(tmp_path, "test", reviews_of(table([[P, O, M], [N, M, O], [X, O, O]]), ASPECTS), PREDICTIONS)
    assert (tmp_path / "evaluation" / "test_errors.csv").exists()


def test_a_report_of_aspects_with_any_name(tmp_path: Path) -> None:
    """`text` and `labels` are columns of ours, but may be aspects of theirs."""
    names = ("text", "labels", "khác")
    predictions = Predictions(PREDICTIONS.output, PREDICTIONS.thresholds, names, PREDICTIONS.polar)
    write_report(tmp_path, "valid", reviews_of(table([[P, O, M], [N, U, O], [X, M, O]]), names), predictions)
    assert (tmp_path / "evaluation" / "valid_predictions.csv").exists()


def test_a_probability_at_its_threshold_is_a_mention() -> None:
    output = Output(torch.zeros(2, 1, 3), torch.tensor([[0.0], [-1e-6]]))
    predictions = Predictions(output, np.array([0.5]), ("pin",), np.array([True]))
    assert predictions.labels.mentioned is not None
    assert predictions.labels.mentioned.tolist() == [[True], [False]]
