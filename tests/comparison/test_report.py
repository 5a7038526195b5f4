"""The comparison's page: positions derived by hand, hostile names, and no external resources."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.comparison.page.charts import Effect, forest_scale, line_path, log_ticks, tick_text, ticks, value_range
from pipeline.comparison.page.colors import DARK, LIGHT, contrast, readable
from pipeline.comparison.page.curves import (
    Curve,
    combine,
    combine_differences,
    curves,
    gates,
    left_out,
    points_by_run,
    smooth,
    thin,
    window,
)
from pipeline.comparison.page.view import page as page_of
from pipeline.comparison.page.view import panel_metrics, write_page
from pipeline.comparison.results import ArmResult, Comparison
from pipeline.config.run_config import RunConfig
from pipeline.maths.row_covariance import NewRows
from pipeline.maths.statistics import Paired, paired

HOSTILE = """<script>alert("1")</script> & 'l.1' </style>"""
METRIC = "test/auc_ctcvr"
VOID = {"meta", "br", "input", "wbr"}


class Page(HTMLParser):
    """A parsed page: its elements with attributes and text, and what is not well-formed."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.broken: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if len(dict(attrs)) != len(attrs):
            self.broken.append(f"an attribute twice in {tag}")
        element = {"tag": tag, "attributes": dict(attrs), "text": "", "path": [e["tag"] for e in self.open]}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop()["tag"] != tag:
            self.broken.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def find(self, tag: str, class_: str | None = None, **attributes: str) -> list[dict[str, Any]]:
        return [
            element
            for element in self.elements
            if element["tag"] == tag
            and (class_ is None or class_ in (element["attributes"].get("class") or "").split())
            and all(element["attributes"].get(name.replace("_", "-")) == value for name, value in attributes.items())
        ]


def plain(element: Mapping[str, Any]) -> str:
    """An element's text as a browser sets it."""
    return " ".join(element["text"].split())


def arm(
    name: str, values: Sequence[float], base: Sequence[float], role: str = "arm", **fields: Any
) -> ArmResult:  # base: of seeds 0, 1, ...
    result = paired([value - other for value, other in zip(values, base, strict=True)])
    plain = ArmResult(
        name=name, role=role, control_of=None, color="#d62728",
        runs={seed: f"{name}-{seed}" for seed in range(len(values))}, values=dict(enumerate(values)),
        mean=float(np.mean(values)), spread=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        best=None, best_spread=None, difference=None if role == "baseline" else result,
        level=None if role == "baseline" else 0.05, looks=(), deciding_seeds=(),
        p_adjusted=result.p if role == "arm" else None, minimum_detectable=None, new_rows=None,
        verdict={"baseline": "", "control": "control"}.get(role, "not distinguishable"), against_control=None,
        side={}, differing={"loss.aux_focal.lambda": "0.1" if role == "arm" else "0.0"},
    )  # fmt: skip
    return replace(plain, **fields)


BASE = (0.60, 0.61, 0.62)
# 4.303, the t quantile of two degrees, times 0.001: with three seeds, their own interval is the wider one. With five,
# V is 3.6e-6 with 61.2 degrees of freedom; twice the rows leave 0.75e-6 of the seeds' variance.
NEW_ROWS = NewRows(0.001, -0.0033, 0.0053, 0.05, 3, 1e-6, 0.5e-6, 3e-6, 25.7, 75, "conversions")


def comparison(*arms: ArmResult, **fields: Any) -> Comparison:
    everyone = (arm("baseline", BASE[: len(arms[0].values) if arms else 3], BASE[: len(arms[0].values) if arms else 3],
                    "baseline", color="#1f77b4"), *arms)  # fmt: skip
    rows = [
        {"run_id": run, "name": f"{one.name} s{seed}", "status": "FINISHED", "arm": one.name, "seed": seed,
         "sweep_id": "0123456789abcdef", f"metrics.{METRIC}": one.values[seed]}
        for one in everyone for seed, run in one.runs.items()
    ]  # fmt: skip
    plain = Comparison(
        title="Focal or not", task="mmoe", metric=METRIC, mode="max", data_digest="ab" * 32,
        tracking_uri="http://127.0.0.1:5000", baseline="baseline", seeds=(0, 1, 2), arms=everyone, side_metrics=(),
        design="fixed", families=(), other_families=0, margin=None,
        runs=pd.DataFrame(rows), notes=(),
    )  # fmt: skip
    return replace(plain, **fields)


