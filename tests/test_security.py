"""What came from elsewhere (a model, a config, data, a name) is read, shown and filed; it never acts."""

import ast
import json
import os
import pickle
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, Call, only_full
from hypothesis import given as examples
from hypothesis import strategies as st
from safetensors import SafetensorError
from test_report import arm as arm_of
from test_report import comparison

from pipeline import __main__ as command_line
from pipeline.comparison.verdicts import to_markdown, to_text
from pipeline.config.strict_config import load, to_yaml, validate
from pipeline.data.contract import verify
from pipeline.data.schema import DataSchema
from pipeline.errors import UserError
from pipeline.names import NOTE_LENGTH
from pipeline.runtime.console import aligned, info
from pipeline.runtime.text import visible
from pipeline.storage.checkpoint_format import read_checkpoint, write_checkpoint
from pipeline.storage.csv_table import cell, write_csv
from pipeline.storage.files import Damaged
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.impressions.impression_table import read_split
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.tasks.visobert.config import ModelConfig
from pipeline.tasks.visobert.model import build_model
from pipeline.tasks.visobert.reviews.columns import read_columns
from pipeline.tasks.visobert.reviews.review_table import tokenise
from pipeline.tasks.visobert.tokenizer import EmbeddedTokenizer, load_tokenizer

PACKAGE = sorted((ROOT / "pipeline").rglob("*.py"))


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.sentinel),)


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Path]:
    """A path that must not exist at the end; that the bomb is live is seen first."""
    path = tmp_path / "sentinel"
    pickle.loads(pickle.dumps(Bomb(path)))  # noqa: S301 (our own)
    path.rmdir()
    yield path
    assert not path.exists(), "the bomb went off"


def bombs(sentinel: Path, folder: Path) -> list[bytes]:
    """The same bomb as a bare pickle and as torch writes weights."""
    torch.save({"weight": Bomb(sentinel)}, folder / "bomb.pt")
    return [pickle.dumps(Bomb(sentinel)), (folder / "bomb.pt").read_bytes()]


def exit_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    with pytest.raises(SystemExit) as ended:
        command_line.main(list(arguments))
    (line,) = capsys.readouterr().err.splitlines()
    assert isinstance(ended.value.code, int)
    return ended.value.code, line


# ---------------------------------------------------------------- files that could hold code


def test_a_pickle_in_place_of_a_logged_models_weights(impressions: Path, tmp_path: Path, sentinel: Path) -> None:
    from pipeline.serving import _load_pyfunc

    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("schema.json", "vocabulary.parquet"):
        shutil.copyfile(impressions / name, folder / name)
    (folder / "config.yaml").write_text(to_yaml(load(MmoeConfig)))
    (folder / "serving.json").write_text('{"predictor": "pipeline.tasks.mmoe.predict"}')
    for bomb in bombs(sentinel, tmp_path):
        (folder / "model.safetensors").write_bytes(bomb)
        with pytest.raises(SafetensorError):
            _load_pyfunc(str(folder))


@pytest.mark.parametrize("name", ["../mmoe", "mmoe", ".predict", "predict", "", "a b.predict", "mmoe.predict\n"])
def test_a_logged_model_names_a_predictor_and_nothing_else(name: str, tmp_path: Path) -> None:
    from pipeline.serving import _load_pyfunc

    (tmp_path / "serving.json").write_text(json.dumps({"predictor": name}))
    with pytest.raises(ValueError, match="is not the name of a module `predict`"):
        _load_pyfunc(str(tmp_path))


ARCHITECTURE = {
    "model_type": "bert", "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 8, "max_position_embeddings": 16,
}  # fmt: skip


