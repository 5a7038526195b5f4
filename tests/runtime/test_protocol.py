"""Messages between processes are read as they were written; anything else is refused."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.protocol import MessageError, decode, encode, read_messages
from pipeline.sweeps.requests import WORKER_REPLIES, WORKER_REQUESTS, DigestData, StopRun, TrainRun
from pipeline.tracking.messages import WRITER_REPLIES, WRITER_REQUESTS, FindRuns, OpenRun, RunRequest

PROTOCOLS: list[tuple[type, ...]] = [WRITER_REQUESTS, WRITER_REPLIES, WORKER_REQUESTS, WORKER_REPLIES]

TEXTS = st.text() | st.just("half a character: \ud800")


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    inner = get_args(hint)
    if is_dataclass(hint):
        return st.builds(hint, **{name: values_of(field) for name, field in get_type_hints(hint).items()})
    if get_origin(hint) is Mapping:
        return st.dictionaries(*map(values_of, inner), max_size=3)
    if get_origin(hint) is tuple:
        return st.lists(values_of(inner[0]), max_size=3).map(tuple)
    if inner:
        return st.one_of([values_of(kind) for kind in inner])
    plain = {str: TEXTS, float: st.floats(allow_nan=False)}
    return plain.get(hint, st.from_type(hint))


@pytest.mark.parametrize("kinds", PROTOCOLS, ids=["to writer", "of writer", "to worker", "of worker"])
def test_every_message_is_one_line_and_reads_back_equal(kinds: tuple[type, ...]) -> None:
    @given(st.one_of([values_of(kind) for kind in kinds]))
    def check(message: Any) -> None:
        line = encode(message)
        assert line.count("\n") == 1
        assert line.endswith("\n")
        assert line.isascii()
        assert decode(line, kinds) == message

    check()


def test_names_are_unique_and_no_field_hides_the_type() -> None:
    for kinds in PROTOCOLS:
        assert len({kind.__name__ for kind in kinds}) == len(kinds)
        for kind in kinds:
            assert "type" not in {field.name for field in fields(kind)}
            assert set(get_type_hints(kind)) == {field.name for field in fields(kind)}


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "not JSON"),
        ("[]", "message type None"),
        ('{"entry": "x"}', "message type None"),
        ('{"type": ["DigestData"]}', "allowed: DigestData, TrainRun, StopRun"),
        ('{"type": "FindRuns"}', "message type 'FindRuns', allowed: DigestData"),
        ('{"type": "StopRun", "now": true}', "StopRun: found field now"),
        ('{"type": "DigestData", "entry": "x"}', "DigestData: .*'config'"),
        ('{"type": "DigestData", "entry": "x", "config": "", "__class__": 1}', "DigestData: found field __class__"),
        ('{"type": "TrainRun", "entry": "", "config": "", "name": "", "tags": {}, "overridden": 3}', "TrainRun: "),
    ],
)
def test_other_lines_are_refused(line: str, error: str) -> None:
    with pytest.raises(MessageError, match=error):
        decode(line, (DigestData, TrainRun, StopRun))


def test_a_message_within_a_message_is_as_strict() -> None:
    line = encode(OpenRun(RunRequest("a"), "out", offline=False))
    assert decode(line, WRITER_REQUESTS) == OpenRun(RunRequest("a"), "out", offline=False)
    for broken in (line.replace('"launcher"', '"lunch"'), line.replace('"run": {', '"run": 3, "x": {')):
        with pytest.raises(MessageError):
            decode(broken, WRITER_REQUESTS)


def test_numbers_that_json_does_not_know_survive() -> None:
    @dataclass(frozen=True)
    class Measured:
        metrics: Mapping[str, float]

    (message,) = read_messages([encode(Measured({"a": float("inf"), "b": float("nan")}))], (Measured,))
    assert message.metrics["a"] == float("inf")
    assert message.metrics["b"] != message.metrics["b"]


def test_an_incomplete_last_line_is_skipped() -> None:
    whole = encode(FindRuns(run_key="k"))
    assert list(read_messages([whole, whole[:-1]], WRITER_REQUESTS)) == [FindRuns(run_key="k")]
