"""Raw Ali-CCP files to training-ready columns: by hand, against a slow reader of its own, and across kills."""

import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import FULL, SHRUNK, Call
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import load
from pipeline.errors import UserError
from pipeline.tasks.mmoe import prepare as prepare_module
from pipeline.tasks.mmoe.aliccp import columns as aliccp_columns
from pipeline.tasks.mmoe.aliccp import lines as aliccp_lines
from pipeline.tasks.mmoe.aliccp import scan as aliccp_scan
from pipeline.tasks.mmoe.aliccp.config import RawSource
from pipeline.tasks.mmoe.aliccp.preparation import prepare_raw
from pipeline.tasks.mmoe.aliccp.work import FOLDER
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.encoding import Encoder
from pipeline.tasks.mmoe.entry import Bars, figures
from pipeline.tasks.mmoe.prepare import prepare
from pipeline.tasks.mmoe.schema import MISSING_TEXT, DataSchema

EXAMPLES = 200 if FULL else 20  # of whole files
REPOSITORY = Path(__file__).parent.parent
SHIPPED = REPOSITORY / "configs" / "data" / "aliccp.yaml"
SKELETON, COMMON = "sample_skeleton_train.csv", "common_features_train.csv"
ALL_TRAINING = {"train": 1.0, "validation": 0.0, "test": 0.0}
FILES = ("train.parquet", "validation.parquet", "test.parquet", "vocabulary.parquet", "schema.json")
Row = dict[str, Any]

pytestmark = pytest.mark.xdist_group("aliccp")  # one process compiles its loops


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
    found: dict[str, list[Any]] = pq.read_table(folder / f"{split}.parquet").to_pydict()
    return found


