"""What `python -m bench` promises; the figures themselves need a quiet machine and many minutes."""

import importlib.metadata
import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import ttest_1samp

from bench import figures, sequential_seeds, wheels
from bench.catalogue import FIGURES
from bench.impressions import MULTI, SINGLE, read, write
from bench.workshop import reference_config
from pipeline.config.strict_config import flatten, load
from pipeline.data.layout import Layout
from pipeline.data.schema import DataSchema
from pipeline.maths.sequential import looks
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.task import MmoeTask

PROMISED = [
    "mmoe_b1024",
    "mmoe_b4096",
    "mmoe_deepfm_b1024",
    "mmoe_vs_deepctr_b1024",
    "mmoe_vs_rechub_b1024",
    "mmoe_vs_deepctr_b4096",
    "mmoe_vs_rechub_b4096",
    "threads_2",
    "logging_cpu",
    "logging_wall",
    "prepare_ctr",
    "prepare_ctr_rss_mb",
    "visobert_vs_naive_bf16",
    "visobert_vs_naive_fp32",
    "visobert_vs_trainer",
    "cost_of_answer",
    "first_step_s",
    "help_s",
]


def test_every_promised_figure_can_be_named_and_is_explained() -> None:
    assert set(PROMISED) <= set(FIGURES)
    explained = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert [name for name in FIGURES if f"`{name}`" not in explained] == []


def test_the_reference_is_the_shipped_configuration_with_wider_towers() -> None:
    shipped, reference = (
        flatten(load(MmoeConfig, ROOT / file)) for file in ("configs/mtl_mmoe.yaml", "bench/reference.yaml")
    )
    assert {key for key in shipped if shipped[key] != reference[key]} == {"model.towers.hidden"}
    assert reference["model.towers.hidden"] == "[128]"


def test_impressions_have_the_shape_of_the_reference_and_train(tmp_path: Path) -> None:
    write(tmp_path, 3000)
    schema, columns = DataSchema.read(tmp_path), read(tmp_path, 3000)
    assert (len(SINGLE), len(MULTI), Layout(schema.features).table_rows) == (
        23,
        5,
        2_269_056,
    )  # 56: two ids a feature more
    assert sum(len(column.ids) for column in columns.ids.values()) / 3000 == pytest.approx(48, abs=0.5)
    task = MmoeTask(reference_config(tmp_path))
    assert len(task.batch(task.plan(0)[0])) == 1024


def test_a_figure_is_one_line_of_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_standard_output", sys.stdout)
    taken = iter([9.0, 9.0, 2.0, 4.0, 5.0, 2.0, 1.0, 8.0])  # one of each; then other, own; own, other; other, own
    work = figures.Timed(lambda: next(taken), 40)
    figures.measured("speed", work, work._replace(rows=80), pairs=3)
    # own: 40 / 4, 40 / 5, 40 / 8; other: 80 / 2, 80 / 2, 80 / 1
    assert json.loads(capsys.readouterr().out) == {
        "name": "speed", "value": 8.0, "unit": figures.RATE, "reference": 40.0, "ratio": 0.2, "spread": [0.0625, 0.25],
    }  # fmt: skip


@pytest.mark.parametrize(("count", "places"), [(2, (0, 1)), (5, (0, 4)), (6, (0, 5)), (11, (1, 9)), (20, (5, 14))])
def test_the_interval_of_a_median_is_the_binomial_one(count: int, places: tuple[int, int]) -> None:
    """Conover 1999, section 3.2: order statistics whose chance to miss the median is below 2.5% on each side."""
    values = [float(value) for value in range(count)][::-1]
    assert figures.interval(values) == places


@pytest.mark.parametrize("margin", [None, 1.0])
def test_simulated_sweeps_are_decided_as_real_ones(margin: float | None) -> None:
    differences = np.random.default_rng(1).normal(size=(30, 4, 20)) + np.arange(4)[:, None]
    differences[:3, 0] = 0.0
    differences[:3, 3, :3] = 2.0  # no variance at the first look
    schedule, level = (3, 5, 8, 12, 20), 0.0019
    answers = sequential_seeds.at_looks(differences, schedule, level, margin)
    kinds = {sequential_seeds.BETTER: "better", sequential_seeds.WORSE: "worse", sequential_seeds.EQUAL: "equal"}
    for index in np.ndindex(30, 4):
        last = looks(differences[index].tolist(), schedule, level, higher_is_better=True, margin=margin)[-1]
        assert str(last.decision).startswith(kinds.get(int(answers.decision[index]), "None"))
        assert answers.seeds[index] == last.seeds


def test_holm_of_simulated_sweeps_steps_down() -> None:
    """The smallest p value is tested at 5% / arms, the next at 5% / (arms - 1), until one is not rejected."""
    differences = np.random.default_rng(2).normal(size=(50, 4, 6)) + np.array([0, 0.8, -1.2, 1.6])[:, None]
    found = sequential_seeds.holm(differences).decision
    for sweep, decisions in zip(differences, found, strict=True):
        tests = sorted((ttest_1samp(arm, 0).pvalue, index) for index, arm in enumerate(sweep))
        expected = [0] * 4
        for left, (p, index) in zip((4, 3, 2, 1), tests, strict=True):
            if p > 0.05 / left:
                break
            expected[index] = int(np.sign(sweep[index].mean()))
        assert decisions.tolist() == expected
    assert set(np.unique(found)) == {-1, 0, 1}


def test_steps_of_a_simulated_sweep_by_hand() -> None:
    """Arms decided at 3 and 5 seeds: the baseline trains 5, and so do the prefixes. 2,000 of 3,125 steps are shared."""
    seeds = np.array([[3, 5]])
    assert sequential_seeds.mean_steps(seeds, 0) == 3125 * (3 + 5 + 5)
    assert sequential_seeds.mean_steps(seeds, 2000) == 2000 * 5 + 1125 * (3 + 5 + 5)
    assert sequential_seeds.mean_steps(np.array([[3, 5], [5, 5]]), 2000) == 2000 * 5 + 1125 * 14


def test_what_a_machine_with_a_gpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins of pyproject.toml without what torch and transformers bring, and what those packages require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(pin.split("==") for pin in (*project["dependencies"], *project["optional-dependencies"]["bench"]))
    extra = {"accelerate": ["psutil", "torch>=2.0.0"], "torch-rechub": ["tqdm>=4", "onnx; extra == 'onnx'"]}
    requires, version = importlib.metadata.requires, importlib.metadata.version  # the extra need not be installed
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: extra.get(name) or requires(name))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: pins[name] if name in extra else version(name))
    packages = wheels.needed()
    direct = packages.keys() & pins.keys()
    assert direct == {"accelerate", "pydantic", "torch-rechub"}
    assert {name: packages[name] for name in direct} == {name: pins[name] for name in direct}
    assert {"pydantic-core", "psutil"} <= packages.keys()
    assert not packages.keys() & {*wheels.MACHINE, *wheels.UNUSED}
