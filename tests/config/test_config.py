import hashlib
import json
from pathlib import Path
from typing import Literal

import pytest
import yaml
from conftest import ROOT, Call
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comparison.compare_config import CompareConfig
from pipeline.config.strict_config import Config, canonical, flatten, keys, load, to_yaml
from pipeline.config.yaml_file import read_yaml
from pipeline.errors import UserError
from pipeline.sweeps.sweep_config import SweepConfig
from pipeline.tasks.mmoe.config import MmoeConfig, PrepareCtrConfig
from pipeline.tasks.visobert.config import DataPrepConfig, VisobertConfig

SHIPPED = ROOT / "configs/mtl_mmoe.yaml"


def text_of(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def error_of(file: Path | None = None, **overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(MmoeConfig, file, {key.replace("__", "."): value for key, value in overrides.items()})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_users_keys_stand_under_their_own_names() -> None:
    flat = flatten(load(MmoeConfig, SHIPPED))
    expected = {
        "loss.aux_focal.enabled": "true",
        "loss.aux_focal.warmup_steps": "2000",
        "loss.aux_focal.target_head": "ctcvr",
        "loss.aux_focal.lambda": "0.1",
        "loss.aux_focal.gamma": "1.0",
        "loss.aux_focal.use_alpha": "false",
        "loss.aux_focal.alpha": "0.25",
        "loss.aux_focal.detach_p_for_weight": "true",
        "loss.aux_focal.compute_fp32": "true",
        "loss.aux_focal.log_components": "true",
        "loss.static_pos_weight.ctr": "24.7",
        "loss.static_pos_weight.ctcvr": "4800.0",
        "loss.pos_weight_clip.ctr": "30.0",
        "loss.pos_weight_clip.ctcvr": "300.0",
        "esmm.lambda_ctr": "1.0",
        "esmm.lambda_ctcvr": "1.0",
        "esmm.lambda_cvr_aux": "0.1",
    }
    assert {key: flat[key] for key in expected} == expected


def test_defaults_of_the_typed_config() -> None:
    focal = MmoeConfig().loss.aux_focal
    assert (focal.enabled, focal.warmup_steps, focal.lambda_, focal.gamma) == (False, 2000, 0.1, 1.0)
    assert (focal.use_alpha, focal.detach_p_for_weight, focal.compute_fp32, focal.log_components) == (
        False, True, True, True,
    )  # fmt: skip


@pytest.mark.parametrize("block", ["loss: {}", "loss:\n  aux_focal:\n", "loss:\n  aux_focal: {enabled: false}"])
def test_a_missing_or_empty_focal_block_is_disabled(tmp_path: Path, block: str) -> None:
    assert load(MmoeConfig, text_of(tmp_path, block)) == MmoeConfig()


@pytest.mark.parametrize("text", ["1e-1", "0.10", "0.1", ".1", "1.0e-1", "'0.1'"])
def test_one_number_has_one_text(text: str) -> None:
    config = load(MmoeConfig, SHIPPED, {"loss.aux_focal.lambda": text})
    assert flatten(config)["loss.aux_focal.lambda"] == "0.1"


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda file: file.name)
def test_yaml_is_the_same_with_the_line_ends_of_windows(tmp_path: Path, file: Path) -> None:
    content = file.read_bytes() + b"folded: >\n  two\n  lines\nkept: |\n  \xe1\xba\xa3nh\n"
    assert b"\r" not in content
    (tmp_path / "lf.yaml").write_bytes(content)
    (tmp_path / "crlf.yaml").write_bytes(content.replace(b"\n", b"\r\n"))
    tree = read_yaml(tmp_path / "crlf.yaml")
    assert tree == read_yaml(tmp_path / "lf.yaml")
    assert (tree["folded"], tree["kept"]) == ("two lines\n", "ảnh\n")


def test_yaml_numbers_written_as_text(tmp_path: Path) -> None:
    assert yaml.safe_load("3e-4") == "3e-4"  # what makes this test worth having
    config = load(MmoeConfig, text_of(tmp_path, "optim: {dense: {lr: 3e-4}}"))
    assert config.optim.dense.lr == 0.0003


@pytest.mark.parametrize("value", ["abc", "-1", "nan", "inf", "-inf", "true", "[1]", "1,5"])
def test_what_is_no_weight_is_refused(value: str) -> None:
    message = error_of(loss__aux_focal__lambda=value)
    assert "loss.aux_focal.lambda" in message
    assert "allowed: number >= 0" in message


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("loss.aux_focal.target_head", "ctr", "ctcvr"),
        ("loss.aux_focal.warmup_steps", "1.5", "integer >= 0"),
        ("training.amp", "fp8", "one of: auto, no, bf16, fp16"),
        ("model.experts.hidden", "[]", "list of integers"),
        ("model.experts.hidden", "[0]", "list of integers"),
        ("optim.dense.betas", "[0.9]", "list of 2 numbers"),
        ("evaluation.metric", "test/auc_ctr", "text"),
        ("loss.aux_focal.alpha", "1.5", "number >= 0 and <= 1"),
    ],
)
def test_the_message_says_what_is_allowed(key: str, value: str, allowed: str) -> None:
    message = error_of(**{key.replace(".", "__"): value})
    assert key in message
    assert allowed in message