def encoder(folder: Path, **changes: Any) -> Path:
    """A local model folder without weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(ARCHITECTURE | changes))
    return folder


class FewIds:
    size, pad_id, mask_id = 40, 0, 3


def test_a_model_folder_with_pickled_weights_alone(tmp_path: Path, sentinel: Path) -> None:
    folder = encoder(tmp_path / "model")
    for bomb in bombs(sentinel, tmp_path):
        (folder / "pytorch_model.bin").write_bytes(bomb)
        with pytest.raises(UserError, match=r"model\.safetensors is missing"):
            build_model(ModelConfig(name=str(folder)), 2, FewIds(), weights=True)  # type: ignore[arg-type]
    for bomb in bombs(sentinel, tmp_path):
        (folder / "model.safetensors").write_bytes(bomb)
        with pytest.raises(UserError, match="transformers cannot load"):
            build_model(ModelConfig(name=str(folder)), 2, FewIds(), weights=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_a_model_folder_that_brings_its_own_code(init: str, tmp_path: Path, sentinel: Path) -> None:
    code = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel", "AutoTokenizer": ["own.OwnTokenizer", None]}
    folder = encoder(tmp_path / "model", model_type="own", auto_map=code)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(sentinel)!r})\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": code, "tokenizer_class": "OwnTokenizer"}))
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cannot load"):
        build_model(ModelConfig(name=str(folder), init=init), 2, FewIds(), weights=True)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(str(folder), None, [], 300)


def test_a_pickle_in_the_cache_of_tokens(tmp_path: Path, sentinel: Path) -> None:
    texts = ["máy tốt, pin bền", "màn hình xấu", "máy tốt"] * 4
    tokenizer = EmbeddedTokenizer.train(texts, 300)
    tokens = tokenise(tokenizer, texts, 32, tmp_path / "cache")
    (file,) = (tmp_path / "cache" / "tokens").iterdir()
    np.savez(file, ids=np.array([Bomb(sentinel)], dtype=object), lengths=tokens.lengths)
    again = tokenise(tokenizer, texts, 32, tmp_path / "cache")
    assert again.ids.tolist() == tokens.ids.tolist()
    assert np.load(file)["ids"].tolist() == tokens.ids.tolist()  # what was there is written over


@pytest.mark.parametrize("signed", [False, True])
def test_a_pickle_in_a_checkpoint(signed: bool, tmp_path: Path, sentinel: Path) -> None:
    folder = tmp_path / "000000005"
    folder.mkdir()
    write_checkpoint(folder, {"weights": {"a": torch.ones(3)}, "step": 5}, 5)
    assert read_checkpoint(folder).step == 5
    for bomb in bombs(sentinel, tmp_path):
        before = (folder / "state.pt").read_bytes()
        (folder / "state.pt").write_bytes(bomb)
        if signed:  # by somebody who knows the manifest
            manifest = (folder / "manifest.json").read_text()
            manifest = manifest.replace(sha256(before).hexdigest(), sha256(bomb).hexdigest())
            (folder / "manifest.json").write_text(manifest.replace(f'"size": {len(before)}', f'"size": {len(bomb)}'))
        with pytest.raises(Damaged):
            read_checkpoint(folder)


CODE = [
    "!!python/object/apply:os.mkdir [SENTINEL]",
    "!!python/object/new:os.mkdir [SENTINEL]",
    "!!python/name:os.mkdir",
    "!!python/module:antigravity",
    "!!python/object:subprocess.Popen {args: [mkdir, SENTINEL]}",
]


READS_YAML = [
    *(f"{entry} --config FILE" for entry in ("train_mmoe", "train_visobert", "data_prep", "compare", "sweep")),
    "prepare_ctr --data x.csv --output_dir out --schema FILE",
]


@pytest.mark.parametrize(("arguments", "code"), zip(READS_YAML, [*CODE, CODE[0]], strict=True))
def test_tags_that_would_run_code(
    code: str, arguments: str, tmp_path: Path, sentinel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(f"a: {code.replace('SENTINEL', str(sentinel))}\n")
    status, line = exit_of(capsys, *(part.replace("FILE", str(file)) for part in arguments.split()))
    assert status == 2
    assert line.startswith(f"error: {file}: line 1 not valid YAML: could not determine a constructor for the tag")


def test_a_tag_in_an_override_is_text(sentinel: Path) -> None:
    code = CODE[0].replace("SENTINEL", str(sentinel))
    with pytest.raises(UserError, match=r"--training\.batch_size: found '!!python"):
        load(MmoeConfig, None, {"training.batch_size": code})


def test_a_few_lines_that_stand_for_billions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file.yaml"
    lists = [
        f"{name}: &{name} [{', '.join(['*' + before] * 9)}]"
        for before, name in zip("abcdefghi", "bcdefghij", strict=True)
    ]
    file.write_text("\n".join(["a: &a [x]", *lists]))
    assert exit_of(capsys, "train_mmoe", "--config", str(file)) == (
        2, f"error: {file}: line 6 not valid YAML: found over 50,000 values with every alias written out",
    )  # fmt: skip
    file.write_text("a: &a {b: *a}")
    assert "a value that contains itself" in exit_of(capsys, "train_mmoe", "--config", str(file))[1]
    file.write_text("a: " + "[" * 5000)
    assert "nested too deeply" in exit_of(capsys, "train_mmoe", "--config", str(file))[1]
    file.write_text("#" * ((1 << 20) + 1))
    assert exit_of(capsys, "train_mmoe", "--config", str(file)) == (
        2, f"error: {file}: found over 1 MiB, allowed: a YAML file of settings"
    )  # fmt: skip
    assert exit_of(capsys, "train_mmoe", "--config", "/dev/zero")[0] == 2


# ---------------------------------------------------------------- names that become files

ESCAPES = ["../../escaped", "/escaped", "..", "a/../../escaped", "..\\escaped"]


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_prepared_folder_cannot_name_files_elsewhere(impressions: Path, tmp_path: Path) -> None:
    shutil.copyfile(impressions / "schema.json", tmp_path / "schema.json")
    content = json.loads((tmp_path / "schema.json").read_text())
    for name in [str(impressions / "train.parquet"), f"../{impressions.name}/train.parquet", "..", "", "a\0b", "a/b"]:
        content["splits"]["train"]["file"] = name
        (tmp_path / "schema.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"splits\.train\.file"):
            read_split(tmp_path, DataSchema.read(tmp_path), "train")


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "null", "1e999", '{"features": {}}'])
def test_a_schema_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(text)
    with pytest.raises(UserError, match=r"schema\.json: "):
        DataSchema.read(tmp_path)


def a_folder(place: Path) -> None:
    place.mkdir()


def a_device(place: Path) -> None:
    place.symlink_to("/dev/zero")


@pytest.mark.parametrize("odd", [os.mkfifo, a_folder, a_device])
def test_what_is_no_file_in_a_prepared_folder_is_told_before_it_is_opened(
    odd: Callable[[Path], None], impressions: Path, tmp_path: Path, small: Callable[..., Any]
) -> None:
    """Opening a pipe would wait for its other end."""
    splits = [f"{split}.parquet" for split in ("train", "validation", "test")]
    names = [*splits, "schema.json", "vocabulary.parquet"]
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        for other in names:
            if other != name:
                (folder / other).symlink_to(impressions / other)
        odd(folder / name)
        for use in (verify, lambda folder: MmoeTask(small(data__path=folder))):
            with pytest.raises(UserError, match=rf"{name}/{name}: not a file"):
                use(folder)
    reviews = tmp_path / "reviews.jsonl"
    odd(reviews)
    with pytest.raises(UserError, match=r"reviews\.jsonl: (not a file|found a folder, allowed: a file)"):
        read_columns(reviews)


def test_a_pipe_where_the_stream_of_a_split_would_be(impressions: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(impressions, tmp_path / "data", ignore=shutil.ignore_patterns("*.arrow"))
    os.mkfifo(folder / "test.arrow")
    schema = DataSchema.read(folder)
    assert len(read_split(folder, schema, "test")) == schema.splits["test"].rows


@examples(size=st.integers(2**31), field=st.sampled_from(["size", "hash_buckets"]))
def test_a_prepared_folder_cannot_have_more_ids_than_there_are(impressions: Path, size: int, field: str) -> None:
    content = json.loads((impressions / "schema.json").read_text())
    content["features"][1][field] = size
    place, most = f"schema\\.json: features\\.1\\.{field}: found {size}", "allowed: integer >= 0 and <= 2147483647"
    with pytest.raises(UserError, match=f"{place}, {most}$"):
        validate(DataSchema, content, Path("schema.json"))
    for feature, ids in zip(content["features"], (2**31 - 2, 2), strict=False):
        feature |= {field: 0, "size": ids}
    with pytest.raises(UserError, match=r"schema\.json: features: found sizes that sum to \d+, allowed: 2147483647"):
        validate(DataSchema, content, Path("schema.json"))
    for change, text in (
        ({"sise": 3}, "unknown key features.1.sise; did you mean size"),
        ({"name": 3}, "features.1.name: found 3, allowed: text"),
        ({"edges": ["a"]}, "features.1.edges.0: found 'a', "),
    ):
        odd: dict[str, Any] = {**content["features"][1], **change}  # type: ignore[dict-item]
        with pytest.raises(UserError, match=re.escape(text)):
            validate(DataSchema, content | {"features": [content["features"][0], odd]}, Path("schema.json"))


def test_columns_and_aspects_are_no_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    header = ",".join(f'"{name}"' for name in ("clicked", *ESCAPES))
    rows = "\n".join(f"{row % 2}," + ",".join(str(row % 3) for _ in ESCAPES) for row in range(40))
    (inside / "data.csv").write_text(f"{header}\n{rows}\n")
    schema = {
        "labels": {"click": "clicked", "conversion": "clicked"},
        "features": dict.fromkeys(ESCAPES, "categorical"),
    }
    (inside / "schema.yaml").write_text(yaml.safe_dump(schema))
    words = ("Positive", "Negative", "Neutral")
    reviews = "\n".join(f"máy {row}," + ",".join(words[row % 3] for _ in ESCAPES) for row in range(12))
    (inside / "reviews.csv").write_text(",".join(["text", *ESCAPES]) + f"\n{reviews}\n")
    before = tree(tmp_path)
    for arguments in (
        ["prepare_ctr", "--data", "data.csv", "--schema", "schema.yaml", "--output_dir", "out/ctr"],
        ["data_prep", "--data", "reviews.csv", "--output_dir", "out/reviews", "--data.cache", "out/cache"],
    ):
        monkeypatch.chdir(inside)
        with pytest.raises(SystemExit) as ended:
            command_line.main([*arguments, "--tracking.enabled", "false"])
        assert ended.value.code == 0, capsys.readouterr().err
    made = tree(tmp_path) - before
    assert {Path(path).parent.as_posix() for path in made} == {
        "a/b/c",
        "a/b/c/out",
        "a/b/c/out/ctr",
        "a/b/c/out/reviews",
    }
    assert not list(tmp_path.parent.glob("*escaped*"))
    assert not Path("/escaped").exists()


def test_metrics_named_after_columns_are_no_paths(impressions: Path) -> None:
    from pipeline.tasks.mmoe.prepare.prepare_ctr import figures

    schema = DataSchema.read(impressions)
    feature = next(feature for feature in schema.features if feature.kind == "categorical")
    for name in ESCAPES:
        changes = {"name": name, "out_of_vocabulary": {"test": 0.5}}
        odd = schema.model_copy(update={"features": (feature.model_copy(update=changes),)})
        assert len(figures(odd)) == len(figures(schema.model_copy(update={"features": ()}))) + 1
        for metric in figures(odd):
            assert re.fullmatch(r"[\w./ -]+", metric)
            assert not {"", ".", ".."} & set(metric.split("/"))


# ---------------------------------------------------------------- pages and notes


def escaped(markdown: str) -> None:
    """No markup of its own in Markdown: HTML may stand there as it is, so no `<` may."""
    assert "<" not in markdown.replace("p < 0.0001", "").replace("| < 0.0001", "")
    assert "&lt;script>" in markdown


def test_a_comparisons_note_shows_names_as_they_are() -> None:
    name = "<script>alert(1)</script> [a](javascript:alert(2)) | `x` ![i](http://x/y.png)"
    bad = arm_of(name, (0.61, 0.62, 0.63), (0.6, 0.6, 0.6), differing={"loss.aux_focal.lambda": name},
                 control_of=name)  # fmt: skip
    compared = comparison(bad, title=name, notes=(name,), task=name)
    for text in (to_markdown(compared), to_markdown(compared, NOTE_LENGTH), to_markdown(compared, 700)):
        escaped(text)
        assert not re.search(r"(?<!\\)\]\(", text), "a link"
    control = replace(bad, role="control")
    escaped(to_markdown(comparison(bad, control, baseline=name)))


# ---------------------------------------------------------------- terminals and spreadsheets

CLEARS = "\x1b]0;title\x07\x1b[2Jname\x9b\r\x7f"


def controls(text: str) -> list[str]:
    """Control characters but for those that tables and lines are made of."""
    return [letter for letter in text if unicodedata.category(letter) == "Cc" and letter not in "\n\t"]


@examples(text=st.text(st.characters(categories=["Cc", "L", "P"]), max_size=20))
def test_control_characters_are_shown_escaped(text: str) -> None:
    shown = visible(text)
    assert not controls(shown.replace("\r\n", "\n"))
    assert visible(shown) == shown
    if not controls(text):
        assert shown == text


def test_names_cannot_speak_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    info(f"run {CLEARS}\n\tin two lines")
    assert capsys.readouterr().err == "run \\x1b]0;title\\x07\\x1b[2Jname\\x9b\\x0d\\x7f\n\tin two lines\n"
    status, line = exit_of(capsys, "verify", f"{CLEARS}/d")
    assert status == 2
    assert line.startswith("error: \\x1b]0;title\\x07\\x1b[2Jname\\x9b \\x7f/d: no such folder; allowed:")
    assert not controls(exit_of(capsys, "train_mmoe", f"--{CLEARS}", "1")[1])
    bad = arm_of(CLEARS, (0.61, 0.62, 0.63), (0.6, 0.6, 0.6), differing={"loss.aux_focal.lambda": CLEARS},
                 control_of=CLEARS)  # fmt: skip
    compared = comparison(bad, title=CLEARS, notes=(CLEARS,), task=CLEARS)
    for text in (to_text(compared), to_markdown(compared), to_markdown(compared, 700)):
        assert not controls(text)
        assert "\\x1b" in text
    first, second = aligned([[CLEARS, "1"], ["a", "2"]]).split("\n")
    assert len(first) == len(second)


FORMULAS = ("=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", '=HYPERLINK("http://x")')


@examples(text=st.sampled_from(FORMULAS) | st.text(st.sampled_from("=+-@\t\r\n1ea\x1b'\""), max_size=6))
def test_no_cell_of_a_table_is_a_formula(text: str) -> None:
    found = cell(text)
    assert isinstance(found, str)
    is_number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text)
    assert len(found) < 2 or found[0] not in "=+-@\t\r" or is_number
    assert found in (visible(text), "'" + visible(text))


def test_the_tables_of_names_that_are_formulas(tmp_path: Path) -> None:
    """Numbers stay numbers, and what reads a table finds its columns; two of them may have one name."""
    frame = pd.DataFrame({"arm": [*FORMULAS[:3], None], "params.a": ["-1e-4", "-", "=a", "b"], "x": [-1.5, 2, 0, 1]})
    frame = pd.concat([frame, pd.DataFrame({"=cmd": ["", "a", "\x1b", "b\r\nc"], "arm": [1, 2, 3, 4]})], axis=1)
    write_csv(frame, tmp_path / "table.csv")
    lines = (tmp_path / "table.csv").read_bytes().decode().split("\n", 1)
    assert lines[0] == "arm,params.a,x,'=cmd,arm"
    found = pd.read_csv(tmp_path / "table.csv", keep_default_na=False)
    assert found["x"].tolist() == [-1.5, 2, 0, 1]
    assert found["arm"].tolist() == ["'=1+1", "'+1+1", "'-1+1", ""]
    assert found["params.a"].tolist() == ["-1e-4", "-", "'=a", "b"]
    assert found["'=cmd"].tolist() == ["", "a", "\\x1b", "b\r\nc"]
    assert all(found[name].tolist() == [1, 2, 3, 4] for name in found if name.startswith("arm."))


# ---------------------------------------------------------------- the source


def nodes(file: Path) -> list[ast.AST]:
    """All of a file's syntax tree."""
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def calls(tree: list[ast.AST]) -> Iterator[tuple[str, ast.Call]]:
    """Every call, as it is written: `torch.load`, `eval`."""
    return ((ast.unparse(node.func), node) for node in tree if isinstance(node, ast.Call))