def history_of(compared: Comparison, values: Mapping[str, Mapping[int, float]]) -> pd.DataFrame:
    """A history with the same points for every run. values: metric -> step -> value."""
    rows = [
        (run, metric, step, value)
        for one in compared.arms
        for run in one.runs.values()
        for metric, points in values.items()
        for step, value in points.items()
    ]
    return pd.DataFrame(rows, columns=["run", "metric", "step", "value"]).astype(
        {"run": "category", "metric": "category"}
    )


EMPTY = pd.DataFrame({"run": [], "metric": [], "step": np.array([], np.int64), "value": np.array([], np.float64)})


def written(compared: Comparison, history: pd.DataFrame, folder: Path) -> tuple[Page, str]:
    file = folder / "comparison.html"
    write_page(compared, history, file)
    source = file.read_text(encoding="utf-8")
    return Page(source), source


def focal_and_control() -> Comparison:
    focal = arm("l.1 g1", (0.603, 0.612, 0.621), BASE, against_control=paired((0.002, 0.001, 0.0)))
    control = arm("w+.1", (0.601, 0.611, 0.621), BASE, "control", control_of="l.1 g1")
    return comparison(arm("l.2 g1", (0.59, 0.60, 0.61), BASE), focal, control)


def test_the_page_is_well_formed_and_has_every_arm_and_panel(tmp_path: Path) -> None:
    compared = focal_and_control()
    metrics = ["loss_total", "loss_ctcvr_bce", "valid/auc_ctcvr", "valid/loss_ctr", "influence/cosine_bce_focal"]
    history = history_of(compared, {name: {0: 1.0, 5: 0.5, 10: 0.25} for name in metrics})
    page, _ = written(compared, history, tmp_path)
    assert not page.broken
    assert not page.open
    beside = ["valid/auc_ctcvr", "valid/loss_ctr", "loss_total", "loss_ctcvr_bce"]  # the difference to the baseline
    panels = [panel["attributes"]["data-metric"] for panel in page.find("figure", "panel")]
    assert panels == [*(name for name in beside for _ in range(2)), "influence/cosine_bce_focal"]
    ordered = ["baseline", "l.2 g1", "l.1 g1", "w+.1"]  # the control behind its arm
    assert [label["attributes"]["data-name"] for label in page.find("label")] == ordered
    assert [item["text"].split(":")[0] for item in page.find("li")] == ordered
    assert "2 arms: 2 not distinguishable." in page.find("header")[0]["text"]
    for panel in page.find("g", data_arm="3"):
        assert panel["attributes"]["class"] == "a3"
    assert len(page.find("g", data_arm="3")) == len(metrics) + len(beside)
    assert len(page.find("g", data_arm="0")) == len(metrics)  # the baseline differs from itself nowhere
    titles = ["Results", "Configuration", "Curves", "Runs"]
    assert [heading["text"] for heading in page.find("h2")] == titles
    assert (
        len([cell for cell in page.find("code") if cell["text"] in {f"{n}-{s}" for n in ordered for s in range(3)}])
        == 12
    )