def test_a_head_without_parts_is_refused() -> None:
    assert "at least one on" in error_of(model__heads__ctr__deep="false")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss: {aux_focal: {lamda: 0.1}}", "unknown key loss.aux_focal.lamda; did you mean loss.aux_focal.lambda?"),
        ("los: {}", "unknown key los; did you mean loss"),
        ("loss: {aux_focal: {lambda: 0.1, lambda: 0.2}}", "written twice"),
        ("loss: [", "line 1"),
        ("- 1", "found a list"),
        ("", "empty"),
        ("loss: 3", "loss"),
        ("seed: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, expected: str) -> None:
    file = text_of(tmp_path, text)
    message = error_of(file)
    assert expected in message
    assert str(file) in message


PLAIN = "allowed: text, numbers, true, false, null, dates, lists and mappings"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("!!binary gIGC", f"experiment: found binary data, {PLAIN}"),
        ("!!binary aGVsbG8=", f"experiment: found binary data, {PLAIN}"),  # bytes that are text, too
        ("[a, !!binary gIGC]", f"experiment: found binary data, {PLAIN}"),
        ("{a: !!binary gIGC}", f"experiment.a: found binary data, {PLAIN}"),
        ("!!set {a, b}", f"experiment: found a set, {PLAIN}"),
        ("!!omap [a: 1]", f"experiment: found an ordered pair, {PLAIN}"),
        ("!!pairs [a: 1]", f"experiment: found an ordered pair, {PLAIN}"),
        ("{!!binary gIGC : 1}", r"experiment: found key b'\x80\x81\x82', allowed: text; write it in quotes"),
        ("{.nan: 1}", "experiment: found key nan, allowed: text; write it in quotes"),
        ("{1: 2, a: 3}", "experiment: found key 1, allowed: text; write it in quotes"),
        ("{no: 2}", "experiment: found key false, allowed: text; write it in quotes"),
        ("{2001-01-01: 2}", "experiment: found key 2001-01-01, allowed: text; write it in quotes"),
        ("2001-01-01", "experiment: found 2001-01-01, allowed: text or null"),
        ("!!timestamp x", "not valid YAML: an invalid value"),
        ("2001-13-45", "not valid YAML: an invalid value (month must be in 1..12)"),
        ("!!int ''", "not valid YAML: an invalid value"),
        ("!!bool x", "not valid YAML: an invalid value"),
        ("0b_", "not valid YAML: an invalid value"),
        ("9" * 5000, "not valid YAML: an invalid value"),
        ('"a\\0b"', "experiment: found a null character"),
        ('{"\\0": 1}', "experiment: found a null character"),
        ("{[a]: b}", "line 1 not valid YAML: found unhashable key"),
        ("{{a: 1}: b}", "line 1 not valid YAML: found unhashable key"),
        ("!!python/name:os.abort", "line 1 not valid YAML: could not determine a constructor"),
        ('"\\ud800"', "experiment: found half a character, allowed: UTF-8 text"),
        ('{"\\ud800": 1}', "experiment: found half a character, allowed: UTF-8 text"),
        (f"0x{'f' * 300}", "experiment: found a whole number of 1200 bits, allowed: up to 1.8e+308"),
    ],
)
def test_values_that_fit_no_setting(tmp_path: Path, value: str, reason: str) -> None:
    file = text_of(tmp_path, f"experiment: {value}")
    assert error_of(file).startswith(f"{file}: {reason}")


