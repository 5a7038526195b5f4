"""The notebooks from top to bottom on small real runs, their figures against MLflow's client and own formulas."""

import ast
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, in_laboratory, project_in
from laboratory import ARMS, METRIC, Laboratory
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from scipy.stats import t, ttest_rel

from pipeline.errors import UserError

pytestmark = in_laboratory

BOOKS = ("alpha", "compare_runs", "findings", "loss_components")
SENTIMENTS = ("positive", "negative", "neutral")


@dataclass(frozen=True)
class Executed:
    """A notebook that ran to its end."""

    values: Any  # of its expression
    printed: str
    figures: int
    refused: list[str]  # error messages for a wrong parameter


# What is asked of each notebook's variables once it has run to its end
ASKED = {
    "compare_runs": """{
        "sweep": SWEEP_ID, "arms": [arm.name for arm in arms],
        "table": json.loads(table.to_json(orient="index", double_precision=15)),
        "differences": json.loads(differences.to_json(double_precision=15)),
        "gates": [int(gate) for gate in gates],
        "curve": {arm.name: (smooth[arm.name] - smooth["baseline"]).mean(axis=1).to_dict() for arm in arms},
        "curves": curves}""",
    "findings": """{
        "table": json.loads(table.to_json(orient="records", double_precision=15)),
        "reasons": {arm: row.to_dict() for (_, arm), row in reasons.iterrows()}}""",
    "loss_components": """{
        "run": run["run_id"], "gate": int(gate), "error": error.to_dict(), "holds": bool((units < 8).all()),
        "after": after.mean().to_dict(), "shares": shares.loc[11].to_dict(), "added": added.to_dict(),
        "added_to_bce": added_to_bce, "ratio": ratio, "against": arm.against_control.mean, "steps": len(steps)}""",
    "alpha": """{
        "counts": counts.to_dict(), "alpha": weights["alpha"].to_dict(), "logged": weights["logged"].to_dict(),
        "by_aspect": by_aspect.T.to_dict(), "of_arms": alpha.T.to_dict(), "f1": mean.T.to_dict(),
        "spread": spread.T.to_dict(), "differences": differences.T.to_dict()}""",
}


@pytest.fixture(scope="module")
def executed(laboratory: Laboratory) -> dict[str, Executed]:
    """Each notebook from top to bottom as Jupyter runs it, in its own folder.

    One kernel runs them one after the other, each without the names of the one before: a kernel imports for seconds.
    Then the notebook's expression is asked for, and its first two cells after the imports are run with a wrong
    parameter.
    """
    folder = laboratory.folder / "notebooks"
    wrong = {"loss_components": f"RUN_ID={baseline_of(laboratory)}"}
    book = nbformat.v4.new_notebook()
    parts: dict[str, list[Any]] = {}
    for name, expression in ASKED.items():
        code = [cell for cell in nbformat.read(folder / f"{name}.ipynb", as_version=4).cells
                if cell.cell_type == "code"]  # fmt: skip
        again = "\n".join(cell.source for cell in code[1:3])
        place = f"import os; os.chdir({str(folder)!r}); os.environ['EXPERIMENT'] = 'Default'"
        parts[name] = [new_code_cell("%reset -f"), new_code_cell(place), *code,
                       new_code_cell(f"import json; print(json.dumps({expression}))")]  # fmt: skip
        if name in wrong:
            key, value = wrong[name].split("=")
            cell = new_code_cell(f"os.environ[{key!r}] = {value!r}\n{again}")
            cell.metadata.tags = ["raises-exception"]
            parts[name].append(cell)
        book.cells += parts[name]
    patience = {"timeout": 900, "startup_timeout": 900, "iopub_timeout": 900}  # a busy kernel's output comes late
    NotebookClient(book, resources={"metadata": {"path": str(folder)}}, **patience).execute(env=dict(os.environ))
    return {name: found_in(cells) for name, cells in parts.items()}


def found_in(cells: list[Any]) -> Executed:
    outputs = [output for cell in cells for output in cell.outputs]
    errors = [output for output in outputs if output.output_type == "error"]
    assert all(error.ename == "UserError" and error.traceback == [error.evalue] for error in errors)
    assert not [output for output in outputs if output.get("name") == "stderr"]
    *printed, last = [output["text"] for output in outputs if output.get("name") == "stdout"]
    figures = sum("image/png" in output.get("data", {}) for output in outputs)
    return Executed(json.loads(last.splitlines()[-1]), "".join([*printed, last]), figures,
                    [error.evalue for error in errors])  # fmt: skip


def baseline_of(laboratory: Laboratory) -> str:
    """A run without a focal loss."""
    return str(laboratory.runs("tags.role = 'baseline' AND tags.task = 'mmoe'")[0].info.run_id)


