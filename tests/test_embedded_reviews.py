"""The generated reviews: do the labels say what the texts say, and are the texts like those that people write."""

import csv
import hashlib
import re
import statistics
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from pipeline.errors import UserError
from pipeline.tasks.visobert import embedded, phrases
from pipeline.tasks.visobert.config import EmbeddedReviewsConfig
from pipeline.tasks.visobert.embedded import ASPECTS, SENTIMENTS, Review, embedded_reviews, generate, reviews

COLUMNS = "data,Battery,Camera,Performance,Display,Design,Packaging,Price,Shop_Service,Shipping,General,Others"
SIZES = {"train": 3200, "validation": 400, "test": 400}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reviews")
    generate(made, 4000, seed=0)
    return made


@pytest.fixture(scope="module")
def splits(folder: Path) -> dict[str, pd.DataFrame]:
    return {name: pd.read_csv(folder / f"{name}.csv", keep_default_na=False) for name in SIZES}


@pytest.fixture(scope="module")
def table(splits: dict[str, pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(splits.values(), ignore_index=True)


@pytest.fixture(scope="module")
def many() -> list[Review]:
    """20,000 reviews, for shares."""
    return list(reviews("train", 20_000, seed=1))


@pytest.fixture(scope="module")
def clean() -> list[Review]:
    """The same 20,000 as `many`, written cleanly."""
    return list(reviews("train", 20_000, seed=1, clean=True))


# Labels


def test_sentiments_are_as_imbalanced_as_in_life(table: pd.DataFrame, many: list[Review]) -> None:
    cells = table[list(ASPECTS)].to_numpy()
    for counts in (Counter(cells[cells != ""]), Counter(label for review in many for label in review.labels.values())):
        assert set(counts) == {"Positive", "Negative", "Neutral"}
        for sentiment, share in (("Positive", 0.55), ("Negative", 0.35), ("Neutral", 0.10)):
            assert counts[sentiment] / counts.total() == pytest.approx(share, abs=0.03), sentiment


def test_number_of_aspects(table: pd.DataFrame, many: list[Review]) -> None:
    counts = (table[list(ASPECTS)] != "").sum(axis=1)
    assert 1.5 < counts.mean() < 2.5
    assert 0.01 < (counts == 0).mean() < 0.06  # about nothing
    shares = Counter(len(review.truth) for review in many)
    for number, share in embedded.ASPECTS_SAID.items():
        assert shares[number] / len(many) == pytest.approx(share, abs=4 * (share * (1 - share) / len(many)) ** 0.5)


def test_every_aspect_and_sentiment_occurs_in_train(splits: dict[str, pd.DataFrame]) -> None:
    """Those of Others are Neutral: what is about neither the phone nor the purchase has no verdict on them."""
    for aspect in ASPECTS:
        counts = Counter(splits["train"][aspect])
        del counts[""]
        assert set(counts) == ({"Neutral"} if aspect == "Others" else set(SENTIMENTS)), aspect
        assert min(counts.values()) >= 20, aspect
    assert (splits["train"]["Others"] != "").mean() < 0.06


def test_labels_agree_with_what_is_said(clean: list[Review]) -> None:
    """Words that leave no doubt, looked for in clean texts: nearly all of those reviews mean that, none the contrary.

    Sarcasm and wishes are ruled out by hand; the words are this test's, not the generator's.
    """
    doubtless = {
        ("Battery", "Positive"): r"chưa hết pin|chẳng lo hết pin|pin bền",
        ("Battery", "Negative"): r"pin tụt|pin yếu|pin bị phồng|sập nguồn",
        ("Camera", "Positive"): r"quay 4k|chống rung",
        ("Camera", "Negative"): r"cam vỡ nét|ảnh bị nhòe|tối như mực",
        ("Performance", "Positive"): r"không giật|êm ru|chưa thấy lag",
        ("Performance", "Negative"): r"máy lag|giật lag|văng app",
        ("Display", "Negative"): r"bị sọc|điểm chết ngay|cảm ứng loạn",
        ("Design", "Positive"): r"vừa tay|tinh tế|mỏng nhẹ",
        ("Packaging", "Positive"): r"gói [^.,]*cẩn thận|nguyên seal",
        ("Packaging", "Negative"): r"móp méo|sơ sài|rách một góc",
        ("Price", "Positive"): r"ngon bổ rẻ|là hời|giá hạt dẻ",
        ("Price", "Negative"): r"giá trên trời|mua hớ|đắt hơn",
        ("Shop_Service", "Positive"): r"tư vấn nhiệt tình|uy tín|có tâm",
        ("Shop_Service", "Negative"): r"lồi lõm|cộc lốc|gian dối",
        ("Shipping", "Positive"): r"giao nhanh (?!thật)|hỏa tốc|sớm hơn dự kiến",
        ("Shipping", "Negative"): r"giao sai địa chỉ|quăng hàng|cắt cổ",
        ("General", "Negative"): r"hàng giả|cạn lời|mất niềm tin",
        ("General", "Neutral"): r"mới dùng chưa biết sao",
        ("Others", "Neutral"): r"sim 4g|thẻ nhớ|bluetooth",
    }
    for (aspect, sentiment), words in doubtless.items():
        found = [review for review in clean if re.search(words, review.text)]
        assert len(found) > 30, (aspect, sentiment)
        meant = Counter(review.truth.get(aspect) for review in found)
        assert meant[sentiment] >= 0.99 * len(found), (aspect, sentiment, meant)
        labelled = Counter(review.labels.get(aspect) for review in found)
        assert 0.93 * len(found) < labelled[sentiment] < len(found), (aspect, sentiment, labelled)


def fixed_parts(phrase: str) -> list[str]:
    """What of a phrase is the same in every text: the words around its slots and holes."""
    return [part for part in re.split(r"\s*\{[^{}]*\}\s*", phrase) if part]


def is_in(phrase: str, text: str) -> bool:
    """Whether the fixed parts of the phrase stand in the text, one after the other."""
    place = 0
    for part in fixed_parts(phrase):
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_every_label_has_its_phrase_in_the_text(clean: list[Review]) -> None:
    """A phrase of that aspect and sentiment, or one that fits any aspect, with a noun of the aspect."""

    def is_said(aspect: str, sentiment: str, text: str) -> bool:
        if any(is_in(phrase, text) for phrase in phrases.PHRASES[aspect][sentiment]):
            return True
        shared = (*phrases.ABOUT_ANY[sentiment], *phrases.ABOUT_BOTH[sentiment])
        named = any(noun in text for noun in phrases.NOUNS.get(aspect, ()))
        return named and any(is_in(phrase, text) for phrase in shared if fixed_parts(phrase))

    slots_alone = 0
    for review in clean[:2000]:
        for aspect, sentiment in review.truth.items():
            if not is_said(aspect, sentiment, review.text):
                # "{} {tốt}": nothing fixed but the noun
                assert any(noun in review.text for noun in phrases.NOUNS[aspect]), review
                slots_alone += 1
    assert slots_alone < 0.05 * 2 * 2000
    # the check can fail: most reviews hold no phrase of an aspect that they are not about
    others = [
        is_said(aspect, "Positive", review.text)
        for review in clean[:300]
        for aspect in ASPECTS[:-1]
        if aspect not in review.truth
    ]
    assert statistics.fmean(others) < 0.25


def test_annotators_err_as_often_as_documented(many: list[Review]) -> None:
    """Within four standard errors of the rates, counted against what was meant."""
    outcomes, spurious = Counter[str](), 0
    for review in many:
        for aspect, sentiment in review.truth.items():
            label = review.labels.get(aspect)
            outcome = "lost" if label is None else "right" if label == sentiment else "confused"
            outcomes["others" if aspect == "Others" and outcome != "lost" else outcome] += 1
            assert aspect != "Others" or label in ("Neutral", None)
        spurious += len(set(review.labels) - set(review.truth))
    total = outcomes.total()
    for found, number, rate in (
        (outcomes["lost"], total, 0.01),
        (outcomes["confused"], total - outcomes["others"], 0.02),
        (spurious, len(many), 0.01),
    ):
        assert abs(found / number - rate) < 4 * (rate * (1 - rate) / number) ** 0.5


def test_the_contents_are_the_same_however_they_are_written(many: list[Review], clean: list[Review]) -> None:
    assert [(review.truth, review.labels) for review in many] == [(review.truth, review.labels) for review in clean]
    assert np.mean([one.text != other.text for one, other in zip(many, clean, strict=True)]) > 0.6


def test_mixed_feelings(clean: list[Review]) -> None:
    """Praise and blame stand in one review, at times in one sentence."""
    mixed = [review for review in clean if {"Positive", "Negative"} <= set(review.truth.values())]
    assert 0.08 < len(mixed) / len(clean) < 0.25
    turns = [review for review in mixed if re.search(r"nhưng|mỗi tội|có điều|bù lại|tuy ", review.text)]
    assert len(turns) > 0.25 * len(mixed)


# Writing


def test_lengths_are_those_of_real_reviews(table: pd.DataFrame) -> None:
    words = table["data"].str.split().str.len()
    assert 20 < words.mean() < 28
    assert 17 <= words.median() <= 23
    assert words.quantile(0.05) <= 7
    assert 85 < words.quantile(0.99) < 140
    assert words.min() >= 1


def test_short_forms_misspellings_and_emoticons(many: list[Review], clean: list[Review]) -> None:
    def share(group: list[Review], words: str) -> float:
        return statistics.fmean(bool(re.search(words, review.text)) for review in group)

    for words, least, most in (
        (r"\b(ko|k|hok|khum|kh)\b", 0.03, 0.2),
        (r"\b(đc|dc|đk)\b", 0.01, 0.2),
        (r"\b(sp|nv|mn|mk|r|z|j)\b", 0.02, 0.3),
        (r":\)|:\(|[\U0001f300-\U0001faff]", 0.1, 0.3),
        (r"\d", 0.2, 0.7),
        (r"\n", 0.08, 0.25),
    ):
        assert least < share(many, words) < most, words
    assert share(clean, r"\b(đc|khum|mn)\b|[\U0001f300-\U0001faff]") == 0


def without_marks(text: str) -> str:
    """As if typed on a keyboard without Vietnamese; by Unicode's own names of letters, unlike the generator."""
    names = {letter: unicodedata.name(letter, "") for letter in set(text)}
    plain = {
        letter: unicodedata.lookup(name.split(" WITH ")[0])
        for letter, name in names.items()
        if name.startswith("LATIN") and " WITH " in name
    }
    return "".join(plain.get(letter, letter) for letter in text)


def test_some_write_without_tones(many: list[Review]) -> None:
    """8% whole reviews, and the short ones that have no marks anyway."""
    texts = [unicodedata.normalize("NFC", review.text) for review in many]
    toneless = [text for text in texts if without_marks(text) == text]
    assert 0.06 < len(toneless) / len(many) < 0.12
    assert len([text for text in toneless if len(text.split()) > 15]) > 0.5 * len(toneless)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Đẹp lắm, đừng chờ!", "Dep lam, dung cho!"),
        ("ưỡn ẹo ỹ ợ", "uon eo y o"),
        ("👍 ok :)\n❤️", "👍 ok :)\n❤️"),
        ("", ""),
    ],
)
def test_without_tones(text: str, expected: str) -> None:
    for form in ("NFC", "NFD"):
        assert embedded.without_tones(unicodedata.normalize(form, text)) == expected