BINARY = {
    "train_mmoe": ("run_name: NAME", "run_name"),
    "compare": ("title: NAME", "title"),
    "sweep": ("task: train_mmoe\nconfig: c.yaml\nbaseline: {}\narms: [{lambda: 0.1, name: NAME}]", "arms.name"),
}


@pytest.mark.parametrize("entry", BINARY)
def test_binary_data_in_each_kind_of_file_is_one_line(entry: str, workplace: Path, call_pipeline: Call) -> None:
    text, key = BINARY[entry]
    file = text_of(workplace, text.replace("NAME", "!!binary gIGC"))
    result = call_pipeline(entry, "--config", str(file))
    assert result.returncode == 2
    assert result.stderr == f"error: {file}: {key}: found binary data, {PLAIN}\n"


def test_binary_data_in_a_schema_is_one_line(workplace: Path, call_pipeline: Call) -> None:
    (workplace / "data.csv").write_text("clicked,user\n1,a\n")
    file = text_of(workplace, "labels: {click: clicked, conversion: clicked}\nfeatures: {user: !!binary gIGC}")
    result = call_pipeline("prepare_ctr", "--data", "data.csv", "--schema", str(file), "--output_dir", "out")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"error: {file}: features.user: found binary data, {PLAIN}"


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    assert "No such file" in error_of(tmp_path / "absent.yaml")
    assert "directory" in error_of(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("experiment: café".encode("latin-1"))
    assert "not UTF-8" in error_of(tmp_path / "latin.yaml")


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        MmoeConfig().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/m*.yaml")), ids=lambda file: file.name)
def test_shipped_files_load_and_resolve_to_themselves(tmp_path: Path, file: Path) -> None:
    config = load(MmoeConfig, file)
    assert load(MmoeConfig, text_of(tmp_path, to_yaml(config))) == config


@given(
    rate=st.floats(1e-300, 1e300, allow_nan=False),
    seed=st.integers(0, 2**63 - 1),
    name=st.none() | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1),
    hidden=st.lists(st.integers(1, 4096), min_size=1, max_size=4),
)
def test_the_resolved_yaml_is_the_same_config(
    tmp_path_factory: pytest.TempPathFactory, rate: float, seed: int, name: str | None, hidden: list[int]
) -> None:
    tree = {"optim": {"dense": {"lr": rate}}, "seed": seed, "run_name": name, "model": {"experts": {"hidden": hidden}}}
    config = MmoeConfig.model_validate(tree)
    file = tmp_path_factory.mktemp("resolved") / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load(MmoeConfig, file) == config


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_canonical_numbers_read_back_exactly(value: float) -> None:
    assert float(canonical(value)) == value


def test_warnings() -> None:
    def warnings(**overrides: str) -> list[str]:
        texts = {key.replace("__", "."): value for key, value in overrides.items()}
        return load(MmoeConfig, SHIPPED, texts).warnings(frozenset(texts))

    assert warnings() == ["pos_weight of ctcvr is clipped: 4800 -> 300"]
    calm = {"loss__static_pos_weight__ctcvr": "300"}
    assert warnings(**calm) == []
    assert "lambda is 0.3; usual: 0.05-0.2" in warnings(**calm, loss__aux_focal__lambda="0.3")[0]
    assert warnings(**calm, loss__aux_focal__lambda="0.2") == []
    assert "gamma is 0.5; usual: 1-2" in warnings(**calm, loss__aux_focal__gamma="0.5")[0]
    assert "gamma is 2.5" in warnings(**calm, loss__aux_focal__gamma="2.5")[0]
    off = warnings(**calm, loss__aux_focal__enabled="false", loss__aux_focal__lambda="0.1")
    assert off == ["loss.aux_focal.lambda has no effect while loss.aux_focal.enabled is false"]
    assert "use_alpha is false" in warnings(**calm, loss__aux_focal__alpha="0.3")[0]
    assert "shared_bottom" in warnings(**calm, model__kind="shared_bottom", model__gate__noise="1")[0]
    assert "data.path" in warnings(**calm, data__path="x", data__embedded__rows="5000")[0]


