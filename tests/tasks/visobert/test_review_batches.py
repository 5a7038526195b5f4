"""Tokenised reviews, their batches and their splits: against naive padding, by hand, and by properties."""

import csv
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import EMBEDDED, EmbeddedReviewsConfig, TrainDataConfig
from pipeline.tasks.visobert.reviews.review_table import (
    ReviewTable,
    capped_repeats,
    length_buckets,
    tokenise,
)
from pipeline.tasks.visobert.reviews.sentiments import MENTIONED, NOT_MENTIONED, UNKNOWN
from pipeline.tasks.visobert.reviews.splits import Splits, load_splits
from pipeline.tasks.visobert.tokenizer import Tokens

torch.set_num_threads(1)

P, N, U = 0, 1, 2
O, M, X = NOT_MENTIONED, MENTIONED, UNKNOWN  # noqa: E741 (nothing, mention, unknown: tables stay readable)


def generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(seed)))


def realistic(count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Lengths of reviews: log-normal, half of them below 26 tokens."""
    drawn = generator(seed).lognormal(np.log(26), 0.65, count)
    return np.clip(np.rint(drawn), 2, 256).astype(np.int64)


# ---------------------------------------------------------------- batches of an epoch


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(1, 60), min_size=0, max_size=200),
    st.integers(1, 20),
    st.integers(1, 120),
    st.none() | st.integers(0, 1000),
)
def test_every_row_once_within_both_budgets(
    listed: list[int], batch_size: int, batch_tokens: int, seed: int | None
) -> None:
    lengths = np.array(listed, dtype=np.int64)
    batches = length_buckets(lengths, batch_size, batch_tokens, None if seed is None else generator(seed))
    assert sorted(row for rows in batches for row in rows.tolist()) == list(range(len(lengths)))
    assert len(batches) == len(list(batches))
    for rows in batches:
        assert 1 <= len(rows) <= batch_size
        assert len(rows) == 1 or len(rows) * lengths[rows].max() <= batch_tokens
    if seed is None:
        flat = [int(lengths[row]) for rows in batches for row in rows]
        assert flat == sorted(flat)


def test_batches_are_as_large_as_the_budgets_allow() -> None:
    """Sorted: 2 2 3 3 3 5 9. Of 10 tokens: 2 2 3 (9 padded), 3 3 (a third would make 3 * 5 = 15), 5 (2 * 9 = 18), 9."""
    lengths = np.array([3, 9, 2, 5, 3, 2, 3])
    assert [rows.tolist() for rows in length_buckets(lengths, 8, 10)] == [[2, 5, 0], [4, 6], [3], [1]]
    assert [len(rows) for rows in length_buckets(lengths, 2, 10)] == [2, 2, 2, 1]
    assert [len(rows) for rows in length_buckets(lengths, 8, 8)] == [2, 2, 1, 1, 1]  # 9 is longer than the budget


def test_an_epoch_depends_on_its_seed_and_number_alone() -> None:
    lengths = realistic(500)

    def plan(*seed: int) -> list[list[int]]:
        return [rows.tolist() for rows in length_buckets(lengths, 16, 512, generator(*seed))]

    assert plan(0, 0) == plan(0, 0)
    assert plan(0, 0) != plan(0, 1)
    assert plan(0, 0) != plan(1, 0)
    # not only another order of the same batches: other neighbours
    first, second = ({frozenset(rows) for rows in plan(0, epoch)} for epoch in (0, 1))
    assert len(first & second) < 0.2 * len(first)


def test_batches_do_not_come_by_length() -> None:
    lengths = realistic(4000)
    batches = length_buckets(lengths, 32, 4096, generator(3))
    means = np.array([lengths[rows].mean() for rows in batches])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


@pytest.mark.parametrize(("batch_size", "batch_tokens"), [(64, 4096), (256, 4096), (32, 1024)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_little_is_padding_on_realistic_lengths(batch_size: int, batch_tokens: int, seed: int) -> None:
    lengths = realistic(8000, seed)
    batches = length_buckets(lengths, batch_size, batch_tokens, generator(seed, 0))
    shuffled = np.array_split(generator(seed).permutation(len(lengths)), len(lengths) // 32)
    cells, naive = (sum(len(rows) * max(lengths[rows]) for rows in each) for each in (batches, shuffled))
    assert lengths.sum() / cells >= 0.95
    assert lengths.sum() / naive < 0.6  # so much is there to win


def test_oversampled_rows_come_as_often_as_configured() -> None:
    lengths = realistic(60)
    repeats = np.tile([1.0, 1.4, 2.0, 2.75], 15)
    drawn: Counter[int] = Counter()
    for epoch in range(400):
        rows = np.concatenate(list(length_buckets(lengths, 16, 512, generator(0, epoch), repeats)))
        counts = np.bincount(rows, minlength=60)
        assert (counts >= np.floor(repeats)).all()
        assert (counts <= np.ceil(repeats)).all()
        drawn.update(rows.tolist())
    means = np.array([drawn[row] / 400 for row in range(60)])
    np.testing.assert_allclose(means, repeats, atol=4.5 * 0.5 / np.sqrt(400))  # a share's deviation is at most 1/2
    assert (means[repeats == np.rint(repeats)] == repeats[repeats == np.rint(repeats)]).all()


def test_capped_repeats_by_hand() -> None:
    """6 positive, 2 negative, 3 neutral: a negative is wanted 3 times, a neutral twice, a positive once."""
    labels = np.array([
        [P, P, O], [P, O, M], [P, P, X], [P, N, O],  # 6 positive, 1 negative
        [N, U, O], [U, O, O], [U, M, X], [O, O, O], [M, X, O],
    ], dtype=np.int8)  # fmt: skip
    assert capped_repeats(labels, 10.0).tolist() == [1, 1, 1, 3, 3, 2, 2, 1, 1]
    assert capped_repeats(labels, 2.5).tolist() == [1, 1, 1, 2.5, 2.5, 2, 2, 1, 1]
    assert capped_repeats(labels, 1.0).tolist() == [1] * 9
    assert capped_repeats(np.array([[P], [P], [N]], np.int8), 5.0).tolist() == [1, 1, 2]  # no neutral at all


# ---------------------------------------------------------------- a batch


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=12), st.data())
def test_a_batch_is_the_rows_padded_to_the_longest(texts: list[list[int]], data: st.DataObject) -> None:
    pad = data.draw(st.sampled_from([0, 1, 77]))
    tokens = Tokens(
        np.array([one for text in texts for one in text], np.int32), np.array([len(text) for text in texts])
    )
    labels = np.arange(2 * len(texts), dtype=np.int8).reshape(-1, 2)
    table = ReviewTable(tokens, labels, pad)
    rows = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=8))
    batch = table.batch(np.array(rows))
    longest = max(len(texts[row]) for row in rows)
    assert batch.ids.tolist() == [texts[row] + [pad] * (longest - len(texts[row])) for row in rows]
    assert batch.mask.tolist() == [[place < len(texts[row]) for place in range(longest)] for row in rows]
    assert batch.labels.tolist() == labels[rows].tolist()
    assert (batch.ids.dtype, batch.mask.dtype, batch.labels.dtype) == (torch.int32, torch.bool, torch.int8)
    assert (len(table), len(batch)) == (len(texts), len(rows))


# ---------------------------------------------------------------- the cache of tokens


class Letters:
    """A tokenizer of letters that counts how often it is asked."""

    size, pad_id, mask_id = 1000, 0, 1

    def __init__(self, digest: str = "a", shift: int = 0) -> None:
        self.digest, self.shift, self.calls = digest, shift, 0

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> Tokens:
        self.calls += 1
        cut = [text[:max_tokens] for text in texts]
        ids = [ord(letter) % 500 + self.shift for text in cut for letter in text]
        return Tokens(np.array(ids, np.int32), np.array([len(text) for text in cut], np.int64))

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def assert_same(tokens: Tokens, expected: Tokens) -> None:
    assert tokens.ids.tolist() == expected.ids.tolist()
    assert tokens.lengths.tolist() == expected.lengths.tolist()
    assert (tokens.ids.dtype, tokens.lengths.dtype) == (np.int32, np.int64)


TEXTS = ("pin trâu", "máy đẹp", "ok")


def test_texts_are_tokenised_once(tmp_path: Path) -> None:
    first, second = Letters(), Letters()
    expected = Letters().encode(TEXTS, 5)
    assert_same(tokenise(first, TEXTS, 5, tmp_path), expected)
    assert_same(tokenise(second, TEXTS, 5, tmp_path), expected)
    assert (first.calls, second.calls) == (1, 0)
    assert len(list((tmp_path / "tokens").iterdir())) == 1  # and nothing half-written beside it


@pytest.mark.parametrize(
    ("tokenizer", "texts", "max_tokens"),
    [
        (Letters("b", 7), TEXTS, 5),
        (Letters(), TEXTS, 4),
        (Letters(), TEXTS[::-1], 5),
        (Letters(), ("pin trâu", "máy đẹpok"), 5),
        (Letters(), ("pin trâu\0máy đẹp", "ok"), 5),
    ],
)
def test_other_tokens_are_another_file(
    tmp_path: Path, tokenizer: Letters, texts: tuple[str, ...], max_tokens: int
) -> None:
    tokenise(Letters(), TEXTS, 5, tmp_path)
    assert_same(tokenise(tokenizer, texts, max_tokens, tmp_path), tokenizer.encode(texts, max_tokens))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:0],
        lambda data: b"something else" + data,
        lambda data: data[:-1],
        lambda data: data.replace(b"lengths", b"lenghts"),
    ],
    ids=["empty", "text", "one byte short", "other names"],
)
def test_a_damaged_file_is_replaced(tmp_path: Path, damage: Any) -> None:
    tokenise(Letters(), TEXTS, 5, tmp_path)
    file = next((tmp_path / "tokens").iterdir())
    whole = file.read_bytes()
    assert damage(whole) != whole
    file.write_bytes(damage(whole))
    assert_same(tokenise(Letters(), TEXTS, 5, tmp_path), Letters().encode(TEXTS, 5))
    after = Letters()
    tokenise(after, TEXTS, 5, tmp_path)
    assert after.calls == 0


def test_a_cache_that_is_no_folder_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"data\.cache"):
        tokenise(Letters(), TEXTS, 5, tmp_path / "cache")


# ---------------------------------------------------------------- splits


def written(file: Path, texts: Sequence[str], **columns: Sequence[str]) -> str:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["data", *columns])
        writer.writerows(zip(texts, *columns.values(), strict=True))
    return str(file)


def many(folder: Path, count: int = 3000) -> TrainDataConfig:
    texts = [f"máy số {number}" for number in range(count)]
    words = ["Positive", "Negative", "Neutral", ""] * (count // 4)
    return TrainDataConfig(train=written(folder / "train.csv", texts, Battery=words), cache=str(folder / "cache"))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_a_share_of_the_training_file_validates(tmp_path: Path, share: float) -> None:
    config = many(tmp_path).model_copy(update={"validation_share": share})
    splits, again = load_splits(config), load_splits(config)
    assert not set(splits.train.texts) & set(splits.valid.texts)
    assert set(splits.train.texts) | set(splits.valid.texts) == {f"máy số {number}" for number in range(3000)}
    deviation = np.sqrt(share * (1 - share) / 3000)
    assert len(splits.valid) / 3000 == pytest.approx(share, abs=4 * deviation)
    assert (splits.train.texts, splits.valid.texts) == (again.train.texts, again.valid.texts)
    assert splits.digest == again.digest
    for part in (splits.train, splits.valid):  # each review keeps its own label
        numbers = [int(text.split()[-1]) for text in part.texts]
        assert part.labels[:, 0].tolist() == [(P, N, U, O)[number % 4] for number in numbers]
    assert splits.test is None


def test_a_review_stays_where_it_is_when_others_come(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    few, more = load_splits(many(tmp_path, 400)), load_splits(many(tmp_path / "more", 800))
    assert set(few.valid.texts) <= set(more.valid.texts)
    assert set(few.train.texts) <= set(more.train.texts)


def test_copies_stay_together(tmp_path: Path) -> None:
    """In other capitals, other spaces, and other Unicode forms of the same letters."""
    texts = [f"Máy số {number} rất đẹp" for number in range(200)]
    copies = [*texts, *(text.upper() for text in texts), *(text.replace(" ", "  ") + " " for text in texts),
              *(unicodedata.normalize("NFD", text) for text in texts)]  # fmt: skip
    file = written(tmp_path / "train.csv", copies, Battery=["Positive", "Negative"] * 400)
    splits = load_splits(TrainDataConfig(train=file, validation_share=0.3))
    folded = [{" ".join(text.lower().split()) for text in part.texts} for part in (splits.train, splits.valid)]
    assert not folded[0] & folded[1]
    assert len(folded[0] | folded[1]) == 200
    assert len(splits.valid) == 4 * len(folded[1])


def test_a_split_without_reviews_is_an_error(tmp_path: Path) -> None:
    file = written(tmp_path / "train.csv", ["một", "hai"], Battery=["Positive", "Negative"])
    with pytest.raises(UserError) as caught:
        load_splits(TrainDataConfig(train=file, validation_share=1e-6))
    assert file in str(caught.value)
    assert "data.validation_share" in str(caught.value)
    assert "\n" not in str(caught.value)


def three(folder: Path, only: tuple[str, ...] = ()) -> Splits:
    train = written(folder / "a.csv", ["một", "hai", "ba"], Pin=["Positive", "", "Neutral"], Khác=["Neutral", "", ""])
    valid = written(folder / "b.csv", ["bốn"], Khác=["Positive"], Pin=["Negative"])
    test = written(folder / "c.csv", ["năm", "sáu"], Pin=["", ""], Khác=["Negative", ""])
    return load_splits(TrainDataConfig(train=train, validation=valid, test=test, detection_only=only))


def test_other_files_have_the_training_files_aspects(tmp_path: Path) -> None:
    splits = three(tmp_path)
    assert splits.test is not None
    assert splits.train.aspects == splits.valid.aspects == splits.test.aspects == ("Pin", "Khác")
    assert splits.train.labels.tolist() == [[P, U], [O, O], [U, O]]
    assert splits.valid.labels.tolist() == [[N, P]]  # its columns stand the other way round
    assert splits.test.labels.tolist() == [[O, N], [O, O]]
    assert splits.detection_only == ()


def test_a_detection_only_aspect_has_mentions_in_every_split(tmp_path: Path) -> None:
    splits = three(tmp_path, ("Khác",))
    assert splits.test is not None
    assert splits.detection_only == ("Khác",)
    assert splits.train.labels.tolist() == [[P, M], [O, O], [U, O]]
    assert splits.valid.labels.tolist() == [[N, M]]
    assert splits.test.labels.tolist() == [[O, M], [O, O]]


@pytest.mark.parametrize("carved", [True, False])
def test_an_aspect_without_polarity_in_training_has_none_elsewhere(tmp_path: Path, carved: bool) -> None:
    """{OTHERS} in the training file, {OTHERS#Positive} in another one: a mention."""
    texts = [f"máy {number}" for number in range(40)]
    train = written(tmp_path / "a.csv", texts, label=["{PIN#Positive};{OTHERS};", "{PIN#Negative};"] * 20)
    other = written(tmp_path / "b.csv", ["bốn"], label=["{OTHERS#Positive};{PIN#Neutral};"])
    files = {"test" if carved else "validation": other}
    splits = load_splits(TrainDataConfig(train=train, validation_share=0.4, **files))
    assert splits.detection_only == ("OTHERS",)
    part = splits.test if carved else splits.valid
    assert part is not None
    assert part.labels.tolist() == [[M, U]]
    if carved:
        assert {code for row in splits.valid.labels.tolist() for code in row[:1]} <= {M, O}


def test_digests_tell_the_files_apart(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    first, second = three(tmp_path / "one"), three(tmp_path / "other")
    assert first.digest == second.digest
    assert len(first.digest) == 64
    train = written(tmp_path / "a.csv", ["một"], Pin=["Positive"])
    swapped = [load_splits(TrainDataConfig(train=train, validation=str(tmp_path / "one" / first),
                                           test=str(tmp_path / "one" / second), aspects=("Pin",)))
               for first, second in (("b.csv", "c.csv"), ("c.csv", "b.csv"))]  # fmt: skip
    assert len({first.digest, swapped[0].digest, swapped[1].digest}) == 3


def test_the_embedded_reviews(tmp_path: Path) -> None:
    config = TrainDataConfig(embedded=EmbeddedReviewsConfig(rows=200), cache=str(tmp_path))
    splits = load_splits(config)
    assert splits.test is not None
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (160, 20, 20)
    assert splits.train.source == EMBEDDED
    assert splits.train.aspects == splits.valid.aspects == splits.test.aspects
