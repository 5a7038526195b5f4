"""Decisions of lists of seeds and of seeds that were added, the answer in words and the first picture, by hand."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t
from test_compare import arm as arm_of
from test_report import EMPTY, NEW_ROWS, Page, plain

from pipeline.comparison import wording
from pipeline.comparison.answer import answer, duration
from pipeline.comparison.families import Family
from pipeline.comparison.page.looks import HEIGHT, columns, look_charts, value_range
from pipeline.comparison.page.view import page as page_of
from pipeline.comparison.results import Comparison
from pipeline.comparison.verdicts import compare, to_frame, to_markdown, to_text
from pipeline.maths.row_covariance import NewRows

METRIC, LEVEL = "test/auc_ctcvr", 0.02
# Differences to the baseline by seed. Half-widths at level 0.02: 6.965 sd / sqrt(3) and 3.747 sd / sqrt(5).
BETTER = (0.010, 0.011, 0.012, 0.010, 0.012)  # sd 0.001: decided at 3
OPEN = (0.010, -0.010, 0.002, 0.003, -0.004)
WITHIN = (0.0004, 0.0005, 0.0006)  # sd 0.0001: decided at 3, by less than 0.001


def frame(arms: dict[str, tuple[float, ...]], looks: tuple[int, ...] = (3, 5), **attrs: Any) -> pd.DataFrame:
    """A frame as `load_runs` returns it. The baseline's metric is 0.5 at every seed."""
    most = max(map(len, arms.values()))
    rows = [
        {"run_id": f"{arm}-{seed}", "name": f"{arm} s{seed}", "status": "FINISHED", "task": "mmoe", "arm": arm,
         "role": "baseline" if arm == "baseline" else "arm", "control_of": None, "seed": seed, "color": None,
         "sweep_id": "5eed", "data_digest": "d" * 64, "artifact_uri": "", "start_time": pd.Timestamp(seed, unit="s"),
         f"metrics.{METRIC}": 0.5 + difference, "metrics.test/ece_ctcvr": 0.1 + difference,
         "metrics.system/train_seconds": 360.0,
         "tags.weights_digest": f"w{seed}" if arm in ("baseline", "same") else f"{arm}{seed}"}
        for arm, differences in ({"baseline": (0.0,) * most} | arms).items()
        for seed, difference in enumerate(differences) if not math.isnan(difference)
    ]  # fmt: skip
    runs = pd.DataFrame(rows)
    family = Family(tuple(arms), LEVEL, looks)
    runs.attrs = {"metric": METRIC, "mode": "max", "families": (family,), "other_families": 0, "margin": None} | attrs
    return runs


def verdicts(comparison: Comparison) -> dict[str, str]:
    return {arm.name: arm.verdict for arm in comparison.arms[1:]}


def test_an_arms_numbers_are_those_of_its_last_look() -> None:
    comparison = compare(frame({"a": BETTER, "b": OPEN}))
    assert comparison.design == "sequential"
    assert verdicts(comparison) == {"a": "better", "b": "not distinguishable"}
    decided, undecided = arm_of(comparison, "a"), arm_of(comparison, "b")
    assert (list(decided.values), len(undecided.values)) == ([0, 1, 2], 5)
    assert decided.difference is not None
    assert undecided.difference is not None
    half = t.isf(LEVEL / 2, 2) * 0.001 / math.sqrt(3)
    assert (decided.difference.n, decided.difference.mean) == (3, pytest.approx(0.011))
    assert (decided.difference.low, decided.difference.high) == pytest.approx((0.011 - half, 0.011 + half))
    assert [look.seeds for look in undecided.looks] == [3, 5]
    assert (undecided.difference.low, undecided.difference.high) == (undecided.looks[1].low, undecided.looks[1].high)
    assert decided.p_adjusted is decided.minimum_detectable is None
    assert wording.P not in wording.columns(comparison)
    table = to_frame(comparison).set_index("arm")
    assert table.loc["a", "look_3.low"] == decided.difference.low
    assert math.isnan(table.loc["a", "look_5.low"])
    assert table.loc["b", "level"] == LEVEL


