"""Whatever stands in a config, a schema or a data file: exit code 0, or 2 with one line; no traceback, no hang.

Inputs are valid ones that something happened to: cut, flipped, quoted, retyped, nested. `FAULTS=full` tries many more.
"""

import contextlib
import faulthandler
import io
import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml
from conftest import FULL, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import __main__ as command_line
from pipeline.config.strict_config import flatten, keys, to_yaml
from pipeline.sweeps import sweep_plan

PATIENCE = 900  # seconds for one case, which only guard against hanging; most take a hundredth of one
CASES = Counter[str]()
CODES = Counter[int]()

pytestmark = pytest.mark.faults


def cases(short: int) -> settings:
    """How many inputs a test tries: the same ones every time in the short form."""
    return settings(
        max_examples=12 * short if FULL else short // 2, deadline=None, derandomize=not FULL,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _count(request: pytest.FixtureRequest) -> Iterator[None]:
    """Prints how many inputs were tried."""
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        message = ", ".join(f"{count} {name}" for name, count in CASES.items())
        print(f"\nfuzz: {CASES.total()} cases ({message}); exit codes {dict(sorted(CODES.items()))}")


def outcome(kind: str, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of `python -m pipeline ...`, in this process.

    Any other exception than SystemExit is a traceback to the user, and fails the test; so does a case that takes long.
    """
    CASES[kind] += 1

    def hangs(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"no end after {PATIENCE} s: {arguments}")

    unseen: list[object] = []  # what Python would print of an error in a callback
    monitor, sys.unraisablehook = sys.unraisablehook, lambda error: unseen.append(error.exc_value)
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(PATIENCE)
    faulthandler.dump_traceback_later(4 * PATIENCE, exit=True)  # stuck where no signal gets through
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(io.StringIO()):
            command_line.main(list(arguments))
    except SystemExit as end:
        code = end.code
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = monitor
    assert not unseen, unseen
    assert isinstance(code, int)
    CODES[code] += 1
    return code, message.getvalue()


def check(code: int, message: str) -> None:
    assert code in (0, 2), message
    assert "Traceback" not in message
    if code == 2:
        last = message.splitlines()[-1]
        assert last.startswith("error: ")
        assert len(last) < 4000, "an error that nobody reads"


@pytest.fixture
def stop_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points end once their config is valid, and has been written as it would be."""
    real = command_line.import_reference

    def reached(config: Any, *rest: Any) -> None:
        flatten(config)
        assert to_yaml(config)

    def launched(config: Any, make_task: Any, given: frozenset[str], writer: Any) -> None:
        reached(config)
        config.warnings(given)
        config.fingerprint("digest")
        assert config.name()

    def planned(config: Any, file: Path, typed: Mapping[str, str]) -> None:
        reached(config)
        model = real(command_line.find_entry(config.task).config)
        plan = sweep_plan.resolve(config, file, model, [Path(), file.parent, ROOT], typed)
        assert plan.identity()
        assert sweep_plan.to_yaml(plan)

    stops: dict[str, Callable[..., None]] = {entry.target: reached for entry in map(command_line.find_entry, ENTRIES)}
    stops |= {"pipeline.runs.launch:launch": launched, "pipeline.sweeps.sweep:sweep": planned,
              "pipeline.tracking.writer_client:writer_for": lambda _: contextlib.nullcontext()}  # fmt: skip
    monkeypatch.setattr(command_line, "task_factory", lambda name: name)
    monkeypatch.setattr(command_line, "import_reference", lambda reference: stops.get(reference) or real(reference))


# ---------------------------------------------------------------- what may happen to text

DEEP = 3000
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{','.join(['*' + a] * 9)}]}}\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
TOKENS = [
    "", '"', "'", '""', ",", ";", "|", "\t", "\n", "\r", "\r\n", "\n\n", "\ufeff", "\0", "\x1b[31m", "\u2028", "\x85",
    " ", "{", "}", "[", "]", "#", "\\", "$", "<script>", "../../x", "/x", "\u202e", "é", "e\u0301", "👩‍👩‍👧", "NaN",
    "inf", "-0", "1e400", "9" * 400, "9" * 5000, "1_000", "0x1F", "1:30", "null", "true", "x" * 70000, "\\ud800",
    "label", "{A#Positive}", "{A#}", "{#Positive};", "Positive", "positiv", "nan", "%", "`", "=", "==", "(",
    "not " * 300,
]  # fmt: skip
YAML_TOKENS = [
    *TOKENS, "&a ", "*a", "&a *a", "&a [*a]", "<<: *a", "? [a, b]\n: c\n", "!!int ''", "!!int x", "!!float ''",
    "!!bool x", "!!timestamp x", "!!binary '!'", "!!set {a}", "!!omap [a: 1]", "!!str 1", "!!null x", "2001-13-45",
    "2001-01-01", "0x_", "0b_", "0o7", "0x" + "f" * 5000, "._", "---\n", "...\n", "%YAML 9.9\n", "\t- ", "- ", ": ",
    "|", ">", "!!python/object/apply:os.abort []", "!!python/name:os.abort", "!x y", "[" * DEEP, "{a: " * DEEP,
    "\n" + LAUGHS, "\n" + MERGES, "\nseed: 1\nseed: 1\n", "\n1: 2\n", "\nnull: 2\n", "\n[a]: 2\n", "\n{a: 1}: 2\n",
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, tokens: list[str]) -> bytes:
    """The bytes after one to four accidents."""
    found = whole
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        start = draw(st.integers(0, len(found)))
        length = draw(st.integers(0, 40))
        kind = draw(st.sampled_from([
            "insert", "insert", "insert", "replace", "replace", "cut", "delete", "repeat", "flip", "raw", "ends",
            "encoding", "lines",
            "only",
        ]))  # fmt: skip
        token = draw(st.sampled_from(tokens)).encode("utf-8", "surrogatepass")
        if kind == "insert":
            found = found[:start] + token + found[start:]
        elif kind == "replace":
            found = found[:start] + token + found[start + length :]
        elif kind == "cut":
            found = found[:start]
        elif kind == "delete":
            found = found[:start] + found[start + length :]
        elif kind == "repeat":
            found = found[: start + length] + found[start:]
        elif kind == "flip" and found:
            at = min(start, len(found) - 1)
            found = found[:at] + bytes([found[at] ^ (1 << draw(st.integers(0, 7)))]) + found[at + 1 :]
        elif kind == "raw":
            found = found[:start] + draw(st.binary(max_size=4)) + found[start:]
        elif kind == "ends":
            found = found.replace(b"\n", draw(st.sampled_from([b"\r", b"\r\n", b"", b"\n\n", b" "])))
        elif kind == "encoding":
            text = found.decode("utf-8", "replace")
            found = text.encode(draw(st.sampled_from(["utf-16", "utf-8-sig", "latin-1", "utf-32-le"])), "replace")
        elif kind == "only":
            found = token
        elif kind == "lines":
            lines = found.split(b"\n")
            at = draw(st.integers(0, len(lines) - 1))
            found = b"\n".join(draw(st.sampled_from([lines[:at], lines[at:], lines[:at] + lines, lines[at:] + lines])))
    return found


