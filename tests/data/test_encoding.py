"""The encoder of a logged model: data frames against the files they came from."""

import io
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_tables import SHOP, SHOP_FEATURES, column, prepare_text, vocabulary, write_schema

from pipeline.data.encoding import Encoder
from pipeline.errors import UserError
from pipeline.tasks.mmoe.prepare.preparation import prepare


def encoder_for(folder: Path, text: str, features: dict[str, Any], **keys: Any) -> Encoder:
    prepare_text(folder, text, features, **keys)
    return Encoder.load(folder / "out")


def encoded(encoder: Encoder, **columns: Any) -> dict[str, list[Any]]:
    return {name: values.to_pylist() for name, values in encoder.encode(pd.DataFrame(columns)).items()}


def test_numbers_find_the_spelling_of_the_file(tmp_path: Path) -> None:
    codes = ["07", "07", "08", "008", "1.50", "12", "1e3", "-05", "9007199254740993"]
    text = "click,bought,code\n" + "".join(f"0,0,{code}\n" for code in codes)
    encoder = encoder_for(tmp_path, text, {"code": "categorical"})
    ids = {value: number for _, value, number, _ in vocabulary(tmp_path)}
    assert encoded(encoder, code=[7, 12, 1000, -5])["code"] == [ids["07"], ids["12"], ids["1e3"], ids["-05"]]
    assert encoded(encoder, code=[1.5, 7.0, np.nan])["code"] == [ids["1.50"], ids["07"], 1]
    assert encoded(encoder, code=[8])["code"] == [0]  # 08 or 008? Nobody can tell
    assert encoded(encoder, code=["7", " 07 ", "08"])["code"] == [0, ids["07"], ids["08"]]  # text says what it means
    assert encoded(encoder, code=[9007199254740993, 9007199254740992])["code"] == [ids["9007199254740993"], 0]
    mixed = [7, "08", 12.0, None, pd.NA, float("nan"), np.int64(12)]  # chunks that pandas read as different types
    assert encoded(encoder, code=mixed)["code"] == [ids["07"], ids["08"], ids["12"], 1, 1, 1, ids["12"]]


def test_truth_values_find_the_spelling_of_the_file(tmp_path: Path) -> None:
    encoder = encoder_for(tmp_path, "click,bought,flag\n0,0,true\n0,0,true\n0,0,FALSE\n", {"flag": "categorical"})
    assert encoded(encoder, flag=[True, False])["flag"] == [2, 3]
    assert encoded(encoder, flag=[False, None])["flag"] == [3, 1]
    assert encoded(encoder, flag=["true", "True", "yes"])["flag"] == [2, 2, 0]


def test_missing_numbers_are_missing_in_frames(tmp_path: Path) -> None:
    text = "click,bought,code,price\n0,0,3,1\n0,0,-1.0,-1.0\n"
    features = {"code": "categorical", "price": {"kind": "numeric", "missing": 7}}
    encoder = encoder_for(tmp_path, text, features, missing_values=["-1.0"])
    ids = encoded(encoder, code=[-1, 3], price=[-1, 2])
    assert ids == {"code": [1, 2], "price": [7.0, 2.0]}


def test_bags_in_all_their_forms(tmp_path: Path) -> None:
    features = {
        "tags": {"kind": "multi", "separator": ";"},
        "seen": {"kind": "multi", "weight_separator": ":"},
        "liked": {"kind": "multi", "weights": "how_much"},
    }
    text = "click,bought,tags,seen,liked,how_much\n" + '0,0,1;2;2,"5:1|1:2:3",8|8|9,1|2|3\n'
    encoder = encoder_for(tmp_path, text, features)
    assert column(tmp_path, "seen") == [[3, 2]]  # ids "5" and "1:2": the weight follows the last separator
    frame = pd.DataFrame({
        "tags": ["1;;2", [1, 2.0, None], np.array(["2", "9"]), None, (1,), ""],
        "seen": ["5:0.5", ["5:1", "1:2:3"], "", None, "NA", " 5:2 | NA "],
        "liked": [[8], ["9", 8], "8|9", [], None, float("nan")],
        "how_much": [[0.5], [1, 2], "3|4", [], "", None],
    })  # fmt: skip
    columns = encoder.encode(frame)
    assert {name: str(values.type) for name, values in columns.items()} == {
        "tags": "list<item: int32>", "seen": "list<item: int32>", "seen.weights": "list<item: float>",
        "liked": "list<item: int32>", "liked.weights": "list<item: float>",
    }  # fmt: skip
    assert columns["tags"].to_pylist() == [[3, 2], [3, 2], [2, 0], [], [3], []]
    assert columns["seen"].to_pylist() == [[3], [3, 2], [], [], [], [3]]
    assert columns["seen.weights"].to_pylist() == [[0.5], [1.0, 3.0], [], [], [], [2.0]]
    assert columns["liked"].to_pylist() == [[2], [3, 2], [2, 3], [], [], []]
    assert columns["liked.weights"].to_pylist() == [[0.5], [1.0, 2.0], [3.0, 4.0], [], [], []]
    single = pd.DataFrame({"tags": [1, 2], "seen": ["", "5:1"], "liked": [8.0, np.nan], "how_much": [0.5, np.nan]})
    assert encoder.encode(single)["tags"].to_pylist() == [[3], [2]]
    assert encoder.encode(single)["liked.weights"].to_pylist() == [[0.5], []]