@contextmanager
def here(folder: Path, **environment: str) -> Iterator[None]:
    """A notebook's cells run in this process: a kernel would import for seconds."""
    import matplotlib.pyplot as plt

    with pytest.MonkeyPatch.context() as patch, plt.rc_context(), warnings.catch_warnings():
        patch.chdir(folder / "notebooks")
        patch.setattr(UserError, "_render_traceback_", None, raising=False)
        for key, value in environment.items():
            patch.setenv(key, value)
        yield
        plt.close("all")


def refused_here(folder: Path, name: str, **environment: str) -> str:
    """The one line that a notebook ends with."""
    with here(folder, **environment):
        with pytest.raises(UserError) as caught:
            exec("\n".join(code_of(name)), {})  # noqa: S102
        assert UserError._render_traceback_(caught.value) == [str(caught.value)]  # type: ignore[attr-defined]
    return str(caught.value)


def code_of(name: str) -> list[str]:
    return ["".join(cell["source"]) for cell in source_of(name)["cells"] if cell["cell_type"] == "code"]


def source_of(name: str) -> Mapping[str, Any]:
    notebook: Mapping[str, Any] = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))
    return notebook


# ---------------------------------------------------------------- as they are in git


@pytest.mark.parametrize("name", BOOKS)
def test_outputs_are_cleared_and_nothing_is_of_one_machine(name: str) -> None:
    book = source_of(name)
    nbformat.validate(nbformat.reads(json.dumps(book), as_version=4))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert 0 < len(code) <= 12
    for cell in code:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    text = "\n".join("".join(cell["source"]) for cell in book["cells"])
    assert not re.search(r"(?<![\w.:/])/(home|root|work|tmp|Users|mnt)/", json.dumps(book))
    assert "`make notebook`" in "".join(book["cells"][0]["source"])
    assert "MLFLOW_TRACKING_URI" in text


@pytest.mark.parametrize("name", BOOKS)
def test_notebooks_read_by_the_two_functions_alone(name: str) -> None:
    modules = set()
    for code in code_of(name):
        for node in ast.walk(ast.parse(code)):
            modules |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            modules |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
    ours = {module for module in modules if module.startswith("pipeline")}
    assert ours == {"pipeline.comparison.verdicts", "pipeline.errors"}
    assert modules - ours <= {"os", "warnings", "pathlib", "pandas", "numpy", "matplotlib.pyplot"}


# ---------------------------------------------------------------- executed


def test_compare_runs_from_the_newest_sweep_to_the_verdict(
    laboratory: Laboratory, executed: dict[str, Executed]
) -> None:
    sweep, result = laboratory.sweep("mmoe"), executed["compare_runs"]
    values = laboratory.by_arm("mmoe", METRIC)
    tested = ["l0 g2 w3", "l5 g1 w3"]
    assert result.values["sweep"] == sweep != laboratory.sweep("visobert")
    assert result.values["arms"] == list(ARMS)
    assert set(values) == set(ARMS)

    base = np.array([values["baseline"][seed] for seed in (0, 1)])
    p = {"l0 g2 w3": 1.0, "l5 g1 w3": float(ttest_rel(list(values["l5 g1 w3"].values()), base).pvalue)}
    adjusted = {arm: min(1, 2 * p[arm]) for arm in tested}  # Bonferroni of two
    for arm, of_arm in values.items():
        row = result.values["table"][arm]
        assert row["mean"] == pytest.approx((of_arm[0] + of_arm[1]) / 2, rel=1e-9)
        if arm == "baseline":
            continue
        apart = {seed: of_arm[seed] - base[seed] for seed in (0, 1)}
        assert any(apart.values()) == (arm != "l0 g2 w3")  # which is the baseline to the last bit
        assert {int(seed): value for seed, value in result.values["differences"][arm].items()} == pytest.approx(apart)
        assert row["difference"] == pytest.approx((apart[0] + apart[1]) / 2)
        if arm in tested:
            assert row["p_adjusted"] == pytest.approx(adjusted[arm])
            better = "better" if row["difference"] < 0 else "worse"  # log loss: less is better
            verdict = better if adjusted[arm] <= 0.05 else "not distinguishable"
            assert row["verdict"] == verdict
            assert f"{arm}: {verdict}" in result.printed

    assert result.values["gates"] == [3]
    assert result.values["curves"] == ["loss_ctcvr_bce", "loss_ctcvr_focal", "valid/logloss_ctcvr"]
    by_arm: dict[str, list[dict[int, float]]] = {}
    for run in sorted(laboratory.runs(f"tags.sweep_id = '{sweep}' AND tags.role != 'summary'"),
                      key=lambda run: int(run.data.tags["seed"])):  # fmt: skip
        points = laboratory.points(run.info.run_id, "valid/logloss_ctcvr")
        by_arm.setdefault(run.data.tags["arm"], []).append(points)
    for arm, runs in by_arm.items():
        assert set(runs[0]) == {6, 12}
        expected = {step: np.mean([run[step] - base[step] for run, base in zip(runs, by_arm["baseline"], strict=True)])
                    for step in (6, 12)}  # fmt: skip
        curve = {int(step): value for step, value in result.values["curve"][arm].items()}
        assert curve == pytest.approx(expected, abs=1e-9)
    assert result.figures == 2