NUMBERS = [0, -1, 1, 2, 0.5, -0.5, 1e308, 5e-324, 10**30, -(10**30), 2**63, 2**64, 10**400, float("nan"), float("inf")]
WORDS = ["", " ", "x", "1e-3", "nan", "null", "true", "auto", "none", "../../x", "/x", "a\0b", "\ud800", "é" * 300,
         "$x", "test/x", "valid/", "valid/\n", "x" * 9000, "{}", "[", "\n", "%s", "{0}", "\x1b", "../x\0"]  # fmt: skip
scalars = st.sampled_from([None, True, False, *NUMBERS, *WORDS, date(2001, 1, 1), b"\xff"])
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*WORDS, "name", "kind", "a"]), inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([1, None, True, 0.5, float("nan"), b"\xff", date(2001, 1, 1)]), inner, max_size=2
        )
    ),
    max_leaves=5,
)


@st.composite
def altered(draw: st.DrawFn, tree: Mapping[str, Any], paths: list[str], most: int = 3) -> dict[str, Any]:
    """The tree with other values at some of its keys, blocks included."""
    found = json.loads(json.dumps(tree))
    for path in draw(st.lists(st.sampled_from(paths), min_size=1, max_size=most)):
        *blocks, leaf = path.split(".")[: draw(st.sampled_from([1, 2, 9, 9, 9]))]
        block = found
        for name in blocks:
            if not isinstance(block.get(name), dict):
                block[name] = {}
            block = block[name]
        if draw(st.integers(0, 9)) == 0:
            block.pop(leaf, None)
        else:
            block[leaf] = draw(values)
    if draw(st.integers(0, 9)) == 0:
        found[draw(st.sampled_from(["x", "", "lamda", "seeds", "\n", "a\0", "loss.lambda", "training.", "."]))] = draw(
            values
        )
    return found


