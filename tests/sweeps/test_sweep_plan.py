"""Sweep plans: arms, grids, names, shared prefixes, and invalid files."""

import datetime
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Call
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.strict_config import load
from pipeline.entries import find_entry
from pipeline.errors import UserError
from pipeline.runtime.importing import import_reference
from pipeline.sweeps.arm_runs import ArmRuns
from pipeline.sweeps.jobs import SweepContext
from pipeline.sweeps.requests import TrainPrefix, TrainRun
from pipeline.sweeps.sweep_config import GridConfig, SweepConfig
from pipeline.sweeps.sweep_plan import Plan, resolve
from pipeline.tasks.mmoe.config import MmoeConfig

SWEEP: dict[str, Any] = {
    "task": "train_mmoe",
    "config": "configs/mtl_mmoe.yaml",
    "baseline": {"aux_focal": False},
    "arms": [{"lambda": 0.05}, {"lambda": 0.1, "gamma": 2.0}],
}


def plan_of(folder: Path, typed: dict[str, str] | None = None, **changes: Any) -> Plan:
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in (SWEEP | changes).items() if value is not ...}))
    sweep = load(SweepConfig, file)
    return resolve(sweep, file, import_reference(find_entry(sweep.task).config), [ROOT], typed)


def shipped(name: str) -> Plan:
    file = ROOT / "configs/sweeps" / f"{name}.yaml"
    sweep = load(SweepConfig, file)
    return resolve(sweep, file, import_reference(find_entry(sweep.task).config), [ROOT])


def test_the_shipped_sweep_holds_the_five_arms() -> None:
    plan = shipped("aux_focal")
    focal = [arm.config.loss.aux_focal for arm in plan.arms]  # type: ignore[attr-defined]
    assert [(part.enabled, part.lambda_, part.gamma, part.warmup_steps) for part in focal[1:]] == [
        (True, 0.05, 1.0, 2000), (True, 0.1, 1.0, 2000), (True, 0.2, 1.0, 2000), (True, 0.1, 2.0, 2000)
    ]  # fmt: skip
    assert not focal[0].enabled
    assert [arm.name for arm in plan.arms] == [
        "baseline", "l.05 g1 w2000", "l.1 g1 w2000", "l.2 g1 w2000", "l.1 g2 w2000"
    ]  # fmt: skip
    assert [arm.role for arm in plan.arms] == ["baseline"] + ["arm"] * 4
    assert plan.arms[1].run_name(2) == "l.05 g1 w2000 s2"
    assert plan.metric == "test/auc_ctcvr"
    assert all(not arm.config.tracking.log_model for arm in plan.arms)
    assert len(plan.sweep.seeds) == 3


def test_without_a_yaml_the_runs_start_from_that_of_the_entry_point(tmp_path: Path) -> None:
    named, default = plan_of(tmp_path), plan_of(tmp_path, config=...)
    assert default.sweep.file is None
    assert [arm.config for arm in default.arms] == [arm.config for arm in named.arms]


def test_the_shipped_alpha_sweep_is_a_grid_without_its_baseline() -> None:
    plan = shipped("alpha")
    loss = [arm.config.multi_label for arm in plan.arms]  # type: ignore[attr-defined]
    assert (loss[0].focal_alpha, loss[0].focal_gamma) == (None, 0.0)
    expected = set(itertools.product(["auto", (1.0, 1.2, 1.5), None], [0.0, 2.0])) - {(None, 0.0)}
    assert {(part.focal_alpha, part.focal_gamma) for part in loss[1:]} == expected
    assert len(plan.arms) == 6
    assert any("is the same run as baseline" in note for note in plan.notes)


