"""Sweeps that add seeds until their arms are decided, with workers that train nothing."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t
from test_sweep_plan import plan_of

from pipeline.comparison.families import Family, families_of
from pipeline.errors import UserError
from pipeline.maths.sequential import nominal_level
from pipeline.names import WEIGHTS_DIGEST
from pipeline.sweeps.arm_runs import ArmRuns
from pipeline.sweeps.growth import grown, with_known_name
from pipeline.sweeps.jobs import Job, SweepContext
from pipeline.sweeps.requests import JobFailed, PrefixTrained, RunTrained, TrainPrefix, TrainRun
from pipeline.sweeps.rounds import train_in_rounds
from pipeline.sweeps.sweep_plan import Plan
from pipeline.tracking.messages import StoredRun

DIGEST = "d" * 64
METRIC = "test/auc_ctcvr"
WIGGLE = (0.0, 1e-4, -1e-4)  # of the differences of arms that are decided at once: t is above 1,000 at 3 seeds
DIFFERENCES: dict[str, Callable[[int], float | None]] = {  # arm -> seed -> difference to the baseline; None: it fails
    "better": lambda seed: 0.1 + WIGGLE[seed % 3],
    "worse": lambda seed: -0.1 + WIGGLE[seed % 3],
    "equal": lambda seed: WIGGLE[seed % 3],
    "noisy": lambda seed: (-1.0) ** seed,
    "late": lambda seed: 0.1 if seed >= 5 else (-0.1, 0.1, 0.0)[seed % 3],
    "early best": lambda seed: 0.0,  # noqa: ARG005 (the same scores, other last weights)
    "zero": lambda seed: 0.0,  # noqa: ARG005
    "fails": lambda seed: None if seed == 4 else (-1.0) ** seed,
}
LAMBDA = {name: number / 100 for number, name in enumerate(DIFFERENCES, 1)}
Key = tuple[str, int]


class FakeWorkers:
    """Workers whose runs have the given metric."""

    def __init__(self, most_runs: float = float("inf")) -> None:
        """most_runs: after so many, the launcher is killed."""
        self.trained: list[Key] = []
        self.prefixes: list[str] = []
        self.most_runs = most_runs

    def work(self, jobs: list[Job], on_progress: object = None) -> None:  # noqa: ARG002
        for job in jobs:
            request = job.request
            if isinstance(request, TrainPrefix):
                self.prefixes.append(job.name)
                job.reply = PrefixTrained(steps=max(map(int, request.folders)))
            else:
                assert isinstance(request, TrainRun)
                assert job.needs is None or job.needs.reply
                if len(self.trained) == self.most_runs:
                    raise KeyboardInterrupt
                job.reply = self.train(request)
            job.finished(job)

    def train(self, request: TrainRun) -> RunTrained | JobFailed:
        arm, seed = request.tags["arm"], int(request.name.rpartition(" s")[2])
        self.trained.append((arm, seed))
        difference = DIFFERENCES.get(arm, lambda _: 0.0)(seed)
        if difference is None:
            return JobFailed(error="it diverged")
        return RunTrained(run_id=request.name, metrics={METRIC: 0.5 + seed / 100 + difference}, steps=3000,
                          weights_digest=f"{'baseline' if arm == 'zero' else arm} {seed}")  # fmt: skip


def plan_with(folder: Path, arms: Iterable[str], most: int = 8, first: int = 3, **changes: Any) -> Plan:
    listed = [{"name": arm, "lambda": LAMBDA[arm]} for arm in arms]
    return plan_of(folder, arms=listed, seeds={"first": first, "most": most}, **changes)


def runs_with(plan: Plan, workers: FakeWorkers, stored: dict[str, StoredRun] | None = None) -> ArmRuns:
    context = SweepContext("5eed", DIGEST, plan, Path("nowhere"), workers, stored or {})  # type: ignore[arg-type]
    return ArmRuns(context)


def stored_runs(plan: Plan, trained: ArmRuns) -> dict[str, StoredRun]:
    """What the tracking store has of the runs that finished: run key -> run."""
    arms = {arm.name: arm for arm in plan.arms}
    runs = {}
    for (name, seed), result in trained.results.items():
        tags = {"arm": name, WEIGHTS_DIGEST: result.weights_digest}
        tags |= trained._membership(arms[name]).to_tags("5eed")
        run = StoredRun(f"{name} s{seed}", f"{name} s{seed}", "FINISHED", 0, "", {}, result.metrics, tags)
        runs[arms[name].at(seed).fingerprint(DIGEST)] = run
    return runs


def seeds_of(trained: list[Key]) -> dict[str, int]:
    """Arm -> number of its seeds, which are 0, 1, ..., each once."""
    counts = {arm: sorted(seed for name, seed in trained if name == arm) for arm, _ in trained}
    assert all(seeds == list(range(len(seeds))) for seeds in counts.values())
    return {arm: len(seeds) for arm, seeds in counts.items()}


def test_each_arm_gets_the_seeds_that_decide_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["better", "worse", "equal", "noisy", "early best", "zero"]
    plan, workers = plan_with(tmp_path, arms, margin=0.01), FakeWorkers()
    looks = train_in_rounds(plan, grown((), plan), runs_with(plan, workers))
    assert {arm: own[-1].decision for arm, own in looks.items()} == {
        "better": "better", "worse": "worse", "equal": "equal within the margin", "noisy": None, "early best": None,
        "zero": "identical",
    }  # fmt: skip
    assert seeds_of(workers.trained) == {"baseline": 8, "noisy": 8, "early best": 8} | dict.fromkeys(
        ["better", "worse", "equal", "zero"], 3
    )
    assert [look.seeds for look in looks["noisy"]] == [3, 5, 8]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("look", "not"))]
    half = t.isf(nominal_level(6) / 2, 2) * 1e-4 / math.sqrt(3)  # about .0016
    assert lines[0].startswith(f"look at 3 seeds: better is better +0.1000 (+{0.1 - half:.4f} to +{0.1 + half:.4f}); "
                               "worse is worse \N{MINUS SIGN}0.1000")  # fmt: skip
    assert lines[0].endswith("zero is identical; open: noisy, early best")
    assert lines[1:] == [
        "look at 5 seeds: open: noisy, early best",
        "look at 8 seeds: open: noisy, early best",
        "not distinguishable with 8 seeds: noisy, early best; a larger seeds.most continues the sweep",
    ]
    assert workers.prefixes == [f"shared prefix s{seed}" for seed in range(8)]  # one a seed, for the arms of its round


def test_lower_may_be_better(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, ["better", "worse"], mode="min")
    looks = train_in_rounds(plan, grown((), plan), runs_with(plan, FakeWorkers()))
    assert {arm: own[-1].decision for arm, own in looks.items()} == {"better": "worse", "worse": "better"}


def test_without_a_margin_nothing_is_equal(tmp_path: Path) -> None:
    plan, workers = plan_with(tmp_path, ["equal"], most=5), FakeWorkers()
    assert train_in_rounds(plan, grown((), plan), runs_with(plan, workers))["equal"][-1].decision is None
    assert seeds_of(workers.trained) == {"baseline": 5, "equal": 5}


def test_a_failed_seed_leaves_its_arm_open_and_trains_no_more_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, workers = plan_with(tmp_path, ["fails", "noisy"]), FakeWorkers()
    runs = runs_with(plan, workers)
    looks = train_in_rounds(plan, grown((), plan), runs)
    assert [look.seeds for look in looks["fails"]] == [3]  # the look at 5 needs the seed that failed
    assert looks["fails"][-1].decision is None
    assert seeds_of(workers.trained) == {"baseline": 8, "noisy": 8, "fails": 5}
    assert runs.failures == {("fails", 4): "it diverged"}
    assert "look at 5 seeds: open: noisy; not looked at, since a seed failed: fails" in capsys.readouterr().err


def test_a_failed_baseline_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIFFERENCES, "baseline", DIFFERENCES["fails"])
    plan, workers = plan_with(tmp_path, ["noisy", "late"], most=20), FakeWorkers()
    looks = train_in_rounds(plan, grown((), plan), runs_with(plan, workers))
    assert {arm: own[-1].seeds for arm, own in looks.items()} == {"noisy": 3, "late": 3}
    assert seeds_of(workers.trained) == dict.fromkeys(["baseline", "noisy", "late"], 5)


def test_a_metric_that_is_no_number_is_no_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIFFERENCES, "noisy", lambda seed: float("nan") if seed == 1 else 0.1)
    plan = plan_with(tmp_path, ["noisy"])
    assert train_in_rounds(plan, grown((), plan), runs_with(plan, FakeWorkers())) == {"noisy": ()}


def test_controls_are_trained_while_one_of_their_arms_is_open(tmp_path: Path) -> None:
    arms = [
        {"name": "better", "lambda": 0.1},
        {"name": "noisy", "lambda": 0.1, "gamma": 2},
        {"name": "worse", "lambda": 0.2},
    ]
    plan = plan_of(tmp_path, arms=arms, controls="reweight", seeds={"most": 5})
    assert [arm.control_of for arm in plan.arms if arm.role == "control"] == [("better", "noisy"), ("worse",)]
    workers = FakeWorkers()
    families = grown((), plan)
    assert families[0].arms == ("better", "noisy", "worse")
    train_in_rounds(plan, families, runs_with(plan, workers))
    assert seeds_of(workers.trained) == {"baseline": 5, "better": 3, "noisy": 5, "worse": 3, "w+.1 w2000": 5,
                                         "w+.2 w2000": 3}  # fmt: skip


def test_killed_anywhere_it_comes_to_the_same_decisions_and_trains_nothing_twice(tmp_path: Path) -> None:
    """Before the first run, in the first round, between two rounds, in the last one, and after the last run."""
    plan = plan_with(tmp_path, ["better", "late", "noisy"])
    families = grown((), plan)
    undisturbed = FakeWorkers()
    expected = train_in_rounds(plan, families, runs_with(plan, undisturbed))
    assert len(undisturbed.trained) == 27  # 3 seeds of 4 arms, then 5 of 3
    recorded = families_of({f"family_{number}": family.to_tag() for number, family in enumerate(families, 1)})
    for killed_after in (0, 5, 12, 26, 27):
        first, again = FakeWorkers(killed_after), FakeWorkers()
        runs = runs_with(plan, first)
        with pytest.raises(KeyboardInterrupt) if killed_after < 27 else nullcontext():
            train_in_rounds(plan, families, runs)
        resumed = runs_with(plan, again, stored_runs(plan, runs))
        assert train_in_rounds(plan, grown(recorded, plan), resumed) == expected
        assert sorted(first.trained + again.trained) == sorted(undisturbed.trained)


def test_more_arms_and_more_seeds_continue_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []  # runs whose arm has another position in the file
    monkeypatch.setattr("pipeline.sweeps.arm_runs.tag_run", lambda run_id, _: moved.append(run_id))
    one, first = plan_with(tmp_path, ["better", "noisy", "zero"], most=5), FakeWorkers()
    families = grown((), one)
    runs = runs_with(one, first)
    train_in_rounds(one, families, runs)
    stored = stored_runs(one, runs)

    two, second = plan_with(tmp_path, ["better", "noisy", "zero", "worse", "late"], most=8), FakeWorkers()
    more = grown(families, two)
    assert [family.arms for family in more] == [("better", "noisy", "zero"), ("worse", "late")]
    assert [family.level for family in more] == [nominal_level(3), nominal_level(2)]
    assert [family.looks for family in more] == [(3, 5, 8), (3, 5, 8)]
    runs = runs_with(two, second, stored)
    # "late" has no mean difference over the first 3 seeds, and a wide interval at all looks up to 8
    assert {arm: own[-1].decision for arm, own in train_in_rounds(two, more, runs).items()} == {
        "better": "better", "noisy": None, "zero": "identical", "worse": "worse", "late": None,
    }  # fmt: skip
    assert sorted(second.trained) == sorted(
        [("baseline", seed) for seed in range(5, 8)] + [("noisy", seed) for seed in range(5, 8)]
        + [("worse", seed) for seed in range(3)] + [("late", seed) for seed in range(8)]
    )  # fmt: skip
    assert grown(more, two) == more  # the same file again adds nothing
    assert grown(more, one) == more  # fewer seeds and arms take nothing back

    alone, third = plan_with(tmp_path, ["noisy"], most=12), FakeWorkers()  # the others left the file
    final = grown(more, alone)
    assert [family.looks for family in final] == [(3, 5, 8, 12)] * 2
    train_in_rounds(alone, final, runs_with(alone, third, stored | stored_runs(two, runs)))
    assert sorted(third.trained) == sorted((arm, seed) for arm in ("baseline", "noisy") for seed in range(8, 12))
    assert moved == [f"noisy s{seed}" for seed in range(8)]


def test_a_family_keeps_its_first_look(tmp_path: Path) -> None:
    families = grown((), plan_with(tmp_path, ["noisy"], first=5, most=5))
    assert families[0].looks == (5,)
    assert [family.looks for family in grown(families, plan_with(tmp_path, ["noisy", "zero"], most=12))] == [
        (5, 8, 12), (3, 5, 8, 12)
    ]  # fmt: skip


def test_a_name_keeps_its_settings(tmp_path: Path) -> None:
    families = grown((), plan_with(tmp_path, ["noisy", "zero"]))
    seeds = {"first": 3, "most": 8}
    other = plan_of(tmp_path, arms=[{"name": "noisy", "lambda": 0.9}], seeds=seeds)
    with pytest.raises(UserError, match=r"^arm noisy has other settings than .* allowed: another name$"):
        grown(families, other)
    renamed = plan_of(tmp_path, arms=[{"name": "loud", "lambda": LAMBDA["noisy"]}], seeds=seeds)
    with pytest.raises(UserError, match=r"^arm loud has the settings of arm noisy, .* allowed: its name, noisy$"):
        grown(families, renamed)
    # an arm that a search finds again gets its name back; another one with that name gets a free one
    assert with_known_name(families, renamed.arms[1]).name == "noisy"
    assert with_known_name(families, other.arms[1]).name == "noisy 2"
    assert with_known_name((), other.arms[1]).name == "noisy"


def test_a_list_of_seeds_is_one_family(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, seeds=[4, 7, 9], controls="reweight")
    (family,) = grown((), plan)
    assert (family.arms, family.level, family.looks) == (("l.05 g1 w2000", "l.1 g2 w2000"), 0.025, (3,))
    assert Family.from_tag(family.to_tag()) == family
