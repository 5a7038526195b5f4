"""Checkpoints: what is read is what was written, and at every moment one intact checkpoint is on disk."""

import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.errors import TrainingError, UserError
from pipeline.storage import checkpoint_format, files
from pipeline.storage import checkpoints as checkpoints_module
from pipeline.storage.checkpoint_format import read_checkpoint, write_checkpoint
from pipeline.storage.checkpoints import Checkpoints
from pipeline.storage.files import Damaged
from pipeline.storage.weights import load_weights, save_weights

FILES = ("state.pt", "manifest.json")
STATE = {"model": {"weight": torch.arange(6.0).reshape(2, 3)}, "steps": 7}
in_place = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(one: Any, other: Any) -> None:
    """Equal in type, order and every bit."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert (one.dtype, one.shape, bits(one)) == (other.dtype, other.shape, bits(other))
    elif isinstance(one, dict):
        assert [(type(key), key) for key in one] == [(type(key), key) for key in other]
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for part, another in zip(one, other, strict=True):
            assert_same(part, another)
    elif isinstance(one, float):
        assert struct.pack(">d", one) == struct.pack(">d", other)
    else:
        assert one == other


def same_files(one: Path, other: Path) -> bool:
    return one.stat().st_ino == other.stat().st_ino


def written(folder: Path, state: Mapping[str, Any] = STATE, **arguments: Any) -> Path:
    folder.mkdir(parents=True)
    write_checkpoint(folder, state, **({"step": 7} | arguments))
    return folder


def hidden(checkpoints: Checkpoints) -> list[str]:
    return [file.name for file in checkpoints.folder.glob(".*")]


def save(checkpoints: Checkpoints, step: int, size: int = 100, best: int | None = None) -> None:
    checkpoints.save(step, {"step": step, "weight": torch.full((size,), float(step))}, {}, {}, best)


def assert_intact(checkpoint: checkpoint_format.Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.step == checkpoint.state["step"] == step
    assert (checkpoint.state["weight"] == step).all()


def flip(file: Path, position: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0xFF
    file.unlink()  # it may be linked
    file.write_bytes(content)


def reseal(folder: Path, **changes: Any) -> None:
    """Make the manifest agree with the current files."""
    content = json.loads((folder / "manifest.json").read_bytes()) | changes
    del content["sha256"]
    for name in content["files"]:
        file = folder / name
        content["files"][name] = {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
    (folder / "manifest.json").write_text(json.dumps(content | {"sha256": checkpoint_format._seal(content)}))


# --- what is read is what was written ---------------------------------------------------------------------------------


def raw(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random bits, NaN and infinity among them."""
    size = math.prod(shape) * dtype.itemsize
    numbers = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, size, dtype=np.uint8)
    return (torch.from_numpy(numbers).view(dtype) if size else torch.empty(0, dtype=dtype)).reshape(shape)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3).map(tuple))
    tensor = raw(dtype, shape, draw(st.integers(0, 99)))
    kind = draw(st.sampled_from(["plain", "transposed", "every other", "broadcast", "part"]))
    if kind == "transposed":
        return tensor.permute(tuple(reversed(range(tensor.dim()))))
    if kind == "every other" and shape:
        return tensor[::3]
    if kind == "broadcast":
        return tensor.expand(2, *shape)
    return tensor[1:] if kind == "part" and shape else tensor