def written(tree: Any) -> str:
    return yaml.dump(tree, Dumper=yaml.SafeDumper, allow_unicode=False, sort_keys=False)


# ---------------------------------------------------------------- configs of every entry point

ENTRIES = command_line.entry_names()
PATHS = {name: [key.path for key in keys(command_line.import_reference(command_line.find_entry(name).config))]
         for name in ENTRIES}  # fmt: skip
SHIPPED = {name: (ROOT / str(command_line.find_entry(name).file)).read_text() for name in ENTRIES}
SWEEP = {"task": "train_mmoe", "config": "configs/mtl_mmoe.yaml", "settings": {"max_steps": 10},
         "baseline": {"aux_focal": False},
         "arms": [{"aux_focal": True, "lambda": 0.1}, {"name": "b", "aux_focal": True, "lambda": 0.2}],
         "seeds": [0, 1]}  # fmt: skip
GRID = SWEEP | {
    "arms": {"grid": {"aux_focal": [True, False], "lambda": [0.1, 0.2]}, "where": {"lambda": {"aux_focal": True}}}
}
SEARCH = {key: value for key, value in SWEEP.items() if key != "arms"} | {
    "search": {"trials": 2, "space": {"lambda": {"low": 0.01, "high": 1, "log": True}, "gamma": {"choices": [1, 2]}},
               "settings": {"aux_focal": True}}}  # fmt: skip


@pytest.mark.usefixtures("stop_before_work")
@cases(40)
@given(data=st.data())
def test_values_of_configs(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(ENTRIES))
    tree = data.draw(altered(yaml.safe_load(SHIPPED[name]) or {}, PATHS[name]))
    file = tmp_path / "config.yaml"
    file.write_text(written(tree), encoding="utf-8")
    check(*outcome("config values", name, "--config", str(file)))


@pytest.mark.usefixtures("stop_before_work")
@cases(40)
@given(data=st.data())
def test_text_of_configs(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(ENTRIES))
    file = tmp_path / "config.yaml"
    file.write_bytes(data.draw(damaged(SHIPPED[name].encode(), YAML_TOKENS)))
    check(*outcome("config texts", name, "--config", str(file)))


@pytest.mark.usefixtures("stop_before_work")
@cases(25)
@given(data=st.data())
def test_overrides(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(ENTRIES))
    typed = []
    own = [
        *PATHS[name],
        "config",
        "lambda",
        "gamma",
        "alpha",
        "data",
        "epochs",
        "max_step",
        "x",
        "",
        "-",
        "a.b",
        "help.me",
    ]
    own += PATHS["train_mmoe"] if name == "sweep" else []
    texts = st.sampled_from([*WORDS, *YAML_TOKENS, *(str(number) for number in NUMBERS), "[0.5, 0.5]", "[1, 2, 3]"])
    for key in data.draw(st.lists(st.sampled_from(own), min_size=1, max_size=4)):
        typed += data.draw(st.sampled_from([[f"--{key}", "V"], [f"--{key}", "V"], [f"--{key}=V"], [f"--{key}"], ["V"]]))
    typed = [part.replace("V", data.draw(texts)) for part in typed]
    check(*outcome("overrides", name, *typed))


@pytest.mark.usefixtures("stop_before_work")
@cases(20)
@given(data=st.data())
def test_sweep_plans(tmp_path: Path, data: st.DataObject) -> None:
    base = data.draw(st.sampled_from([SWEEP, GRID, SEARCH]))
    inner = ["settings.lambda", "settings.seed", "settings.name", "baseline.lambda", "baseline.loss.aux_focal.gamma",
             "baseline.run_name", "arms.grid", "arms.grid.lambda", "arms.grid.gamma", "arms.where.lambda",
             "arms.where.lambda.aux_focal", "search.space.lambda", "search.space.lambda.low",
             "search.space.gamma.choices", "search.space.lambda.high", "search.space.lambda.integer"]  # fmt: skip
    tree = data.draw(altered(base, [*PATHS["sweep"], *inner]))
    if isinstance(tree.get("arms"), list) and data.draw(st.booleans()):
        names = st.sampled_from(["name", "lambda", "gamma", "x", "loss", "aux_focal", "data", "seed"])
        tree["arms"].append(data.draw(st.dictionaries(names, values, max_size=3)))
    file = tmp_path / "sweep.yaml"
    file.write_text(written(tree), encoding="utf-8")
    check(*outcome("sweep files", "sweep", "--config", str(file)))


