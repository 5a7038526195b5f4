"""Alpha, distribution, copies and lengths: by hand, against brute force, and the entry point as a user starts it."""

import itertools
import json
import unicodedata
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Call, Place, one_writer, project_in
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.names import metric_names
from pipeline.tasks.visobert.prepare import duplicates
from pipeline.tasks.visobert.prepare.duplicates import (
    distinct,
    find_duplicates,
    in_conflict,
    near_components,
    summary,
    write_duplicates,
)
from pipeline.tasks.visobert.prepare.review_statistics import distribution, token_lengths, write_distribution
from pipeline.tasks.visobert.reviews.alpha import (
    ALPHA_FILE,
    Alpha,
    auto_alpha,
    check_same_data,
    compute_alpha,
    count_sentiments,
)
from pipeline.tasks.visobert.reviews.reviews import Reviews, folded
from pipeline.tasks.visobert.reviews.sentiments import MENTIONED, NOT_MENTIONED, UNKNOWN

P, N, U = range(3)
O, M, X = NOT_MENTIONED, MENTIONED, UNKNOWN  # noqa: E741 (nothing, mention, unknown: tables stay readable)
COUNTS = (9_880, 9_734, 9_427)
FEWER = (988, 973, 943)  # 2904 / (3 * 988) = 0.97976, / (3 * 973) = 0.99486, / (3 * 943) = 1.02651
FEWER_TEXT = "[0.9798, 0.9949, 1.0265]"
ALPHA_TEXT = "[0.9798, 0.9945, 1.0269]"  # 29041 / (3 * 9880) = 0.97979, / (3 * 9734) = 0.99449, / (3 * 9427) = 1.02688


def reviews_of(labels: list[list[int]], texts: list[str] | None = None, **more: Any) -> Reviews:
    aspects = tuple("ABCDEFGH"[: len(labels[0])])
    texts = texts or [f"review {number}" for number in range(len(labels))]
    more = {"rows": np.arange(1, len(labels) + 1)} | more
    return Reviews("train.csv", "ab12", tuple(texts), np.array(labels, dtype=np.int8), aspects, **more)


# ---------------------------------------------------------------- alpha


def test_alpha_by_hand() -> None:
    assert auto_alpha([2, 1, 3]) == (6 / 6, 6 / 3, 6 / 9)
    assert [round(weight, 4) for weight in auto_alpha(COUNTS)] == json.loads(ALPHA_TEXT)
    labels = [[P, O, M], [P, N, M], [X, U, U], [N, P, O], [U, U, M]]
    assert count_sentiments(np.array(labels, dtype=np.int8)).tolist() == [[2, 1, 1], [1, 1, 2], [0, 0, 1]]
    assert count_sentiments(np.array(labels, dtype=np.int8)).dtype == np.int64

    alpha = compute_alpha(reviews_of(labels), ("C",), "auto")  # C's one neutral is a mention only
    assert alpha.counts == (3, 2, 3)
    assert alpha.vector == (8 / 9, 8 / 6, 8 / 9)
    assert alpha.text == "[0.8889, 1.3333, 0.8889]"
    assert alpha.metrics() == {"alpha/positive": 8 / 9, "alpha/negative": 8 / 6, "alpha/neutral": 8 / 9}
    assert (alpha.mode, alpha.labelled_cells, alpha.detection_only) == ("auto", 8, ("C",))
    assert alpha.per_aspect_counts == ((2, 1, 1), (1, 1, 2), (0, 0, 0))
    assert (alpha.digest, alpha.source) == ("ab12", "train.csv")
    every = compute_alpha(reviews_of(labels), (), "auto")
    assert every.counts == (3, 2, 4)
    assert every.metrics() == {"alpha/positive": 9 / 9, "alpha/negative": 9 / 6, "alpha/neutral": 9 / 12}