def vocabulary(folder: Path) -> list[tuple[str, str, int, int]]:
    table = pq.read_table(folder / "vocabulary.parquet")
    return list(zip(*(table[name].to_pylist() for name in ("feature", "value", "id", "count")), strict=True))


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
        "109_14": [[2, 3], [2, 3], [], []],
        "109_14.weights": [[0.5, np.float32(2.07944)]] * 2 + [[], []],
        "121": [2, 2, 2, 1],
        "205": [2, 3, 2, 2],  # 16777216 three times, 16777217 once
        "210": [[2, 3], [2], [], []],  # 9 twice, 8 once
        "210.weights": [[1.0, 1.0], [1.0], [], []],
    }
    assert vocabulary(tmp_path / "out") == [
        ("101", "31319", 2, 2), ("101", "31320", 3, 1),
        ("109_14", "450001", 2, 2), ("109_14", "16777217", 3, 2),  # equally often: by number
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
    assert DataSchema.read(tmp_path / "out") == schema


def test_the_shipped_yaml_reads_the_files_under_their_own_names(tmp_path: Path) -> None:
    text = "".join(line(f"{number},0,0,bacff91692951881", f"205={number}") for number in range(400))
    write_raw(tmp_path, text, COMMON_TEXT)
    schema = prepare(tmp_path, SHIPPED, tmp_path / "out")
    assert sum(split.rows for split in schema.splits.values()) == 400
    assert 290 <= schema.splits["train"].rows <= 350  # 320 +- 4 standard deviations (8)
    declared = load(RawSource, SHIPPED)
    assert declared == RawSource(format="aliccp")  # what the YAML says is what is so without it


@pytest.mark.parametrize(("rule", "labels"), [
    ("drop", ([0, 1, 1], [0, 1, 0])),
    ("no_conversion", ([0, 1, 1, 0], [0, 1, 0, 0])),
    ("click", ([0, 1, 1, 1], [0, 1, 0, 1])),
])  # fmt: skip
def test_rules_for_rows_that_do_not_fit(tmp_path: Path, rule: str, labels: tuple[list[int], list[int]]) -> None:
    keys = {"conversion_without_click": rule, "without_common_features": "drop"}
    schema = prepare(tmp_path, write_raw(tmp_path, SKELETON_TEXT, COMMON_TEXT, **keys), tmp_path / "out")
    found = columns(tmp_path / "out")
    assert (found["click"], found["conversion"]) == labels
    assert (schema.counts["conversions_without_click"], schema.counts["without_common_features"]) == (1, 1)


def test_values_as_float32_of_the_double(tmp_path: Path) -> None:
    texts = ["1e-3", "-2.5", "+.5", "5.", "0.6931471805599453", "2.0794415416798357", "9007199254740993",
             "20794415416798357e-16", "1234567890123456789", "12345678901234567890123", "3.4028235e38", "1e-46", "-0",
             "0.00000000000000000000000000000000012345678901234567", "179769313486231570000e10"]  # fmt: skip
    text = "".join(line(f"{number},0,0,x", f"9={number}:{value}") for number, value in enumerate(texts))
    prepare(tmp_path, write_raw(tmp_path, text, ""), tmp_path / "out")
    assert columns(tmp_path / "out")["9.weights"] == [[float(np.float32(float(value)))] for value in texts]


def test_a_cut_last_line_is_told_and_left_out(tmp_path: Path) -> None:
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
        "2,0,0,bacff91692951881,1,205\x027": "no value",
        "2,0,0,bacff91692951881,1,205\x027\x031.0\x01": "a feature that is not there",
        "2,0,0,bacff91692951881": "too few cells",
        "2,0,0,bacff91692951881,1,Preis€\x027\x031.0": "not ASCII",
        f"2,0,0,bacff91692951881,1,{'n' * 65}\x027\x031.0": "a long name",
    }
    lines = SKELETON_TEXT.splitlines(keepends=True)
    for text in wrong:
        schema = write_raw(tmp_path, "".join([lines[0], text, "\n", *lines[1:]]), COMMON_TEXT)
        ended = call_pipeline("prepare_ctr", "--data", str(tmp_path), "--schema", str(schema),
                              "--output_dir", str(tmp_path / "out"), "--tracking.enabled", "false")  # fmt: skip
        assert ended.returncode == 2
        assert f"{SKELETON}: line 2: found " in ended.stderr
        assert "allowed: sample_id,click (0 or 1),buy (0 or 1)" in ended.stderr
        assert ended.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()

    text = "".join([lines[0], *(f"{line}\n" for line in wrong), *lines[1:]])
    schema = write_raw(tmp_path, text, COMMON_TEXT, malformed_lines=len(wrong))
    prepared = prepare(tmp_path, schema, tmp_path / "out")
    assert prepared.counts["malformed_lines"] == len(wrong)
    assert columns(tmp_path / "out")["click"] == [0, 1, 1, 0]
    with pytest.raises(UserError, match=f"line {len(wrong) + 1}: found"):
        prepare(tmp_path, write_raw(tmp_path, text, COMMON_TEXT, malformed_lines=len(wrong) - 1), tmp_path / "out")
    with pytest.raises(UserError, match=rf"{COMMON}: line 1: found '1,0,0"):
        prepare(tmp_path, write_raw(tmp_path, SKELETON_TEXT, SKELETON_TEXT), tmp_path / "out")