@pytest.mark.parametrize("file", sorted((ROOT / "configs/findings").glob("*.yaml")), ids=lambda file: file.stem)
def test_sweeps_of_findings_ask_one_question_each(file: Path) -> None:
    """Before training: one metric, and a margin, or for a confirmation ten seeds that no first sweep may use."""
    sweep = load(SweepConfig, file)
    plan = resolve(sweep, file, import_reference(find_entry(sweep.task).config), [ROOT])
    assert sweep.metric == plan.metric
    assert plan.experiment == "findings"
    if sweep.is_sequential:
        assert sweep.margin
    else:
        assert len(sweep.all_seeds) == 10
        assert min(sweep.all_seeds) > 80  # the most that a sweep may add


@given(
    st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True),
                    min_size=1, max_size=4),
    st.data(),
)  # fmt: skip
def test_a_grid_is_every_combination_whose_conditions_hold(grid: dict[str, list[Any]], data: st.DataObject) -> None:
    where = {}
    if len(grid) > 1:
        key, other = data.draw(st.permutations(list(grid)))[:2]
        where = {key: {other: data.draw(st.sampled_from(grid[other]))}}
    arms = GridConfig(grid=grid, where=where).combinations()
    expected = set()
    for values in itertools.product(*grid.values()):
        arm = dict(zip(grid, values, strict=True))
        kept = {k: v for k, v in arm.items() if all(arm[o] == w for o, w in where.get(k, {}).items())}
        expected.add(tuple(sorted(kept.items())))
    assert {tuple(sorted(arm.items())) for arm in arms} == expected
    assert len(arms) == len(expected)


def test_settings_of_a_grid_that_are_the_same_are_named_as_they_were_written(tmp_path: Path) -> None:
    grid = {"aux_focal": [True], "optim.dense.lr": ["1e-4", 0.0001, 0.003]}
    plan = plan_of(tmp_path, arms={"grid": grid})
    assert plan.notes == ("arms.grid: aux_focal true, optim.dense.lr 0.0001 is the same run as aux_focal true, "
                          "optim.dense.lr 1e-4 and is left out",)  # fmt: skip
    assert len(plan.arms) == 3
    with pytest.raises(UserError, match=r"arm 3 has the same settings as arm 1 \(l.05 g1 w2000\), allowed: arms that"):
        plan_of(tmp_path, arms=[{"lambda": 0.05}, {"lambda": 0.1}, {"loss.aux_focal.lambda": "5e-2"}])


def test_an_arm_is_named_after_what_the_baseline_alone_overrides(tmp_path: Path) -> None:
    changes = {
        "baseline": {"aux_focal": False, "optim.dense.lr": 0.002},
        "arms": [{"aux_focal": False}, {"lambda": 0.05}],
    }
    assert [arm.name for arm in plan_of(tmp_path, **changes).arms] == ["baseline", "lr 0.003", "l.05 g1 w2000"]


@pytest.mark.parametrize("name", ["run", "baseline"])
def test_a_name_that_runs_have_by_default_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"arm 1: name: found {name}, allowed: another name"):
        plan_of(tmp_path, arms=[{"lambda": 0.05, "name": name}])


def test_a_bare_no_of_yaml_is_a_precision_everywhere_in_a_sweep(tmp_path: Path) -> None:
    yes = yaml.safe_load("[no, bf16]")
    assert yes[0] is False
    plan = plan_of(
        tmp_path, settings={"training": {"amp": False}}, arms={"grid": {"training.amp": yes, "lambda": [0.1]}}
    )
    assert [arm.config.training.amp for arm in plan.arms] == ["no", "no", "bf16"]
    space = {"training.amp": {"choices": yes}, "lambda": {"low": 0.1, "high": 0.2}}
    assert plan_of(tmp_path, arms=..., search={"space": space}, controls=False).sweep.controls == "off"