def test_custom_alpha_and_ones_still_carry_the_counts() -> None:
    reviews = reviews_of([[P], [P], [N]])
    custom = compute_alpha(reviews, (), (1.0, 1.23456789, 1.5))
    assert (custom.mode, custom.text, custom.counts) == ("custom", "[1.0, 1.23456789, 1.5]", (2, 1, 0))
    ones = compute_alpha(reviews, (), None)
    assert (ones.mode, ones.text, ones.vector) == ("ones", "[1.0, 1.0, 1.0]", (1.0, 1.0, 1.0))
    with pytest.raises(UserError, match=r"no neutral label among 3 labelled cells.*focal_alpha as a list of 3 numbers"):
        compute_alpha(reviews, (), "auto")


@pytest.mark.parametrize("focal_alpha", ["auto", (1.0, 2.0, 3.0), None])
def test_no_labelled_cell_is_an_error_in_every_mode(focal_alpha: Any) -> None:
    for reviews, only in ((reviews_of([[O], [M], [X]]), ()), (reviews_of([[P], [N], [U]]), ("A",))):
        with pytest.raises(UserError, match=r"train\.csv: no labelled cell at all"):
            compute_alpha(reviews, only, focal_alpha)


def test_alpha_file_round_trip(tmp_path: Path) -> None:
    alpha = compute_alpha(reviews_of([[P, O], [N, U], [U, U]]), (), "auto")
    alpha.write(tmp_path / ALPHA_FILE)
    assert Alpha.read(tmp_path / ALPHA_FILE) == alpha
    assert [file.name for file in tmp_path.iterdir()] == [ALPHA_FILE]
    tree = json.loads((tmp_path / ALPHA_FILE).read_text())
    assert tree["per_aspect_alpha"] == {"A": [1.0, 1.0, 1.0], "B": [None, None, 1 / 3]}
    assert tree["formula"].startswith("alpha[s] = labelled_cells / (3 * counts[s])")
    assert tree["order"] == ["positive", "negative", "neutral"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("counts"), "counts Field required"),
        (lambda tree: tree.update(vector=[1, 2]), "vector"),
        (lambda tree: tree.update(mode="car"), "mode"),
        (lambda tree: tree.update(counts=[-1, 1, 4]), "counts.0"),
    ],
)
def test_a_bad_alpha_file(tmp_path: Path, change: Any, message: str) -> None:
    file = tmp_path / ALPHA_FILE
    compute_alpha(reviews_of([[P, O], [N, U], [U, O]]), (), "auto").write(file)
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError) as caught:
        Alpha.read(file)
    assert str(caught.value).startswith(f"{file}: not an alpha.json of data_prep (")
    assert message in str(caught.value)


def test_alpha_of_other_labels_is_refused(tmp_path: Path) -> None:
    """The same file, read with another meaning of its numbers."""
    alpha = compute_alpha(reviews_of([[P], [N], [U]], dialect="0-3"), (), "auto")
    check_same_data(alpha, reviews_of([[P], [N], [U]], dialect="0-3"), (), "run 1")
    with pytest.raises(UserError, match=r"^run 1: its data\.labels is 0-3, here null; allowed: the same$"):
        check_same_data(alpha, reviews_of([[P], [N], [U]]), (), "run 1")
    alpha.write(tmp_path / ALPHA_FILE)
    assert Alpha.read(tmp_path / ALPHA_FILE) == alpha
    tree = json.loads((tmp_path / ALPHA_FILE).read_text())
    del tree["dialect"]  # of an older version
    (tmp_path / ALPHA_FILE).write_text(json.dumps(tree))
    check_same_data(Alpha.read(tmp_path / ALPHA_FILE), reviews_of([[P], [N], [U]]), (), "run 1")


@pytest.mark.parametrize("content", [b"[1, 2]", b"{", b"\xff\xfe"])
def test_a_file_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / ALPHA_FILE
    with pytest.raises(UserError, match="No such file"):
        Alpha.read(file)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"not an alpha\.json"):
        Alpha.read(file)


# ---------------------------------------------------------------- names