NUMBERS = "uint8 uint16 uint32 uint64 int8 int16 int32 int64 float8_e4m3fn float8_e5m2 float16 bfloat16 float32 float64"
DTYPES = [getattr(torch, name) for name in ("bool", "complex64", *NUMBERS.split())]
SHARED = torch.arange(12, dtype=torch.float32).reshape(3, 4)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
leaves = plain | tensors() | st.sampled_from([SHARED, SHARED[1], SHARED.T])
structures = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@in_place
@given(state=st.dictionaries(st.text(max_size=5) | st.integers(-3, 3), structures, max_size=4))
def test_any_state_comes_back_bit_for_bit(state: dict[Any, Any], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    try:
        size = write_checkpoint(folder, state, step=3, facts={"threads": 2})
        assert size == sum(file.stat().st_size for file in folder.iterdir())
        checkpoint = read_checkpoint(folder)
        assert (checkpoint.step, checkpoint.facts, checkpoint.folder) == (3, {"threads": 2}, folder)
        assert_same(checkpoint.state, state)
    finally:
        shutil.rmtree(folder)


def test_a_view_takes_no_more_than_its_own_numbers(tmp_path: Path) -> None:
    table = torch.arange(1e6)
    state = {"view": table[3:6], "column": table.view(1000, 1000)[:, 3], "spread": torch.ones(1).expand(1000)}
    folder = written(tmp_path / "g", state)
    assert (folder / "state.pt").stat().st_size < 20_000
    assert_same(read_checkpoint(folder).state, state)


def test_a_transposed_weight_keeps_its_strides(tmp_path: Path) -> None:
    """Strides decide the order of an optimizer's loops."""
    weight = nn.Parameter(torch.randn(3, 4, 5).permute(2, 0, 1))
    loaded = read_checkpoint(written(tmp_path / "g", {"weight": weight})).state["weight"]
    assert loaded.stride() == weight.stride() != weight.contiguous().stride()
    assert_same(loaded, weight.detach())


def test_tensors_that_shared_memory_are_apart_when_they_are_read(tmp_path: Path) -> None:
    loaded = read_checkpoint(
        written(tmp_path / "g", {"one": SHARED, "other": SHARED, "bits": SHARED.view(torch.int32)})
    ).state
    loaded["one"].zero_()
    assert torch.equal(loaded["other"], SHARED)
    assert torch.equal(loaded["bits"], SHARED.view(torch.int32))


def test_torch_itself_reads_the_file(tmp_path: Path) -> None:
    folder = written(tmp_path / "g", STATE, facts={"data": "abc"})
    assert_same(torch.load(folder / "state.pt", weights_only=True), STATE)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["facts"]) == (2, 7, {"data": "abc"})
    assert manifest["files"]["state.pt"]["size"] == (folder / "state.pt").stat().st_size