def test_compare_runs_takes_another_sweep_where_it_is_named(laboratory: Laboratory) -> None:
    names: dict[str, Any] = {}
    sweep = laboratory.sweep("visobert")
    with here(laboratory.folder, SWEEP_ID=sweep, MLFLOW_TRACKING_URI=f"sqlite:///{laboratory.folder / 'mlflow.db'}"):
        exec("\n".join(code_of("compare_runs")), names)  # noqa: S102
    assert names["SWEEP_ID"] == names["runs"]["sweep_id"].unique().item() == sweep
    assert names["curves"] == ["loss_sentiment", "loss_aspect", "valid/sentiment_f1_macro"]


def test_loss_components_turns_one_run_inside_out(laboratory: Laboratory, executed: dict[str, Executed]) -> None:
    result = executed["loss_components"]
    newest = laboratory.runs("tags.role = 'arm' AND tags.task = 'mmoe'")[-1]
    assert result.values["run"] == newest.info.run_id
    arm, weight = newest.data.tags["arm"], float(newest.data.params["loss.aux_focal.lambda"])
    assert (result.values["gate"], result.values["steps"]) == (3, 12)

    names = ("loss_ctr", "loss_ctcvr", "loss_ctcvr_bce", "loss_ctcvr_focal", "loss_cvr_aux", "loss_total")
    points = {name: laboratory.points(newest.info.run_id, name) for name in names}
    assert set(points["loss_ctcvr_focal"]) == set(range(3, 12))
    bce, focal, total = (points[name] for name in ("loss_ctcvr_bce", "loss_ctcvr_focal", "loss_total"))
    missed = {
        "loss_ctcvr": [bce[step] + weight * focal.get(step, 0) - points["loss_ctcvr"][step] for step in range(12)],
        # of the shipped config: clicks and the product weigh 1, clicked rows 0.1
        "loss_total": [points["loss_ctr"][step] + bce[step] + weight * focal.get(step, 0)
                       + 0.1 * points["loss_cvr_aux"][step] - total[step] for step in range(12)],
    }  # fmt: skip
    for name, errors in missed.items():
        assert result.values["error"][name] == pytest.approx(max(map(abs, errors)), abs=1e-12)
        assert result.values["error"][name] < 1e-5
    assert result.values["holds"]
    assert result.values["after"]["ctcvr, lambda * focal"] == pytest.approx(weight * np.mean(list(focal.values())))
    assert result.values["shares"]["ctcvr, cross-entropy"] == pytest.approx(bce[11] / total[11], rel=1e-5)
    added = weight * sum(focal.values()) / sum(bce[step] for step in focal)
    assert result.values["added_to_bce"] == pytest.approx(added)
    assert f"adds {added:.3%} to the cross-entropy" in result.printed

    factors = [
        laboratory.points(newest.info.run_id, f"influence/focal_factor_{kind}") for kind in ("positive", "negative")
    ]
    positive, negative = (weight * np.mean(list(factor.values())) for factor in factors)
    assert set(factors[1]) == {4, 6, 8, 10}
    assert result.values["added"] == pytest.approx({"conversions": positive, "others": negative})
    assert result.values["ratio"] == pytest.approx(
        (300 + positive) / (1 + negative)
    )  # 300: the clip of the shipped config
    values = laboratory.by_arm("mmoe", METRIC)
    against = np.mean([values[arm][seed] - values["w+5 w3"][seed] for seed in (0, 1)])
    assert result.values["against"] == pytest.approx(against)
    assert result.figures == 2