def test_nothing_is_asked_from_outside(tmp_path: Path) -> None:
    compared = focal_and_control()
    page, source = written(compared, history_of(compared, {"loss_total": {0: 1.0, 9: 2.0}}), tmp_path)
    assert not {"link", "img", "iframe", "object", "base", "image", "use"} & {e["tag"] for e in page.elements}
    for element in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (element["attributes"].get(name) or "#").startswith("#"), element
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|import\(", source)
    policy = page.find("meta", http_equiv="Content-Security-Policy")[0]["attributes"]["content"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "http://127.0.0.1:5000" in page.find("section")[-1]["text"]  # said, not linked


def test_names_cannot_break_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunConfig, "gates", ("aux_focal_on",))  # of a task of this name, too
    bad = arm(HOSTILE, (0.61, 0.62, 0.63), BASE,
              differing={HOSTILE: HOSTILE}, side={HOSTILE: paired((1.0, 2.0, 3.0))},
              minimum_detectable=0.01)  # fmt: skip
    compared = comparison(
        bad, title=HOSTILE, notes=(HOSTILE,), side_metrics=(HOSTILE,), tracking_uri=HOSTILE, task=HOSTILE
    )
    compared.runs[f"metrics.alpha/{HOSTILE}"] = 1.0
    logged = {f"loss_{HOSTILE}": {0: 1.0, 1: 2.0}, "aux_focal_on": {0: 1.0}}
    history = history_of(compared, logged)
    page, source = written(compared, history, tmp_path)
    assert not page.broken
    assert len(page.find("script")) == len(page.find("style")) == 1
    assert "alert(" not in page.find("script")[0]["text"] + page.find("style")[0]["text"]
    assert source.count("<script") == 1
    assert page.find("h1")[0]["text"] == page.find("title")[0]["text"] == HOSTILE
    assert page.find("label")[1]["attributes"]["data-name"] == HOSTILE
    assert page.find("figure")[0]["attributes"]["data-metric"] == f"loss_{HOSTILE}"
    assert plain(page.find("section", id="notes")[0]) == f"Notes {HOSTILE}"
    assert page.find("code")[1]["text"] == HOSTILE
    drawn = [element["text"] for element in page.find("title")[1:]]
    assert f"{HOSTILE}: minimum detectable difference 0.010" in drawn
    assert f"{HOSTILE}: gate opens at step 0" in drawn


@given(st.text(min_size=1))
@settings(max_examples=30, deadline=None)
def test_text_comes_back_as_it_was(content: str) -> None:
    page = Page(page_of(comparison(arm(content, BASE, BASE)), EMPTY))
    assert not page.broken
    assert not page.open
    lost = re.compile("[\x00\r\ufffd]")  # HTML has no place for the first two
    kept, label = lost.sub("", content), page.find("svg", "strip")[0]["attributes"]["aria-label"]
    assert lost.sub("", page.find("b")[2]["text"]) == kept
    assert lost.sub("", label).startswith(f"{kept}: 0 (0 to 0); seeds 0 0,")


def test_forest_positions_by_hand(tmp_path: Path) -> None:
    """-0.003 (minimum detectable difference) to 0.006 (the interval's end) on 9% to 91%: 82 / 0.009 per cent."""
    result = Paired(3, 0.002, 0.0016, -0.002, 0.006, 0.2)
    one = arm("l.1", (0.601, 0.612, 0.623), BASE, difference=result, minimum_detectable=0.003)
    page, _ = written(comparison(one), EMPTY, tmp_path)
    strip = page.find("svg", "strip")[0]
    assert strip["attributes"]["aria-label"] == (
        "l.1: +0.0020 (−0.0020 to +0.0060); seeds 0 +0.0010, 1 +0.0020, 2 +0.0030"
    )
    assert page.find("line", "zero")[0]["attributes"]["x1"] == "36.33%"  # 9 + 82 * 3 / 9
    assert page.find("circle", "mean")[0]["attributes"]["cx"] == "54.56%"  # 9 + 82 * 5 / 9
    line = page.find("line", "interval")[0]["attributes"]
    assert (line["x1"], line["x2"]) == ("18.11%", "91.00%")  # 9 + 82 / 9
    assert [dot["attributes"]["cx"] for dot in page.find("circle", "seed")] == ["45.44%", "54.56%", "63.67%"]
    band = page.find("rect", "reach")[0]["attributes"]
    assert (band["x"], band["width"]) == ("9.00%", "54.67%")  # 82 * 6 / 9
    assert page.find("div", "directions")[0]["text"] == "← worsebetter →"


def test_where_less_is_better_the_left_is_better(tmp_path: Path) -> None:
    page, _ = written(comparison(arm("l.1", BASE, BASE), mode="min"), EMPTY, tmp_path)
    assert page.find("div", "directions")[0]["text"] == "← betterworse →"
    assert re.search(r"\b(less|lower) is better", page.find("body")[0]["text"])
    assert not re.search(r"\b(more|higher) is better", page.find("body")[0]["text"])


def effect(mean: float, half: float, reach: float | None) -> Effect:
    difference = Paired(3, mean, None, mean - half, mean + half, None)
    return Effect(1, arm("a", BASE, BASE, minimum_detectable=reach), difference, {0: mean})


def test_a_far_wider_minimum_detectable_difference_does_not_squeeze_the_forest() -> None:
    near, far = effect(1.0, 1.0, 5.9), effect(1.0, 1.0, 6.1)
    assert (forest_scale([near]).low, forest_scale([near]).high) == (-5.9, 5.9)
    assert (forest_scale([far]).low, forest_scale([far]).high) == (0.0, 2.0)


def test_all_differences_zero_still_have_an_axis(tmp_path: Path) -> None:
    page, _ = written(comparison(arm("lambda 0", BASE, BASE)), EMPTY, tmp_path)
    assert {page.find("circle", "mean")[0]["attributes"]["cx"], page.find("line", "zero")[0]["attributes"]["x1"]} == {
        "50.00%"
    }
    sentence = "lambda 0: not distinguishable: all differences are 0 so far, which decides nothing; 3 seeds: 0 (0 to 0)"
    assert page.find("li")[1]["text"].startswith(sentence)


def test_the_gate_is_where_it_opened(tmp_path: Path) -> None:
    """Steps 0 to 1000 lie on 58 to 350: step 250 on 58 + 292 / 4 = 131."""
    compared = focal_and_control()
    opened = {"aux_focal_on": {0: 0.0, 249: 0.0, 250: 1.0, 1000: 1.0}, "loss_total": {0: 1.0, 250: 1.0, 1000: 1.0}}
    history = history_of(compared, opened)
    shut = (history["metric"] == "aux_focal_on") & history["run"].str.startswith(("baseline", "w+.1"))
    history.loc[shut, "value"] = 0.0
    page, _ = written(compared, history, tmp_path)
    own, apart = page.find("line", "gate")[:2], page.find("line", "gate")[2:]
    assert own == [line | {"path": own[0]["path"]} for line in apart]  # in the panel of the differences, too
    lines = own
    assert [line["attributes"]["class"] for line in lines] == ["gate a1", "gate a2"]
    assert {line["attributes"]["x1"] for line in lines} == {line["attributes"]["x2"] for line in lines} == {"131"}
    # two arms at one step take turns of 5 px: 5 drawn, 5 and 3 left to the other
    assert [line["attributes"]["stroke-dasharray"] for line in lines] == ["5 8", "5 8"]
    assert len({line["attributes"]["stroke-dashoffset"] for line in lines}) == 2
    assert [label["text"] for label in page.find("label")] == ["baseline", "l.2 g1gate 250", "l.1 g1gate 250", "w+.1"]


def test_gates_are_the_first_open_step_of_any_seed() -> None:
    rows = [("a0", 0, 0.0), ("a0", 7, 1.0), ("a0", 8, 1.0), ("a1", 6, 1.0), ("b0", 3, 0.0)]
    history = pd.DataFrame([(r, "aux_focal_on", s, v) for r, s, v in rows], columns=["run", "metric", "step", "value"])
    arms = {"a": {0: "a0", 1: "a1"}, "b": {0: "b0"}}
    assert gates(history, arms, ["aux_focal_on"]) == {"a": 6}
    assert gates(history, arms, ["other_on", "aux_focal_on"]) == {"a": 6}
    assert gates(history, arms, ["other_on"]) == gates(history, arms, []) == {}


def test_curve_positions_by_hand(tmp_path: Path) -> None:
    """0 and 10 with 5% room are -0.5 and 10.5 on a plot of 292 x 184 pixels, in tenths."""
    compared = comparison(arm("l.1", BASE, BASE))
    page, _ = written(compared, history_of(compared, {"loss_x": {0: 0.0, 50: 5.0, 100: 10.0}}), tmp_path)
    expected = [(0, 1840 * 10.5 / 11), (1460, 920), (2920, 1840 * 0.5 / 11)]
    numbers = [int(n) for n in re.findall(r"-?\d+", page.find("path", "line")[0]["attributes"]["d"])]
    points = np.cumsum(np.array(numbers).reshape(-1, 2), 0)
    assert points.tolist() == [[x, round(height)] for x, height in expected]
    chart = page.find("svg", "chart")[0]["attributes"]
    assert chart["data-steps"] == "0 100"
    assert [float(v) for v in chart["data-values"].split()] == pytest.approx([-0.5, 10.5])
    assert chart["aria-label"].endswith("Last values: baseline 10.0000, l.1 10.0000.")


def test_a_panel_by_logarithm_by_hand(tmp_path: Path) -> None:
    """1, 10 and 100 by logarithm: 10 lies in the middle of curve and axis; the axis names powers of ten."""
    compared = comparison(arm("l.1", BASE, BASE))
    page, _ = written(compared, history_of(compared, {"loss_x": {0: 1.0, 50: 10.0, 100: 100.0}}), tmp_path)
    room = 4 * 1840 / 108  # 4% of the range on either side, of its logarithm
    numbers = [int(n) for n in re.findall(r"-?\d+", page.find("path", "line")[0]["attributes"]["d"])]
    assert np.cumsum(np.array(numbers).reshape(-1, 2), 0)[:, 1].tolist() == [round(1840 - room), 920, round(room)]
    heights = [float(line["attributes"]["y1"]) for line in page.find("line", "grid")[:3]]
    assert heights == pytest.approx([192 - room / 10, 100, 8 + room / 10], abs=0.01)
    assert "data-log" in page.find("svg", "chart")[0]["attributes"]
    assert page.find("figcaption")[0]["text"] == "loss_x log scale"


def test_a_few_far_points_of_many_do_not_set_the_axis() -> None:
    values = np.linspace(1, 2, 1000)
    values[[200, 300, 400]], values[500] = 1000.0, -1000.0
    low, high, _ = value_range([Curve(np.arange(1000), values, values, values, 1)], 0)
    assert 0.9 < low < 1
    assert 2 <= high < 2.1  # where the curve ends
    values[-1] = 40.0
    assert 40 <= value_range([Curve(np.arange(1000), values, values, values, 1)], 0)[1] < 42


def test_the_first_tenth_may_lie_outside() -> None:
    steps = np.arange(0, 101, 5)
    values = np.where(steps < 10, 1000.0, 5.0 + steps / 100)
    curve = Curve(steps, values, values, values, 1)
    assert value_range([curve], 10) == (pytest.approx(5.1 - 0.045), pytest.approx(6 + 0.045), False)
    few = Curve(steps[:9], values[:9], values[:9], values[:9], 1)
    assert value_range([few], 10)[1] > 1000


@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), min_size=1, max_size=50))
def test_a_path_leads_through_its_points(points: list[tuple[float, float]]) -> None:
    x, y = np.array(points).T
    path = line_path(x, y)
    assert re.fullmatch(r"M-?\d+ -?\d+(h0|l-?\d+( |-)\d+(( |-)\d+( |-)\d+)*)", path)
    numbers = [int(n) for n in re.findall(r"-?\d+", path.removesuffix("h0"))]
    result = np.cumsum(np.array(numbers).reshape(-1, 2), 0)  # the first is where it starts, the others are moves
    assert np.abs(result - 10 * np.stack([x, y], 1)).max() <= 0.5 + 1e-6


