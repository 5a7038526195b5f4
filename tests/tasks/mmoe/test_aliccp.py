"""Raw Ali-CCP files to training-ready columns: by hand, against a slow reference reader, and after a kill."""

import gzip
import re
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import FULL, ROOT, Call
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.strict_config import load
from pipeline.data import prepared_folder
from pipeline.data.contract import verify
from pipeline.data.encoding import Encoder
from pipeline.data.schema import MISSING_TEXT
from pipeline.errors import UserError
from pipeline.tasks.mmoe.prepare import aliccp, aliccp_scan
from pipeline.tasks.mmoe.prepare.aliccp_config import AliccpSource
from pipeline.tasks.mmoe.prepare.preparation import prepare
from pipeline.tasks.mmoe.prepare.prepare_ctr import ProgressBars, figures

EXAMPLES = 200 if FULL else 20  # of whole files
SHIPPED = ROOT / "configs" / "data" / "aliccp.yaml"
SKELETON, COMMON = "sample_skeleton_train.csv", "common_features_train.csv"
TEST = {"skeleton": "sample_skeleton_test.csv", "common_features": "common_features_test.csv"}
ALL_TRAINING = {"train": 1.0, "validation": 0.0, "test": 0.0}
FILES = ("train.parquet", "validation.parquet", "test.parquet", "vocabulary.parquet", "schema.json")
Row = dict[str, Any]


def features(text: str) -> str:
    """`205=7 210=8:0.5` in the files' own writing."""
    parts = [re.fullmatch(r"(.*)=(.*?)(?::(.*))?", part) for part in text.split()]
    return "\x01".join(f"{part[1]}\x02{part[2]}\x03{part[3] or '1.0'}" for part in parts if part)


def line(cells: str, text: str, count: int | None = None) -> str:
    return f"{cells},{len(text.split()) if count is None else count},{features(text)}\n"


def write_raw(folder: Path, skeleton: str | bytes, common: str | bytes, **keys: Any) -> Path:
    """The two files and `schema.yaml`, which is returned."""
    for name, text in ((SKELETON, skeleton), (COMMON, common)):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    schema = folder / "schema.yaml"
    schema.write_text(yaml.safe_dump({"format": "aliccp", "split": ALL_TRAINING} | keys))
    return schema


def columns(folder: Path, split: str = "train") -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = pq.read_table(folder / f"{split}.parquet").to_pydict()
    return values


def vocabulary(folder: Path) -> list[tuple[str, str, int, int]]:
    table = pq.read_table(folder / "vocabulary.parquet")
    return list(zip(*(table[name].to_pylist() for name in ("feature", "value", "id", "count")), strict=True))


def write_test(folder: Path) -> None:
    (folder / TEST["skeleton"]).write_text(
        line("9,1,0,bacff91692951881", "205=16777216") + line("10,0,0,0123456789abcdef", "205=77")
    )
    (folder / TEST["common_features"]).write_text(line("bacff91692951881", "101=31320 121=4"))


# ---------------------------------------------------------------- by hand

COMMON_TEXT = (
    line("bacff91692951881", "101=31319 121=3 109_14=450001:0.5 109_14=16777217:2.07944")
    + line("0123456789abcdef", "101=31320 121=3")
)  # fmt: skip
SKELETON_TEXT = (
    line("1,0,0,bacff91692951881", "205=16777216 210=9 210=8")
    + line("2,1,1,bacff91692951881", "205=16777217 210=9")
    + line("3,1,0,0123456789abcdef", "205=16777216")
    + line("4,0,1,0123456789abcdef", "205=5")  # bought, but not clicked
    + line("5,0,0,ffffffffffffffff", "205=16777216")  # whose common features are not there
)