def test_a_few_are_decomposed(many: list[Review]) -> None:
    """Up to 4%, so that normalisation matters; the others are NFC."""
    texts = [review.text for review in many]
    decomposed = [text for text in texts if not unicodedata.is_normalized("NFC", text)]
    assert 0.025 < len(decomposed) / len(texts) < 0.045
    assert all(unicodedata.is_normalized("NFD", text) for text in decomposed)


def test_few_reviews_come_twice(splits: dict[str, pd.DataFrame], table: pd.DataFrame, many: list[Review]) -> None:
    assert 0 < table["data"].duplicated().mean() < 0.02
    train = set(splits["train"]["data"])
    for name in ("validation", "test"):
        assert splits[name]["data"].isin(train).mean() < 0.02  # short ones; splits are no copies
    assert len({review.text for review in many}) > 0.97 * len(many)


def test_phrases_are_many_and_well_formed() -> None:
    assert set(phrases.PHRASES) == set(ASPECTS)
    for aspect, by_sentiment in phrases.PHRASES.items():
        for sentiment, own in by_sentiment.items():
            least = 5 if sentiment == "Neutral" else 12
            assert len(set(own)) == len(own) >= least, (aspect, sentiment)
        assert set(by_sentiment) == ({"Neutral"} if aspect == "Others" else set(SENTIMENTS))
    everything = [*phrases.FILLERS, *phrases.DECOYS, *phrases.FIELDS]
    everything += [phrase for one in phrases.PHRASES.values() for own in one.values() for phrase in own]
    everything += [phrase for own in (*phrases.ABOUT_ANY.values(), *phrases.ABOUT_BOTH.values()) for phrase in own]
    for phrase in everything:
        assert unicodedata.is_normalized("NFC", phrase)
        assert set(re.findall(r"\{([^{}]+)\}", phrase)) - {"0", "1"} <= set(phrases.SLOTS), phrase
        assert phrase.count("{") == phrase.count("}")