def test_a_condition_keeps_lambda_to_where_the_loss_is_on(tmp_path: Path) -> None:
    grid = {"aux_focal": [True, False], "lambda": [0.05, 0.1], "optim.dense.lr": [0.001, 0.003]}
    plan = plan_of(tmp_path, arms={"grid": grid, "where": {"lambda": {"aux_focal": True}}})
    # 2 x 2 with the loss on; off, the rates alone, of which 0.003 is the baseline itself
    assert len(plan.arms) - 1 == 2 * 2 + 2 - 1
    assert len({arm.name for arm in plan.arms}) == len(plan.arms)
    assert any("same run as baseline" in note for note in plan.notes)
    assert {arm.name for arm in plan.arms if "lr 0.001" in arm.name} == {
        "l.05 g1 w2000 lr 0.001", "l.1 g1 w2000 lr 0.001", "lr 0.001"
    }  # fmt: skip


def test_the_identity_is_of_what_is_run_and_on_what(tmp_path: Path) -> None:
    one = plan_of(tmp_path)
    spelt = [{"loss": {"aux_focal": {"gamma": 2, "lambda": "1e-1"}}}, {"lambda": 5e-2}]
    off = {"loss.aux_focal.enabled": False}
    same = plan_of(tmp_path, arms=spelt, baseline=off, metric="test/auc_ctr", jobs=4, title="other")
    assert one.identity("d") == same.identity("d")
    others = [plan_of(tmp_path, seeds=[0, 1]), plan_of(tmp_path, arms=[{"lambda": 0.05}]),
              plan_of(tmp_path, settings={"max_steps": 7}), plan_of(tmp_path, share_prefix=False)]  # fmt: skip
    identities = {plan.identity("d") for plan in (one, *others)} | {one.identity("e")}
    assert len(identities) == 6
    assert plan_of(tmp_path, settings={"output_dir": "elsewhere", "tracking.log_every": 9}).identity() == one.identity()


def test_the_identity_of_sequential_seeds_is_the_question(tmp_path: Path) -> None:
    few, many = {"first": 3, "most": 8}, {"first": 5, "most": 20}
    one = plan_of(tmp_path, seeds=few)
    same = plan_of(tmp_path, seeds=many, arms=[{"lambda": 0.2}], margin=0.001, jobs=4, title="other")
    assert one.identity("d") == same.identity("d") == one.question("d") == plan_of(tmp_path).question("d")
    others = [plan_of(tmp_path, seeds=few, metric="test/auc_ctr"), plan_of(tmp_path, seeds=few, mode="min"),
              plan_of(tmp_path, seeds=few, baseline={"aux_focal": False, "optim.dense.lr": 0.1}),
              plan_of(tmp_path, seeds=few, share_prefix=False),
              plan_of(tmp_path, seeds=few, settings={"experiment": "x"})]  # fmt: skip
    assert len({plan.identity("d") for plan in (one, *others)} | {one.identity("e")}) == 7
    assert plan_of(tmp_path).identity("d") not in {one.identity("d"), plan_of(tmp_path, seeds=[0, 1]).identity("d")}