@given(st.integers(1, 5000))
def test_thinning_keeps_the_first_and_the_last(count: int) -> None:
    kept = thin(count)
    assert kept[0] == 0
    assert kept[-1] == count - 1
    assert len(kept) == min(count, 300)
    assert (np.diff(kept) > 0).all()
    assert np.abs(kept - np.linspace(0, count - 1, len(kept))).max() <= 0.5 + 1e-9


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60), st.integers(1, 20))
def test_smoothing_is_the_mean_of_what_came_before(values: list[float], width: int) -> None:
    expected = [np.mean(values[max(0, index + 1 - width) : index + 1]) for index in range(len(values))]
    assert smooth(np.array(values), width) == pytest.approx(expected, abs=1e-9)


def test_a_curve_is_the_mean_over_seeds_with_their_range() -> None:
    steps = np.array([0, 10, 20])
    curve = combine([(steps, np.array([1.0, 2.0, 3.0])), (steps[:2], np.array([3.0, 6.0]))])
    assert curve.steps.tolist() == [0, 10, 20]
    assert curve.mean.tolist() == [2.0, 4.0, 3.0]  # the second run ended before step 20
    assert curve.low.tolist() == [1.0, 2.0, 3.0]
    assert curve.high.tolist() == [3.0, 6.0, 3.0]
    assert curve.seeds == 2