def test_no_slot_or_hole_is_left_open(many: list[Review], clean: list[Review]) -> None:
    for review in (*many, *clean):
        assert not set("{}|") & set(review.text)
        assert review.text.strip()


# Learnable, not trivial


def test_a_linear_baseline_learns_most_of_it(splits: dict[str, pd.DataFrame]) -> None:
    """Pair micro F1 of TF-IDF with logistic regressions for mention and sentiment; majority reaches far less."""
    train, test = splits["train"], splits["test"]
    vectoriser = TfidfVectorizer(
        preprocessor=lambda text: unicodedata.normalize("NFC", text).lower(), ngram_range=(1, 2), sublinear_tf=True
    )
    features, unseen = vectoriser.fit_transform(train["data"]), vectoriser.transform(test["data"])
    right = guessed = labelled = 0
    for aspect in ASPECTS:
        mentioned = (train[aspect] != "").to_numpy()
        settings: dict[str, Any] = {"C": 10, "max_iter": 1000, "class_weight": "balanced"}
        found = LogisticRegression(**settings).fit(features, mentioned).predict(unseen)
        sentiment = np.full(len(test), "Neutral", dtype=object)
        if aspect != "Others":
            model = LogisticRegression(**settings).fit(features[mentioned], train[aspect][mentioned])
            sentiment = model.predict(unseen)
        truth = test[aspect].to_numpy()
        right += int((found & (truth == sentiment)).sum())
        guessed += int(found.sum())
        labelled += int((truth != "").sum())
    assert 0.75 < 2 * right / (guessed + labelled) < 0.9