def given(node: ast.Call, name: str) -> str | None:
    return next((ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == name), None)


PICKLES = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")


def dangers(tree: list[ast.AST]) -> list[str]:
    """What a file does that could run what it reads."""
    found = []
    for name, node in calls(tree):
        last = name.rsplit(".", 1)[-1]
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            found.append(name)
        if name == "torch.load" and given(node, "weights_only") != "True":
            found.append(f"{name} without weights_only")
        if name in ("np.load", "numpy.load") and given(node, "allow_pickle") != "False":
            found.append(f"{name} without allow_pickle=False")
        if name.startswith("yaml.") and last in ("unsafe_load", "full_load", "load_all", "Loader", "UnsafeLoader"):
            found.append(name)
        if name == "yaml.load" and "SafeLoader" not in ast.unparse(node):
            found.append(f"{name} without a safe loader")
        if given(node, "shell") not in (None, "False"):
            found.append(f"{name} with a shell")
        if last in ("from_pretrained", "from_config") and given(node, "trust_remote_code") != "False":
            found.append(f"{name} without trust_remote_code=False")
        if given(node, "invalid_row_handler") or (last == "ReadOptions" and given(node, "encoding")):
            found.append(f"{name} calls back from Arrow's threads, which aborts the process at its end")
    for node in tree:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"import {name}" for name in names if name.split(".")[0] in PICKLES]
    return found


