"""The same words and numbers in a terminal, in Markdown, on the page and in MLflow's note."""

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import ttest_rel
from test_compare import Store, new_store, run_entry
from test_report import EMPTY, Page

from pipeline.comparison import wording
from pipeline.comparison.answer import answer
from pipeline.comparison.families import Family
from pipeline.comparison.page.view import page as page_of
from pipeline.comparison.verdicts import Comparison, compare, load_runs, to_markdown, to_text
from pipeline.maths.sequential import minimum_detectable_difference
from pipeline.names import NOTE_LENGTH

pytestmark = pytest.mark.xdist_group("compare")

SWEEP = "5eed0000000000aa"
VALUES = {
    "baseline": (0.60, 0.62, 0.61, 0.64, 0.63),
    "higher": (0.61, 0.632, 0.616, 0.651, 0.639),
    "reweighted": (0.604, 0.622, 0.613, 0.645, 0.631),  # the control of `higher`
    "lower": (0.58, 0.6002, 0.5901, 0.6199, 0.6102),
    "level": (0.603, 0.618, 0.612, 0.637, 0.631),
    "lonely": (0.61,),
}
TESTED = ("higher", "lower", "level")
VERDICTS = {"baseline": "baseline", "higher": "better", "reweighted": "control", "lower": "worse",
            "level": "not distinguishable", "lonely": "one seed: no verdict"}  # fmt: skip
ARMS = 4  # that are not controls
HEADINGS = ("mean ± sd", "difference", "interval", "p (Bonferroni)", "minimum detectable difference", "verdict")
Reading = dict[str, tuple[str, ...]]  # arm -> a text for each heading


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Store]:
    with new_store(tmp_path_factory.mktemp("wording"), empty_store) as store:
        for arm, values in VALUES.items():
            control = {"role": "control", "control_of": "higher"} if arm == "reweighted" else {}
            for seed, value in enumerate(values):
                store.run(arm, seed, {"test/auc_ctcvr": value}, sweep_id=SWEEP, **control)
        yield store


def places(uncertainty: float) -> int:
    """Decimals of the second significant digit."""
    return 1 - Decimal(f"{uncertainty:.1e}").adjusted()


def expected(level: float = 0.05 / ARMS, seeds: dict[str, int] | None = None) -> Reading:
    """Computed with scipy; numbers end at the second digit of their uncertainty.

    level: of the intervals. seeds: how many of an arm's count.
    """
    base = np.array(VALUES["baseline"])
    shown: dict[str, list[str]] = {}
    for arm, every in VALUES.items():
        values = every[: (seeds or {}).get(arm)]
        if len(values) == 1:
            shown[arm] = ["0.6100", "+0.0100", "–", "–", "–"]  # of unknown uncertainty
            continue
        sd = float(np.std(values, ddof=1))
        texts = [f"{np.mean(values):.{places(sd)}f} ± {sd:.{places(sd)}f}"]
        if arm == "baseline":
            shown[arm] = [*texts, "–", "–", "–", "–"]
            continue
        test, apart = ttest_rel(values, base[: len(values)]), np.array(values) - base[: len(values)]
        low, high = test.confidence_interval(1 - level)
        digits = places((high - low) / 2)
        texts += [f"{np.mean(apart):+.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}"]
        if arm in TESTED:
            adjusted = min(1.0, ARMS * float(test.pvalue))
            least = minimum_detectable_difference(float(np.std(apart, ddof=1)), (len(values),), 0.05 / ARMS)
            texts += ["< 0.0001" if adjusted < 0.0001 else f"{adjusted:.4f}", f"{least:.{places(least)}f}"]
        else:
            texts += ["–", "–"]
        shown[arm] = texts
    return {arm: (*(text.replace("-", "−") for text in texts), VERDICTS[arm]) for arm, texts in shown.items()}


def headings_of(comparison: Comparison) -> tuple[str, ...]:
    """A sequential design has neither p values nor a minimum detectable difference."""
    sequential = comparison.design == "sequential"
    return tuple(name for name in HEADINGS if not sequential or name not in HEADINGS[3:5])


def of_text(text: str) -> Reading:
    """Cells are two spaces apart at least; a heading's lines stand over each other."""
    lines = next(part for part in text.split("\n\n") if "mean ± sd" in part).splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("arm"))
    assert re.split("  +", lines[first])[:4] == ["arm", "mean ± sd", "difference", "interval"]
    assert lines[first].endswith("  verdict")
    cells = [re.split("  +", line.strip()) for line in lines[first + 1 :]]
    return {arm: tuple(texts) for arm, *texts in cells if arm != "against its control"}


def of_markdown(text: str, headings: Sequence[str]) -> Reading:
    block = next(part for part in text.split("\n\n") if part.startswith("| arm | mean"))
    (_, *head), _, *rows = ([cell.split("; ")[0] for cell in line[2:-2].split(" | ")] for line in block.splitlines())
    return {arm: tuple(dict(zip(head, texts, strict=True))[name] for name in headings) for arm, *texts in rows}