NOT_PLAIN = [
    "!!binary gIGC", "!!binary aGVsbG8=", "!!binary ''", "!!set {a, b}", "!!set {}", "!!omap [a: 1]",
    "!!pairs [a: 1, a: 2]", "{!!binary gIGC : 1}", "{.nan: 1}", "{1: 2, a: 3}", "{null: 1}", "{2001-01-01: 1}",
    "[{no: 1}]", '"\\ud800"', "!!timestamp x", "!!python/tuple [1]", "!!python/bytes x", "0x" + "f" * 300,
]  # fmt: skip


@st.composite
def not_plain(draw: st.DrawFn, tree: Mapping[str, Any], paths: list[str]) -> str:
    """The tree as YAML, with one value that no setting may have."""
    found = json.loads(json.dumps(tree))
    *blocks, leaf = draw(st.sampled_from(paths)).split(".")
    block = found
    for name in blocks:
        if not isinstance(block.get(name), dict):
            block[name] = {}
        block = block[name]
    block[leaf] = draw(st.sampled_from(["PLACE", ["PLACE"], {"a": "PLACE"}]))
    return written(found).replace("PLACE", draw(st.sampled_from(NOT_PLAIN)))


@pytest.mark.usefixtures("stop_before_work")
@cases(40)
@given(data=st.data())
def test_what_is_no_plain_value_is_refused_wherever_it_stands(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(ENTRIES))
    own = [SWEEP, GRID, SEARCH] if name == "sweep" else [yaml.safe_load(SHIPPED[name]) or {}]
    text = data.draw(not_plain(data.draw(st.sampled_from(own)), [*PATHS[name], "search.settings.x", "arms.x"]))
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    code, message = outcome("not plain", name, "--config", str(file))
    check(code, message)
    assert (code, message[: len(f"error: {file}: ")]) == (2, f"error: {file}: "), message


# ---------------------------------------------------------------- impressions

SCHEMA = {
    "labels": {"click": "clicked", "conversion": "clicked and spend > 10"},
    "features": {"user": "categorical", "tags": {"kind": "multi", "separator": "|"},
                 "age": {"kind": "numeric", "missing": "mean"},
                 "items": {"kind": "multi", "weight_separator": ":"}, "income": "numeric"},
    "split": {"by": "user", "seed": 0, "train": 0.8, "validation": 0.1, "test": 0.1},
    "csv": {"delimiter": ",", "strip": True},
    "missing_values": ["", "NA"],
}  # fmt: skip
SCHEMA_PATHS = [
    "labels", "labels.click", "labels.conversion", "features", "features.user", "features.tags.separator",
    "features.age.missing", "features.age.bins", "features.items.weight_separator", "features.items.weights",
    "features.user.min_count", "features.income", "features.x", "split", "split.by", "split.seed", "split.train",
    "split.validation", "split.test", "csv", "csv.delimiter", "csv.strip", "missing_values", "columns",
]  # fmt: skip
CONDITIONS = [
    "clicked", "not clicked", "clicked and", "clicked == 'a'", "age > 1e400", "spend >", "`a b` == 1", "`", "x",
    "1 < age < 3", "user in ['u1', 'u2']", "user in []", "user in ['a', 1]", "clicked or (age", "age is 1",
    "__import__('os').abort()", "(lambda: 0)()", "age == " + "9" * 5000, "age == 0x" + "f" * 5000,
    "not " * 2000 + "clicked", "(" * 300 + "clicked" + ")" * 300, "clicked" + " and clicked" * 3000,
    "age" + " < 3" * 500, "spend > -" + "-" * 2000 + "1", "clicked\0", "\ud800", "user == 'é'", "f'{age}' == 1",
    "age == 1j", "age == None", "age == True", "b'x' == age", "", "\n", "user == '\\x00'", "clicked # x",
]  # fmt: skip
IMPRESSIONS = "".join(
    ["clicked,user,tags,age,items,spend,income\n"]
    + [
        f"{row % 2},u{row % 7},a|b{row % 3},{20 + row if row % 5 else 'NA'},i{row % 4}:0.5|j:2,{row}.5,1e3\n"
        for row in range(30)
    ]
).encode()


def prepared(tmp_path: Path, kind: str, schema: str, impressions: bytes, name: str = "data.csv") -> tuple[int, str]:
    (tmp_path / name).write_bytes(impressions)
    (tmp_path / "schema.yaml").write_text(schema, encoding="utf-8")
    typed = ["--data", str(tmp_path / name), "--schema", str(tmp_path / "schema.yaml")]
    return outcome(kind, "prepare_ctr", *typed, "--output_dir", str(tmp_path / "out"), "--tracking.enabled", "false")


