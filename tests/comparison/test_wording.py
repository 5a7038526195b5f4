"""The same words and numbers in a terminal, in Markdown, on the page and in MLflow's note."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy.optimize import brentq
from scipy.stats import ttest_rel
from test_compare import Store, run_entry
from test_report import Page
from test_stats import power_of_t_test

from pipeline.comparison import wording
from pipeline.comparison.verdicts import compare, load_runs, to_markdown, to_text
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
HEADINGS = ("mean ± sd", "difference", "95% interval (unadjusted)", "p (Holm)", "minimum detectable difference",
            "verdict")  # fmt: skip
Reading = dict[str, tuple[str, ...]]  # arm -> a text for each heading


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Store]:
    import mlflow

    folder = tmp_path_factory.mktemp("wording")
    shutil.copyfile(empty_store, folder / "mlflow.db")
    new_store = Store(folder)
    new_store.experiment("sweeps", (folder / "artifacts").as_uri())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", new_store.uri)
        mlflow.set_tracking_uri(new_store.uri)
        for arm, values in VALUES.items():
            control = {"role": "control", "control_of": "higher"} if arm == "reweighted" else {}
            for seed, value in enumerate(values):
                new_store.run(arm, seed, {"test/auc_ctcvr": value}, sweep_id=SWEEP, **control)
        yield new_store
    mlflow.set_tracking_uri(None)


def expected() -> Reading:
    """Computed with scipy, to four decimals."""
    base = np.array(VALUES["baseline"])
    shown = {arm: [f"{np.mean(values):.4f}"] for arm, values in VALUES.items()}
    p = {arm: float(ttest_rel(VALUES[arm], base).pvalue) for arm in TESTED}
    ordered = sorted(TESTED, key=lambda arm: p[arm])
    steps = [(len(TESTED) - rank) * p[arm] for rank, arm in enumerate(ordered)]
    holm = {arm: min(1.0, max(steps[: rank + 1])) for rank, arm in enumerate(ordered)}
    for arm, values in VALUES.items():
        if len(values) > 1:
            shown[arm][0] += f" ± {np.std(values, ddof=1):.4f}"
        apart = np.array(values) - base[: len(values)]
        shown[arm].append("–" if arm == "baseline" else f"{np.mean(apart):+.4f}")
        if arm == "baseline" or len(values) < 2:
            shown[arm].append("–")
        else:
            shown[arm].append("{:+.4f} to {:+.4f}".format(*ttest_rel(values, base).confidence_interval()))
        if arm not in TESTED:
            shown[arm] += ["–", "–"]
            continue
        shown[arm].append("< 0.0001" if holm[arm] < 0.0001 else f"{holm[arm]:.4f}")
        shown[arm].append(f"{minimum(float(np.std(apart, ddof=1)), len(values)):.4f}")
    return {arm: (*(text.replace("-", "−") for text in texts), VERDICTS[arm]) for arm, texts in shown.items()}


def minimum(sd: float, seeds: int) -> float:
    """The difference that the t test finds with 80% probability, at a fourth of 5%: four arms are not controls."""
    return float(brentq(lambda size: power_of_t_test(size, sd, seeds, 0.05 / 4) - 0.8, sd / 10, 10 * sd))


def of_text(text: str) -> Reading:
    """Cells are two spaces apart at least; a heading's lines stand over each other."""
    lines = next(part for part in text.split("\n\n") if "mean ± sd" in part).splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("arm"))
    last_lines = ("mean ± sd", "difference", "(unadjusted)", "p (Holm)", "difference", "verdict")
    assert re.split("  +", lines[first]) == ["arm", *last_lines]
    cells = [re.split("  +", line.strip()) for line in lines[first + 1 :]]
    return {arm: tuple(texts) for arm, *texts in cells if arm != "against its control"}


def of_markdown(text: str) -> Reading:
    block = next(part for part in text.split("\n\n") if part.startswith("| arm | mean"))
    (_, *head), _, *rows = ([cell.split("; ")[0] for cell in line[2:-2].split(" | ")] for line in block.splitlines())
    return {arm: tuple(dict(zip(head, texts, strict=True))[name] for name in HEADINGS) for arm, *texts in rows}


def of_page(page: Page) -> Reading:
    """The cells of the results, without details in small print."""
    head = [" ".join(cell["text"].split()) for cell in page.find("th", scope="col")]
    head = head[1 : head.index("arm", 1)]
    small = "|".join(re.escape(element["text"]) for element in page.find("small"))
    cells = [re.sub(f"({small})$", "", cell["text"]) for cell in page.find("td")]
    rows = (cells[at * len(head) : (at + 1) * len(head)] for at in range(len(VALUES)))
    names = (name["text"] for name in page.find("th", scope="row"))
    return {name: tuple(dict(zip(head, row, strict=True))[of] for of in HEADINGS)
            for name, row in zip(names, rows, strict=False)}  # fmt: skip


def of_sentences(sentences: dict[str, str]) -> Reading:
    patterns = (
        r"; mean ([^;]+)",
        r"; difference ([^;,]+)",
        r"; difference [^;,]+, 95% interval ([^;]+) \(unadjusted\)",
        r"; p ([^;]+) \(Holm\)",
        r"; minimum detectable difference ([^;]+)",
        r"^(.+?)(?: of higher)?(?:, 5 seeds)?; mean",
    )
    by_arm = {arm: [re.search(pattern, text) for pattern in patterns] for arm, text in sentences.items()}
    return {arm: tuple(match[1] if match else "–" for match in matches) for arm, matches in by_arm.items()}


def test_all_five_say_the_same(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry("--sweep_id", SWEEP, "--output_dir", str(tmp_path)) == 0
    terminal = capsys.readouterr().err
    markdown = (tmp_path / SWEEP / "comparison.md").read_text(encoding="utf-8")
    page = Page((tmp_path / SWEEP / "comparison.html").read_text(encoding="utf-8"))
    comparison = compare(load_runs(SWEEP))
    note = to_markdown(comparison, NOTE_LENGTH)  # a run gets just that: test_compare
    numbers = expected()
    assert list(numbers["lower"][3:5]) == ["< 0.0001", numbers["lower"][4]]

    assert of_text(to_text(comparison)) == numbers
    assert of_text(terminal) == numbers
    assert of_markdown(markdown) == of_markdown(note) == numbers
    assert of_page(page) == numbers
    in_page = dict(item["text"].split(": ", 1) for item in page.find("li")[: len(VALUES)])
    assert of_sentences(in_page) == numbers
    assert "; against its control reweighted: difference +0.0066, 95% interval " in in_page["higher"]
    for text in (markdown, note, to_markdown(comparison, len(markdown) - 1)):
        assert dict(re.findall(r"^- \*\*(.+?)\*\*: (.+)$", text, re.M)) == in_page
    shared = (wording.tally(comparison), *wording.method(comparison).splitlines(), *comparison.notes)
    plain = " ".join(page.find("body")[0]["text"].split())
    for sentence in shared:
        assert sentence in terminal
        assert sentence in plain
        assert sentence in markdown.replace("\\_", "_")


def test_the_manual_has_every_heading() -> None:
    manual = (ROOT / "docs/compare.md").read_text(encoding="utf-8")
    for heading in HEADINGS:
        assert f"| {heading} |" in manual