def test_types_that_parquet_has_and_csv_has_not(tmp_path: Path) -> None:
    when = pd.to_datetime(["2024-05-01 12:00", "2024-05-01 12:00", "2025-01-01 00:00"])
    arrow = {
        "click": pa.array([True, False, False]),
        "bought": pa.array([0, 0, 0], pa.uint8()),
        "seconds": pa.array(when, pa.timestamp("s")),
        "zoned": pa.array(when, pa.timestamp("ns", "UTC")),
        "day": pa.array(when, pa.date32()),
        "big": pa.array([Decimal(10**30), Decimal(10**30), Decimal(10**30 + 1)], pa.decimal128(38, 0)),
        "cost": pa.array([Decimal("1.50"), Decimal("1.50"), Decimal(3)], pa.decimal128(5, 2)),
        "small": pa.array(["a", "a", "b"]).dictionary_encode(),
        "wide": pa.array(["a", "a", "b"], pa.large_string()),
        "bytes": pa.array([b"a", b"a", b"b"], pa.binary()),
        "half": pa.array([0.5, 0.5, None], pa.float16()),
        "single": pa.array([0.1, 0.1, 3], pa.float32()),
        "lists": pa.array([[1, 2, 1], None, [1]], pa.large_list(pa.int8())),
        "pairs": pa.array([[1.0, 2.0], [1.0, None], [None, 2.0]], pa.list_(pa.float64(), 2)),
        "price": pa.array([Decimal(1), Decimal(2), Decimal(3)], pa.decimal128(5, 2)),
    }
    pq.write_table(pa.table(arrow), tmp_path / "data.parquet")
    features: dict[str, Any] = dict.fromkeys([*arrow][2:-3], "categorical")
    features |= {"lists": "multi", "pairs": "multi", "price": "numeric"}
    prepare(tmp_path / "data.parquet", write_schema(tmp_path, features), tmp_path / "out")
    values: dict[str, list[str]] = {}
    for feature, value, _, _ in vocabulary(tmp_path):
        values.setdefault(feature, []).append(value)
    assert values == {
        "seconds": ["2024-05-01 12:00:00", "2025-01-01"],
        "zoned": ["2024-05-01 12:00:00", "2025-01-01"],
        "day": ["2024-05-01", "2025-01-01"],
        "big": [str(10**30), str(10**30 + 1)],
        "cost": ["1.50", "3.00"], "small": ["a", "b"], "wide": ["a", "b"], "bytes": ["a", "b"],
        "half": ["0.5"], "single": ["0.1", "3.0"], "lists": ["1", "2"], "pairs": ["1", "2"],
    }  # fmt: skip
    assert column(tmp_path, "half") == [2, 2, 1]
    assert column(tmp_path, "lists") == [[2, 3, 2], [], [2]]
    assert column(tmp_path, "pairs") == [[2, 3], [2], [3]]
    assert column(tmp_path, "price") == [1, 2, 3]
    table = pq.read_table(tmp_path / "out" / "train.parquet")
    for frame in (pa.table(arrow).to_pandas(), pa.table(arrow).to_pandas(types_mapper=pd.ArrowDtype)):
        for name, values in Encoder.load(tmp_path / "out").encode(frame).items():
            assert values.equals(table[name].combine_chunks().cast(values.type)), name


def test_an_empty_frame_has_the_same_types(tmp_path: Path) -> None:
    encoder = encoder_for(tmp_path, SHOP, SHOP_FEATURES)
    full = encoder.encode(pd.read_csv(io.StringIO(SHOP)))
    empty = encoder.encode(pd.read_csv(io.StringIO(SHOP)).iloc[:0])
    for name, values in empty.items():
        assert (len(values), values.type) == (0, full[name].type)


def test_frames_that_are_refused(tmp_path: Path) -> None:
    text = "click,bought,city,price\n0,0,a,1\n"
    encoder = encoder_for(tmp_path, text, {"city": "categorical", "price": "numeric"})
    good = pd.DataFrame({"city": ["a"] * 3, "price": [1.0] * 3, "more": 1})
    encoder.encode(good)
    for frame, expected in [
        (good.drop(columns="price").rename(columns={"more": "prices"}), "no column price; did you mean prices?"),
        (good.assign(price=[1, None, 2]), "row 2, column price: found no value, allowed: a number"),
        (good.assign(price=["1", "2", "3x"]), "row 3, column price: found '3x', allowed: a number"),
        (good.assign(price=[1, np.inf, 2]), "row 2, column price: found inf, allowed: finite"),
        (good.assign(price=[1, 2, 1e39]), "row 3, column price: found 1e+39, allowed: finite"),
        (good.assign(city=[["a"], ["b"], []]), "row 1, column city: found lists, allowed: one value a row"),
        (good.assign(city=[{"a": 1}] * 3), "column city: found values of type struct"),
        (pd.concat([good, good["city"]], axis=1), "column city appears twice"),
    ]:
        with pytest.raises(UserError) as caught:
            encoder.encode(frame)
        assert expected in str(caught.value)


def test_a_foreign_vocabulary_is_refused(tmp_path: Path) -> None:
    prepare_text(tmp_path, SHOP, SHOP_FEATURES)
    file = tmp_path / "out" / "vocabulary.parquet"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"not the vocabulary that schema\.json was written with"):
        Encoder.load(tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match="No such file"):
        Encoder.load(tmp_path / "out")