def test_parameters_and_numbers_of_numpy_come_back_as_plain_ones(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2))
    state = read_checkpoint(
        written(tmp_path / "g", {"w": weight, "f": np.float64(0.1), "i": np.int64(3), "b": np.bool_(True)})
    ).state
    assert_same(state, {"w": torch.ones(2), "f": 0.1, "i": 3, "b": True})
    assert not state["w"].requires_grad


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"inner": [object()]}, "state part/inner/0: found object"),
        ({1.5: 0}, "state part: found key 1.5"),
        ({True: 0}, "state part: found key True"),
        ({"x": {1, 2}}, "state part/x: found set"),
        (torch.eye(2).to_sparse(), "state part: found a tensor of torch.float32, torch.sparse_coo"),
        ({"x": b"bytes"}, "state part/x: found bytes"),
        ({"x": np.datetime64("2001-01-01")}, "state part/x: found date"),
        ({"x": [signal.SIGTERM]}, "state part/x/0: found Signals"),
    ],
)
def test_values_that_a_state_cannot_hold_are_refused_by_path(part: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        written(tmp_path / "g", {"part": part})


# --- damage -----------------------------------------------------------------------------------------------------------


def parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


@in_place
@given(data=st.data(), name=st.sampled_from(FILES))
def test_a_changed_byte_is_found(data: st.DataObject, name: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "g", facts={"data": "abc", "position": 12})
    file = folder / name
    before = file.read_bytes()
    content = bytearray(before)
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    if name == "manifest.json" and parsed(content) == json.loads(before):  # another blank between two values
        assert_same(read_checkpoint(folder).state, STATE)
    else:
        with pytest.raises(Damaged, match=f"^{file}: ") as raised:
            read_checkpoint(folder)
        assert raised.value.exit_code == 2
    shutil.rmtree(folder)


@in_place
@given(data=st.data(), name=st.sampled_from(FILES))
def test_a_cut_file_is_found(data: st.DataObject, name: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "g")
    size = (folder / name).stat().st_size
    os.truncate(folder / name, data.draw(st.integers(0, size - 1)))
    with pytest.raises(Damaged, match=f"^{folder / name}: "):
        read_checkpoint(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(name: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "g")
    (folder / name).unlink()
    with pytest.raises(Damaged, match=f"^{folder / name}: No such file or directory$"):
        read_checkpoint(folder)


@pytest.mark.parametrize("version", [1, 3])
def test_another_format_is_refused_and_never_passed_over(version: int, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, last=3)
    for step in (10, 20):
        save(checkpoints, step)
    checkpoints.check_format()
    reseal(checkpoints.folder / "000000020", format=version)
    message = re.escape(
        f"{checkpoints.folder}/000000020/manifest.json: found checkpoint format {version}, this program reads 2; "
        "resume with the version of focal-pipeline that wrote it, or delete "
        f"{checkpoints.folder} to train from the beginning"
    )
    for refused in (checkpoints.latest, checkpoints.check_format, lambda: checkpoints.at(20)):
        with pytest.raises(UserError, match=f"^{message}$") as raised:
            refused()
        assert raised.value.exit_code == 2
    assert checkpoints.steps() == [10, 20]


def test_a_flipped_bit_makes_no_other_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20):
        save(checkpoints, step)
    manifest = checkpoints.folder / "000000020" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 3'))
    checkpoints.check_format()
    assert_intact(checkpoints.latest(), 10)
    assert "manifest.json: found other content than was written; that of step 10" in capsys.readouterr().err


def saved_by_torch(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [*map(saved_by_torch, [[], None, 7, torch.ones(2)]), b"", b"{}", b"PK\x03\x04", b"\x80\x02.", b"\xff" * 1000],
    ids=len,
)
def test_a_file_without_a_state_is_refused_even_with_the_right_hash(content: bytes, tmp_path: Path) -> None:
    folder = written(tmp_path / "g")
    (folder / "state.pt").write_bytes(content)
    reseal(folder)
    with pytest.raises(Damaged, match=r"state\.pt: found no state in it$"):
        read_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_of_another_make_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = written(tmp_path / "g")
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"manifest\.json: found no manifest in it$"):
        read_checkpoint(folder)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    folder = written(tmp_path / "g")
    (tmp_path / "elsewhere").write_text("secret")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    reseal(folder, files=files | {"../elsewhere": {}})
    with pytest.raises(Damaged, match=r"manifest\.json: found files .*'\.\./elsewhere'$"):
        read_checkpoint(folder)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("saved_by_torch", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_bomb_is_refused_and_does_not_run(
    name: str, saved_by_torch: bool, sealed: bool, tmp_path: Path
) -> None:
    sentinel, folder = tmp_path / "sentinel", written(tmp_path / "g")
    bomb = tmp_path / "bomb"
    if saved_by_torch:
        torch.save({"weight": Bomb(sentinel)}, bomb)
        torch.load(bomb, weights_only=False)
    else:
        bomb.write_bytes(pickle.dumps(Bomb(sentinel)))
        pickle.loads(bomb.read_bytes())  # noqa: S301
    assert sentinel.is_dir()
    sentinel.rmdir()
    bomb.replace(folder / name)
    if sealed and name != "manifest.json":
        reseal(folder)
    with pytest.raises(Damaged, match=re.escape(f"{folder / name}: found")):
        read_checkpoint(folder)
    if name == "state.pt":
        with pytest.raises(Damaged, match="found no file of tensors"):
            load_weights(folder / name)
    assert not sentinel.exists()


def test_the_newest_intact_checkpoint_is_used_with_a_warning_about_damaged_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path, last=3)
    assert checkpoints.latest() is None
    for step in (10, 20, 30):
        save(checkpoints, step)
    assert_intact(checkpoints.latest(), 30)
    assert capsys.readouterr().err == ""

    flip(checkpoints.folder / "000000030" / "state.pt")
    os.truncate(checkpoints.folder / "000000020" / "manifest.json", 20)
    assert_intact(checkpoints.latest(), 10)
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"warning: damaged checkpoint: \S+/000000030/state\.pt: found SHA-256 \w{12}\.\.\., expected "
        r"\w{12}\.\.\.; that of step 10 is used instead", first)  # fmt: skip
    assert re.fullmatch(
        r"warning: damaged checkpoint: \S+/000000020/manifest\.json: found no manifest in it; that of step 10 is used "
        "instead", second)  # fmt: skip

    (checkpoints.folder / "000000010" / "state.pt").unlink()
    assert checkpoints.latest() is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.endswith("; no whole one is left") for line in lines)