def test_a_small_shop_by_hand(tmp_path: Path) -> None:
    schema = prepare(tmp_path, write_raw(tmp_path, SKELETON_TEXT, COMMON_TEXT), tmp_path / "out")

    assert columns(tmp_path / "out") == {
        "click": [0, 1, 1, 0],
        "conversion": [0, 1, 0, 0],
        # user 31319 has two training rows, 31320 one; the last row has no user
        "101": [2, 2, 3, 1],
        "109_14": [[3, 2], [3, 2], [], []],
        "109_14.weights": [[0.5, np.float32(2.07944)]] * 2 + [[], []],
        "121": [2, 2, 2, 1],
        "205": [2, 3, 2, 2],  # 16777216 three times, 16777217 once
        "210": [[2, 3], [2], [], []],  # 9 twice, 8 once
        "210.weights": [[1.0, 1.0], [1.0], [], []],
    }
    assert vocabulary(tmp_path / "out") == [
        ("101", "31319", 2, 2), ("101", "31320", 3, 1),
        ("109_14", "16777217", 2, 2), ("109_14", "450001", 3, 2),  # equally often: by text
        ("121", "3", 2, 3),
        ("205", "16777216", 2, 3), ("205", "16777217", 3, 1),
        ("210", "9", 2, 2), ("210", "8", 3, 1),
    ]  # fmt: skip
    assert [(feature.name, feature.kind, feature.size, feature.weighted) for feature in schema.features] == [
        ("101", "categorical", 4, False), ("109_14", "multi", 4, True), ("121", "categorical", 3, False),
        ("205", "categorical", 4, False), ("210", "multi", 4, True),
    ]  # fmt: skip
    assert schema.counts == {
        "rows/train": 4, "rows/validation": 0, "rows/test": 0, "lines": 5, "users": 2, "conversions_without_click": 1,
        "without_common_features": 1, "cut_lines": 0, "malformed_lines": 0, "repeated_common_features": 0,
        "repeated_fields": 0, "other_feat_num": 0, "empty_ids": 0,
    }  # fmt: skip
    assert schema.base_rates.model_dump() == {"ctr": 0.5, "cvr": 0.5}
    assert (schema.splits["train"].rows, schema.splits["train"].clicks, schema.splits["train"].conversions) == (4, 2, 1)
    assert figures(schema)["raw/conversions_without_click"] == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    assert verify(tmp_path / "out") == schema