def test_a_difference_is_paired_by_seed_and_step() -> None:
    """Two seeds differ by 1 and 3 at step 10: mean 2, half-width 12.706 (t with one degree) x sd / sqrt(2), which is 1.

    Step 0 is missing in one run, and 20 in another.
    """
    steps = np.array([0, 10, 20])
    one = (steps, np.array([5.0, 6.0, 7.0])), (steps[1:], np.array([5.0, 9.0]))
    other = (steps[:2], np.array([0.0, 8.0])), (steps, np.array([4.0, 5.0, 6.0]))
    curve = combine_differences([one, other])
    assert curve is not None
    assert (curve.steps.tolist(), curve.mean.tolist(), curve.seeds) == ([10], [2.0], 2)
    assert curve.low.tolist() == pytest.approx([2 - 12.706204736432095])
    assert curve.high.tolist() == pytest.approx([2 + 12.706204736432095])
    alone = combine_differences([one])
    assert alone is not None
    assert (alone.mean.tolist(), alone.low.tolist(), alone.high.tolist()) == ([1.0, -2.0], [1.0, -2.0], [1.0, -2.0])
    assert combine_differences([]) is None
    assert combine_differences([((steps[:1], np.zeros(1)), (steps[1:], np.zeros(2)))]) is None


def test_a_difference_is_that_of_the_smoothed_curves() -> None:
    steps, random = np.arange(1000), np.random.default_rng(0)
    arm_values, base_values = random.normal(size=(2, 1000))
    curve = combine_differences([((steps, arm_values), (steps, base_values))])
    assert curve is not None
    own, base = combine([(steps, arm_values)]), combine([(steps, base_values)])
    assert curve.steps.tolist() == own.steps.tolist()
    assert curve.mean == pytest.approx(own.mean - base.mean, abs=1e-12)


