"""The generated impressions: their true probabilities, and the files."""

import math
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import chi2
from sklearn.metrics import roc_auc_score

from pipeline.data.contract import verify
from pipeline.data.prepared_folder import FILES, arrow_schema
from pipeline.data.schema import FIRST_ID, SPLITS, DataSchema
from pipeline.errors import UserError
from pipeline.storage.files import file_sha256
from pipeline.tasks.mmoe.config import EmbeddedDataConfig
from pipeline.tasks.mmoe.impressions import embedded_impressions as embedded
from pipeline.tasks.mmoe.impressions.embedded_impressions import embedded_data, generate

ROWS = 600_000
CALIBRATED_ON = 200_000  # rows on which the generator sets its mean rates

Columns = dict[str, npt.NDArray[Any]]


def read(folder: Path) -> pa.Table:
    """All splits, in order."""
    return pa.concat_tables([pq.ParquetFile(folder / f"{split}.parquet").read() for split in SPLITS])


pytestmark = pytest.mark.xdist_group("embedded")  # one process makes the data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DataSchema]:
    folder = tmp_path_factory.mktemp("generated")
    return folder, generate(folder, ROWS, seed=0)


@pytest.fixture(scope="module")
def table(prepared: tuple[Path, DataSchema]) -> pa.Table:
    return read(prepared[0])


@pytest.fixture(scope="module")
def rows(table: pa.Table) -> Columns:
    """Every column but the lists."""
    return {name: table[name].to_numpy() for name in table.column_names if not pa.types.is_list(table[name].type)}


# Labels and their truth


def assert_rates(schema: DataSchema, rows: int) -> None:
    """4% clicks and 3% conversions per click, within four standard errors of the sample and of the calibration."""
    clicks = sum(split.clicks for split in schema.splits.values())
    conversions = sum(split.conversions for split in schema.splits.values())
    assert abs(clicks / rows - 0.04) < 4 * math.sqrt(0.04 * 0.96 * (1 / rows + 1 / CALIBRATED_ON))
    assert abs(conversions / clicks - 0.03) < 4 * math.sqrt(0.03 * 0.97 * (1 / clicks + 1 / (0.04 * CALIBRATED_ON)))


def test_rates(prepared: tuple[Path, DataSchema], tmp_path: Path) -> None:
    """Of this world and of others."""
    assert_rates(prepared[1], ROWS)
    for seed in (1, 2**40):
        assert_rates(generate(tmp_path, 100_000, seed), 100_000)


def test_labels_and_probabilities(rows: Columns) -> None:
    """Labels are 0 and 1, conversions are clicks; probabilities lie between, and vary enough to be worth learning."""
    assert set(np.unique(rows["click"])) == set(np.unique(rows["conversion"])) == {0, 1}
    assert not (rows["conversion"] & ~rows["click"] & 1).any()
    assert rows["conversion"].sum() < rows["click"].sum()
    for name in ("p_ctr", "p_cvr"):
        assert rows[name].dtype == np.float64
        assert 0 < rows[name].min() < rows[name].max() < 1
        assert rows[name].std() > 0.01


def standard_scores(
    p: npt.NDArray[Any], events: npt.NDArray[Any], group: npt.NDArray[Any], least: float
) -> npt.NDArray[Any]:
    """Standard scores of the number of events in each group, if rows are independent events with their own p.

    Groups with fewer than `least` expected events are left out.
    """
    expected, variance = np.bincount(group, weights=p), np.bincount(group, weights=p * (1 - p))
    kept = expected >= least
    return (np.bincount(group, weights=events) - expected)[kept] / np.sqrt(variance[kept])