def test_names_of_metrics() -> None:
    names = metric_names(["SER&ACC", "Độ bền", "a/b", "a:b.c", "..", "x-1 2"])
    assert list(names.values()) == ["SER_ACC", "Độ bền", "a_b", "a_b.c", "__", "x-1 2"]
    assert metric_names(["A&B", "A/B", "A_B"]) == {"A&B": "A_B", "A/B": "A_B 2", "A_B": "A_B 3"}
    assert metric_names(["A_B", "A_B"]) == {"A_B": "A_B"}
    assert list(metric_names(["x" * 201, "x" * 202]).values()) == ["x" * 200, "x" * 200 + " 2"]


@settings(deadline=None)
@given(st.text(max_size=20))
def test_mlflow_takes_every_name(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    (plain,) = metric_names([name]).values()
    for metric in (plain, f"valid/f1/{plain}"):
        if metric:
            _validate_metric_name(metric)
    assert "/" not in plain


# ---------------------------------------------------------------- distribution and lengths


def test_distribution_by_hand(tmp_path: Path) -> None:
    counts = distribution(reviews_of([[P, M], [P, O], [N, M], [O, O], [X, O]]))
    assert counts["reviews"] == 5
    assert counts["reviews_without_a_mention"] == 2  # a dropped label is no mention
    assert counts["overall"] == {
        "counts": {"positive": 2, "negative": 1, "neutral": 0},
        "shares": {"positive": 2 / 3, "negative": 1 / 3, "neutral": 0.0},
        "labelled_cells": 3, "mentions": 5, "without_polarity": 2, "dropped": 1,
    }  # fmt: skip
    assert counts["aspects"]["B"]["shares"] == {"positive": None, "negative": None, "neutral": None}
    assert (counts["aspects"]["B"]["mentions"], counts["aspects"]["A"]["dropped"]) == (2, 1)

    write_distribution({"train": counts}, {"more": 1}, tmp_path / "d.json", tmp_path / "d.csv")
    assert json.loads((tmp_path / "d.json").read_text()) == {"splits": {"train": counts}, "more": 1}
    frame = pd.read_csv(tmp_path / "d.csv").set_index("aspect")
    assert list(frame.index) == ["all aspects", "A", "B"]
    assert frame.loc["A", ["positive", "negative", "neutral", "labelled_cells"]].tolist() == [2, 1, 0, 3]
    assert frame.loc["all aspects", "positive_share"] == pytest.approx(2 / 3)
    assert np.isnan(frame.loc["B", "neutral_share"])


def test_token_lengths_by_hand() -> None:
    lengths = token_lengths(np.array([4, 1, 3, 2], dtype=np.int64))
    assert lengths == {"mean": 2.5, "min": 1, "p1": 1, "p5": 1, "p25": 1, "p50": 2, "p75": 3, "p90": 4, "p95": 4,
                       "p99": 4, "max": 4}  # fmt: skip


# ---------------------------------------------------------------- copies


def shingles(text: str) -> set[str]:
    return {text[start : start + 5] for start in range(max(1, len(text) - 4))}


def jaccard(first: set[str], second: set[str]) -> float:
    return len(first & second) / len(first | second)


def by_brute_force(texts: list[str]) -> list[int]:
    """The first text that each is joined to, by comparing all with all."""
    joined, pieces = list(range(len(texts))), [shingles(text) for text in texts]
    for one, other in itertools.combinations(range(len(texts)), 2):
        if jaccard(pieces[one], pieces[other]) >= 0.8 - 1e-9:
            low, high = sorted((joined[one], joined[other]))
            joined = [low if value == high else value for value in joined]
    return joined


WORDS = st.sampled_from(["pin", "trâu", "máy", "đẹp", "giao", "hàng nhanh", "ship", "lâu", "ok", "tốt", "😂", "rất"])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(WORDS, min_size=1, max_size=30).map(" ".join), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 200), st.sampled_from(["", "x", "!! "])), max_size=20),
)
def test_near_copies_are_those_of_brute_force(texts: list[str], edits: list[tuple[int, int, str]]) -> None:
    for which, at, put in edits:  # copies with a letter less or more
        text = texts[which % len(texts)]
        texts.append(text[: at % len(text)] + put + text[at % len(text) + 1 :] or "x")
    texts = list(dict.fromkeys(texts))
    joined = np.array(by_brute_force(texts))
    assert near_components(texts).tolist() == np.unique(joined, return_inverse=True)[1].tolist()  # numbered in order