def test_the_panel_of_differences_by_hand(tmp_path: Path) -> None:
    """0, 2 and 4 above the baseline at every seed: 5% room on either side of 4 on a plot from 8 to 192 pixels."""
    compared = comparison(arm("l.1", BASE, BASE))
    history = history_of(compared, {"loss_x": {0: 0.0, 50: 1.0, 100: 2.0}})
    own = history["run"].str.startswith("l.1")
    history.loc[own, "value"] *= 3
    page, _ = written(compared, history, tmp_path)
    chart = page.find("svg", "difference")[0]["attributes"]
    assert [float(value) for value in chart["data-values"].split()] == pytest.approx([-0.2, 4.2])
    assert chart["aria-label"].startswith("loss_x minus baseline over global steps 0 to 100.")
    assert chart["aria-label"].endswith("Last values: l.1 +4.0000 (+4.0000 to +4.0000).")
    (zero,) = (line for line in page.find("line", "zero") if "figure" in line["path"])
    assert float(zero["attributes"]["y1"]) == pytest.approx(192 - 184 * 0.2 / 4.4, abs=0.01)


def test_a_loss_that_the_baseline_lacks_has_no_panel_of_differences(tmp_path: Path) -> None:
    compared = comparison(arm("l.1", BASE, BASE))
    history = history_of(compared, {"loss_ctcvr_focal": {0: 0.5, 9: 0.25}})
    page, _ = written(compared, history[history["run"].str.startswith("l.1")], tmp_path)
    assert len(page.find("figure", "panel")) == 1
    assert not page.find("svg", "difference")


def test_long_curves_are_thinned_and_smoothed() -> None:
    values = np.arange(10_000, dtype=np.float64)
    curve = combine([(np.arange(10_000), values)])
    assert window(10_000) == 400
    assert window(100) == 1
    assert len(curve.steps) == 300
    assert (curve.steps[0], curve.steps[-1]) == (0, 9999)
    assert curve.mean[0] == 0.0
    assert curve.mean[-1] == pytest.approx((9600 + 9999) / 2)  # of the last 400


def test_points_out_of_order_twice_or_not_finite() -> None:
    rows = [(2, 5.0), (0, 1.0), (2, 7.0), (1, math.nan), (3, math.inf), (4, -math.inf)]
    history = pd.DataFrame([("r", "loss_x", s, v) for s, v in rows], columns=["run", "metric", "step", "value"])
    points = points_by_run(history, ["loss_x", "loss_y"])
    curve = curves(points, ["loss_x", "loss_y"], {"a": {0: "r"}, "b": {0: "none"}})
    assert list(curve) == ["loss_x"]
    assert list(curve["loss_x"]) == ["a"]
    assert curve["loss_x"]["a"].steps.tolist() == [0, 2]
    assert curve["loss_x"]["a"].mean.tolist() == [1.0, 7.0]  # of two at one step the last
    assert left_out(history, ["loss_x"]) == 3
    assert left_out(history, ["loss_y"]) == 0


def test_values_that_are_not_drawn_are_told(tmp_path: Path) -> None:
    compared = comparison(arm("l.1", BASE, BASE))
    page, _ = written(compared, history_of(compared, {"loss_x": {0: 1.0, 1: math.nan}}), tmp_path)
    assert "gate opens. 6 values were NaN or infinite and are not drawn." in plain(page.find("body")[0])


def test_only_what_changes_by_orders_of_magnitude_is_drawn_by_logarithm() -> None:
    steps = np.arange(3)
    wide, narrow = np.array([1.0, 10.0, 100.0]), np.array([1.0, 10.0, 49.0])
    low, high, log = value_range([Curve(steps, wide, wide, wide, 1)], 0)
    assert log
    assert low * high == pytest.approx(100)  # the same room on both sides
    assert value_range([Curve(steps, narrow, narrow, narrow, 1)], 0) == (
        pytest.approx(-1.4),
        pytest.approx(51.4),
        False,
    )
    assert not value_range([Curve(steps, wide - 1, wide - 1, wide - 1, 1)], 0)[2]  # zero has no logarithm
    flat = np.zeros(3)
    assert value_range([Curve(steps, flat, flat, flat, 1)], 0) == (-1.0, 1.0, False)