def test_an_arm_waits_for_all_seeds_of_a_look() -> None:
    """Seed 3 failed: the look at 5 is not made, and only 3 seeds count."""
    comparison = compare(frame({"b": (*OPEN[:3], math.nan, OPEN[4]), "c": (0.01, 0.02)}))
    assert verdicts(comparison) == {"b": "open", "c": "open"}
    assert list(arm_of(comparison, "b").values) == [0, 1, 2]
    early = arm_of(comparison, "c").difference
    assert early is not None
    assert (early.n, early.mean, early.low) == (2, pytest.approx(0.015), None)
    assert "b: seeds 4 do not count, because only the scheduled looks do" in comparison.notes
    assert answer(comparison) == (
        "Keep the baseline for now: no arm is decided yet. "
        "Two arms are still open: start the sweep again, with them in its file, for more seeds."
    )


def test_the_same_weights_are_identical_and_equal_metrics_alone_decide_nothing() -> None:
    comparison = compare(frame({"same": (0.0,) * 3, "gated": (0.0,) * 5}))
    assert verdicts(comparison) == {"same": "identical", "gated": "not distinguishable"}
    gated = arm_of(comparison, "gated")
    assert gated.difference is not None
    assert gated.difference.low is None
    words = "not distinguishable: all differences are 0 so far, which decides nothing; 5 seeds: 0; mean 0.5000 ± 0.0000"
    assert wording.sentence(gated, comparison) == words
    text = answer(comparison)
    assert "gated is equal to the baseline at every seed: the best weights may be from before the gate" in text
    assert "too close" not in text


def test_a_margin_makes_arms_equal_and_small_gains_small() -> None:
    within = tuple(difference - 0.0005 for difference in WITHIN)
    comparison = compare(frame({"tiny": WITHIN, "none": within, "a": BETTER[:3]}, margin=0.001))
    assert verdicts(comparison) == {
        "tiny": "better, by less than the margin", "none": "equal within the margin", "a": "better",
    }  # fmt: skip
    assert wording.tally(comparison) == (
        "3 arms: 1 better, 1 better, by less than the margin, 1 equal within the margin"
    )
    small = compare(frame({"tiny": WITHIN}, margin=0.001))
    assert answer(small) == "Keep the baseline: tiny is better, but by less than the margin of 0.001."


def test_a_design_of_one_look_has_its_margin_too() -> None:
    assert verdicts(compare(frame({"tiny": WITHIN}, looks=(3,), margin=0.001))) == {
        "tiny": "better, by less than the margin"
    }


@pytest.mark.parametrize(
    ("arguments", "why"), [({"metric": "test/ece_ctcvr"}, METRIC), ({"baseline": "b"}, "another baseline")]
)
def test_what_the_seeds_were_not_chosen_by_gets_no_verdict(arguments: dict[str, str], why: str) -> None:
    comparison = compare(frame({"a": BETTER, "b": OPEN}), **arguments)
    (verdict,) = set(verdicts(comparison).values())
    assert verdict == f"no verdict: the seeds were chosen by {why}"
    assert answer(comparison) == f"There is {verdict}."
    assert not look_charts(comparison)


def test_a_list_of_seeds_has_intervals_at_its_familys_level() -> None:
    """Half of 5% each, although one of the two arms has no run left."""
    runs = frame({"a": BETTER}, families=(Family(("a", "gone"), 0.025, (5,)),))
    comparison = compare(runs)
    result, arm = arm_of(comparison, "a").difference, arm_of(comparison, "a")
    assert result is not None
    assert comparison.design == "fixed"
    half = t.isf(0.0125, 4) * np.std(BETTER, ddof=1) / math.sqrt(5)
    assert (result.low, result.high) == pytest.approx((0.011 - half, 0.011 + half))
    assert result.p is not None
    assert arm.p_adjusted == pytest.approx(2 * result.p)
    assert "p times 2 arms (Bonferroni)" in wording.method(comparison)
    chosen = compare(runs, baseline="a")  # the baseline's family would not be this one
    assert arm_of(chosen, "baseline").level == 0.05


def test_an_interval_that_includes_0_is_no_verdict() -> None:
    """t = 2 sqrt(3) with two degrees of freedom: p = 1 - sqrt(12 / 14) = 7.4%, twice that for two arms."""
    apart = (0.001, 0.002, 0.003)
    alone, two = (compare(frame(dict.fromkeys(names, apart), families=())) for names in ("a", "ab"))
    for comparison, times in ((alone, 1), (two, 2)):
        arm = arm_of(comparison, "a")
        assert arm.difference is not None
        assert arm.p_adjusted == pytest.approx(times * (1 - math.sqrt(12 / 14)))
        assert arm.verdict == "not distinguishable"
        assert arm.difference.low is not None
        assert arm.difference.low < 0