# Files


def test_files_and_columns(folder: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == ["test.csv", "train.csv", "validation.csv"]
    for name, size in SIZES.items():
        content = (folder / f"{name}.csv").read_bytes()
        assert content.decode("utf-8").split("\n")[0] == COLUMNS
        assert b"\r" not in content
        assert len(pd.read_csv(folder / f"{name}.csv")) == size


def rows_of(file: Path) -> Iterator[list[str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        yield from csv.reader(lines)


def test_line_breaks_survive_a_round_trip(folder: Path, splits: dict[str, pd.DataFrame]) -> None:
    """Through two readers, the texts are those that were generated, line breaks and quotes and all."""
    for name, size in SIZES.items():
        written = [review.text for review in reviews(name, size, seed=0)]
        assert [row[0] for row in rows_of(folder / f"{name}.csv")][1:] == written
        assert list(splits[name]["data"]) == written
        assert sum("\n" in text for text in written) > 0.08 * size
    labels = [[review.labels.get(aspect, "") for aspect in ASPECTS] for review in reviews("test", 400, seed=0)]
    assert splits["test"][list(ASPECTS)].to_numpy().tolist() == labels


@pytest.mark.parametrize(("rows", "sizes"), [(100, (80, 10, 10)), (109, (87, 10, 12)), (12_345, (9876, 1234, 1235))])
def test_both_ends_of_rows(tmp_path: Path, rows: int, sizes: tuple[int, ...]) -> None:
    """The smallest that the config takes still has every sentiment in train."""
    generate(tmp_path, rows, seed=2)
    read = [pd.read_csv(tmp_path / f"{name}.csv", keep_default_na=False) for name in SIZES]
    assert tuple(map(len, read)) == sizes
    assert {"Positive", "Negative", "Neutral"} <= set(read[0][list(ASPECTS)].to_numpy().ravel())


def test_fewer_rows_than_a_hundred_are_refused() -> None:
    EmbeddedReviewsConfig(rows=100)
    with pytest.raises(ValidationError, match="greater than or equal to 100"):
        EmbeddedReviewsConfig(rows=99)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_the_seed_decides(tmp_path: Path) -> None:
    """Byte by byte, in another process with other hash and locale too; another seed is another file."""
    for name, seed in (("one", 5), ("again", 5), ("other", 6), ("large", 5 + 2**32)):
        (tmp_path / name).mkdir()
        np.random.seed(len(name))  # no global generator takes part
        generate(tmp_path / name, 500, seed)
    assert digests(tmp_path / "one") == digests(tmp_path / "again")
    (tmp_path / "process").mkdir()
    code = "import pathlib, sys; from pipeline.tasks.visobert import embedded;"
    code += "embedded.generate(pathlib.Path(sys.argv[1]), 500, 5)"
    environment = {"PYTHONHASHSEED": "77", "LC_ALL": "C", "PYTHONUTF8": "0", "PATH": ""}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "process")], env=environment, check=True)
    assert digests(tmp_path / "one") == digests(tmp_path / "process")
    texts = {name: list(pd.read_csv(tmp_path / name / "train.csv")["data"]) for name in ("one", "other", "large")}
    for name in ("other", "large"):
        assert len(set(texts["one"]) & set(texts[name])) < 0.02 * 400