def test_thousands_of_near_copies_are_one_group_and_cost_little() -> None:
    texts = [f"đơn hàng số {number} giao nhanh, đóng gói cẩn thận, máy dùng mượt, pin trâu, ảnh đẹp, sẽ ủng hộ shop"
             for number in range(2000)]  # fmt: skip
    compared = 0
    original = duplicates.similar

    def counting(shingled: Any, pairs: Any) -> Any:
        nonlocal compared
        compared += len(pairs)
        return original(shingled, pairs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "similar", counting)
        joined = near_components(texts)
    assert set(joined.tolist()) == {0}
    assert compared < 40 * len(texts)  # all pairs would be 1,000 a text


def test_exact_copies_within_and_across_splits(tmp_path: Path) -> None:
    long = "pin trâu lắm mọi người ơi, dùng hai ngày mới phải sạc, chụp hình cũng đẹp"
    train = reviews_of(
        [[P, O], [P, O], [N, O], [P, N], [U, O], [P, X]],
        ["Máy  đẹp", "máy đẹp\n", "giao lâu", long, "tạm", "máy ĐẸP"],
        rows=np.array([1, 3, 4, 5, 6, 7]),
    )
    test = reviews_of([[N, O], [P, N], [O, O], [U, O]], ["MÁY đẹp", long + "!", "khác hẳn", "tạm"])
    splits = {"train": train, "test": test}
    groups = find_duplicates(splits)
    assert [(group.kind, group.members, group.conflict) for group in groups] == [
        ("exact", (("train", 0), ("train", 1), ("train", 5), ("test", 0)), True),
        ("exact", (("train", 4), ("test", 3)), False),
        ("near", (("train", 3), ("test", 1)), False),
    ]
    counts = summary(splits, groups)
    assert counts["exact"] == {
        "groups": 2, "reviews": 6, "copies": 4, "conflicting_groups": 1,
        "within": {"train": {"groups": 1, "copies": 2}, "test": {"groups": 0, "copies": 0}},
        "across": {"train/test": {"groups": 2, "reviews_of_test": 2}},
    }  # fmt: skip
    assert (counts["near"]["groups"], counts["near"]["across"]["train/test"]["reviews_of_test"]) == (1, 1)
    assert not [group for group in find_duplicates({"train": train}) if group.conflict]  # a dropped cell agrees

    write_duplicates(splits, groups, counts, tmp_path)
    frame = pd.read_csv(tmp_path / "duplicates.csv")
    assert list(frame.columns) == ["group", "kind", "split", "row", "text", "labels", "conflict"]
    assert frame["row"].tolist() == [1, 3, 7, 1, 6, 4, 5, 2]  # row 2 of the training file had no text
    assert frame.loc[1, ["group", "text", "labels", "conflict"]].tolist() == [1, "máy đẹp\n", "{A#Positive}", True]
    assert json.loads((tmp_path / "duplicates.json").read_text()) == counts
    assert distinct(train).tolist() == [0, 2, 3, 4, 5]  # other labels, another review


def test_copies_in_other_spellings() -> None:
    long = "máy chạy rất hòa hợp, pin khỏe và chụp hình cũng đẹp, thủy tinh trong suốt, dùng hai ngày mới sạc"
    texts = [long, long.replace("òa", "oà").replace("ủy", "uỷ"), unicodedata.normalize("NFD", long),
             long.replace("đẹp", "&#273;ẹp").replace("khỏe", "kho&#7867;") + "!", "khác hẳn"]  # fmt: skip
    groups = find_duplicates({"train": reviews_of([[P]] * 5, texts)})
    assert [(group.kind, [position for _, position in group.members]) for group in groups] == [
        ("exact", [0, 1, 2]), ("near", [0, 1, 2, 3])
    ]  # fmt: skip