@pytest.mark.parametrize(("keys", "told"), [
    ({"features": {"206": "categorical"}}, r"features\.206: no such field in the files; there are: 101, 109_14"),
    ({"features": {"207": "categorical"}}, r"features\.207: found in the common features and in the skeleton, allowed"),
    ({"features": {"ä": "multi"}}, r"allowed: names of up to 64 printable ASCII characters"),
    ({"other_fields": "ignore"}, "no field of the files is a feature"),
    ({"test": {"skeleton": "a", "common_features": "b"}, "split": {"test": 0.1}}, "allowed: one of both"),
    ({"test": {"skeleton": "a", "common_features": "b"}}, r"no file a \(nor a\.gz\)"),
    ({"conversion_without_click": "keep"}, "one of: drop, no_conversion, click"),
    ({}, r"features\.click: the prepared files have such a column; allowed"),
    ({"split": {"train": 1e-9, "validation": 1 - 1e-9, "test": 0}}, "4 rows, none of them in the training split"),
])  # fmt: skip
def test_a_schema_that_does_not_fit(tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    common = COMMON_TEXT + line("ffffffffffffffff", "207=1")
    skeleton = SKELETON_TEXT + line("6,1,1,bacff91692951881", "207=1")
    skeleton = skeleton if "207" in keys.get("features", {}) else SKELETON_TEXT
    if not keys:
        skeleton += line("6,0,0,x", "click=7")
    with pytest.raises(UserError, match=told):
        prepare(tmp_path, write_raw(tmp_path, skeleton, common, **keys), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    schema = write_raw(tmp_path, SKELETON_TEXT, "")
    (tmp_path / SKELETON).unlink()
    with pytest.raises(UserError, match=rf"no file {SKELETON}"):
        prepare(tmp_path, schema, tmp_path / "out")
    with pytest.raises(UserError, match=f"no such folder, allowed: a folder that holds {SKELETON}, {COMMON}"):
        prepare(tmp_path / "nowhere", schema, tmp_path / "out")
    (tmp_path / SKELETON).write_bytes(b"")
    with pytest.raises(UserError, match="no rows, allowed: at least one training row"):
        prepare(tmp_path, schema, tmp_path / "out")
    (tmp_path / SKELETON).unlink()
    (tmp_path / f"{SKELETON}.gz").write_bytes(gzip.compress(SKELETON_TEXT.encode())[:-30])
    with pytest.raises(UserError, match=r"\.gz: not a whole gzip file"):
        prepare(tmp_path, schema, tmp_path / "out")


# ---------------------------------------------------------------- a slow reader of its own

MASK = 2**64 - 1
NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
FEATURE = rf"[ -+\--~]{{1,64}}\x02[ -+\--~]*\x03{NUMBER}"
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


def by_number(text: str) -> tuple[bool, int, str]:
    """Numbers as they are written in decimal, up to 19 digits; then texts."""
    number = bool(re.fullmatch(r"0|[1-9][0-9]{0,18}", text))
    return (not number, int(text) if number else 0, text)


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
    found = [tuple(re.split("[\x02\x03]", part)) for part in text.split("\x01")] if text else []
    counts["other_feat_num"] += int(claimed) != len(found)
    return [(name, number, float(value)) for name, number, value in found]


def slowly(skeleton: str, common: str, source: RawSource) -> tuple[dict[str, list[Row]], dict[str, Any], Counter[str]]:
    """Rows of each split (id texts and weights), what is known of each feature, and what was met."""
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
        key = hashed(index if source.split.by == "common_feature_index" else sample)
        uniform = (mixed(key ^ mixed(source.split.seed)) >> 11) / 2**53
        first, second = source.split.train, source.split.train + source.split.validation
        split = "train" if uniform < first else "validation" if uniform < second else "test"
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
        words = sorted((word for word in seen if seen[word] >= least), key=lambda word: (-seen[word], by_number(word)))
        known[name] = {"kind": kind, "words": words, "seen": seen, "weighted": wish.weighted if wish else True,
                       "found": name in in_common | in_skeleton}  # fmt: skip
    return splits, known, counts


def slow_columns(rows: list[Row], known: dict[str, Any], source: RawSource) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {label: [row[label] for row in rows] for label in ("click", "conversion")}
    for name, feature in known.items():
        wish = source.features.get(name)
        buckets = source.hash_buckets if wish is None or wish.hash_buckets is None else wish.hash_buckets
        ids = {word: number for number, word in enumerate(feature["words"], 2)}

        def number(word: str, ids: dict[str, int] = ids, buckets: int = buckets) -> int:
            return ids.get(word, 2 + len(ids) + hashed(word) % buckets if buckets else 0)

        own = [[part for part in row["parts"] if part[0] == name] for row in rows]
        if feature["kind"] == "categorical":
            found[name] = [number(parts[0][1]) if parts else 1 for parts in own]
        else:
            found[name] = [[number(part[1]) for part in parts] for parts in own]
            if feature["weighted"]:
                found[f"{name}.weights"] = [[float(np.float32(part[2])) for part in parts] for parts in own]
    return found


INDICES = ("bacff91692951881", "0000000000000001", "1", "user 7", "BACFF91692951881", "")
IDS = ("0", "7", "07", "16777216", "16777217", "9007199254740993", "9223372036854775807", "9223372036854775808",
       "9999999999999999999", "10000000000000000000", "-3", "abc", "a b;c", "", "NULL", "7.0")  # fmt: skip
VALUES = ("1", "1.0", "1.0", "1.0", "0.5", "2.07944", "-2", "1e-3", "0.6931471805599453")
COMMON_FIELDS, SKELETON_FIELDS = ("101", "121", "109_14", "both"), ("205", "210", "a rather long name", "both")


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
    source = RawSource.model_validate({"format": "aliccp"} | rules)
    splits, known, counts = slowly(skeleton, common, source)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(aliccp_lines, "BLOCK_BYTES", block)
        patch.setattr(aliccp_scan, "SLOTS", 1 << 23 if block > 1000 else 4)
        patch.setattr(prepare_module, "ROW_GROUP_ROWS", 4)
        for constant, words in (("CHUNK_WORDS", 30), ("GAP_WORDS", 2)):  # so that a few rows are several chunks
            patch.setattr(aliccp_columns, constant, words)
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


def _frames_mean_the_same(folder: Path, rows: list[Row], known: dict[str, Any], source: RawSource) -> None:
    """A logged model encodes a raw frame as the files were."""
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


# ---------------------------------------------------------------- going on after a kill


def test_the_test_files_may_be_the_test_split(tmp_path: Path) -> None:
    test = {"skeleton": "sample_skeleton_test.csv", "common_features": "common_features_test.csv"}
    (tmp_path / test["skeleton"]).write_text(
        line("9,1,0,bacff91692951881", "205=16777216") + line("10,0,0,0123456789abcdef", "205=77")
    )
    (tmp_path / test["common_features"]).write_text(line("bacff91692951881", "101=31320 121=4"))
    keys = {"test": test, "split": {"train": 1.0, "validation": 0.0, "test": 0.0}}
    schema = prepare(tmp_path, write_raw(tmp_path, SKELETON_TEXT, COMMON_TEXT, **keys), tmp_path / "out")
    found = columns(tmp_path / "out", "test")
    # the same index means another user there; 4 and 77 are not in the training split; one user is missing
    assert (found["click"], found["101"], found["121"], found["205"]) == ([1, 0], [3, 1], [0, 1], [2, 0])
    assert columns(tmp_path / "out")["101"] == [2, 2, 3, 1]
    assert schema.counts["without_common_features"] == 2
    assert [feature.out_of_vocabulary["test"] for feature in schema.features if feature.name in ("121", "205")] == [
        1.0, 0.5,
    ]  # fmt: skip


def _generated(folder: Path, rows: int = 400, users: int = 60) -> Path:
    """Files of many small blocks, and their schema."""
    generator = np.random.default_rng(0)
    common = "".join(
        line(f"{number:016x}", f"101={number} 121={number % 5} " + " ".join(
            f"109_14={generator.integers(500)}:{generator.integers(1, 99)}e-1" for _ in range(generator.integers(5))
        )) for number in range(users)
    )  # fmt: skip
    skeleton = "".join(
        line(f"{number},{number % 2},{number % 8 // 7},{generator.integers(users + 5):016x}",
             f"205={generator.integers(2**40)} 206={generator.integers(50)} odd=x{generator.integers(9)}")
        for number in range(rows)
    )  # fmt: skip
    split = {"train": 0.8, "validation": 0.1, "test": 0.1}
    return write_raw(folder, skeleton, common, split=split, min_count=2, hash_buckets=7)


def _digests(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def _raw(schema: Path) -> RawSource:
    return load(RawSource, schema)


def test_whatever_moment_it_is_killed_at_it_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aliccp_lines, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(aliccp_scan, "SLOTS", 64)
    monkeypatch.setattr(prepare_module, "ROW_GROUP_ROWS", 32)
    schema = _generated(tmp_path)
    snapshots: list[tuple[Path, str]] = []

    def snapshot(what: str, rows: int, share: float) -> None:
        """What a process that is killed now would leave: nothing waits in buffers of its own."""
        assert rows > 0
        assert 0 < share <= 1
        to = tmp_path / f"killed-{len(snapshots)}"
        shutil.copytree(tmp_path / "whole" / FOLDER, to / FOLDER)
        snapshots.append((to, what))

    source = _raw(schema)
    prepare_raw(tmp_path, source, schema, tmp_path / "whole", progress=snapshot, keep_seconds=0)
    prepare_raw(tmp_path, source, schema, tmp_path / "at once")
    whole = _digests(tmp_path / "whole")
    assert _digests(tmp_path / "at once") == whole
    order = list(dict.fromkeys(what for _, what in snapshots))
    assert order == [COMMON, SKELETON, "users", "train.parquet", "validation.parquet", "test.parquet"]
    assert Counter(what for _, what in snapshots)[SKELETON] > 5
    for number, (killed, what) in enumerate(snapshots):
        done: list[tuple[str, int]] = []
        prepare_raw(tmp_path, source, schema, killed, progress=lambda *told: done.append(told[:2]))  # noqa: B023
        assert _digests(killed) == whole, what
        assert sorted(path.name for path in killed.iterdir()) == sorted(FILES)
        # no finished stage again; of a file that is being read, at most the last block
        assert not {what for what, _ in done} & set(order[: order.index(what)])
        if what in (COMMON, SKELETON) and number and snapshots[number - 1][1] == what:
            assert len([1 for again, _ in done if again == what]) <= 1 + len(
                [1 for _, later in snapshots[number:] if later == what]
            )


@pytest.mark.faults
def test_a_killed_process_leaves_what_the_next_one_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL, in a process of its own; in full, the second start is one of these, too."""
    schema = _generated(tmp_path)
    whole = tmp_path / "whole"
    prepare_raw(tmp_path, _raw(schema), schema, whole)
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from pipeline.tasks.mmoe.aliccp import lines\n"
        "lines.BLOCK_BYTES = 4000\n"
        "from pipeline.tasks.mmoe.aliccp.preparation import prepare_raw\n"
        "from pipeline.config import load\n"
        "from pipeline.tasks.mmoe.aliccp.config import RawSource\n"
        "def progress(what, rows, share):\n"
        "    if what == sys.argv[1] and share > .5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "data = Path(sys.argv[2])\n"
        "source = load(RawSource, data / 'schema.yaml')\n"
        "prepare_raw(data, source, data / 'schema.yaml', data / 'out', progress=progress, keep_seconds=0)\n"
    )
    for what in (SKELETON, "train.parquet") if FULL else ("train.parquet",):
        ended = subprocess.run([sys.executable, "-c", program, what, str(tmp_path)], check=False, cwd=REPOSITORY)
        assert ended.returncode == -signal.SIGKILL
        assert (tmp_path / "out" / FOLDER / "progress.npz").exists()
        assert not (tmp_path / "out" / "schema.json").exists()
    done: list[str] = []
    prepare_raw(tmp_path, _raw(schema), schema, tmp_path / "out", progress=lambda what, *_: done.append(what))
    assert _digests(tmp_path / "out") == _digests(whole)
    assert done[0] == "train.parquet"


def _stopped(folder: Path, schema: Path, at: str, error: BaseException) -> None:
    def progress(what: str, rows: int, share: float) -> None:
        if what == at and rows > 150:
            raise error

    prepare_raw(folder, _raw(schema), schema, folder / "out", progress=progress, keep_seconds=0)


def test_interrupted_it_keeps_its_work_and_failed_it_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliccp_lines, "BLOCK_BYTES", 4000)
    schema = _generated(tmp_path)
    work = tmp_path / "out" / FOLDER
    with pytest.raises(KeyboardInterrupt):
        _stopped(tmp_path, schema, SKELETON, KeyboardInterrupt())
    assert (work / "progress.npz").exists()
    with pytest.raises(UserError, match=r"No space left on device; what is done is kept in .*start again to go on"):
        _stopped(tmp_path, schema, SKELETON, OSError(28, "No space left on device"))
    assert (work / "progress.npz").exists()
    with pytest.raises(ZeroDivisionError):
        _stopped(tmp_path, schema, SKELETON, ZeroDivisionError())
    assert not (tmp_path / "out").exists()


def test_a_changed_file_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliccp_lines, "BLOCK_BYTES", 4000)
    schema = _generated(tmp_path)
    common = tmp_path / COMMON
    text, times = common.read_bytes(), (common.stat().st_atime_ns, common.stat().st_mtime_ns)
    with pytest.raises(KeyboardInterrupt):
        _stopped(tmp_path, schema, SKELETON, KeyboardInterrupt())
    common.write_bytes(text.replace(b"101\x0211\x03", b"101\x0288\x03"))
    os.utime(common, ns=(times[0], times[1] + 1))
    done: list[str] = []
    prepare_raw(tmp_path, _raw(schema), schema, tmp_path / "out", progress=lambda what, *_: done.append(what))
    assert done[0] == COMMON
    assert ("101", "88") in [entry[:2] for entry in vocabulary(tmp_path / "out")]

    # of the same size and time: found by its digest, where it is read again
    skeleton = tmp_path / SKELETON
    text, times = skeleton.read_bytes(), (skeleton.stat().st_atime_ns, skeleton.stat().st_mtime_ns)
    with pytest.raises(KeyboardInterrupt):
        _stopped(tmp_path, schema, SKELETON, KeyboardInterrupt())
    skeleton.write_bytes(text.replace(b"206\x02", b"207\x02"))
    os.utime(skeleton, ns=times)
    with pytest.raises(UserError, match=f"{SKELETON}: changed since its first half was prepared; start again"):
        prepare_raw(tmp_path, _raw(schema), schema, tmp_path / "out")
    prepare_raw(tmp_path, _raw(schema), schema, tmp_path / "out")
    assert "207" in [entry[0] for entry in vocabulary(tmp_path / "out")]


def test_another_schema_starts_over_and_a_spoilt_progress_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliccp_lines, "BLOCK_BYTES", 4000)
    schema = _generated(tmp_path)
    source = _raw(schema)
    for spoil in (False, True):
        with pytest.raises(KeyboardInterrupt):
            _stopped(tmp_path, schema, SKELETON, KeyboardInterrupt())
        if spoil:
            with (tmp_path / "out" / FOLDER / "progress.npz").open("rb+") as kept:
                kept.truncate(1000)
        done: list[str] = []
        wish = source if spoil else source.model_copy(update={"min_count": 1})
        prepare_raw(tmp_path, wish, schema, tmp_path / "out", progress=lambda what, *_: done.append(what))  # noqa: B023
        assert done[0] == COMMON


def test_one_at_a_time(tmp_path: Path) -> None:
    schema = _generated(tmp_path)

    def meanwhile(what: str, rows: int, share: float) -> None:
        with pytest.raises(UserError, match="another prepare_ctr is at work there"):
            prepare_raw(tmp_path, _raw(schema), schema, tmp_path / "out")

    prepare_raw(tmp_path, _raw(schema), schema, tmp_path / "out", progress=meanwhile)
    assert DataSchema.read(tmp_path / "out").counts["lines"] == 400


# ---------------------------------------------------------------- what comes of it


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the rows of the same users and ids, in blocks that are small beside both."""
    monkeypatch.setattr(aliccp_lines, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(aliccp_scan, "SLOTS", 1 << 10)
    monkeypatch.setattr(aliccp_columns, "CHUNK_WORDS", 1 << 10)
    monkeypatch.setattr(prepare_module, "ROW_GROUP_ROWS", 256)
    common = "".join(line(f"{number:016x}", f"101={number}") for number in range(50))
    one = "".join(
        line(f"{number},0,0,{number % 50:016x}", f"205={number % 97} 210=5:2 210={number % 9}")
        for number in range(2_000)
    )
    peaks = []
    for times in (1, 1, 10):
        schema = write_raw(tmp_path, one * times, common)
        tracemalloc.start()
        prepare_raw(tmp_path, _raw(schema), schema, tmp_path / "out")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(one) * 9 > 600_000
    assert peaks[2] < peaks[1] + 100_000


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


def test_columns_names_and_a_byte_order_mark_may_stand_first(tmp_path: Path) -> None:
    header = "\ufeffsample_id,click,buy,common_feature_index,feat_num,feat_list\r\n"
    schema = write_raw(tmp_path, header + SKELETON_TEXT, "index,feat_num,feat_list\n" + COMMON_TEXT)
    prepared = prepare(tmp_path, schema, tmp_path / "out")
    assert (prepared.counts["lines"], prepared.counts["users"]) == (6, 2)
    assert columns(tmp_path / "out")["101"] == [2, 2, 3, 1]


def test_training_reads_it(tmp_path: Path) -> None:
    from pipeline.console import Console
    from pipeline.run import MemoryRun
    from pipeline.tasks.mmoe.task import MmoeTask
    from pipeline.training import Training

    prepare(tmp_path, _generated(tmp_path), tmp_path / "out")
    keys = SHRUNK | {"data.path": str(tmp_path / "out"), "training.max_steps": "2", "output_dir": str(tmp_path / "run")}
    run = MemoryRun()
    task = MmoeTask(load(MmoeConfig, REPOSITORY / "configs/mtl_mmoe.yaml", keys))
    Training(task, run, Console(0, quiet=True), "cpu").train()
    assert [step for step, metrics in run.points if "loss_total" in metrics] == [0, 1]


def test_the_bar_shows_rows_a_second_and_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    now = 0.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    with Bars() as bars:
        for seconds, rows in ((0, 1000), (1, 3000), (2, 5000)):
            now = seconds
            bars.show("file.csv", rows, rows / 10_000)
        bars.show("users", 70, 1.0)
    shown = re.split("[\r\n]+", capsys.readouterr().err)
    # 4000 rows in two seconds; the other 5000 will take as long for each
    assert any(re.search(r"file\.csv: +50%.* 5\.00k/10\.0k .*00:02<00:02, 2\.00k rows/s", part) for part in shown)
    assert any(part.startswith("users: 100%") for part in shown)


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_compressed_text_that_ends_with_a_block(
    members: int, extra: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of exactly as many bytes as are read at a time, and one more or less."""
    monkeypatch.setattr(aliccp_lines, "BLOCK_BYTES", 64)
    line = b"x" * (63 + extra) + b"\n"
    file = tmp_path / "lines.csv.gz"
    file.write_bytes(gzip.compress(line) * members)
    found = [bytes(block.text[block.start : block.end]) for block in aliccp_lines.Lines(file).blocks()]
    assert b"".join(found) == line * members


@pytest.mark.parametrize("zeros", [1, 63, 64, 1000])
def test_zeros_after_compressed_text_are_skipped(zeros: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As tapes leave them, over several reads, and text may follow (gzip's own reader allows it)."""
    monkeypatch.setattr(aliccp_lines, "BLOCK_BYTES", 64)
    file = tmp_path / "lines.csv.gz"
    file.write_bytes((gzip.compress(b"some text\n") + bytes(zeros)) * 2)
    found = [bytes(block.text[block.start : block.end]) for block in aliccp_lines.Lines(file).blocks()]
    assert b"".join(found) == gzip.decompress(file.read_bytes()) == b"some text\n" * 2
    file.write_bytes(bytes(zeros) + gzip.compress(b"some text\n"))
    with pytest.raises(UserError, match="not a whole gzip file"):
        list(aliccp_lines.Lines(file).blocks())