def test_the_number_of_sequential_seeds_can_be_typed(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    for written, expected in {None: (3, 12), "{first: 5, most: 8}": (5, 12), "[0, 1]": (3, 12)}.items():
        seeds = {"seeds": yaml.safe_load(written)} if written else {}
        file.write_text(yaml.safe_dump(SWEEP | seeds))
        typed = load(SweepConfig, file, {"seeds.most": "12", "margin": "0.01"})
        assert (typed.looks[0], typed.looks[-1]) == expected
        assert typed.all_seeds == tuple(range(12))
    assert load(SweepConfig, file).looks == (2,)


def test_what_arms_share_is_the_run_until_the_gate(tmp_path: Path) -> None:
    late = {"loss.late_pos_weight.ctcvr": 0.1}  # from step 2000
    plan = plan_of(tmp_path, arms=[{"lambda": 0.05}, {"gamma": 2}, {"warmup_steps": 1500}, {"optim.dense.lr": 0.001},
                                   {"aux_focal": False} | late, {"warmup_steps": 1500} | late,
                                   {"warmup_steps": 2500} | late,
                                   {"loss.aux_focal.log_components": False}])  # fmt: skip
    prefixes = [arm.config.shared_prefix() for arm in plan.arms]
    assert [step for _, step in prefixes] == [
        None,
        2000,
        2000,
        1500,
        2000,
        2000,
        1500,
        2000,
        2000,
    ]  # the earlier of two
    prints = [config.fingerprint() for config, _ in prefixes]
    assert len({prints[0], *prints[1:4], *prints[5:8]}) == 1
    assert len({prints[0], prints[4], prints[8]}) == 3  # what is logged is shared, too
    assert prefixes[0][0].fingerprint() == plan.baseline.config.fingerprint()


def test_arms_branch_at_their_own_gates_from_what_logs_as_they_do(tmp_path: Path) -> None:
    arms = [{"warmup_steps": 300}, {"warmup_steps": 700}, {"warmup_steps": 500, "tracking.log_every": 5}]
    plan = plan_of(tmp_path, arms=arms, seeds=[0, 1], settings={"output_dir": str(tmp_path)})
    context = SweepContext("5eed", "d" * 64, plan, tmp_path, workers=None, stored={})  # type: ignore[arg-type]
    requests = [job.request for job in ArmRuns(context).jobs(plan.arms, [0, 1])]
    trained = [request for request in requests if isinstance(request, TrainPrefix)]
    assert [sorted(request.folders) for request in trained] == [["300", "700"]] * 2  # a prefix a seed
    assert not set(trained[0].folders.values()) & set(trained[1].folders.values())
    runs = [request for request in requests if isinstance(request, TrainRun)]
    for seed, prefix in enumerate(trained):
        wanted = [prefix.folders["700"], prefix.folders["300"], prefix.folders["700"], None]
        assert [run.prefix for run in runs[4 * seed : 4 * seed + 4]] == wanted
    assert [run.tags.get("branch_step") for run in runs] == ["700", "300", "700", None] * 2


def test_a_control_adds_lambda_to_the_weight_of_conversions_from_the_gate_on(tmp_path: Path) -> None:
    arms = [{"lambda": 0.05}, {"lambda": 0.05, "gamma": 2}, {"lambda": 0.2, "warmup_steps": 100}, {"lambda": 0}]
    plan = plan_of(tmp_path, arms=arms, controls="reweight")
    controls = {arm.control_of: arm.config for arm in plan.arms if arm.role == "control"}
    assert set(controls) == {("l.05 g1 w2000", "l.05 g2 w2000"), ("l.2 g1 w100",)}  # gamma makes no other control
    loss = controls["l.2 g1 w100",].loss  # type: ignore[attr-defined]
    assert not loss.aux_focal.enabled
    assert loss.ctcvr_pos_weight(99) == 300
    assert loss.ctcvr_pos_weight(100) == pytest.approx(300.2)
    assert loss.pos_weight("ctr") == 24.7
    assert [arm.name for arm in plan.arms if arm.role == "control"] == ["w+.05 w2000", "w+.2 w100"]


def test_an_arm_that_is_a_control_already_is_not_run_twice(tmp_path: Path) -> None:
    arms = [{"lambda": 0.1}, {"name": "mine", "aux_focal": False, "loss.late_pos_weight.ctcvr": 0.1}]
    plan = plan_of(tmp_path, arms=arms, controls="reweight")
    assert [(arm.name, arm.role) for arm in plan.arms] == [
        ("baseline", "baseline"), ("l.1 g1 w2000", "arm"), ("mine", "arm")
    ]  # fmt: skip


def test_a_control_is_not_warned_of_the_focal_settings_it_lacks(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, arms=[{"lambda": 0.1, "max_steps": 5000}], controls="reweight")
    control = plan.arms[-1]
    assert control.role == "control"
    assert control.overridden == {"training.max_steps"}
    assert not [text for text in control.config.warnings(control.overridden) if "no effect" in text]


def test_what_is_typed_goes_to_every_run(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"max_steps": "7", "warmup_steps": "3"}, settings={"training": {"max_steps": 100}},
                   arms=[{"lambda": 0.05, "warmup_steps": 2000}, {"lambda": 0.1, "warmup_steps": 2000}])  # fmt: skip
    assert {arm.config.training.max_steps for arm in plan.arms} == {7}
    assert {arm.config.loss.aux_focal.warmup_steps for arm in plan.arms} == {3}  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"loss\.aux_focal\.lambda: the arms .* differ in it \(0\.05, 0\.1\)"):
        plan_of(tmp_path, {"lambda": "0.3"}, arms=[{"lambda": 0.05}, {"lambda": 0.1}])