def test_a_folder_that_was_renamed_is_not_taken_for_another_step(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10)
    (checkpoints.folder / "000000010").rename(checkpoints.folder / "000000099")
    with pytest.raises(Damaged, match="000000099: found step 10 in it"):
        checkpoints.at(99)


def test_a_step_that_was_not_kept_is_refused_naming_those_that_were(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"found no checkpoint of step 5; kept: none$"):
        checkpoints.at(5)
    for step in (10, 20, 30):
        save(checkpoints, step)
    assert_intact(checkpoints.at(20), 20)
    with pytest.raises(UserError, match=r"found no checkpoint of step 10; kept: 20, 30$"):
        checkpoints.at(10)


# --- which are kept ---


@pytest.mark.parametrize(
    ("last", "keep_steps", "saves", "expected"),
    [
        (2, (), [(10, None), (20, None), (30, None), (40, None)], [30, 40]),
        (2, (20, 35), [(10, None), (20, None), (30, None), (40, None), (50, None)], [20, 40, 50]),
        (2, (), [(10, 10), (20, 10), (30, 10), (40, 10)], [10, 30, 40]),
        (2, (), [(10, 10), (20, 20), (30, 20), (40, 20), (50, 40)], [40, 50]),
        (2, (10,), [(10, 5), (20, 20), (30, 20), (40, 20)], [10, 20, 30, 40]),
        (1, (), [(10, None), (20, 10), (30, 10)], [10, 30]),
        (3, (), [(999_999_998, None), (999_999_999, None), (1_000_000_000, None), (1_000_000_001, None)],
         [999_999_999, 1_000_000_000, 1_000_000_001]),
    ],
)  # fmt: skip
def test_the_last_the_best_and_keep_steps_are_kept(
    last: int, keep_steps: tuple[int, ...], saves: list[tuple[int, int | None]], expected: list[int], tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_steps, last=last)
    for step, best in saves:
        save(checkpoints, step, best=best)
    assert checkpoints.steps() == expected
    assert sorted(file.name for file in checkpoints.folder.iterdir()) == sorted(f"{step:09d}" for step in expected)
    for step in expected:
        assert_intact(checkpoints.at(step), step)


def test_damaged_ones_of_later_steps_do_not_push_whole_ones_out(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20):
        save(checkpoints, step)
    flip(checkpoints.folder / "000000020" / "state.pt")
    save(checkpoints, 15)  # the run went on from 10
    assert checkpoints.steps() == [10, 15]


def test_a_step_that_is_there_is_not_written_again_unless_it_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10)
    file = checkpoints.folder / "000000010" / "state.pt"
    first, size = (
        (file.stat().st_ino, file.stat().st_mtime_ns),
        sum(file.stat().st_size for file in file.parent.iterdir()),
    )
    saved = checkpoints.save(10, {"step": 99}, {}, {}, None)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == first
    assert saved.bytes == size
    assert saved.seconds > 0

    flip(file)
    save(checkpoints, 10)
    assert_intact(checkpoints.at(10), 10)
    assert "found SHA-256" in capsys.readouterr().err
    assert hidden(checkpoints) == []


# --- links ------------------------------------------------------------------------------------------------------------


def test_linked_files_are_shared_and_keep_what_they_were(tmp_path: Path) -> None:
    best = tmp_path / "best" / "model.safetensors"
    checkpoints = Checkpoints(tmp_path, last=3)
    for step, weight in ((10, 1.0), (20, None), (30, 3.0)):
        if weight is not None:
            save_weights({"weight": torch.tensor(weight)}, best)
        checkpoints.save(step, {}, {}, {"best.safetensors": best}, None)
    loaded = [checkpoints.at(step).folder / "best.safetensors" for step in (10, 20, 30)]
    assert [load_weights(file)["weight"].item() for file in loaded] == [1, 1, 3]
    assert same_files(loaded[0], loaded[1])
    assert same_files(loaded[2], best)

    flip(loaded[0])
    with pytest.raises(Damaged, match=r"best\.safetensors: found SHA-256"):
        checkpoints.at(10)