def test_the_whole_inputs_are_fine(tmp_path: Path) -> None:
    assert prepared(tmp_path, "whole", written(SCHEMA), IMPRESSIONS)[0] == 0
    for name in ("wide.csv", "braces.csv", "wide.jsonl"):
        assert reviewed(tmp_path, "whole", name, REVIEWS[name])[0] == 0


@cases(25)
@given(data=st.data())
def test_schemas(tmp_path: Path, data: st.DataObject) -> None:
    tree = data.draw(altered(SCHEMA, SCHEMA_PATHS))
    if data.draw(st.booleans()):
        tree["labels"] = {
            "click": data.draw(st.sampled_from(CONDITIONS)),
            "conversion": data.draw(st.sampled_from(CONDITIONS)),
        }
    check(*prepared(tmp_path, "schemas", written(tree), IMPRESSIONS))


@cases(15)
@given(data=st.data())
def test_what_is_no_plain_value_is_refused_in_a_schema(tmp_path: Path, data: st.DataObject) -> None:
    code, message = prepared(tmp_path, "not plain", data.draw(not_plain(SCHEMA, SCHEMA_PATHS)), IMPRESSIONS)
    check(code, message)
    assert (code, message.startswith(f"error: {tmp_path / 'schema.yaml'}: ")) == (2, True), message


@cases(30)
@given(data=st.data())
def test_bytes_of_impressions(tmp_path: Path, data: st.DataObject) -> None:
    content = data.draw(damaged(IMPRESSIONS, TOKENS))
    check(
        *prepared(
            tmp_path,
            "impressions",
            written(SCHEMA),
            content,
            data.draw(st.sampled_from(["d.csv", "d.csv", "d.csv.gz"])),
        )
    )


# ---------------------------------------------------------------- reviews

WIDE = [f'"máy tốt, số {n}",{("Positive", "", "Negative")[n % 3]},{("", "Neutral")[n % 2]}' for n in range(12)]
BRACES = [f"pin ổn {n},{{BATTERY#Positive}};{{OTHERS}};{{CAMERA#{('Negative', 'Neutral')[n % 2]}}};" for n in range(12)]
RECORDS = [{"review": f"màn đẹp {n}", "Screen": ("Positive", "Negative", None)[n % 3], "Price": "Neutral"}
           for n in range(12)]  # fmt: skip
REVIEWS = {
    "wide.csv": "\n".join(["text,Camera,Battery", *WIDE]).encode(),
    "braces.csv": "\n".join(["comment,label", *BRACES]).encode(),
    "wide.jsonl": "\n".join(map(json.dumps, RECORDS)).encode(),
}


def reviewed(tmp_path: Path, kind: str, name: str, content: bytes, *more: str) -> tuple[int, str]:
    file = tmp_path / name
    file.write_bytes(content)
    own = ["--data", str(file), "--output_dir", str(tmp_path / "out"), "--data.cache", str(tmp_path / "cache")]
    return outcome(kind, "data_prep", *own, "--tracking.enabled", "false", *more)


@cases(30)
@given(data=st.data())
def test_bytes_of_reviews(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(REVIEWS)))
    content = data.draw(damaged(REVIEWS[name], TOKENS))
    more = data.draw(st.sampled_from([[], ["--data.on_bad_label", "drop"], ["--data.aspects", "[Camera, Screen]"]]))
    check(*reviewed(tmp_path, "reviews", name, content, *more))


@cases(25)
@given(data=st.data())
def test_records_of_reviews(tmp_path: Path, data: st.DataObject) -> None:
    records: list[dict[str, Any]] = [dict(record) for record in RECORDS]
    odd = values.filter(lambda value: "date" not in repr(value) and "b'" not in repr(value))
    names = st.sampled_from(
        ["review", "Screen", "Price", "x", "", "a\0", "\ud800", "a\nb", "../x", "$a$", "$\\frac{$", "A" * 300]
    )
    for _ in range(data.draw(st.integers(1, 4))):
        records[data.draw(st.integers(0, 11))][data.draw(names)] = data.draw(
            odd | st.sampled_from(["Positive", "Negative"])
        )
    if data.draw(st.booleans()):
        other = data.draw(names)
        records = [{other if name == "Price" else name: cell for name, cell in record.items()} for record in records]
    lines = [json.dumps(record, ensure_ascii=data.draw(st.booleans())) for record in records]
    if data.draw(st.integers(0, 4)) == 0:
        odd_lines = [
            "[" * DEEP,
            '{"a":' * DEEP,
            "1",
            "null",
            '"x"',
            "{",
            '{"review": 1, "review": 2}',
            "9" * 5000,
            "{}",
        ]
        lines[data.draw(st.integers(0, 11))] = data.draw(st.sampled_from(odd_lines))
    drop = data.draw(st.sampled_from([[], ["--data.on_bad_label", "drop"]]))
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    check(*reviewed(tmp_path, "records", "wide.jsonl", content, *drop))