# the answer


def test_the_answer_says_what_would_decide() -> None:
    """Mean 0.003 and sd 0.005 at level 0.02: the half-width is 2.718 x 0.00144 = 0.0039 at 12 seeds, 0.0028 at 20.

    The baseline and the arm need 15 more seeds each, at 360 seconds: 3 hours.
    """
    apart = (0.003 + 0.005 * np.array([-1, 0, 0, 0, 1]) * math.sqrt(2)).tolist()  # variance 2 x 2 x 0.005^2 / 4
    comparison = compare(frame({"a": tuple(apart)}))
    assert np.std(apart, ddof=1) == pytest.approx(0.005)
    assert answer(comparison) == (
        "Keep the baseline: the arm is not shown to be better. a is not distinguishable: raise seeds.most to 20 "
        "(30 runs, about 3 hours of training), which decides if the difference stays as it is."
    )


def test_the_answer_names_the_arm_to_use_and_its_doubts() -> None:
    comparison = compare(frame({"a": BETTER, "b": OPEN}))
    first = answer(comparison).split(" b is ")[0]
    assert first == "Use a: it is better, test/auc_ctcvr +0.0110 (+0.0070 to +0.0150)."
    doubtful = replace_arm(comparison, "a", new_rows=NEW_ROWS, deciding_seeds=(1,))
    assert " But one seed decides: without seed 1 it would not be better. " in answer(doubtful)
    assert " On new test rows it may be nothing: 75 conversions decide, so test on more rows. " in answer(doubtful)
    several = compare(frame({"a": BETTER, "b": tuple(0.5 * d for d in BETTER)}))
    names = "Use one of these, each is better than the baseline: a (+0.0110), b (+0.0055)."
    assert answer(several) == names


def test_one_seed_that_decides_is_told() -> None:
    """At 3.747 sd / sqrt(5): without seed 0 the arm is decided; without another, 0.8 is less than its half-width."""
    apart = (0.0, 0.010, 0.010, 0.010, 0.012)
    comparison = compare(frame({"a": apart}, looks=(5,)))
    factor, deciding = t.isf(LEVEL / 2, 4) / math.sqrt(5), []
    assert np.mean(apart) > factor * np.std(apart, ddof=1)
    for seed in range(5):
        others = np.delete(apart, seed)
        deciding += [seed] if np.mean(others) < factor * np.std(others, ddof=1) else []
    assert deciding == [1, 2, 3, 4]
    arm = arm_of(comparison, "a")
    assert (arm.verdict, arm.deciding_seeds) == ("better", (1, 2, 3, 4))
    warning = "one seed decides: without seed 1, 2, 3 or another it would not be better"
    assert f"; {warning}; " in wording.sentence(arm, comparison)
    assert answer(comparison).endswith(f" But {warning}.")
    assert wording.one_seed_decides(replace(arm, deciding_seeds=(7,))) == (
        "one seed decides: without seed 7 it would not be better"
    )


def test_what_holds_on_new_rows_is_in_the_verdict() -> None:
    comparison = replace_arm(compare(frame({"a": BETTER})), "a", new_rows=NEW_ROWS)
    arm = arm_of(comparison, "a")
    doubt = "better on these rows; on new ones it may be nothing: 75 conversions decide"
    assert wording.sentence(arm, comparison).startswith(f"{doubt}; 3 seeds: +0.0110 (")
    sure = NewRows(0.0014, 0.0002, 0.0026, 0.02, 3, 1e-6, 1e-7, 1e-7, 9.0, 75, "conversions")
    comparison = replace_arm(comparison, "a", new_rows=sure)
    words = wording.in_full(arm_of(comparison, "a"), comparison)
    assert words == "better; on new rows like these +0.0014 (+0.0002 to +0.0026)"
    for text in (to_text(comparison), to_markdown(comparison), plain(Page(page_of(comparison, EMPTY)).find("body")[0])):
        assert "taken as independent" in " ".join(text.split())
    equal = replace_arm(comparison, "a", verdict="equal within the margin", new_rows=NEW_ROWS, margin=0.004)
    assert wording.in_full(arm_of(equal, "a"), equal) == (
        "equal within the margin on these rows; on new ones it may be more: 75 conversions decide"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "about 1 second"), (100, "about 100 seconds"), (150, "about 2 minutes"), (7300, "about 2 hours"),
     (10_800, "about 3 hours"), (200_000, "about 2 days")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def replace_arm(comparison: Comparison, name: str, margin: float | None = None, **fields: Any) -> Comparison:
    arms = tuple(replace(arm, **fields) if arm.name == name else arm for arm in comparison.arms)
    return replace(comparison, arms=arms, margin=margin or comparison.margin)