def test_random_streams_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content, habits and annotator of every split and seed start in states of their own."""
    states, original = [], np.random.PCG64

    def recorded(seed: Any) -> np.random.PCG64:
        generator = original(seed)
        states.append(generator.state["state"]["state"])
        return generator

    monkeypatch.setattr(np.random, "PCG64", recorded)
    for seed in (0, 1, 2, 2**32, 1 + 2**32, 2**64):
        generate(tmp_path, 100, seed)
    assert len(states) == 6 * 3 * 3
    assert len(set(states)) == len(states)


def test_thousands_take_no_time(tmp_path: Path) -> None:
    start = time.process_time()
    generate(tmp_path, 4000, seed=9)
    assert time.process_time() - start < 3


# The cache


def config(rows: int = 100, seed: int = 0) -> EmbeddedReviewsConfig:
    return EmbeddedReviewsConfig(rows=rows, seed=seed)


def test_generated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded_reviews(config(), tmp_path / "new" / "cache")
    assert folder.parent == tmp_path / "new" / "cache"
    assert re.fullmatch(r"reviews-100-0-[0-9a-f]{12}", folder.name)
    (tmp_path / "directly").mkdir()
    generate(tmp_path / "directly", 100, 0)
    assert digests(folder) == digests(tmp_path / "directly")

    def fail(*_: Any) -> None:
        raise AssertionError("generated again")

    monkeypatch.setattr(embedded, "generate", fail)
    assert embedded_reviews(config(), tmp_path / "new" / "cache") == folder


def test_another_size_seed_or_source_is_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [embedded_reviews(config(*key), tmp_path / "cache") for key in ((100, 0), (101, 0), (100, 1))]
    changed = tmp_path / "phrases.py"
    changed.write_bytes(Path(phrases.__file__).read_bytes() + b"\n# changed\n")
    monkeypatch.setattr(phrases, "__file__", str(changed))
    made.append(embedded_reviews(config(), tmp_path / "cache"))
    assert len(set(made)) == 4
    assert sorted((tmp_path / "cache").iterdir()) == sorted(made)  # and nothing else stays


def test_generating_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(4, timeout=60)

    def at_once(folder: Path, rows: int, seed: int) -> None:
        generate(folder, rows, seed)
        together.wait()

    monkeypatch.setattr(embedded, "generate", at_once)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: embedded_reviews(config(), tmp_path), range(4)))
    assert len(set(folders)) == 1
    assert list(tmp_path.iterdir()) == folders[:1]
    assert len(digests(folders[0])) == 3


def test_an_interrupted_generation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path, rows: int, seed: int) -> None:
        (folder / "train.csv").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(embedded, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embedded_reviews(config(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(pd.read_csv(embedded_reviews(config(), tmp_path) / "test.csv")) == 10


@pytest.mark.parametrize("lost", ["train.csv", "validation.csv", "test.csv"])
def test_a_damaged_folder_is_made_again(tmp_path: Path, lost: str) -> None:
    folder = embedded_reviews(config(), tmp_path)
    before = digests(folder)
    (folder / lost).unlink()
    assert digests(embedded_reviews(config(), tmp_path)) == before


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("", encoding="utf-8")
    for place in (tmp_path / "cache", tmp_path / "cache" / "inside"):
        with pytest.raises(UserError, match=r"^data\.cache ") as caught:
            embedded_reviews(config(), place)
        assert str(place) in str(caught.value)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and what was written is taken away."""

    def full(folder: Path, rows: int, seed: int) -> None:
        (folder / "train.csv").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "generate", full)
    with pytest.raises(UserError, match="No space left on device"):
        embedded_reviews(config(), tmp_path)
    assert list(tmp_path.iterdir()) == []