def test_page_without_history(tmp_path: Path) -> None:
    page, _ = written(focal_and_control(), EMPTY, tmp_path)
    assert not page.broken
    assert not page.find("figure")
    assert "No history was read: there are no curves." in page.find("body")[0]["text"]
    assert len(page.find("circle", "mean")) == 3


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    one = arm("l.1", (0.61,), BASE[:1], verdict="one seed: no verdict")
    compared = comparison(one, seeds=(0,), notes=("one seed only",))
    page, _ = written(compared, history_of(compared, {"loss_x": {0: 1.0}, "loss_y": {0: 1.0, 9: 2.0}}), tmp_path)
    assert page.find("li")[1]["text"] == "l.1: one seed: no verdict; 1 seed: +0.0100; mean 0.6100"
    assert "One seed cannot tell a better setting from luck." in page.find("section")[0]["text"]
    assert not page.find("line", "interval")
    assert not page.find("path", "band")  # of the one with two points as well
    assert len(page.find("circle", "mean")) == 1
    assert page.find("path", "line")[0]["attributes"]["d"].endswith("h0")  # a single point is a dot
    assert page.find("a", href="#notes")
    assert plain(page.find("section", id="notes")[0]) == "Notes one seed only"
    assert "1 arm: 1 without a verdict." in page.find("header")[0]["text"]


def test_no_seed_in_common(tmp_path: Path) -> None:
    apart = arm("l.1", BASE, BASE, difference=paired([]), p_adjusted=None, verdict="no shared seed: no verdict")
    page, _ = written(comparison(apart), EMPTY, tmp_path)
    assert page.find("li")[1]["text"] == "l.1: no shared seed: no verdict; 3 seeds; mean 0.610 ± 0.010"
    assert "No arm shares a seed with the baseline." in page.find("body")[0]["text"]


def test_table_shows_all_that_is_known_of_an_arm(tmp_path: Path) -> None:
    one = arm(
        "l.1", BASE, BASE, difference=Paired(3, 0.001, 0.002, -0.004, 0.006, 0.03), p_adjusted=0.06, best=0.7,
        best_spread=0.01, minimum_detectable=0.0123, new_rows=NEW_ROWS,
        against_control=Paired(3, 0.0005, 0.001, -0.002, 0.003, 0.5),
        side={"test/auc_ctr": Paired(3, -0.002, 0.001, -0.0045, 0.0005, 0.07)},
    )  # fmt: skip
    compared = comparison(one, side_metrics=("test/auc_ctr",))
    compared = replace(
        compared, runs=compared.runs.assign(**{"metrics.test/auc_ctr": [0.70, 0.71, 0.72, 1.0, 1.0, 1.0]})
    )
    page, _ = written(compared, EMPTY, tmp_path)
    cells = [cell["text"] for cell in page.find("td")]
    width = 10
    assert cells[:width] == [
        "0.610 ± 0.0103 seeds", "–", "–", "–", "–", "–", "baseline", "–", "–", "0.710 ± 0.010own value",
    ]  # fmt: skip
    assert cells[width : 2 * width] == [
        "0.610 ± 0.0103 seeds", "0.700 ± 0.010", "+0.0010", "−0.0040 to +0.0060", "0.0600", "0.012",
        "not distinguishable",
        "+0.0010 (−0.0033 to +0.0053)75 conversions decideuncertainty: 25% seeds, 75% rows"
        "±0.0043; ±0.0038 with 5 seeds; ±0.0037 with twice the rows",
        "+0.0005−0.0020 to +0.0030",
        "−0.0020−0.0045 to +0.0005",
    ]  # fmt: skip


def test_settings_that_differ(tmp_path: Path) -> None:
    same = arm("same", BASE, BASE, differing={"loss.aux_focal.lambda": "0.0"})
    page, _ = written(comparison(arm("l.1", BASE, BASE), same), EMPTY, tmp_path)
    assert page.find("code")[0]["text"] == "loss.aux_focal.lambda"
    assert [cell["text"] for cell in page.find("td", "same")] == ["0.0", "0.0"]
    assert [cell["text"] for cell in page.find("td", "differs")] == ["0.1"]