class Words(Config):
    plain: Literal["off", "reweight"] = "reweight"
    optional: Literal["yes", "maybe"] | None = None
    mixed: Literal["no"] | float | tuple[Literal["on"], ...] = 1.0
    flag: bool = False
    number: float = 0.0


def test_a_bare_flag_of_yaml_is_the_word_that_a_key_allows(tmp_path: Path) -> None:
    found = load(Words, text_of(tmp_path, "{plain: off, optional: yes, mixed: no, flag: off}"))
    assert (found.plain, found.optional, found.mixed, found.flag) == ("off", "yes", "no", False)
    assert load(Words, None, {"plain": "Off", "optional": "YES"}) == Words(plain="off", optional="yes")
    for key, value in {"plain": "true", "optional": "no", "mixed": "yes", "number": "off"}.items():
        with pytest.raises(UserError, match=f"{key}: found (true|false), allowed: "):
            load(Words, text_of(tmp_path, f"{key}: {value}"))
    for model in (MmoeConfig, VisobertConfig):
        assert load(model, text_of(tmp_path, "training: {amp: no}")).training.amp == "no"


CONFIGS = (MmoeConfig, PrepareCtrConfig, VisobertConfig, DataPrepConfig, SweepConfig, CompareConfig)


@pytest.mark.parametrize("model", CONFIGS)
def test_nothing_typed_is_refused_for_every_key_and_null_is_null(model: type[Config], tmp_path: Path) -> None:
    for key in keys(model):
        for text in ("", " "):
            with pytest.raises(UserError) as caught:
                load(model, None, {key.path: text})
            assert str(caught.value) == f"--{key.path}: found {text!r}, allowed: {key.allowed}".strip()
    if model is VisobertConfig:
        assert load(model, None, {"data.train": "null", "training.max_steps": "~"}) == VisobertConfig()
        assert load(model, text_of(tmp_path, "{experiment: , training: {max_steps: }}")) == VisobertConfig()
        with pytest.raises(UserError, match=r"--training\.max_steps: found '# 5', allowed: integer"):
            load(model, None, {"training.max_steps": "# 5"})  # nothing, to YAML


def test_an_experiments_bare_id_is_text(tmp_path: Path) -> None:
    for model in (MmoeConfig, VisobertConfig, DataPrepConfig, CompareConfig):
        assert load(model, text_of(tmp_path, "experiment: 12")).experiment == "12"  # type: ignore[attr-defined]
        assert load(model, None, {"experiment": "012"}).experiment == "012"  # type: ignore[attr-defined]


def test_losses_that_are_all_switched_off_are_refused() -> None:
    nothing = dict.fromkeys(("esmm.lambda_ctr", "esmm.lambda_ctcvr", "esmm.lambda_cvr_aux"), "0")
    assert "all 0, allowed: at least one above 0" in error_of(**nothing)
    for values in ({"multi_label.lambda_sentiment": "0", "multi_label.lambda_aspect": "0"},
                   {"multi_label.lambda_sentiment": "0", "model.aspect_detection": "false"}):  # fmt: skip
        with pytest.raises(UserError, match="0, allowed: a loss with a weight above 0"):
            load(VisobertConfig, None, values)
    load(VisobertConfig, None, {"multi_label.lambda_sentiment": "0"})


def test_a_key_that_was_added_later_is_part_of_the_fingerprint_where_it_is_used() -> None:
    """The formula that runs of before were stored with: a hash of all other settings."""
    config, compiled = (load(MmoeConfig, None, {"training.compile": value}) for value in ("false", "true"))
    settings = {key: value for key, value in config.decisive().items() if key != "training.compile"}
    before = hashlib.sha256(json.dumps(["mmoe", settings, "digest"], sort_keys=True).encode()).hexdigest()
    assert config.fingerprint("digest") == before
    assert compiled.fingerprint("digest") != before
    assert config.decisive()["training.compile"] == "false"  # logged, as every setting is