def test_conflicts_and_folding() -> None:
    def conflict(*rows: list[int]) -> bool:
        return in_conflict(np.array(rows, dtype=np.int8))

    assert not conflict([P, O], [P, O])
    assert conflict([P, O], [P, N])
    assert conflict([P, M], [P, N])
    assert not conflict([P, X], [X, N])
    assert not conflict([X], [X])
    assert conflict([U, X], [N, O])
    assert folded(" Đẹp\u00a0 QUÁ\r\n") == folded("Đẹp quá") == "đẹp quá"


# ---------------------------------------------------------------- the entry point


def balanced_file(folder: Path) -> Path:
    """A wide file with exactly FEWER labelled cells in two aspects; every text occurs once."""
    cells = np.repeat(["Positive", "Negative", "Neutral"], FEWER)
    np.random.default_rng(0).shuffle(cells)
    half = -(-len(cells) // 2)
    random = np.random.default_rng(1).integers(0, 26, (half, 30))
    texts = ["".join(map(chr, 97 + row)) for row in random]
    second = np.append(cells[half:], [""] * (2 * half - len(cells)))
    file = folder / "train.csv"
    frame = pd.DataFrame({"data": texts, "SER&ACC": cells[:half], "Camera": second})
    frame.to_csv(file, index=False, encoding="utf-8-sig")
    return file


@pytest.fixture
def prep(call_pipeline: Call) -> Call:
    return partial(call_pipeline, "data_prep")


def run_ids(place: Place) -> set[str]:
    return {run.info.run_id for run in place.client.search_runs(["0"])}


def new_run(place: Place, before: set[str]) -> Any:
    """The one run that was made since."""
    (run_id,) = run_ids(place) - before
    return place.client.get_run(run_id)


@one_writer
def test_data_prep_leaves_alpha_everywhere(lent: Place, tmp_path: Path, prep: Call) -> None:
    file, client, before = balanced_file(tmp_path), lent.client, run_ids(lent)
    result = prep("--data", str(file), "--output_dir", "prep")
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    run = new_run(lent, before)
    assert run.info.status == "FINISHED"
    expected = 2904 / (3 * np.array(FEWER))
    metrics, names = run.data.metrics, ("positive", "negative", "neutral")
    assert [metrics[f"count/{name}"] for name in names] == list(FEWER)
    assert [round(100 * metrics[f"share/{name}"], 2) for name in names] == [34.02, 33.51, 32.47]
    np.testing.assert_allclose([metrics[f"alpha/{name}"] for name in names], expected, rtol=1e-12)
    assert (metrics["labelled_cells"], metrics["reviews"]) == (2904, 1452)
    frame = pd.read_csv(file)
    assert metrics["neutral/SER_ACC"] == (frame["SER&ACC"] == "Neutral").sum()
    assert metrics["mentions/Camera"] == frame["Camera"].notna().sum()
    assert (metrics["duplicates/exact_copies"], metrics["duplicates/near_copies"]) == (0, 0)
    assert metrics["tokens/p50"] > 2
    assert run.data.params["alpha_vector"] == FEWER_TEXT
    assert run.data.params["alpha_mode"] == "auto"
    assert run.data.params["data.path"] == str(file)
    digest = json.loads((tmp_path / "prep" / ALPHA_FILE).read_text())["digest"]
    assert run.data.tags["data_digest"] == digest
    assert run.inputs.dataset_inputs[0].dataset.digest == digest[:32]
    files = {"alpha.json", "duplicates.csv", "duplicates.json", "sentiment_distribution.csv",
             "sentiment_distribution.json", "sentiment_distribution.png", "token_lengths.json"}  # fmt: skip
    assert {path.name for path in (tmp_path / "prep").iterdir()} == files
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= files
    alpha = Alpha.read(Path(client.download_artifacts(run.info.run_id, ALPHA_FILE)))
    assert (alpha.counts, alpha.text, alpha.aspects) == (FEWER, FEWER_TEXT, ("SER&ACC", "Camera"))
    assert (tmp_path / "prep" / "sentiment_distribution.png").read_bytes().startswith(b"\x89PNG")
    last = result.stderr.strip().splitlines()[-1]
    assert last == f"next: train_visobert with data.train={file}, data_prep_run={run.info.run_id}"


@one_writer
def test_embedded_reviews(lent: Place, tmp_path: Path, prep: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    project, before = project_in(tmp_path), run_ids(lent)
    opened = lent.client.create_run("0", run_name="legendary-gnat-695").info.run_id  # as `mlflow run` does
    monkeypatch.setenv("MLFLOW_RUN_ID", opened)
    result = prep("--data.embedded.rows", "500", "--data.detection_only", "[Others]")
    assert result.returncode == 0, result.stderr
    run = new_run(lent, before)
    assert (run.info.run_id, run.info.status) == (opened, "FINISHED")
    assert run.data.tags["mlflow.runName"] == "data_prep embedded"
    assert [run.data.metrics[f"rows/{split}"] for split in ("train", "validation", "test")] == [400, 50, 50]
    folder = project / "outputs" / "data_prep"
    tree = json.loads((folder / "sentiment_distribution.json").read_text())
    (train,) = (project / "data_cache").rglob("train.csv")
    frame = pd.read_csv(train)
    aspects = [name for name in frame.columns if name not in ("data", "Others")]
    counts = Counter(frame[aspects].stack())
    assert tree["splits"]["train"]["overall"]["counts"] == {
        "positive": counts["Positive"], "negative": counts["Negative"], "neutral": counts["Neutral"]
    }  # fmt: skip
    assert tree["splits"]["train"]["aspects"]["Others"]["without_polarity"] == frame["Others"].notna().sum() > 0
    assert set(tree["splits"]) == {"train", "validation", "test"}
    alpha = Alpha.read(folder / ALPHA_FILE)
    assert (alpha.source, alpha.detection_only) == ("embedded", ("Others",))
    assert alpha.vector == auto_alpha([counts["Positive"], counts["Negative"], counts["Neutral"]])
    assert 'next: train_visobert with data.detection_only=["Others"]' in result.stderr
    assert "config=configs/config_multi_embedded.yaml" in result.stderr
    assert result.stderr.startswith("embedded data: generated, 500 reviews, because data.path is null\n")
    assert "warning" not in result.stderr


SOME = 'data,A,B\n"máy\nđẹp",Positive,\npin kém,,Negative\nbình thường thôi,Neutral,Neutral\n'


@one_writer
def test_dropped_cells_are_counted_and_listed(lent: Place, tmp_path: Path, prep: Call) -> None:
    before = run_ids(lent)
    (tmp_path / "some.csv").write_text(SOME + "giao nhanh,Posititve,Positive\n ,Positive,\n", encoding="utf-8")
    (tmp_path / "valid.csv").write_text(SOME, encoding="utf-8")
    arguments = ["--data", "some.csv", "--data.on_bad_label", "drop", "--data.validation", "valid.csv"]
    result = prep(*arguments)
    assert result.returncode == 0, result.stderr
    assert "warning: some.csv: 1 labelled reviews have no text: data_prep counts them" in result.stderr
    assert "warning: train: bad cells that are dropped: 1\n  row 4, column A: 'Posititve'\n" in result.stderr
    assert "warning: 3 of 3 validation reviews have exact copies in train" in result.stderr
    assert "data.on_bad_label=drop, data.train=some.csv, data.validation=valid.csv" in result.stderr
    tree = json.loads((tmp_path / "outputs/data_prep/sentiment_distribution.json").read_text())
    assert tree["dropped"]["train"] == [{"row": 4, "column": "A", "value": "Posititve"}]
    metrics = new_run(lent, before).data.metrics
    assert (metrics["dropped"], metrics["reviews"], metrics["count/positive"]) == (1, 5, 3)
    assert metrics["tokens/unknown_share"] == 0
    assert metrics["duplicates/exact_groups_across_splits"] == 3
    assert metrics["alpha_of_distinct/neutral"] == metrics["alpha/neutral"]
    assert metrics["duplicates/share_of_copies"] == 0


def test_an_oversampled_file_is_reported_with_both_alphas(
    tmp_path: Path, prep: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rare = "bình thường thôi,Neutral,Neutral\n"
    (tmp_path / "over.csv").write_text(SOME + rare * 6, encoding="utf-8")
    result = prep("--data", "over.csv", "--tracking.enabled", "false")
    assert result.returncode == 0, result.stderr
    assert "warning: 6 of 9 training reviews are exact copies of others" in result.stderr
    lines = {line[:30].strip(): line[30:].split() for line in result.stderr.splitlines()}
    assert lines["alpha of the file"] == ["5.3333", "5.3333", "0.3810"]  # 1, 1, 14 of 16
    assert lines["alpha of the distinct reviews"] == ["1.3333", "1.3333", "0.6667"]  # 1, 1, 2 of 4
    assert Alpha.read(tmp_path / "outputs/data_prep" / ALPHA_FILE).vector[2] == 16 / 42
    tree = json.loads((tmp_path / "outputs/data_prep/duplicates.json").read_text())
    assert tree["train"]["oversampled"] is True


def test_untracked_leaves_files_alone(tmp_path: Path, prep: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.csv").write_text(SOME, encoding="utf-8")
    arguments = ["--data", "some.csv", "--tracking.enabled", "false", "--output_dir", "out"]
    result = prep(*arguments)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"some.csv", "out"}
    assert result.stderr.strip().splitlines()[-1] == "next: train_visobert with data.train=some.csv"


@one_writer
@pytest.mark.parametrize(
    ("text", "arguments", "parts"),
    [
        (SOME.replace("Negative", "Negativ"), [], ["data.csv: row 2, column B", "'Negativ'", "did you mean Negative?"]),
        (SOME, ["--data.aspects", "[A, C]"], ["data.aspects: no column C", "A, B"]),
        (SOME, ["--data.detection_only", "[Bb]"], ["data.detection_only: no aspect Bb"]),
        (SOME.replace("Negative", ""), [], ["no negative label among 3 labelled cells", "focal_alpha"]),
        (SOME, ["--data.detection_only", "[A, B]"], ["no labelled cell at all; allowed"]),
        (
            "data,label\nx,{A:1}\ny,{A:1};{A}\nz,\n",
            ["--data.on_bad_label", "drop"],
            ["no labelled cell at all: 2 of 2 cells are no labels (first: row 1, column label: '{A:1}')"],
        ),
        ("data,A\n,Positive\n,Negative\n", [], ["column data: found no text in any of 2 rows"]),
        (SOME, ["--tokenizer", "nowhere/at/all"], ["error: tokenizer", "nowhere/at/all"]),
        (SOME, ["--output_dir", "/proc/nothing"], ["output_dir /proc/nothing"]),
        (SOME, ["--data.on_bad_label", "skip"], ["data.on_bad_label", "'skip'", "error, drop"]),
        (SOME, ["--data", "absent.csv"], ["absent.csv: No such file"]),
        (SOME, ["--data", "null", "--data.test", "data.csv"], ["without data.path"]),
    ],
    ids=lambda value: None if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(
    lent: Place, tmp_path: Path, prep: Call, *, text: str, arguments: list[str], parts: list[str]
) -> None:
    before = run_ids(lent)
    (tmp_path / "data.csv").write_text(text, encoding="utf-8")
    (tmp_path / "outputs" / "data_prep").mkdir(parents=True)
    (tmp_path / "outputs" / "data_prep" / ALPHA_FILE).write_text("of an earlier run")
    result = prep("--data", "data.csv", *arguments)
    lines = result.stderr.splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]
    assert [file.name for file in (tmp_path / "outputs" / "data_prep").iterdir()] == [ALPHA_FILE]
    assert (tmp_path / "outputs" / "data_prep" / ALPHA_FILE).read_text() == "of an earlier run"
    assert run_ids(lent) == before