# the picture


def test_the_picture_has_a_chart_per_arm_and_a_bar_per_look() -> None:
    comparison = compare(frame({"b": OPEN, "a": BETTER, "same": (0.0,) * 3}, looks=(3, 5), margin=0.001))
    page = Page(page_of(comparison, EMPTY))
    charts = page.find("svg", "looks")
    assert [chart["attributes"]["aria-label"].split(".")[0] for chart in charts] == [
        "a: better", "b: not distinguishable", "same: identical",
    ]  # fmt: skip
    assert not page.broken
    assert len(page.find("g", "look")) == 1 + 2 + 1
    assert len(page.find("g", "last")) == 3
    assert len(page.find("rect", "margin")) == len(page.find("rect", "good")) == 3
    answered = page.find("p", "answer")[0]
    assert plain(answered) == answer(comparison)
    header = page.find("header")[0]["text"]
    assert header.index("Use a: it is better") < header.index("difference to the baseline against")


def test_positions_of_the_picture_by_hand() -> None:
    """Looks at 3 and 5 stand 14 pixels from the plot's sides at 58 and 234; values share an axis from 8 to 120."""
    comparison = compare(frame({"b": OPEN}))
    (chart,) = look_charts(comparison)
    low, high = value_range([arm_of(comparison, "b")], None)
    result = arm_of(comparison, "b").difference
    assert result is not None
    assert result.low is not None
    assert result.high is not None
    room = 0.08 * (result.high - result.low)
    assert (low, high) == pytest.approx((result.low - room, result.high + room))
    assert [mark.x for mark in chart.marks] == [72, 220]
    assert [tick.label for tick in chart.x] == ["3", "5"]
    first, last = chart.marks
    place = 120 - (result.mean - low) / (high - low) * 112
    assert last.mean == pytest.approx(place)
    assert last.ends == pytest.approx((120 - 112 * 0.08 / 1.16, 8 + 112 * 0.08 / 1.16))
    assert (first.ends, first.caps) == ((120.0, 8.0), [])  # far wider: it leaves the plot
    assert HEIGHT == 140


def test_a_far_worse_arm_does_not_flatten_the_others() -> None:
    near = [arm_of(compare(frame({"a": tuple(scale * d for d in BETTER)})), "a") for scale in (0.9, 1.0, -50.0)]
    low, high = value_range(near, None)
    reach = max(near[1].difference.high, 0.0)  # type: ignore[union-attr,type-var]
    assert low == pytest.approx(-2 * reach - 0.08 * (reach + 2 * reach))
    assert high == pytest.approx(reach + 0.08 * (reach + 2 * reach))
    worse = look_charts(compare(frame({"a": BETTER, "b": tuple(0.9 * d for d in BETTER),
                                       "far": tuple(-50 * d for d in BETTER)})))[-1]  # fmt: skip
    assert (worse.arm.name, worse.marks[-1].outside, worse.marks[-1].caps) == ("far", "▼", [])
    better = look_charts(compare(frame({"a": BETTER, "b": tuple(0.9 * d for d in BETTER),
                                        "far": tuple(50 * d for d in BETTER)})))  # fmt: skip
    assert [(chart.arm.name, chart.marks[-1].outside, len(chart.marks[-1].caps)) for chart in better] == [
        ("a", "", 2), ("b", "", 2), ("far", "", 2)
    ]  # fmt: skip
    assert value_range([], None) == (-1.0, 1.0)
    assert value_range([], 0.5) == pytest.approx((-0.58, 0.58))


def test_rows_of_charts_are_of_equal_length() -> None:
    assert [columns(charts) for charts in (1, 3, 4, 5, 6, 7, 8, 12, 13)] == [4, 4, 4, 5, 6, 4, 4, 6, 5]