@pytest.mark.parametrize("own_test", [False, True])
def test_the_shipped_yaml_reads_the_published_files(
    tmp_path: Path, own_test: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(line(f"{number},0,0,bacff91692951881", f"205={number}") for number in range(400))
    write_raw(tmp_path, text, COMMON_TEXT)
    if own_test:
        write_test(tmp_path)
    schema = prepare(tmp_path, SHIPPED, tmp_path / "out")
    shares, total = (0.8, 0.1) if own_test else (0.8, 0.1, 0.1), 0.9 if own_test else 1
    drawn = [uniform(str(number), 0) * total for number in range(400)]
    ends = [sum(number < sum(shares[: part + 1]) for number in drawn) for part in range(len(shares))]
    expected = [ends[0], *(end - before for before, end in pairwise(ends)), *([2] if own_test else [])]
    assert [schema.splits[split].rows for split in ("train", "validation", "test")] == expected
    message = f"all of {TEST['skeleton']}; split.train and split.validation divide {SKELETON}, split.test does not"
    message = message if own_test else f"no test files; split divides {SKELETON} in three"
    assert f"test: {message}\n" in capsys.readouterr().err
    assert load(AliccpSource, SHIPPED) == AliccpSource(format="aliccp")  # what the YAML says is what is so without it


@pytest.mark.parametrize(("rule", "labels"), [
    ("drop", ([0, 1, 1], [0, 1, 0])),
    ("no_conversion", ([0, 1, 1, 0], [0, 1, 0, 0])),
    ("click", ([0, 1, 1, 1], [0, 1, 0, 1])),
])  # fmt: skip
def test_rules_for_irregular_rows(tmp_path: Path, rule: str, labels: tuple[list[int], list[int]]) -> None:
    keys = {"conversion_without_click": rule, "without_common_features": "drop"}
    schema = prepare(tmp_path, write_raw(tmp_path, SKELETON_TEXT, COMMON_TEXT, **keys), tmp_path / "out")
    rows = columns(tmp_path / "out")
    assert (rows["click"], rows["conversion"]) == labels
    assert (schema.counts["conversions_without_click"], schema.counts["without_common_features"]) == (1, 1)


def test_values_as_float32_of_the_double(tmp_path: Path) -> None:
    texts = ["1e-3", "-2.5", "+.5", "5.", "0.6931471805599453", "2.0794415416798357", "9007199254740993",
             "20794415416798357e-16", "1234567890123456789", "12345678901234567890123", "3.4028235e38", "1e-46", "-0",
             "0.00000000000000000000000000000000012345678901234567", "179769313486231570000e10",
             "3.4028235677973e38"]  # fmt: skip
    text = "".join(line(f"{number},0,0,x", f"9={number}:{value}") for number, value in enumerate(texts))
    prepare(tmp_path, write_raw(tmp_path, text, ""), tmp_path / "out")
    assert columns(tmp_path / "out")["9.weights"] == [[float(np.float32(float(value)))] for value in texts]


def test_a_cut_last_line_is_counted_and_left_out(tmp_path: Path) -> None:
    last = len(SKELETON_TEXT.splitlines()[-1])
    # 1: the line end alone; 2 and 3: the value 1.0 is 1. and 1, which is the same
    for cut in (1, 2, 3, 4, 5, 14, 15, 17, 20, last - 1, last):
        schema = prepare(tmp_path, write_raw(tmp_path, SKELETON_TEXT[:-cut], COMMON_TEXT), tmp_path / str(cut))
        assert (schema.counts["cut_lines"], schema.splits["train"].rows) == ((0, 4) if cut <= 3 else (1, 3))
        assert schema.counts["lines"] == len(SKELETON_TEXT.splitlines())


def test_a_malformed_line_is_named(tmp_path: Path, call_pipeline: Call) -> None:
    wrong = {
        "2,2,0,bacff91692951881,1,205\x027\x031.0": "click",
        "2,0,0,bacff91692951881,one,205\x027\x031.0": "feat_num",
        "2,0,0,bacff91692951881,1,205\x027\x03nan": "number",
        "2,0,0,bacff91692951881,1,205\x027\x031e39": "beyond float32",
        "2,0,0,bacff91692951881,1,205\x027\x03-3.4028235677973366e38": "just beyond float32",
        f"2,0,0,bacff91692951881,1,205\x027\x03{'9' * 400}": "beyond double",
        "2,0,0,bacff91692951881,1,205\x027": "no value",
        "2,0,0,bacff91692951881,1,205\x027\x031.0\x01": "a feature that is not there",
        "2,0,0,bacff91692951881": "too few cells",
        "2,0,0,bacff91692951881,1,Preis€\x027\x031.0": "not ASCII",
        "2,0,0,bacff91692951881,1,205\x027\x031.0\r\r": "two ends",
    }
    lines = SKELETON_TEXT.splitlines(keepends=True)
    expected = rf"^{tmp_path}/{SKELETON}: line 2: found '2,.*allowed: sample_id,click \(0 or 1\),buy \(0 or 1\),common"
    for text in wrong:
        schema = write_raw(tmp_path, "".join([lines[0], text, "\n", *lines[1:]]), COMMON_TEXT)
        with pytest.raises(UserError, match=expected):
            prepare(tmp_path, schema, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    ended = call_pipeline("prepare_ctr", "--data", str(tmp_path), "--schema", str(schema),
                          "--output_dir", str(tmp_path / "out"), "--tracking.enabled", "false")  # fmt: skip
    first, error = ended.stderr.splitlines()
    assert (ended.returncode, first[:20], error[:7]) == (2, "test: no test files;", "error: ")

    text = "".join([lines[0], *(f"{line}\n" for line in wrong), *lines[1:]])
    schema = write_raw(tmp_path, text, COMMON_TEXT, malformed_lines=len(wrong))
    prepared = prepare(tmp_path, schema, tmp_path / "out")
    assert prepared.counts["malformed_lines"] == len(wrong)
    assert columns(tmp_path / "out")["click"] == [0, 1, 1, 0]
    with pytest.raises(UserError, match=f"line {len(wrong) + 1}: found"):
        prepare(tmp_path, write_raw(tmp_path, text, COMMON_TEXT, malformed_lines=len(wrong) - 1), tmp_path / "out")
    with pytest.raises(UserError, match=rf"{COMMON}: line 1: found '1,0,0"):
        prepare(tmp_path, write_raw(tmp_path, SKELETON_TEXT, SKELETON_TEXT), tmp_path / "out")


@pytest.mark.parametrize(("keys", "expected"), [
    ({"features": {"206": "categorical"}}, r"features\.206: no such field in the files; there are: 101, 109_14"),
    ({"features": {"207": "categorical"}}, r"features\.207: found in the common features and in the skeleton, allowed"),
    ({"features": {"ä": "multi"}}, "allowed: names of printable ASCII characters but a comma"),
    ({"other_fields": "ignore"}, "no field of the files is a feature"),
    ({"test": {"skeleton": "a"}}, r"test: found .*, allowed: auto or mapping or null \(a mapping has the keys"),
    ({"test": {"skeleton": "a", "common_features": "b"}}, r"no file a \(nor a\.gz\)"),
    ({"conversion_without_click": "keep"}, "one of: drop, no_conversion, click"),
    ({}, r"features\.click: the prepared files have such a column; allowed"),
    ({"split": {"train": 1e-9, "validation": 1 - 1e-9, "test": 0}}, "4 rows, none of them in the training split"),
])  # fmt: skip
def test_a_schema_that_contradicts_the_files(tmp_path: Path, keys: dict[str, Any], expected: str) -> None:
    common = COMMON_TEXT + line("ffffffffffffffff", "207=1")
    skeleton = SKELETON_TEXT + line("6,1,1,bacff91692951881", "207=1")
    skeleton = skeleton if "207" in keys.get("features", {}) else SKELETON_TEXT
    if not keys:
        skeleton += line("6,0,0,x", "click=7")
    with pytest.raises(UserError, match=expected):
        prepare(tmp_path, write_raw(tmp_path, skeleton, common, **keys), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_files(tmp_path: Path) -> None:
    schema = write_raw(tmp_path, SKELETON_TEXT, "")
    (tmp_path / SKELETON).unlink()
    with pytest.raises(UserError, match=rf"no file {SKELETON}"):
        prepare(tmp_path, schema, tmp_path / "out")
    with pytest.raises(UserError, match=f"no such folder, allowed: a folder that holds {SKELETON}, {COMMON}"):
        prepare(tmp_path / "nowhere", schema, tmp_path / "out")
    (tmp_path / SKELETON).write_bytes(b"")
    with pytest.raises(UserError, match="no rows, allowed: at least one training row"):
        prepare(tmp_path, schema, tmp_path / "out")


# ---------------------------------------------------------------- a slow reference reader

MASK = 2**64 - 1
NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
FEATURE = rf"[ -+\--~]+\x02[ -+\--~]*\x03{NUMBER}"
FEAT_LIST = rf"(?:{FEATURE}(?:\x01{FEATURE})*)?"
COMMON_LINE = re.compile(rf"([ -+\--~]+),([0-9]{{1,10}}),({FEAT_LIST})")
SKELETON_LINE = re.compile(rf"([ -+\--~]+),([01]),([01]),([ -+\--~]*),([0-9]{{1,10}}),({FEAT_LIST})")


def mixed(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31


def hashed(text: str) -> int:
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return mixed(value)


def uniform(key: str, seed: int) -> float:
    return (mixed(hashed(key) ^ mixed(seed)) >> 11) / 2**53


def read_lines(text: str, pattern: re.Pattern[str], counts: Counter[str]) -> list[tuple[str, ...]]:
    """The cells of the lines, in their order."""
    rows = []
    lines = text.split("\n")
    for number, whole in enumerate(lines, 1):
        cells = pattern.fullmatch(whole.removesuffix("\r"))
        if number == len(lines):  # what follows the last line end
            fits = cells and int(cells[pattern.groups - 1]) <= len(cells[pattern.groups].split("\x01"))
            fits = fits and (cells[pattern.groups] or cells[pattern.groups - 1] == "0")
            counts["cut"] += bool(whole.removesuffix("\r") and not fits)
            if not fits:
                break
        if not whole.strip("\r"):
            continue
        assert cells, whole
        rows.append(cells.groups())
    return rows


def read_features(text: str, claimed: str, counts: Counter[str]) -> list[tuple[str, str, float]]:
    parts = [tuple(re.split("[\x02\x03]", part)) for part in text.split("\x01")] if text else []
    counts["other_feat_num"] += int(claimed) != len(parts)
    return [(name, number, float(value)) for name, number, value in parts]


def slowly(
    skeleton: str, common: str, source: AliccpSource
) -> tuple[dict[str, list[Row]], dict[str, Any], Counter[str]]:
    """Rows of each split (id texts and weights), properties of each feature, and counts of irregularities."""
    counts: Counter[str] = Counter()
    kinds = {name: feature.kind for name, feature in source.features.items()}

    def kept(text: str, claimed: str) -> list[tuple[str, str, float]]:
        parts: list[tuple[str, str, float]] = []
        for name, number, value in read_features(text, claimed, counts):
            if kinds.get(name, source.other_fields) == "ignore":
                continue
            if number in MISSING_TEXT:
                counts["empty_ids"] += 1
            elif kinds.get(name) == "categorical" and name in [part[0] for part in parts]:
                counts["repeated_fields"] += 1
            else:
                parts.append((name, number, value))
        return parts

    users: dict[str, list[tuple[str, str, float]]] = {}
    for index, claimed, text in read_lines(common, COMMON_LINE, counts):
        if index in users:
            counts["repeated_common_features"] += 1
            read_features(text, claimed, counts)
        else:
            users[index] = kept(text, claimed)
    everything = list(users.values())
    in_common = {part[0] for parts in users.values() for part in parts}
    in_skeleton = set[str]()
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for sample, click_text, buy_text, index, claimed, text in read_lines(skeleton, SKELETON_LINE, counts):
        click, buy = int(click_text), int(buy_text)
        orphan, lonely = buy and not click, index not in users
        counts["conversions_without_click"] += orphan
        counts["without_common_features"] += lonely
        if (orphan and source.conversion_without_click == "drop") or (
            lonely and source.without_common_features == "drop"
        ):
            read_features(text, claimed, counts)
            continue
        if orphan:
            click, buy = (1, 1) if source.conversion_without_click == "click" else (0, 0)
        parts = kept(text, claimed)
        everything.append(parts)
        in_skeleton |= {part[0] for part in parts}
        drawn = uniform(index if source.split.by == "common_feature_index" else sample, source.split.seed)
        first, second = source.split.train, source.split.train + source.split.validation
        split = "train" if drawn < first else "validation" if drawn < second else "test"
        splits[split].append({"click": click, "conversion": buy, "parts": users.get(index, []) + parts})
    names = [name for name in source.features if kinds[name] != "ignore"]
    names += sorted((in_common | in_skeleton) - set(names))
    known: dict[str, Any] = {}
    for name in names:
        several = name in in_common & in_skeleton or any(
            sum(part[0] == name for part in parts) > 1 or any(part[0] == name and part[2] != 1 for part in parts)
            for parts in everything
        )
        kind = kinds.get(name, "auto")
        kind = ("multi" if several else "categorical") if kind == "auto" else kind
        wish = source.features.get(name)
        least = (wish.min_count if wish else None) or source.min_count
        seen = Counter(part[1] for row in splits["train"] for part in row["parts"] if part[0] == name)
        words = sorted((word for word in seen if seen[word] >= least), key=lambda word: (-seen[word], word))
        known[name] = {"kind": kind, "words": words, "seen": seen, "weighted": wish.weighted if wish else True,
                       "found": name in in_common | in_skeleton}  # fmt: skip
    return splits, known, counts


def slow_columns(rows: list[Row], known: dict[str, Any], source: AliccpSource) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {label: [row[label] for row in rows] for label in ("click", "conversion")}
    for name, feature in known.items():
        wish = source.features.get(name)
        buckets = source.hash_buckets if wish is None or wish.hash_buckets is None else wish.hash_buckets
        ids = {word: number for number, word in enumerate(feature["words"], 2)}

        def number(word: str, ids: dict[str, int] = ids, buckets: int = buckets) -> int:
            return ids.get(word, 2 + len(ids) + hashed(word) % buckets if buckets else 0)

        own = [[part for part in row["parts"] if part[0] == name] for row in rows]
        if feature["kind"] == "categorical":
            columns[name] = [number(parts[0][1]) if parts else 1 for parts in own]
        else:
            columns[name] = [[number(part[1]) for part in parts] for parts in own]
            if feature["weighted"]:
                columns[f"{name}.weights"] = [[float(np.float32(part[2])) for part in parts] for parts in own]
    return columns


INDICES = ("bacff91692951881", "0000000000000001", "1", "user 7", "BACFF91692951881", "")
IDS = ("0", "7", "07", "16777216", "16777217", "9007199254740993", "9223372036854775807", "9223372036854775808",
       "9999999999999999999", "10000000000000000000", "-3", "abc", "a b;c", "", "NULL", "7.0")  # fmt: skip
VALUES = ("1", "1.0", "1.0", "1.0", "0.5", "2.07944", "-2", "1e-3", "0.6931471805599453")
COMMON_FIELDS, SKELETON_FIELDS = ("101", "121", "109_14", "both"), ("205", "210", "a name of any length " * 9, "both")


def feature_lists(fields: tuple[str, ...]) -> st.SearchStrategy[str]:
    part = st.tuples(st.sampled_from(fields), st.sampled_from(IDS), st.sampled_from(VALUES))
    plain = st.tuples(st.sampled_from(fields), st.sampled_from(IDS), st.just("1.0"))
    lists = st.lists(part | plain, max_size=6) | st.lists(plain, max_size=3, unique_by=lambda part: part[0])
    return lists.flatmap(lambda parts: st.sampled_from((0, 0, 0, 1, 5)).map(
        lambda more: f"{len(parts) + more}," + "\x01".join(f"{a}\x02{b}\x03{c}" for a, b, c in parts)
    ))  # fmt: skip


def files(cells: st.SearchStrategy[str], fields: tuple[str, ...]) -> st.SearchStrategy[str]:
    one = st.builds(lambda head, rest, end: f"{head},{rest}{end}", cells, feature_lists(fields),
                    st.sampled_from(("\n", "\n", "\r\n", "\n\n")))  # fmt: skip
    cut = st.integers(0, 12)
    return st.builds(lambda lines, cut: "".join(lines)[: -cut or None], st.lists(one, max_size=12), cut)


RULES = st.fixed_dictionaries({
    "conversion_without_click": st.sampled_from(("drop", "no_conversion", "click")),
    "without_common_features": st.sampled_from(("keep", "drop")),
    "min_count": st.integers(1, 3),
    "hash_buckets": st.sampled_from((0, 0, 3)),
    "split": st.builds(
        lambda by, seed, train: {"by": by, "seed": seed, "train": train, "validation": 1 - train, "test": 0.0},
        st.sampled_from(("sample_id", "common_feature_index")), st.integers(0, 3), st.sampled_from((1.0, 0.5)),
    ),
    "features": st.sampled_from(({}, {"101": "categorical"}, {"205": {"kind": "categorical", "min_count": 2}},
                                 {"210": {"kind": "multi", "weighted": False}, "121": "ignore"},
                                 {"both": {"hash_buckets": 2}})),
    "other_fields": st.sampled_from(("auto", "auto", "auto", "ignore")),
})  # fmt: skip
SAMPLES = st.builds(
    lambda sample, click, buy, index: f"{sample},{click},{buy},{index}",
    st.sampled_from(("1", "2", "17", "s 3")), st.sampled_from((0, 1)), st.sampled_from((0, 0, 1)),
    st.sampled_from(INDICES),
)  # fmt: skip


@pytest.mark.faults
@given(
    skeleton=files(SAMPLES, SKELETON_FIELDS), common=files(st.sampled_from(INDICES[:-1]), COMMON_FIELDS),
    rules=RULES, block=st.sampled_from((64, 1000, 1 << 20)), compressed=st.booleans(),
)  # fmt: skip
@settings(max_examples=EXAMPLES)
def test_the_same_as_a_slow_reader(
    skeleton: str, common: str, rules: dict[str, Any], block: int, compressed: bool
) -> None:
    source = AliccpSource.model_validate({"format": "aliccp"} | rules)
    splits, known, counts = slowly(skeleton, common, source)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(aliccp_scan, "BLOCK_BYTES", block)
        patch.setattr(aliccp, "CHUNK_IDS", 8)  # so that a few rows are several chunks
        patch.setattr(prepared_folder, "ROW_GROUP_ROWS", 4)
        folder = Path(name)
        schema_file = write_raw(folder, skeleton, common, **rules)
        if compressed:
            (folder / SKELETON).unlink()
            parts = [part.encode() for part in (skeleton[:100], skeleton[100:])]
            (folder / f"{SKELETON}.gz").write_bytes(b"".join(gzip.compress(part) for part in parts))
        nowhere = [name for name, feature in known.items() if not feature["found"]]
        if not splits["train"] or not known or nowhere:
            with pytest.raises(UserError, match=r"training row|no such field|is a feature"):
                prepare(folder, schema_file, folder / "out")
            return
        schema = prepare(folder, schema_file, folder / "out")

        for split, rows in splits.items():
            assert columns(folder / "out", split) == slow_columns(rows, known, source)
            assert schema.splits[split].rows == schema.counts[f"rows/{split}"] == len(rows)
        assert [entry[:2] for entry in vocabulary(folder / "out")] == [
            (name, word) for name, feature in known.items() for word in feature["words"]
        ]
        assert all(count == known[name]["seen"][word] for name, word, _, count in vocabulary(folder / "out"))
        for kind in ("conversions_without_click", "without_common_features", "repeated_common_features",
                     "repeated_fields", "other_feat_num", "empty_ids"):  # fmt: skip
            assert schema.counts[kind] == counts[kind], kind
        assert schema.counts["cut_lines"] == counts["cut"]
        _frames_mean_the_same(folder / "out", splits["train"], known, source)


def _frames_mean_the_same(folder: Path, rows: list[Row], known: dict[str, Any], source: AliccpSource) -> None:
    """A logged model encodes a raw frame like the files."""
    frame: dict[str, list[Any]] = {}
    for name, feature in known.items():
        own = [[part for part in row["parts"] if part[0] == name] for row in rows]
        if feature["kind"] == "categorical":
            frame[name] = [parts[0][1] if parts else None for parts in own]
        else:
            shown = "{1}:{2!r}" if feature["weighted"] else "{1}"
            frame[name] = ["|".join(shown.format(*part) for part in parts) or None for parts in own]
    encoded = Encoder.load(folder).encode(pd.DataFrame(frame, dtype=object))
    expected = slow_columns(rows, known, source)
    assert {name: column.to_pylist() for name, column in encoded.items()} == {
        name: values for name, values in expected.items() if name not in ("click", "conversion")
    }


# ---------------------------------------------------------------- test files and reproducibility


@pytest.mark.parametrize("keys", [{}, {"test": TEST}])
def test_the_test_files_are_the_test_split(tmp_path: Path, keys: dict[str, Any]) -> None:
    write_test(tmp_path)
    schema = prepare(tmp_path, write_raw(tmp_path, SKELETON_TEXT, COMMON_TEXT, **keys), tmp_path / "out")
    rows = columns(tmp_path / "out", "test")
    # the same index means another user there; 4 and 77 are not in the training split; one user is missing
    assert (rows["click"], rows["101"], rows["121"], rows["205"]) == ([1, 0], [3, 1], [0, 1], [2, 0])
    assert columns(tmp_path / "out")["101"] == [2, 2, 3, 1]
    assert schema.counts["without_common_features"] == 2
    shares = {feature.name: feature.out_of_vocabulary["test"] for feature in schema.features}
    assert (shares["121"], shares["205"]) == (1.0, 0.5)


def test_test_files_that_are_ignored_or_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_test(tmp_path)
    schema = prepare(tmp_path, write_raw(tmp_path, SKELETON_TEXT, COMMON_TEXT, test=None), tmp_path / "out")
    assert [split.rows for split in schema.splits.values()] == [4, 0, 0]
    assert f"test: {TEST['skeleton']} is not read; split divides {SKELETON} in three\n" in capsys.readouterr().err
    schema_file = write_raw(tmp_path, SKELETON_TEXT, COMMON_TEXT)
    for gone, left in (tuple(TEST.values()), tuple(TEST.values())[::-1]):
        (tmp_path / gone).unlink()
        (tmp_path / left).rename(tmp_path / f"{left}.gz")
        with pytest.raises(UserError, match=rf"no file {gone} \(nor .*; test: null reads no test files"):
            prepare(tmp_path, schema_file, tmp_path / "half")
        (tmp_path / f"{left}.gz").unlink()
        write_test(tmp_path)
    (tmp_path / TEST["common_features"]).unlink()
    with pytest.raises(UserError, match=rf"no file {TEST['common_features']} \(nor"):
        prepare(tmp_path, write_raw(tmp_path, SKELETON_TEXT, COMMON_TEXT, test=TEST), tmp_path / "half")
    assert not (tmp_path / "half").exists()


def _generated(folder: Path, rows: int = 400, users: int = 60) -> Path:
    """Files of many small blocks, and their schema."""
    generator = np.random.default_rng(0)
    common = "".join(
        line(f"{number:016x}", f"101={number} 121={number % 5} " + " ".join(
            f"109_14={generator.integers(500)}:{generator.integers(1, 99)}e-1" for _ in range(generator.integers(5))
        )) for number in range(users)
    ) + "".join(line(f"{number % users:016x}", "101=1 121=2 other=3") for number in range(9, users, 2))  # fmt: skip
    skeleton = "".join(
        line(f"{number},{number % 2},{number % 8 // 7},{generator.integers(users + 5):016x}",
             f"205={generator.integers(2**40)} 206={generator.integers(50)} odd=x{generator.integers(9)}")
        for number in range(rows)
    )  # fmt: skip
    split = {"train": 0.8, "validation": 0.1, "test": 0.1}
    return write_raw(folder, skeleton, common, split=split, min_count=2, hash_buckets=7)


def _digests(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def test_blocks_and_threads_do_not_decide_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = _generated(tmp_path)
    monkeypatch.setattr(prepared_folder, "ROW_GROUP_ROWS", 32)
    counts = prepare(tmp_path, schema, tmp_path / "whole").counts
    assert (counts["users"], counts["repeated_common_features"]) == (60, 26)
    threads = pa.cpu_count()
    for number, (block, ids, cores) in enumerate([(1 << 23, 1 << 20, 1), (4000, 64, 2), (300, 1, threads)]):
        monkeypatch.setattr(aliccp_scan, "BLOCK_BYTES", block)
        monkeypatch.setattr(aliccp, "CHUNK_IDS", ids)
        pa.set_cpu_count(cores)
        prepare(tmp_path, schema, tmp_path / str(number))
        assert _digests(tmp_path / str(number)) == _digests(tmp_path / "whole")
    assert pq.ParquetFile(tmp_path / "0" / "train.parquet").metadata.row_group(0).num_rows == 32
    # where rows hold many ids, row groups have fewer
    monkeypatch.undo()
    monkeypatch.setattr(aliccp, "GROUP_IDS", 800)
    prepare(tmp_path, schema, tmp_path / "many")
    rows = [row for split in ("train", "validation", "test") for row in zip(
        *(column for name, column in columns(tmp_path / "many", split).items()
          if name not in ("click", "conversion") and not name.endswith(".weights")), strict=True
    )]  # fmt: skip
    ids = sum(len(cell) if isinstance(cell, list) else cell != 1 for row in rows for cell in row)
    group = pq.ParquetFile(tmp_path / "many" / "train.parquet").metadata.row_group(0)
    assert group.num_rows == 800 * len(rows) // ids > 64


@pytest.mark.faults
@pytest.mark.parametrize("moment", [COMMON, SKELETON, "splits"])
def test_after_a_kill_the_same_command_gives_the_same_bytes(tmp_path: Path, moment: str) -> None:
    schema = _generated(tmp_path)
    prepare(tmp_path, schema, tmp_path / "whole")
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from pipeline.tasks.mmoe.prepare import aliccp, aliccp_scan\n"
        "from pipeline.tasks.mmoe.prepare.preparation import prepare\n"
        "aliccp_scan.BLOCK_BYTES, aliccp.CHUNK_IDS, data = 4000, 100, Path(sys.argv[2])\n"
        "def progress(what, rows, share):\n"
        "    if what == sys.argv[1] and share > .5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare(data, data / 'schema.yaml', data / 'out', progress=progress)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, moment, str(tmp_path)], check=False, cwd=ROOT)
    assert ended.returncode == -signal.SIGKILL
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert set(left) <= {*FILES[:4], ".work.lock"}  # what was read went to files without a name
    prepare(tmp_path, schema, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    assert _digests(tmp_path / "out") == _digests(tmp_path / "whole")


# ---------------------------------------------------------------- memory, hashing, gzip


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the rows of the same users and ids, in blocks that are small beside both."""
    monkeypatch.setattr(aliccp_scan, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(aliccp, "CHUNK_IDS", 1 << 10)
    monkeypatch.setattr(prepared_folder, "ROW_GROUP_ROWS", 256)
    common = "".join(line(f"{number:016x}", f"101={number}") for number in range(50))
    one = "".join(
        line(f"{number},0,0,{number % 50:016x}", f"205={number % 97} 210=5:2 210={number % 9}")
        for number in range(2_000)
    )
    peaks, of_arrow = [], []
    for times in (1, 1, 10):
        schema, held = write_raw(tmp_path, one * times, common), list[int]()
        tracemalloc.start()
        prepare(tmp_path, schema, tmp_path / "out", progress=lambda *_: held.append(pa.total_allocated_bytes()))  # noqa: B023
        peaks.append(tracemalloc.get_traced_memory()[1])
        of_arrow.append(max(held))
        tracemalloc.stop()
    assert len(one) * 9 > 600_000
    assert peaks[2] < peaks[1] + 100_000
    assert of_arrow[2] < of_arrow[1] + 100_000


def test_hashed_ids_of_a_csv(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("click,bought,city\n1,0,Huế\n0,0,Huế\n1,0,Vinh\n1,0,\n")
    tree = {
        "labels": {"click": "click", "conversion": "bought"}, "split": ALL_TRAINING,
        "features": {"city": {"kind": "categorical", "min_count": 2, "hash_buckets": 5}},
    }  # fmt: skip
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(tree))
    schema = prepare(tmp_path / "data.csv", tmp_path / "schema.yaml", tmp_path / "out")
    assert columns(tmp_path / "out")["city"] == [2, 2, 3 + hashed("Vinh") % 5, 1]
    assert (schema.features[0].size, schema.features[0].hash_buckets) == (8, 5)
    assert schema.features[0].out_of_vocabulary["train"] == 0
    unseen = pd.DataFrame({"city": ["Hà Nội", "Huế", None]})
    encoded = Encoder.load(tmp_path / "out").encode(unseen)["city"].to_pylist()
    assert encoded == [3 + hashed("Hà Nội") % 5, 2, 1]


def test_files_with_a_header_and_a_byte_order_mark(tmp_path: Path) -> None:
    header = "\ufeffsample_id,click,buy,common_feature_index,feat_num,feat_list\r\n"
    schema = write_raw(tmp_path, header + SKELETON_TEXT, "index,feat_num,feat_list\n" + COMMON_TEXT)
    prepared = prepare(tmp_path, schema, tmp_path / "out")
    assert (prepared.counts["lines"], prepared.counts["users"]) == (6, 2)
    assert columns(tmp_path / "out")["101"] == [2, 2, 3, 1]


def test_the_bar_shows_rows_a_second_and_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    now = 0.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    with ProgressBars() as bars:
        for seconds, rows in ((0, 1000), (1, 3000), (2, 5000)):
            now = seconds
            bars.show("file.csv", rows, rows / 10_000)
        bars.show("users", 70, 1.0)
    shown = re.split("[\r\n]+", capsys.readouterr().err)
    # 4000 rows in two seconds; the other 5000 will take as long for each
    assert any(re.search(r"file\.csv: +50%.* 5\.00k/10\.0k .*00:02<00:02, 2\.00k rows/s", part) for part in shown)
    assert any(part.startswith("users: 100%") for part in shown)


@pytest.mark.parametrize("zeros", [0, 1, 1000])
def test_gzip_in_parts_with_trailing_zeros(zeros: int, tmp_path: Path) -> None:
    """As written by parallel compressors and to tapes; a file that is cut, or begins with zeros, is refused."""
    schema = write_raw(tmp_path, SKELETON_TEXT, COMMON_TEXT)
    prepare(tmp_path, schema, tmp_path / "plain")
    (tmp_path / SKELETON).unlink()
    file = tmp_path / f"{SKELETON}.gz"
    parts = [gzip.compress(part.encode()) + bytes(zeros) for part in (SKELETON_TEXT[:100], SKELETON_TEXT[100:])]
    file.write_bytes(b"".join(parts))
    prepare(tmp_path, schema, tmp_path / "out")
    assert _digests(tmp_path / "out")[:4] == _digests(tmp_path / "plain")[:4]
    for wrong in (parts[0] + parts[1][: -zeros - 9], bytes(1) + parts[0], parts[0] + SKELETON_TEXT.encode()):
        file.write_bytes(wrong)
        with pytest.raises(UserError, match=rf"{file.name}: not a whole gzip file \([^()]*(\([^()]*\))?\)$"):
            prepare(tmp_path, schema, tmp_path / "out")
