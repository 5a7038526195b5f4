"""Keys of the aspect sentiment task, its learning rate's warm-up, and what `launch` tells of epochs and files."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.strict_config import canonical, flatten, keys, load, to_yaml
from pipeline.errors import UserError
from pipeline.maths.schedules import learning_rate_factor
from pipeline.runs.launch import announce_epochs
from pipeline.runs.run_artifacts import log_files
from pipeline.tasks.visobert.config import EMBEDDED_DEFAULTS, VisobertConfig
from pipeline.tracking.run import MemoryRun

SHIPPED, SMALL = ROOT / "configs/config_multi.yaml", ROOT / "configs/config_multi_embedded.yaml"


def config_of(file: Path | None = None, **overrides: str) -> VisobertConfig:
    return load(VisobertConfig, file, {key.replace("__", "."): value for key, value in overrides.items()})


def error_of(file: Path | None = None, **overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        config_of(file, **overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def text_of(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


# ---------------------------------------------------------------- the users' keys and the defaults


def test_documented_keys_and_defaults() -> None:
    flat = flatten(config_of(SHIPPED))
    expected = {
        "multi_label.use_focal_loss": "true",
        "multi_label.focal_gamma": "2.0",
        "multi_label.focal_alpha": "auto",
        "training.num_train_epochs": "15",
    }
    assert {key: flat[key] for key in expected} == expected
    assert config_of(SHIPPED) == VisobertConfig()


def test_defaults_follow_the_model() -> None:
    big, small = flatten(VisobertConfig()), flatten(config_of(SMALL))
    assert {key for key in big if big[key] != small[key]} == {*EMBEDDED_DEFAULTS, "model.name"}
    assert {key: small[key] for key in EMBEDDED_DEFAULTS} == {
        "model.hidden": "null",
        "model.dropout": "0.3",
        "training.amp": "no",
        "optim.encoder.lr": "0.003",
        "optim.encoder.layer_decay": "1.0",
        "optim.encoder.betas": "[0.9, 0.99]",
        "optim.head.lr": "0.003",
        "optim.head.betas": "[0.9, 0.99]",
    }
    assert (big["model.hidden"], big["training.amp"], big["optim.encoder.lr"]) == ("512", "bf16", "3e-05")


def test_the_descriptions_name_the_defaults_of_the_embedded_model() -> None:
    """What --help says of keys that follow the model (an lr of 3e-3 is written 0.003)."""
    descriptions = {key.path: str(key.field.description) for key in keys(VisobertConfig)}
    for path, value in EMBEDDED_DEFAULTS.items():
        if not path.endswith(".betas"):
            assert (
                f"Default for the embedded model: {canonical(value)}".rstrip("0").rstrip(".") in descriptions[path]
            ), path


@pytest.mark.parametrize(
    ("key", "text", "shown"),
    [
        ("model.hidden", "32", "32"),
        ("model.dropout", "0.1", "0.1"),
        ("training.amp", "bf16", "bf16"),
        ("optim.encoder.betas", "[0.9, 0.999]", "[0.9, 0.999]"),
    ],
)
def test_explicit_values_win(tmp_path: Path, key: str, text: str, shown: str) -> None:
    """On the command line and in the file; the other defaults still follow the model."""
    by_hand = flatten(load(VisobertConfig, SMALL, {key: text}))
    *blocks, leaf = key.split(".")
    tree: Any = {leaf: json.loads(text) if text[0] in "[0123456789" and "e" not in text else text}
    for block in reversed(blocks):
        tree = {block: tree}
    tree = {**tree, "model": {"name": "embedded", **tree.get("model", {})}}
    in_file = flatten(load(VisobertConfig, text_of(tmp_path, json.dumps(tree))))
    for flat in (by_hand, in_file):
        assert flat[key] == shown
        others = {path: flat[path] for path in EMBEDDED_DEFAULTS if path != key}
        assert others == {path: flatten(config_of(SMALL))[path] for path in others}


def test_an_empty_block_has_the_defaults_of_the_model(tmp_path: Path) -> None:
    file = text_of(tmp_path, "model: {name: embedded}\noptim:\n  encoder:\ntraining:\n")
    assert load(VisobertConfig, file) == config_of(SMALL)
    assert load(VisobertConfig, text_of(tmp_path, "model:\n")) == VisobertConfig()


@pytest.mark.parametrize("text", ["false", "False", "no", "off", "0", "n", "f"])
def test_without_detection_sentiments_choose_the_best_weights(text: str) -> None:
    """However the switch is written: there are no pairs to score."""
    config = config_of(None, model__aspect_detection=text)
    assert config.model.aspect_detection is False
    assert config.evaluation.metric == "valid/sentiment_f1_macro"
    explicit = config_of(None, model__aspect_detection=text, evaluation__metric="valid/loss_total")
    assert explicit.evaluation.metric == "valid/loss_total"


@pytest.mark.parametrize("text", ["model: 3", "model: [a]", "optim: 3\nmodel: {name: embedded}", "evaluation: x"])
def test_a_value_where_a_block_belongs_is_one_line(tmp_path: Path, text: str) -> None:
    assert text.split(":", maxsplit=1)[0] in error_of(text_of(tmp_path, text))


def test_alpha_without_any_weight_is_refused() -> None:
    message = (
        "--multi_label.focal_alpha: found [0, 0.0, -0.0], allowed: auto or list of 3 numbers >= 0 or null (at least one"
    )
    with pytest.raises(UserError) as caught:
        load(VisobertConfig, None, {"multi_label.focal_alpha": "[0, 0.0, -0.0]"})
    assert str(caught.value).startswith(message)
    assert config_of(SMALL, multi_label__focal_alpha="[0, 1e-9, 0]").multi_label.focal_alpha == (0, 1e-9, 0)


# ---------------------------------------------------------------- there and back


ALPHAS = [None, "auto", (1.0, 1.2, 1.5), (0.0, 0.0, 1e-9)]


@settings(deadline=None, max_examples=60)
@given(
    alpha=st.sampled_from(ALPHAS) | st.tuples(*[st.floats(0, 1e6)] * 3).filter(any),
    gamma=st.floats(0, 100),
    embedded=st.booleans(),
    detection=st.booleans(),
    hidden=st.none() | st.integers(1, 999),
    aspects=st.none() | st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])), min_size=1),
    seed=st.integers(0, 99),
)
def test_the_resolved_yaml_is_the_same_config(  # noqa: PLR0917
    tmp_path_factory: pytest.TempPathFactory,
    alpha: Any,
    gamma: float,
    embedded: bool,
    detection: bool,
    hidden: int | None,
    aspects: list[str] | None,
    seed: int,
) -> None:
    tree: dict[str, Any] = {
        "multi_label": {"focal_alpha": alpha, "focal_gamma": gamma},
        "model": {"aspect_detection": detection, **({"name": "embedded"} if embedded else {})},
        "data": {"aspects": aspects},
    }
    if seed % 2:
        tree["model"]["hidden"] = hidden
    config = VisobertConfig.model_validate(tree)
    file = tmp_path_factory.mktemp("resolved") / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    again = load(VisobertConfig, file)
    assert again == config
    assert flatten(again) == flatten(config)
    chosen = random.Random(seed).sample(sorted(flatten(config)), 12)
    overrides = {key: value for key, value in flatten(config).items() if key in chosen}
    assert load(VisobertConfig, file, overrides) == config


# ---------------------------------------------------------------- alpha


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", "auto"),
        ("null", None),
        ("[1.0, 1.2, 1.5]", (1.0, 1.2, 1.5)),
        ("[1e-1, 2, 3]", (0.1, 2.0, 3.0)),
    ],
)
def test_alpha(tmp_path: Path, text: str, expected: Any) -> None:
    assert config_of(None, multi_label__focal_alpha=text).multi_label.focal_alpha == expected
    file = text_of(tmp_path, f"multi_label: {{focal_alpha: {text}}}")
    assert load(VisobertConfig, file).multi_label.focal_alpha == expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[1.0, 1.2]", "[1.0, 1.2]"),
        ("[1.0, -1, 1]", "[1.0, -1, 1]"),
        ("[1.0, .nan, 1]", "[1.0, NaN, 1]"),
        ("[a, 1, 1]", '["a", 1, 1]'),
        ("automatic", "'automatic'"),
        ("true", "true"),
        ("{positive: 1}", '{"positive": 1}'),
        ("[true, 1, 1]", "[true, 1, 1]"),
    ],
)
def test_a_bad_alpha_is_reported_once_in_full(tmp_path: Path, text: str, shown: str) -> None:
    wanted = f"found {shown}, allowed: auto or list of 3 numbers >= 0 or null"
    assert error_of(None, multi_label__focal_alpha=text) == f"--multi_label.focal_alpha: {wanted}"
    file = text_of(tmp_path, f"multi_label: {{focal_alpha: {text}}}")
    assert error_of(file) == f"{file}: multi_label.focal_alpha: {wanted}"


def test_alpha_under_its_short_name() -> None:
    short = VisobertConfig.short
    assert (short["alpha"], short["gamma"]) == ("multi_label.focal_alpha", "multi_label.focal_gamma")
    with pytest.raises(UserError) as caught:
        load(VisobertConfig, None, {short["alpha"]: "[1]"}, shown_as={short["alpha"]: "alpha"})
    assert str(caught.value).startswith("--alpha: multi_label.focal_alpha: found [1], allowed: auto or list of 3")


def test_two_errors_are_both_reported() -> None:
    message = error_of(None, multi_label__focal_alpha="[1, 2]", multi_label__focal_gamma="-1", training__amp="fp8")
    assert message.count("found") == 3
    assert "found -1, allowed: number >= 0 and <= 100" in message


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("data.validation_share", "1", "number > 0 and < 1"),
        ("data.aspects", "[]", "list of texts of at least 1 or null"),
        ("model.pooling", "mean", "one of: pooler, cls, aspect_attention"),
        ("model.embedded.width", "7", "integer"),
        ("multi_label.aspect.alpha", "1.5", "number >= 0 and <= 1 or null"),
        ("evaluation.metric", "test/pair_f1_micro", "matching"),
        ("training.num_train_epochs", "0", "integer >= 1"),
    ],
)
def test_the_message_says_what_is_allowed(key: str, value: str, allowed: str) -> None:
    message = error_of(None, **{key.replace(".", "__"): value})
    assert key in message
    assert allowed in message


def test_other_splits_need_a_training_file() -> None:
    assert "without train" in error_of(None, data__validation="a.csv")
    assert "without train" in error_of(None, data__test="a.csv")


# ---------------------------------------------------------------- warnings and names


IDLE = [
    ({"multi_label.use_focal_loss": "false", "multi_label.focal_gamma": "3"}, "multi_label.focal_gamma"),
    ({"multi_label.use_focal_loss": "false", "data_prep_run": "a"}, "data_prep_run"),
    ({"multi_label.focal_alpha": "null", "data_prep_run": "a"}, "data_prep_run"),
    ({"data.oversampling_ratio": "2"}, "data.oversampling_ratio"),
    ({"multi_label.alpha_from": "oversampled"}, "multi_label.alpha_from"),
    ({"data.oversampling": "capped", "data_prep_run": "a", "multi_label.alpha_from": "oversampled"},
     "multi_label.alpha_from"),
    ({"multi_label.aspect.gamma": "1"}, "multi_label.aspect.gamma"),
    ({"multi_label.aspect.alpha": "0.3"}, "multi_label.aspect.alpha"),
    ({"model.aspect_detection": "false", "multi_label.lambda_aspect": "1"}, "multi_label.lambda_aspect"),
    ({"model.aspect_detection": "false", "multi_label.aspect.loss": "focal"}, "multi_label.aspect.loss"),
    ({"model.name": "embedded", "model.init": "random"}, "model.init"),
    ({"model.name": "embedded", "model.revision": "main"}, "model.revision"),
    ({"model.embedded.layers": "2"}, "model.embedded.layers"),
    ({"data.train": "a.csv", "data.embedded.rows": "500"}, "data.embedded.rows"),
    ({"data.validation_share": "0.2"}, "data.validation_share"),
    ({"data.train": "a.csv", "data.validation": "b.csv", "data.validation_share": "0.2"}, "data.validation_share"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "idle"), IDLE, ids=lambda value: str(value) if isinstance(value, str) else "")
def test_keys_without_effect_are_reported(overrides: dict[str, str], idle: str) -> None:
    warnings = load(VisobertConfig, None, overrides).warnings(frozenset(overrides))
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{idle} has no effect while ")


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"multi_label.focal_gamma": "0.5"},
        {"multi_label.aspect.loss": "focal", "multi_label.aspect.gamma": "1", "multi_label.aspect.alpha": "0.3"},
        {"data.oversampling": "capped", "data.oversampling_ratio": "2", "multi_label.alpha_from": "oversampled"},
        {"data.train": "a.csv", "data.validation_share": "0.2"},
        {"model.name": "embedded", "model.embedded.layers": "2"},
        {"model.init": "random", "model.revision": "v1", "data_prep_run": "a"},
        {"multi_label.use_focal_loss": "false", "multi_label.lambda_aspect": "1"},
    ],
)
def test_keys_with_effect_are_not_reported(overrides: dict[str, str]) -> None:
    assert load(VisobertConfig, None, overrides).warnings(frozenset(overrides)) == []


def test_an_unusual_gamma_is_reported() -> None:
    for text, unusual in (("0.4", True), ("0.5", False), ("5", False), ("5.5", True)):
        warnings = config_of(None, multi_label__focal_gamma=text).warnings()
        assert warnings == ([f"multi_label.focal_gamma is {text}; usual: 0.5-5"] if unusual else [])
    assert config_of(None, multi_label__focal_gamma="9", multi_label__use_focal_loss="false").warnings() == []


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({}, "bert auto g2 s0"),
        ({"model.name": "embedded", "seed": "3"}, "small auto g2 s3"),
        ({"multi_label.focal_alpha": "null", "multi_label.focal_gamma": "0.5"}, "bert ones g0.5 s0"),
        ({"multi_label.focal_alpha": "[1, 1.2, 1.5]"}, "bert 1 1.2 1.5 g2 s0"),
        ({"multi_label.use_focal_loss": "false"}, "bert ce s0"),
        ({"run_name": "mine"}, "mine"),
    ],
)
def test_run_names_contain_the_arm(overrides: dict[str, str], name: str) -> None:
    assert load(VisobertConfig, None, overrides).name() == name


# ---------------------------------------------------------------- the warm-up as a share


def factors(total: int, steps: int, ratio: float, decay: str = "constant") -> list[float]:
    return [
        learning_rate_factor(
            step, total, warmup_steps=steps, decay=decay, final_ratio=0.0, warmup_ratio=ratio
        )
        for step in range(total)
    ]  # fmt: skip


def test_the_warm_up_by_hand() -> None:
    """A fifth of 10 steps is 2; warmup_steps where those are more; nothing where both are 0."""
    assert factors(10, 0, 0.2) == [0.5, *[1.0] * 9]
    assert factors(10, 1, 0.2) == [0.5, *[1.0] * 9]
    assert factors(10, 4, 0.2) == [0.25, 0.5, 0.75, *[1.0] * 7]
    assert factors(10, 0, 0.0) == [1.0] * 10
    assert factors(4, 0, 0.1) == [1.0] * 4  # 0.4 of a step is none
    half = factors(8, 0, 0.5, "cosine")
    assert half[:4] == [0.25, 0.5, 0.75, 1.0]
    assert half[4:] == pytest.approx([1, 0.5 + 0.5 * 2**-0.5, 0.5, 0.5 - 0.5 * 2**-0.5])


# ---------------------------------------------------------------- run keys


def test_keys_that_older_versions_did_not_have_leave_run_keys_as_they_were() -> None:
    """The formula of before those keys; each of them counts once it has another value than its default."""
    added = {"data.labels", "data.delimiter", "model.segmenter", "training.compile"}
    for config in (config_of(SHIPPED), config_of(SMALL, seed="3", data__train="a.csv")):
        older = {key: value for key, value in config.decisive().items() if key not in added}
        text = json.dumps(["visobert", older, "d"], sort_keys=True)
        assert config.fingerprint("d") == hashlib.sha256(text.encode()).hexdigest()
        assert len(older) == len(config.decisive()) - 4
    values = [{}, {"data__labels": "0-3"}, {"data__labels": "{positive: [1]}"}, {"data__delimiter": ";"},
              {"model__segmenter": "pyvi"}, {"training__compile": "true"}]  # fmt: skip
    assert len({config_of(SHIPPED, **value).fingerprint("d") for value in values}) == len(values)
    assert config_of(SHIPPED, data__labels="null").fingerprint("d") == config_of(SHIPPED).fingerprint("d")


def test_phobert_without_segmented_words_is_reported() -> None:
    name = {"model__name": "vinai/phobert-base-v2"}
    assert [note for note in config_of(None, **name).warnings() if "segmented words" in note]
    assert not config_of(None, **name, model__segmenter="pyvi").warnings()
    assert not config_of(SHIPPED).warnings()


# ---------------------------------------------------------------- what launch tells and keeps


def test_epochs_are_printed_with_their_source(capsys: pytest.CaptureFixture[str]) -> None:
    announce_epochs(config_of(SHIPPED), frozenset({"seed"}))
    assert capsys.readouterr().err == "Using epochs from config: 15\n"
    announce_epochs(config_of(SHIPPED, training__num_train_epochs="3"), frozenset({"training.num_train_epochs"}))
    output = capsys.readouterr()
    assert output.err == "warning: Using epochs from command line: 3 (overrides config)\n"
    assert output.out == ""


def test_files_become_artifacts_under_their_paths(tmp_path: Path) -> None:
    for file in ("b.json", "plots/a.png", "plots/deep/c.csv", "evaluation/d e.csv"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
    (tmp_path / "empty").mkdir()
    run = MemoryRun(folder=tmp_path / "run")
    log_files(run, tmp_path)
    assert sorted(run.artifacts) == ["b.json", "evaluation/d e.csv", "plots/a.png", "plots/deep/c.csv"]
    log_files(run, tmp_path / "empty")
    assert len(run.artifacts) == 4