def deciles(p: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.searchsorted(np.quantile(p, np.linspace(0.1, 0.9, 9)), p)


def test_the_truth_is_calibrated(rows: Columns) -> None:
    """Clicks, conversions of clicks, and conversions, in bins by their own probability: within 4 standard errors."""
    clicked = rows["click"] == 1
    for p, events in (
        (rows["p_ctr"], rows["click"]),
        (rows["p_cvr"][clicked], rows["conversion"][clicked]),
        (rows["p_ctr"] * rows["p_cvr"], rows["conversion"]),
    ):
        scores = standard_scores(p, events, deciles(p), least=1)
        assert len(scores) == 10
        assert np.abs(scores).max() < 4


@pytest.mark.parametrize("name", ["user", "item", "age", "city", "category", "hour", "device", "slot"])
def test_the_truth_holds_for_every_value(rows: Columns, name: str) -> None:
    """Squared standard scores have mean 1: given p, the label does not depend on the features."""
    clicked = rows["click"] == 1
    for p, events, group in (
        (rows["p_ctr"], rows["click"], rows[name]),
        (rows["p_cvr"][clicked], rows["conversion"][clicked], rows[name][clicked]),
    ):
        scores = standard_scores(p, events, group, least=5)
        # their sum follows chi squared, skewed to the right; there are sixteen of them
        assert 1e-5 < chi2.cdf(np.square(scores).sum(), len(scores)) < 1 - 1e-5, (name, len(scores))


def test_the_truth_is_a_function_of_the_row(rows: Columns) -> None:
    """Equal users, items, hours, devices and slots have equal probabilities."""
    key = np.zeros(ROWS, dtype=np.int64)
    for name in ("user", "item", "hour", "device", "slot"):
        key = key * (int(rows[name].max()) + 1) + rows[name]
    _, group = np.unique(key, return_inverse=True)
    assert group.max() + 1 < 0.99 * ROWS  # enough rows come again
    first = np.zeros(group.max() + 1, dtype=np.int64)
    first[group[::-1]] = np.arange(ROWS)[::-1]
    for name in ("p_ctr", "p_cvr"):
        np.testing.assert_allclose(rows[name], rows[name][first[group]], rtol=1e-12)


def test_users_and_items_are_what_they_are(table: pa.Table) -> None:
    """One age, city, activity and set of interests a user; one category, price and set of tags an item."""
    some = table.slice(0, 20_000)
    owned = {
        "user": ("age", "city", "activity", "interests", "interests.weights"),
        "item": ("category", "price", "tags"),
    }
    for owner, names in owned.items():
        owners = some[owner].to_pylist()
        for name in names:
            values_of = defaultdict(set)
            for one, value in zip(owners, some[name].to_pylist(), strict=True):
                values_of[one].add(tuple(value) if isinstance(value, list) else value)
            assert {len(values) for values in values_of.values()} == {1}, name
            assert len(set.union(*values_of.values())) > 1, name


def test_popularity_is_skewed(rows: Columns) -> None:
    """A tenth of the users (items) has the share of impressions that Zipf's law with exponent 0.8 gives it: half."""
    for name, count in (("user", 2000), ("item", 500)):
        zipf = np.arange(1, count + 1) ** -0.8
        expected = zipf[: count // 10].sum() / zipf.sum()
        assert 0.5 < expected < 0.56
        shares = np.sort(np.bincount(rows[name]) / ROWS)[::-1]
        assert shares[: count // 10].sum() == pytest.approx(expected, abs=0.01)
        assert shares[0] == pytest.approx(zipf[0] / zipf.sum(), rel=0.05)
        assert (shares > 0).sum() == count  # and everyone comes


def test_the_popular_are_not_the_first(rows: Columns) -> None:
    """An id's number tells nothing of its popularity."""
    for name in ("user", "item"):
        counts = np.bincount(rows[name])[FIRST_ID:]
        assert abs(np.corrcoef(np.arange(len(counts)), counts)[0, 1]) < 0.15


def test_no_feature_alone_ranks_like_the_truth(rows: Columns, table: pa.Table) -> None:
    """Rates of each value on the first half of the rows, ranked on the second, fall short of the Bayes AUC."""
    features = {name: values for name, values in rows.items() if name not in ("click", "conversion", "p_ctr", "p_cvr")}
    for name in ("interests", "tags"):  # the first of the bag
        lists = table[name].combine_chunks()
        offsets, ids = lists.offsets.to_numpy(), lists.values.to_numpy()
        features[name] = np.where(np.diff(offsets) > 0, ids[np.minimum(offsets[:-1], len(ids) - 1)], -1)
    assert len(features) == 12
    coded = {name: np.unique(values, return_inverse=True)[1] for name, values in features.items()}
    clicked = rows["click"] == 1
    for p, events, chosen, margin in (
        (rows["p_ctr"], rows["click"], np.ones(ROWS, dtype=bool), 0.1),
        (rows["p_cvr"], rows["conversion"], clicked, 0.05),
    ):
        half = np.cumsum(chosen) <= chosen.sum() / 2
        first, second = chosen & half, chosen & ~half
        bayes = roc_auc_score(events[second], p[second])
        for name, codes in coded.items():
            seen = np.bincount(codes[first], minlength=codes.max() + 1)
            rate = (np.bincount(codes[first], weights=events[first], minlength=codes.max() + 1) + 0.04) / (seen + 1)
            assert roc_auc_score(events[second], rate[codes[second]]) < bayes - margin, name


# Files


drawn_once = cache(embedded.World)


@pytest.fixture
def one_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the world of a seed once: these tests only look at the written files."""
    monkeypatch.setattr(embedded, "World", drawn_once)


def test_the_folder_keeps_the_contract(prepared: tuple[Path, DataSchema], table: pa.Table) -> None:
    folder, schema = prepared
    assert verify(folder) == schema
    assert schema.truth
    assert {file.name for file in folder.iterdir()} == set(FILES)
    types = {field.name: str(field.type) for field in arrow_schema(schema.features)}
    assert {field.name: str(field.type).replace("element", "item") for field in table.schema} == types | {
        "p_ctr": "double", "p_cvr": "double"
    }  # fmt: skip
    assert Counter(feature.kind for feature in schema.features) == {"categorical": 8, "multi": 2, "numeric": 2}
    for feature in schema.features:
        if feature.kind != "numeric":
            column = table[feature.name].combine_chunks()
            ids = (column.flatten() if feature.kind == "multi" else column).unique().to_pylist()
            assert min(ids) >= FIRST_ID  # no value is missing or out of vocabulary
            assert len(ids) > 0.9 * (feature.size - FIRST_ID), feature.name


def test_bags(table: pa.Table) -> None:
    """One to four interests, whose weights sum to 1; up to four tags, at times none."""
    some = table.slice(0, 50_000)
    interests, weights = some["interests"].to_pylist(), some["interests.weights"].to_pylist()
    assert {len(bag) for bag in interests} == {1, 2, 3, 4}
    assert [len(bag) for bag in weights] == [len(bag) for bag in interests]
    assert all(abs(sum(bag) - 1) < 1e-6 and min(bag) > 0 for bag in weights)
    assert {len(bag) for bag in some["tags"].to_pylist()} == {0, 1, 2, 3, 4}


def test_edges_cover_the_numbers(prepared: tuple[Path, DataSchema], rows: Columns) -> None:
    """33 increasing edges, also in single precision, from the least to the largest; no bin is without rows."""
    for feature in prepared[1].features:
        if feature.kind == "numeric":
            edges = np.array(feature.edges, dtype=np.float32)
            assert len(edges) == 33
            assert all(low < high for low, high in pairwise(edges))
            assert edges[0] <= rows[feature.name].min()
            assert rows[feature.name].max() <= edges[-1]
            assert np.histogram(rows[feature.name], edges)[0].min() > 0


@pytest.mark.usefixtures("one_world")
@pytest.mark.parametrize("count", [1000, 1001, 1999, 2345])
def test_split_sizes(tmp_path: Path, count: int) -> None:
    """80, 10 and 10 percent, to the row that rounding costs, and none lost."""
    schema = generate(tmp_path, count, seed=3)
    sizes = {name: split.rows for name, split in schema.splits.items()}
    assert list(sizes) == ["train", "validation", "test"]
    assert sum(sizes.values()) == count
    for name, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert abs(sizes[name] - share * count) < 2
        assert pq.ParquetFile(tmp_path / f"{name}.parquet").metadata.num_rows == sizes[name]


def test_the_seed_decides(tmp_path: Path) -> None:
    """Byte by byte, and through the digest; chunk by chunk, no seed draws what another one does."""
    schemas = {}
    worlds = {"one": (2000, 5), "again": (2000, 5), "other": (2000, 6), "large": (2000, 5 + 2**32), "more": (2001, 5)}
    for name, (count, seed) in worlds.items():
        (tmp_path / name).mkdir()
        np.random.seed(len(schemas))  # no global generator takes part
        schemas[name] = generate(tmp_path / name, count, seed)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert schemas["one"].digest == schemas["again"].digest
    assert len({schema.digest for schema in schemas.values()}) == 4
    one, *others = (read(tmp_path / name)["user"].to_numpy() for name in ("one", "other", "large"))
    for other in others:
        assert np.mean(one == other) < 0.1


@pytest.mark.usefixtures("one_world")
@pytest.mark.parametrize("chunk", [300, 1999, 100_000])
def test_rows_that_are_no_multiple_of_the_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Every row is there once, chunk by chunk, and no chunk is another's copy."""
    monkeypatch.setattr(embedded, "CHUNK_ROWS", chunk)
    schema = generate(tmp_path, 2000, seed=7)
    for name, count in (("train", 1600), ("validation", 200), ("test", 200)):
        metadata = pq.ParquetFile(tmp_path / f"{name}.parquet").metadata
        groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        full, rest = divmod(count, chunk)
        assert groups == [chunk] * full + ([rest] if rest else [])
        assert schema.splits[name].rows == count
    content = read(tmp_path)
    assert sum(split.clicks for split in schema.splits.values()) == sum(content["click"].to_pylist())
    keys = list(zip(content["user"].to_pylist(), content["item"].to_pylist(), content["hour"].to_pylist(), strict=True))
    assert len(set(keys)) > 1950  # some users come to an item twice in an hour, chunks never again
    assert keys[:50] != keys[1600:1650]


# The cache


def config(folder: Path, rows: int = 1000, seed: int = 0) -> EmbeddedDataConfig:
    return EmbeddedDataConfig(rows=rows, seed=seed, cache=str(folder))


def fail(*_: Any) -> None:
    raise AssertionError("generated again")


@pytest.mark.usefixtures("one_world")
def test_generated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded_data(config(tmp_path / "new" / "cache"))
    assert DataSchema.read(folder).splits["train"].rows == 800
    monkeypatch.setattr(embedded, "generate", fail)
    assert embedded_data(config(tmp_path / "new" / "cache")) == folder


@pytest.mark.usefixtures("one_world")
def test_another_size_or_seed_is_another_folder(tmp_path: Path) -> None:
    folders = [embedded_data(config(tmp_path, *key)) for key in ((1000, 0), (1001, 0), (1000, 1))]
    assert len(set(folders)) == 3
    assert len({DataSchema.read(folder).digest for folder in folders}) == 3
    assert sorted(tmp_path.iterdir()) == sorted(folders)  # and nothing else stays


@pytest.mark.usefixtures("one_world")
def test_generating_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have written their copy before the first puts it in place: one folder, whole, and no leavings."""
    together = threading.Barrier(4, timeout=300)

    def at_once(folder: Path, rows: int, seed: int) -> DataSchema:
        schema = generate(folder, rows, seed)
        together.wait()
        return schema

    monkeypatch.setattr(embedded, "generate", at_once)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: embedded_data(config(tmp_path)), range(4)))
    assert len(set(folders)) == 1
    assert list(tmp_path.iterdir()) == folders[:1]
    schema = DataSchema.read(folders[0])
    for split in schema.splits.values():
        assert file_sha256(folders[0] / split.file) == split.sha256


@pytest.mark.usefixtures("one_world")
def test_an_interrupted_generation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path, rows: int, seed: int) -> None:
        (folder / "train.parquet").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(embedded, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embedded_data(config(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert DataSchema.read(embedded_data(config(tmp_path))).splits["test"].rows == 100


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        embedded_data(config(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("", encoding="utf-8")
    assert "data.embedded.cache" in refused(tmp_path / "cache")
    assert "data.embedded.cache" in refused(tmp_path / "cache" / "inside")


@pytest.mark.usefixtures("one_world")
def test_a_damaged_folder_is_made_again(tmp_path: Path) -> None:
    folder = embedded_data(config(tmp_path))
    (folder / "schema.json").unlink()
    again = embedded_data(config(tmp_path))
    assert DataSchema.read(again).splits["train"].rows == 800