def test_where_files_cannot_be_linked_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2500))
    folder = written(tmp_path / "g", links={"linked": source})
    assert (read_checkpoint(folder).folder / "linked").read_bytes() == source.read_bytes()
    assert not same_files(folder / "linked", source)


# --- full and failing disks -------------------------------------------------------------------------------------------

MEGABYTE = 250_000  # numbers of four bytes


def test_the_older_of_the_last_makes_room(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, max_bytes=2_500_000)
    for step in (10, 20, 30):
        save(checkpoints, step, MEGABYTE)
    assert checkpoints.steps() == [20, 30]
    roomy = Checkpoints(tmp_path / "roomy", max_bytes=3_500_000, last=3)
    for step in (10, 20, 30, 40, 50):
        save(roomy, step, MEGABYTE)
    assert roomy.steps() == [30, 40, 50]


def test_what_does_not_fit_is_refused_with_figures_and_the_rest_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_steps=[10], max_bytes=2_500_000)
    save(checkpoints, 10, MEGABYTE)
    save(checkpoints, 20, MEGABYTE)
    with pytest.raises(TrainingError, match=r"^checkpoint of step 30 in \S+: needs ([\d,]+) bytes, "
                       r"checkpoint\.max_gb has ([\d,]+) left$") as raised:  # fmt: skip
        save(checkpoints, 30, MEGABYTE)
    needed, left = (int(text.replace(",", "")) for text in re.findall(r"[\d,]{5,}", str(raised.value)))
    assert 1_000_000 < needed < 1_020_000
    assert 480_000 < left < 500_000
    assert checkpoints.steps() == [10, 20]
    assert hidden(checkpoints) == []
    save(checkpoints, 30, 1000)
    assert checkpoints.steps() == [10, 20, 30]


@pytest.mark.parametrize("limit", ["checkpoint.max_gb", "the disk"])
def test_none_is_removed_for_one_that_would_not_fit_even_then(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, max_bytes=3_500_000 if limit == "checkpoint.max_gb" else None, last=3)
    for step in (10, 20, 30):
        save(checkpoints, step, MEGABYTE)
    if limit == "the disk":
        full = shutil.disk_usage(tmp_path)._replace(free=480_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(TrainingError, match=rf"needs 3,\d+,\d+ bytes, {re.escape(limit)} has 2,4\d\d,\d+ left$"):
        save(checkpoints, 40, 3 * MEGABYTE)
    assert checkpoints.steps() == [10, 20, 30]
    save(checkpoints, 40, 2 * MEGABYTE)
    assert checkpoints.steps() == [30, 40]


def test_the_last_whole_one_never_makes_room(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, max_bytes=1_500_000)
    save(checkpoints, 10, MEGABYTE)
    with pytest.raises(TrainingError, match="needs"):
        save(checkpoints, 20, MEGABYTE)
    assert_intact(checkpoints.latest(), 10)

    later = Checkpoints(tmp_path, max_bytes=2_500_000)
    save(later, 20, MEGABYTE)
    flip(later.folder / "000000020" / "state.pt")
    save(later, 30, MEGABYTE)  # the damaged one goes, not the one before
    assert later.steps() == [10, 30]


def test_the_best_does_not_make_room(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, max_bytes=2_500_000)
    save(checkpoints, 10, MEGABYTE, best=10)
    save(checkpoints, 20, MEGABYTE, best=10)
    with pytest.raises(TrainingError, match="needs"):
        save(checkpoints, 30, MEGABYTE, best=10)
    assert checkpoints.steps() == [10, 20]


def test_a_linked_file_counts_once(tmp_path: Path) -> None:
    best = tmp_path / "best"
    best.write_bytes(bytes(1_000_000))
    checkpoints = Checkpoints(tmp_path, max_bytes=1_100_000)
    for step in (10, 20):
        checkpoints.save(step, {}, {}, {"best": best}, None)
    assert checkpoints.steps() == [10, 20]
    best.rename(tmp_path / "old")
    best.write_bytes(bytes(1_000_000))  # another file
    with pytest.raises(TrainingError, match=r"needs 1,01\d,\d{3} bytes, checkpoint\.max_gb has \d\d,\d{3} left"):
        checkpoints.save(30, {}, {}, {"best": best}, None)


def test_a_disk_that_is_nearly_full_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10, MEGABYTE)
    usage = shutil.disk_usage(tmp_path)._replace(free=900_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(checkpoints_module, "write_checkpoint", lambda *_, **__: pytest.fail("written all the same"))
    with pytest.raises(TrainingError, match=r"needs 1,0\d\d,\d{3} bytes, the disk has 900,000 left$"):
        save(checkpoints, 20, MEGABYTE)
    assert_intact(checkpoints.latest(), 10)


class Failing(io.FileIO):
    """A file that fails after `room` bytes."""

    def __init__(self, file: Path, room: int, number: int) -> None:
        super().__init__(file, "w")
        self.room, self.number = room, number

    def write(self, data: Any) -> int:
        if len(data) > self.room:
            raise OSError(self.number, os.strerror(self.number))
        self.room -= len(data)
        return super().write(data)


@pytest.mark.parametrize(("name", "room"), [("state.pt", 0), ("state.pt", 700), ("manifest.json", 0)])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_write_that_fails_leaves_the_earlier_ones_and_nothing_else(
    name: str, room: int, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10)
    save(checkpoints, 20)
    whole = Path.open
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda path, *mode: (
            Failing(path, room, number) if path.name == name and mode == ("wb",) else whole(path, *mode)))  # fmt: skip
        with pytest.raises(TrainingError) as raised:
            save(checkpoints, 30)
    assert str(raised.value) == f"checkpoint of step 30 in {checkpoints.folder}: {os.strerror(number)}"
    assert raised.value.exit_code == 1
    assert checkpoints.steps() == [10, 20]
    assert hidden(checkpoints) == []
    assert_intact(checkpoints.latest(), 20)
    save(checkpoints, 30)
    assert_intact(checkpoints.latest(), 30)


