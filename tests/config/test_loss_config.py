"""The block of a focal loss behind a gate: when it acts, and what it warns of."""

from typing import Any

import pytest

from pipeline.config.loss_config import FocalConfig


def focal(**values: Any) -> FocalConfig:
    return FocalConfig.model_validate(values)


def test_the_gate_opens_at_the_first_step_after_the_warm_up() -> None:
    on = focal(enabled=True, warmup_steps=3)
    assert [on.is_on(step) for step in (0, 2, 3, 4)] == [False, False, True, True]
    assert not focal(warmup_steps=0).is_on(10)  # not enabled


def test_positives_are_weighted_with_use_alpha_alone() -> None:
    assert focal(alpha=0.7).class_weight is None
    assert focal(alpha=0.7, use_alpha=True).class_weight == 0.7


@pytest.mark.parametrize(("values", "given", "expected"), [
    ({"enabled": True, "lambda": 0.2, "gamma": 2}, {"lambda", "gamma"}, []),
    ({"enabled": True, "lambda": 0.3, "gamma": 0.5}, set(),
     ["loss.x.lambda is 0.3; usual: 0.05-0.2, by habit (docs/findings.md)",
      "loss.x.gamma is 0.5; usual: 1-2, by habit (docs/findings.md)"]),
    ({"enabled": True}, {"alpha"}, ["loss.x.alpha has no effect while loss.x.use_alpha is false"]),
    ({}, {"enabled", "log_components", "lambda", "gamma"},
     ["loss.x.gamma has no effect while loss.x.enabled is false",
      "loss.x.lambda has no effect while loss.x.enabled is false"]),
])  # fmt: skip
def test_warnings(values: dict[str, Any], given: set[str], expected: list[str]) -> None:
    assert focal(**values).warnings("loss.x", {f"loss.x.{key}" for key in given} | {"loss.xy"}) == expected


def test_warnings_of_a_run() -> None:
    on = focal(enabled=True, warmup_steps=100)
    assert on.run_warnings("loss.x", 101, "no") == []  # the last step is 100
    assert on.run_warnings("loss.x", 100, "no") == [
        "loss.x.warmup_steps is 100, the last of 100 steps is 99: the focal term will never switch on"
    ]
    assert focal(warmup_steps=100).run_warnings("loss.x", 100, "no") == []
    without = focal(compute_fp32=False)
    assert without.run_warnings("loss.x", 10, "no") == [
        "loss.x.compute_fp32: false has no effect with training.amp: no"
    ]
    assert without.run_warnings("loss.x", 10, "bf16") == []