def of_page(page: Page, headings: Sequence[str]) -> Reading:
    """The cells of the results, without details in small print."""
    head = [" ".join(cell["text"].split()) for cell in page.find("th", scope="col")]
    head = head[1 : head.index("arm", 1)]
    small = "|".join(re.escape(element["text"]) for element in page.find("small"))
    cells = [re.sub(f"({small})+$", "", cell["text"]) for cell in page.find("td")]
    rows = (cells[at * len(head) : (at + 1) * len(head)] for at in range(len(VALUES)))
    names = (name["text"] for name in page.find("th", scope="row"))
    return {name: tuple(dict(zip(head, row, strict=True))[of] for of in headings)
            for name, row in zip(names, rows, strict=False)}  # fmt: skip


def of_sentences(sentences: dict[str, str], headings: Sequence[str]) -> Reading:
    patterns = {
        "mean ± sd": r"; mean ([^;]+)",
        "difference": r"; \d seeds?: ([^;( ]+)",
        "interval": r"; \d seeds?: [^;(]+\(([^)]+)\)",
        "p (Bonferroni)": r"; p ([^;]+) \(Bonferroni\)",
        "minimum detectable difference": r"; minimum detectable difference ([^;]+)",
        "verdict": r"^(one seed: no verdict|[^:;]+?)(?: of higher)?[:;]",
    }
    found = {arm: [re.search(patterns[heading], text) for heading in headings] for arm, text in sentences.items()}
    return {arm: tuple(match[1] if match else "–" for match in matches) for arm, matches in found.items()}


def same_in_all_five(comparison: Comparison, terminal: str, markdown: str, page: Page) -> None:
    """The fifth is a run's note: Markdown that fits into it."""
    headings, note = headings_of(comparison), to_markdown(comparison, NOTE_LENGTH)
    numbers = of_text(terminal)
    assert of_markdown(markdown, headings) == of_markdown(note, headings) == numbers
    assert of_page(page, headings) == numbers
    in_page = dict(item["text"].split(": ", 1) for item in page.find("li")[: len(VALUES)])
    assert of_sentences(in_page, headings) == numbers
    for text in (markdown, note, to_markdown(comparison, len(markdown) - 1)):
        assert dict(re.findall(r"^- \*\*(.+?)\*\*: (.+)$", text, re.M)) == in_page
    shared = (answer(comparison), wording.tally(comparison), *wording.method(comparison).splitlines())
    plain = " ".join(page.find("body")[0]["text"].split())
    for sentence in (*shared, *comparison.notes):
        assert sentence in " ".join(terminal.split())
        assert sentence in plain
        assert sentence in markdown.replace("\\_", "_")


def test_all_five_say_the_same_of_a_list_of_seeds(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_entry("--sweep_id", SWEEP, "--output_dir", str(tmp_path)) == 0
    terminal = capsys.readouterr().err
    markdown = (tmp_path / SWEEP / "comparison.md").read_text(encoding="utf-8")
    page = Page((tmp_path / SWEEP / "comparison.html").read_text(encoding="utf-8"))
    comparison = compare(load_runs(SWEEP))
    assert of_text(terminal) == of_text(to_text(comparison)) == expected()
    same_in_all_five(comparison, terminal, markdown, page)
    assert "; against its control reweighted: +0.0066 (" in wording.sentence(comparison.arms[1], comparison)
    assert answer(comparison).startswith("Use higher: it is better, test/auc_ctcvr +0.0096 (")


def test_all_five_say_the_same_of_seeds_that_were_added(store: Store) -> None:
    """Looks at 3 and 5 seeds: `lower` is decided at the first, and its later seeds do not count."""
    runs, level = load_runs(SWEEP), 0.02
    families = (Family(("higher", "lower"), level, (3, 5)), Family(("level", "lonely"), level, (3, 5)))
    runs.attrs |= {"families": families, "other_families": 1, "margin": 0.005}
    runs.attrs |= {"metric": "test/auc_ctcvr", "mode": "max"}
    comparison = compare(runs)
    verdicts = VERDICTS | {"level": "equal within the margin", "lonely": "open"}
    numbers = {arm: (*texts[:3], verdicts[arm]) for arm, texts in expected(level, {"lower": 3}).items()}
    text, page = to_text(comparison), Page(page_of(comparison, EMPTY))
    assert of_text(text) == numbers
    same_in_all_five(comparison, text, to_markdown(comparison), page)
    assert {arm.name: [look.seeds for look in arm.looks] for arm in comparison.arms} == {
        "baseline": [], "higher": [3, 5], "reweighted": [], "lower": [3], "level": [3, 5], "lonely": [],
    }  # fmt: skip
    assert "lower: seeds 3, 4 do not count, because only the scheduled looks do" in comparison.notes
    assert "3 families, each at most 5%, together at most 15%." in text
    assert answer(comparison).startswith("Use higher: it is better, test/auc_ctcvr +0.0096 (+0.0057 to +0.0135).")
    assert "lonely is still open: start the sweep again, with it in its file, for more seeds." in answer(comparison)


def test_the_manual_has_every_heading() -> None:
    manual = (ROOT / "docs/compare.md").read_text(encoding="utf-8")
    for heading in HEADINGS:
        assert f"| {heading} |" in manual