def test_findings_of_every_sweep_in_the_experiment(laboratory: Laboratory, executed: dict[str, Executed]) -> None:
    result = executed["findings"]
    table = {(row["question"], row["arm"]): row for row in result.values["table"]}
    questions = {"mmoe": f"mmoe: {METRIC}, embedded data",
                 "visobert": "alpha: test/sentiment_f1_macro, embedded data"}  # fmt: skip
    arms = {"mmoe": ("l0 g2 w3", "l5 g1 w3"), "visobert": ("auto g0", "1 1.2 1.5 g2")}  # without the controls
    assert table.keys() == {(questions[task], arm) for task in arms for arm in arms[task]}
    for task, metric in {"mmoe": METRIC, "visobert": "test/sentiment_f1_macro"}.items():
        values = laboratory.by_arm(task, metric)
        for arm in arms[task]:
            row, apart = table[questions[task], arm], [values[arm][seed] - values["baseline"][seed] for seed in (0, 1)]
            assert row["seeds"] == "0-1"
            assert row["difference"] == pytest.approx(np.mean(apart))
            if any(apart):  # Bonferroni of two arms: Student's interval at 97.5% with one degree of freedom
                half = t.ppf(1 - 0.05 / 2 / 2, 1) * np.std(apart, ddof=1) / np.sqrt(2)
                assert [row["low"], row["high"]] == pytest.approx([np.mean(apart) - half, np.mean(apart) + half])

    sweep = laboratory.sweep("mmoe")
    for arm in arms["mmoe"]:
        runs = laboratory.runs(f"tags.sweep_id = '{sweep}' AND tags.arm = '{arm}'")
        for name in ("focal_over_bce", "cosine_bce_focal", "focal_factor_positive", "focal_factor_negative"):
            points = [value for run in runs
                      for value in laboratory.points(run.info.run_id, f"influence/{name}").values()]  # fmt: skip
            assert result.values["reasons"][arm][f"influence/{name}"] == pytest.approx(np.mean(points))
    assert result.figures == 1  # the map needs its own data
    assert "no sweep on folders of docs/findings/worlds.py" in result.printed


def test_alpha_from_distribution_to_effect(laboratory: Laboratory, executed: dict[str, Executed]) -> None:
    result = executed["alpha"]

    (folder,) = (laboratory.folder / "data_cache").glob("reviews-300-*")
    labels = pd.read_csv(folder / "train.csv", encoding="utf-8-sig").drop(columns="data")
    by_aspect = {
        aspect.replace("&", "_"): {name: int((column == name.capitalize()).sum()) for name in SENTIMENTS}
        for aspect, column in labels.items()
    }
    counts = {name: sum(aspect[name] for aspect in by_aspect.values()) for name in SENTIMENTS}
    auto = {name: sum(counts.values()) / (3 * count) for name, count in counts.items()}
    assert result.values["counts"] == counts
    assert result.values["by_aspect"] == by_aspect
    assert result.values["alpha"] == pytest.approx(auto)
    (prep,) = laboratory.runs("metrics.`count/positive` > 0")
    assert result.values["logged"] == {name: prep.data.metrics[f"alpha/{name}"] for name in SENTIMENTS}
    assert "auto in this sweep is the alpha above" in result.printed

    arms = {"baseline": (1, 1, 1), "auto g0": tuple(auto.values()), "1 1.2 1.5 g2": (1, 1.2, 1.5)}
    assert set(result.values["of_arms"]) == set(arms)
    for arm, vector in arms.items():
        assert tuple(result.values["of_arms"][arm].values()) == pytest.approx(vector)
    for name in SENTIMENTS:
        f1 = laboratory.by_arm("visobert", f"test/sentiment_f1/{name}")
        for arm, values in f1.items():
            assert result.values["f1"][arm][name] == pytest.approx(np.mean(list(values.values())))
            assert result.values["spread"][arm][name] == pytest.approx(np.std(list(values.values()), ddof=1))
            if arm != "baseline":
                apart = np.mean([values[seed] - f1["baseline"][seed] for seed in (0, 1)])
                assert result.values["differences"][arm][name] == pytest.approx(apart)
    assert result.figures == 3


# ---------------------------------------------------------------- refused


COMMANDS = {
    "alpha": "mlflow run . -e data_prep --env-manager=local",
    "compare_runs": "mlflow run . -e sweep --env-manager=local",
    "findings": "mlflow run . -e sweep -P config=configs/findings/census_focal.yaml --env-manager=local",
    "loss_components": "mlflow run . -e train_mmoe --env-manager=local",
}


@pytest.mark.parametrize("name", BOOKS)
def test_an_empty_store_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    line = refused_here(project_in(tmp_path), name)
    assert "there is no such file" in line
    assert "\n" not in line
    assert line.endswith(f"is made by: {COMMANDS[name]}")
    assert not (tmp_path / "mlflow.db").exists()


def test_a_run_or_sweep_of_another_kind_is_told_in_one_line(
    laboratory: Laboratory, executed: dict[str, Executed]
) -> None:
    (run,) = executed["loss_components"].refused
    message = f"run {baseline_of(laboratory)} logged no loss_ctcvr_focal; allowed as RUN_ID: one that did, or none"
    assert run == message
    sweep = laboratory.sweep("mmoe")
    store = f"sqlite:///{laboratory.folder / 'mlflow.db'}"
    line = refused_here(laboratory.folder, "alpha", SWEEP_ID=sweep, MLFLOW_TRACKING_URI=store)
    assert line.startswith(f"sweep {sweep} is not one of train_visobert; a sweep over alpha is made by: mlflow run")