def test_alpha_bars_share_a_scale(tmp_path: Path) -> None:
    compared = comparison(arm("auto", BASE, BASE))
    compared.runs["metrics.alpha/neutral"], compared.runs["metrics.alpha/positive"] = 2.0, 0.5
    page, _ = written(compared, EMPTY, tmp_path)
    bars = page.find("div", "bar")
    assert [bar["text"] for bar in bars] == ["2", "0.5"] * 2  # neutral, then positive
    assert [bar["attributes"]["style"] for bar in page.find("i")] == ["width:110.0px", "width:27.5px"] * 2


def test_which_metrics_have_a_panel() -> None:
    compared = comparison(metric="test/pair_f1_micro", side_metrics=("test/aspect_f1_macro",))
    names = ["loss_b", "loss_total", "lr/dense", "valid/f1/price", "valid/aspect_f1_macro", "valid/pair_f1_micro",
             "valid/loss_a", "valid/auc_b", "valid/auc_b_bayes", "influence/x", "global_step"]  # fmt: skip
    assert panel_metrics(compared, names) == {
        "Validation": ["valid/pair_f1_micro", "valid/aspect_f1_macro", "valid/auc_b", "valid/loss_a"],
        "Training losses": ["loss_total", "loss_b"],
        "Influence": ["influence/x"],
    }


def test_the_page_stays_small(tmp_path: Path) -> None:
    """Five arms, three seeds, 25 panels of noise, which compresses worst."""
    random = np.random.Generator(np.random.PCG64(0))
    arms = [arm(f"l.{index}", BASE, BASE) for index in range(4)]
    compared = comparison(*arms)
    steps = np.arange(2000)
    parts = [
        pd.DataFrame({"run": run, "metric": f"loss_{metric}", "step": steps, "value": random.normal(size=len(steps))})
        for one in compared.arms for run in one.runs.values() for metric in range(25)
    ]  # fmt: skip
    page, source = written(compared, pd.concat(parts), tmp_path)
    assert len(page.find("figure", "panel")) == 2 * 25
    assert len(page.find("path", "line")) == len(page.find("path", "band")) == 25 * (5 + 4)
    assert len(source.encode()) < 2_500_000


def test_every_arm_has_its_own_dashes_and_a_switch(tmp_path: Path) -> None:
    page, _ = written(focal_and_control(), history_of(focal_and_control(), {"loss_x": {0: 1.0, 1: 2.0}}), tmp_path)
    sheet = page.find("style")[0]["text"]
    assert len(set(re.findall(r"--dash: ([^;]+);", sheet))) == 4
    for box in page.find("input"):
        name = box["attributes"]["id"]
        assert f"body:has(#{name}:not(:checked)) .panels .a{name.removeprefix('show-')} {{ display: none; }}" in sheet
        assert "checked" in box["attributes"]
    assert len(page.find("input")) == 4
    assert "@media (prefers-color-scheme: dark)" in sheet


@given(st.from_regex(r"\A#[0-9a-f]{6}\Z"))
def test_colours_can_be_told_from_the_paper(color: str) -> None:
    for paper in (LIGHT, DARK):
        result = readable(color, paper)
        assert contrast(result, paper) >= 3
        assert result == color or contrast(color, paper) < 3


def test_contrast_by_known_values() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # a textbook near miss of 4.5


def test_round_ticks() -> None:
    assert ticks(0, 10_000) == [0, 2000, 4000, 6000, 8000, 10_000]
    assert ticks(-0.0031, 0.0062, 6) == pytest.approx([-0.002, 0, 0.002, 0.004, 0.006])
    assert log_ticks(0.02, 300) == pytest.approx([0.1, 1, 10, 100])
    assert [tick_text(value, 2000) for value in (0, 2000, 10_000)] == ["0", "2k", "10k"]
    assert [tick_text(value, 0.002, sign=True) for value in (-0.002, 0.0, 0.004)] == ["−0.002", "0", "+0.004"]
    assert tick_text(0.25, 0.05) == "0.25"
    assert tick_text(3e-6, 1e-6) == "3e−6"


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(3, 8))
def test_ticks_are_few_and_within(low: float, span: float, most: int) -> None:
    result = ticks(low, low + span, most)
    assert 1 <= len(result) <= most + 1
    assert min(result) >= low - 1e-6 * span - 1e-9 * abs(low)
    assert max(result) <= low + span * (1 + 1e-6) + 1e-9 * abs(low)