def test_decisive_settings_and_only_those_make_a_run_another(tmp_path: Path) -> None:
    base = load(MmoeConfig, ROOT / "configs/mtl_mmoe.yaml", {})
    same = {"output_dir": "x", "run_name": "x", "experiment": "x", "device": "cpu", "tracking.log_every": "5",
            "model.calibrate": "false"}  # fmt: skip
    assert load(MmoeConfig, ROOT / "configs/mtl_mmoe.yaml", same).fingerprint("d") == base.fingerprint("d")
    for key, value in {"seed": "1", "training.threads": "2", "loss.aux_focal.lambda": "0.11"}.items():
        assert load(MmoeConfig, ROOT / "configs/mtl_mmoe.yaml", {key: value}).fingerprint("d") != base.fingerprint("d")
    assert base.fingerprint("e") != base.fingerprint("d")


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"arms": [{"lamda": 0.1}]}, ["arm 1", "unknown key lamda", "did you mean lambda"]),
    (
        {"arms": [], "search": {"trails": 3}},
        ["search.space is required", "unknown key search.trails; did you mean search.trials?"],
    ),
    ({"arms": [{"lambda": "abc"}]}, ["arm 1", "lambda", "'abc'", "number >= 0"]),
    ({"arms": [{"lambda": -1}]}, ["arm 1", "lambda", "found -1", ">= 0"]),
    ({"baseline": {"loss": {"aux_focal": {"lamda": 1}}}}, ["baseline", "loss.aux_focal.lamda", "lambda"]),
    ({"settings": {"max_stepz": 1}}, ["settings", "max_stepz", "max_steps"]),
    ({"settings": {"seed": 1}}, ["seed", "seeds"]),
    ({"arms": [{"seed": 1}]}, ["arm 1", "seed", "seeds"]),
    ({"arms": []}, ["arms is empty"]),
    ({"arms": {"grid": {}}}, ["arms.grid is empty"]),
    ({"arms": {"grid": {"lambda": []}}}, ["arms.grid.lambda is empty"]),
    ({"arms": {"grid": {"lambda": [0.1]}, "where": {"lambda": {"aux": True}}}}, ["arms.where", "aux"]),
    ({"arms": {"grid": {"aux_focal": [False]}}}, ["nothing beside the baseline"]),
    ({"arms": [{"lambda": 0.1}, {"loss.aux_focal.lambda": 1e-1}]}, ["same settings as"]),
    ({"arms": [{"aux_focal": False}]}, ["same settings as baseline"]),
    ({"arms": [{"name": "x", "lambda": 0.1}, {"name": "x", "lambda": 0.2}]}, ["two arms are called x"]),
    ({"arms": [{"name": 3, "lambda": 0.1}]}, ["arm 1", "name", "text"]),
    ({"arms": ...}, ["arms or search"]),
    ({"baseline": ...}, ["baseline is required"]),
    ({"seeds": []}, ["seeds", "at least 1"]),
    ({"seeds": [1, 1]}, ["seeds", "twice"]),
    ({"seeds": [-1]}, ["seeds", ">= 0"]),
    ({"seeds": {"first": 3, "most": 9}}, ["seeds", "first and most: each one of 3, 5, 8, 12, 20, 32, 50, 80"]),
    ({"seeds": {"frist": 3}}, ["seeds", "frist", "first and most"]),
    ({"seeds": {"first": 8, "most": 5}}, ["seeds", "first <= most"]),
    ({"margin": 0.1}, ["margin: found 0.1 with a list of seeds", "{first, most}"]),
    ({"margin": 0, "seeds": {"first": 3}}, ["margin: found 0", "> 0"]),
    (
        {"arms": ..., "search": {"seed": 7, "space": {"lambda": {"low": 0, "high": 1}}}, "seeds": {"most": 8}},
        ["search.seed 7"],
    ),
    ({"jobs": 0}, ["jobs", ">= 1"]),
    ({"task": "train"}, ["task", "train_mmoe, train_visobert"]),
    ({"metric": "auc"}, ["metric", "valid|test"]),
    ({"controls": "reweigh"}, ["controls", "off, reweight"]),
    ({"controls": "reweight", "arms": [{"lambda": 0}]}, ["controls", "no arm has a control"]),
    ({"config": "nowhere.yaml"}, ["nowhere.yaml", "No such file"]),
    ({"arm": [{}]}, ["unknown key arm", "arms"]),
    ({"search": {"space": {"lambda": {"low": 0, "high": 1}}}}, ["arms or search"]),
    ({"arms": ..., "search": {"space": {"lambda": {"low": 2, "high": 1}}}}, ["low <= high"]),
    ({"arms": ..., "search": {"space": {"lambda": {"low": -1, "high": 1}}}}, ["search.space", "lambda", ">= 0"]),
    ({"arms": ..., "search": {"space": {"lamda": {"low": 0, "high": 1}}}}, ["search.space", "lamda", "lambda"]),
    ({"arms": ..., "search": {"space": {"lambda": {"low": 0, "high": 1, "log": True}}}}, ["log needs low > 0"]),
    ({"arms": ..., "search": {"space": {}}}, ["search"]),
    (
        {"arms": ..., "search": {"space": {"gamma": {"low": 0.5, "high": 8, "log": True, "integer": True}}}},
        ["log needs low > 0, as a whole number"],
    ),
    ({"arms": ..., "search": {"space": {"seed": {"low": 1, "high": 8, "integer": True}}}}, ["search.space", "seed"]),
    (
        {
            "arms": ...,
            "search": {"space": {"lambda": {"low": 0, "high": 1}, "loss.aux_focal.lambda": {"low": 0, "high": 1}}},
        },
        ["lambda appears twice"],
    ),
    ({"arms": {"grid": {"lambda": [datetime.date(2020, 1, 1)]}}}, ["arms.grid", "lambda", "2020-01-01"]),
    ({"arms": ..., "search": {"seed": 1, "space": {"lambda": {"low": 0, "high": 1}}}}, ["search.seed 1"]),
    (
        {"arms": ..., "search": {"space": {"lambda": {"low": 0, "high": 1}}, "storage": "postgresql://u:secret@h/d"}},
        ["sweep.yaml: unknown key search.storage; did you mean search."],
    ),
]


@pytest.mark.parametrize(("changes", "parts"), BAD, ids=lambda value: str(value)[:60])
def test_bad_sweeps_are_one_line_that_says_where(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert all(text in message for text in parts), message
    assert len(message) < 400


def test_bad_sweeps_end_with_code_2_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call_pipeline: Call
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(SWEEP | {"config": str(ROOT / "configs/mtl_mmoe.yaml")}))
    for arguments, message in {
        ("--lamda", "0.1"): "unknown key lamda; did you mean lambda?",
        ("--max_steps",): "--max_steps needs a value",
        ("stray",): "found stray, allowed: --key value",
        ("--job", "2"): "unknown key job; did you mean jobs?",
        ("--max_steps", "0"): "max_steps",
        ("--tracking.enabled", "false"): "tracking.enabled is false, allowed: true",
        ("--resume", "auto"): "resume and fork are for single runs",
    }.items():
        result = call_pipeline("sweep", "--config", str(file), *arguments)
        assert result.returncode == 2, result.stderr
        assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1, result.stderr
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]