# ---------------------------------------------------------------- what such inputs found, one by one


def three(column: str, labels: tuple[str, str, str] = ("Positive", "Negative", "Neutral")) -> bytes:
    """Three reviews with labels in a column; escapes as they are written."""
    return "".join(f'{{"text": "a{row}", "{column}": "{label}"}}\n' for row, label in enumerate(labels)).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"\xef\xbb\xbf\n", "the file is empty"),
        ("a.jsonl", three(r"\ud800"), "column '\\ud800': allowed: a name of whole characters other than NUL"),
        ("a.jsonl", three(r"A\u0000"), "column 'A\\x00': allowed: a name of whole characters other than NUL"),
        ("a.jsonl", three("A", ("Positive", "Negative", r"\udc00")), "row 3, column A: found half a character"),
        ("a.jsonl", three("label", (r"{\ud800#Positive}", "", "")), "row 1, column label: found half a character"),
    ],
)
def test_reviews_that_once_ended_in_a_traceback(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    for more in ([], ["--data.on_bad_label", "drop"]):
        code, line = reviewed(tmp_path, "found before", name, content, *more)
        assert code == 2
        assert line.startswith(f"error: {tmp_path / name}: {message}")


def test_a_file_of_many_aspects_is_pictured_in_part(tmp_path: Path) -> None:
    count = 1500  # a picture with a row for each would have more pixels than a PNG may
    lines = [",".join(["text", *(f"a{number}" for number in range(count))])]
    lines += [",".join([word, *[word] * count]) for word in ("Positive", "Negative", "Neutral")]
    code, message = reviewed(tmp_path, "found before", "wide.csv", "\n".join(lines).encode())
    assert code == 0, message
    assert len(json.loads((tmp_path / "out" / "alpha.json").read_text())["aspects"]) == count


QUOTES = "quotes within quotes are doubled, or csv.escape names what escapes them"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"clicked,user\n1,\xfe,3\n", "row 1: found 3 columns, allowed: 2"),  # bytes that are no text in such a row
        (b"\n\n1\xfe,\xff\n", "the header is not UTF-8 text; csv.encoding names another encoding"),
        (b'clicked,"user\n1,2\n', "the header: found a quote that is never closed"),
        (b'"clicked"x,user\n1,2\n', f"the header: found text after a closing quote, allowed: {QUOTES}"),
        (b"\xef\xbb\xbf\n\n", "no rows"),
        (b"\xff\xfeclicked", "found UTF-16, allowed: UTF-8 text, or csv.encoding: utf-16"),
    ],
)
def test_headers_and_rows_of_impressions(tmp_path: Path, content: bytes, message: str) -> None:
    schema = {"labels": {"click": "clicked", "conversion": "clicked"}, "features": {"user": "categorical"}}
    code, line = prepared(tmp_path, "found before", written(schema), content)
    assert code == 2
    assert line == f"error: {tmp_path / 'data.csv'}: {message}\n"


def test_a_header_is_read_as_its_rows_are(tmp_path: Path) -> None:
    rows = "".join(f'{row % 2},"u{row % 3}"\r' for row in range(30))
    schema = {"labels": {"click": "clicked", "conversion": "clicked"}, "features": {'us,"er': "categorical"}}
    content = b"\xef\xbb\xbf\r" + f'clicked,"us,""er"\r{rows}'.encode()
    code, message = prepared(tmp_path, "found before", written(schema), content)
    assert code == 0, message


def test_errors_are_short_whatever_the_keys(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(written({"x" * 9000: 1} | {f"key{number}": number for number in range(500)}), encoding="utf-8")
    code, line = outcome("found before", "train_mmoe", "--config", str(file))
    assert code == 2
    assert line.count("unknown key") == 12
    assert line.endswith("; and 489 more\n")
    assert len(line) < 3000