def test_nothing_in_the_package_runs_what_it_reads() -> None:
    for file in PACKAGE:
        tree = nodes(file)
        assert not dangers(tree), file
        for node in tree:
            if isinstance(node, ast.ClassDef) and "Loader" in node.name:
                assert [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]


def test_the_rule_sees_what_it_forbids(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    bad = [
        "eval('1')", "exec('1')", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)",
        "yaml.unsafe_load(f)",
        "yaml.load(f, yaml.Loader)", "subprocess.run('x', shell=True)", "AutoModel.from_pretrained(f)", "import pickle",
        "from joblib import load", "os.system('x')", "pa.csv.ParseOptions(invalid_row_handler=f)",
    ]  # fmt: skip
    for line in bad:
        file.write_text(line)
        assert dangers(nodes(file)), line
    fine = ["torch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)", "yaml.safe_load(f)", "model.eval()",
            "re.compile('x')"]  # fmt: skip
    file.write_text("\n".join(fine))
    assert not dangers(nodes(file))


# ---------------------------------------------------------------- secrets

SECRET = "hunter%2F2"  # noqa: S105 (of nobody)
SECRETS = [
    f"http://user:{SECRET}@127.0.0.1:1",
    f"postgresql://user:{SECRET}@127.0.0.1:1/base",
    f"postgresql://127.0.0.1:1/base?user=u&password={SECRET}",
    f"postgresql+psycopg://user:{SECRET}@127.0.0.1:1/base?sslpassword={SECRET}&connect_timeout=1",
    f"mysql://user:a@{SECRET}@127.0.0.1:1/base",
    f"http://127.0.0.1:1/?access_token={SECRET}",
]


@pytest.mark.parametrize("uri", SECRETS)
def test_a_uri_is_told_without_its_secrets(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    from pipeline.tracking.store import tracking_uri

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(None)
    shown = tracking_uri()
    for secret in (SECRET, "hunter", "user", "password", "token"):
        assert secret not in shown
    assert shown.startswith(uri.split("://", maxsplit=1)[0])
    assert "127.0.0.1" in shown


@pytest.mark.parametrize("uri", [SECRETS[3], pytest.param(SECRETS[0], marks=[pytest.mark.faults, only_full])])
def test_a_server_that_is_away_is_told_without_secrets(
    uri: str, tmp_path: Path, call_pipeline: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is printed and left in files; test_delivery has the lines for every kind of server."""
    (tmp_path / "reviews.csv").write_text(
        "text,Camera\n" + "".join(f"máy {row},{word}\n" for row, word in enumerate(("Positive", "Negative", "Neutral")))
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    done = call_pipeline("data_prep", "--data", "reviews.csv")
    assert done.returncode == 2
    texts = [done.stdout, done.stderr]
    texts += [file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file()]
    for text in texts:
        assert "hunter" not in text
    assert "tracking store" in done.stderr.splitlines()[-1]