def test_an_interruption_in_the_middle_of_a_write_goes_on_as_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's writer calls back from C++."""

    def stop(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Failing, "write", stop)
    whole = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *mode: Failing(path, 0, 0) if mode == ("wb",) else whole(path, *mode)
    )
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 10)
    assert list(checkpoints.folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(TrainingError, match=r"^checkpoint of step 1 in \S+/checkpoints: File exists$"):
        save(Checkpoints(tmp_path), 1)


def test_weights_that_cannot_be_written_leave_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "best" / "model.safetensors"
    save_weights({"weight": torch.ones(3)}, file)
    (file.parent / ".tmpkilled").touch()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "sync_path", full)
        with pytest.raises(TrainingError, match=f"^{file}: No space left on device$"):
            save_weights({"weight": torch.zeros(3)}, file)
    assert [entry.name for entry in file.parent.iterdir()] == ["model.safetensors"]
    assert_same(load_weights(file), {"weight": torch.ones(3)})
    with pytest.raises(Damaged, match="none: No such file or directory"):
        load_weights(tmp_path / "none")


def test_weights_of_any_layout_come_back(tmp_path: Path) -> None:
    table = torch.arange(1e6)
    weights = {"table": table, "tied": table, "view": table[3:6], "transposed": torch.randn(3, 4).T,
               "parameter": nn.Parameter(torch.ones(2)), "none": torch.empty(0)}  # fmt: skip
    file = tmp_path / "model.safetensors"
    save_weights(weights, file)
    assert_same(load_weights(file), {name: weights[name].detach() for name in sorted(weights)} | {})
    assert file.stat().st_size < 2 * 4e6 + 20_000
    assert file.stat().st_mode & 0o777 == 0o644


# --- power cuts -------------------------------------------------------------------------------------------------------


def test_all_is_on_disk_before_the_checkpoint_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order that survives power cuts: every file, the folder, the rename, the parent folder."""
    events = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_rename(path: Path, target: Path) -> Path:
        events.append((path, target))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    linked = tmp_path / "linked"
    linked.touch()
    checkpoints = Checkpoints(tmp_path, last=1)
    save(checkpoints, 10)
    events.clear()
    checkpoints.save(20, {}, {}, {"best": linked}, None)
    folder = checkpoints.folder
    work = folder / ".000000020.new"
    assert events == [
        work / "state.pt",
        work / "best",
        work / "manifest.json",
        work,
        (work, folder / "000000020"),
        folder,
        (folder / "000000010", folder / ".000000010.old"),
    ]
