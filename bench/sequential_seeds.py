"""Error rates, power and cost of a sweep that adds seeds until its arms are decided, over simulated sweeps.

`python -m bench.sequential_seeds` prints the tables of docs/verdict.md. The unit is the standard deviation of the
differences arm - baseline. A run's metric is its effect plus noise of its own; all arms of a sweep share the noise of
the baseline's runs. Arrays of differences: [sweeps, arms, seeds].
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import t

from bench.figures import figure
from pipeline.maths.sequential import LEVEL, LOOKS, minimum_detectable_difference, nominal_level, scheduled_looks

Array = npt.NDArray[np.float64]
SWEEPS, CHUNK = 10_000, 2_000  # simulated sweeps a case; as many at a time in memory
ARMS = (1, 4, 10)
FIRST, MOST, LAST = LOOKS[0], 20, LOOKS[-1]
MARGIN, EFFECTS = 1.0, (0.0, 1.0, 2.0, 3.0)  # of the cost of an answer
STEPS, GATE = 3_125, 2_000  # optimizer steps of a run; those before the gate are the same for all arms of a seed
BETTER, WORSE, EQUAL, OPEN = 1, -1, 2, 0

NOISE: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {  # mean 0, variance 1
    "none": lambda _, shape: np.zeros(shape),
    "Gaussian": lambda random, shape: random.normal(size=shape),
    "t3": lambda random, shape: random.standard_t(3, size=shape) / np.sqrt(3),
    "exponential": lambda random, shape: random.exponential(size=shape) - 1,
    "log-normal": lambda random, shape: (random.lognormal(size=shape) - np.exp(0.5)) / np.sqrt(np.exp(2) - np.exp(1)),
}


class Answers(NamedTuple):
    """For each arm of each simulated sweep. [sweeps, arms]"""

    decision: npt.NDArray[np.int64]  # BETTER, WORSE, EQUAL, OPEN
    seeds: npt.NDArray[np.int64]  # trained

    def share(self, kind: int, arm: int = 0) -> float:
        return float((self.decision[:, arm] == kind).mean())

    def share_with_any(self, *kinds: int) -> float:
        """Share of sweeps with an arm that is decided so."""
        return float(np.isin(self.decision, kinds).any(1).mean())


class Design(NamedTuple):
    """A rule for training seeds and deciding."""

    name: str
    seeds: int  # at most
    decide: Callable[[Array], Answers]


def at_looks(differences: Array, schedule: Sequence[int], level: float, margin: float | None = None) -> Answers:
    """What `pipeline.maths.sequential.looks` decides, for all arms at once."""
    decision = np.full(differences.shape[:2], OPEN, dtype=np.int64)
    trained = np.full(differences.shape[:2], schedule[-1], dtype=np.int64)
    totals, squares = differences.cumsum(-1), (differences**2).cumsum(-1)
    for seeds in schedule:
        mean = totals[..., seeds - 1] / seeds
        variance = np.maximum(squares[..., seeds - 1] / seeds - mean**2, 0) / (seeds - 1)  # of the mean
        half = t.isf(level / 2, seeds - 1) * np.sqrt(variance)
        now = np.where(mean > half, BETTER, np.where(mean < -half, WORSE, OPEN))
        if margin is not None:
            now[(now == OPEN) & (np.abs(mean) + half < margin)] = EQUAL
        first = (decision == OPEN) & (now != OPEN) & (half > 0)
        decision[first], trained[first] = now[first], seeds
    return Answers(decision, trained)


def holm(differences: Array) -> Answers:
    """All seeds, by t tests in Holm's step-down procedure (1979)."""
    arms, seeds = differences.shape[1:]
    mean = differences.mean(-1)
    p = 2 * t.sf(np.abs(mean) * np.sqrt(seeds) / differences.std(-1, ddof=1), seeds - 1)
    order = p.argsort(1)
    passed = np.take_along_axis(p, order, 1) <= LEVEL / (arms - np.arange(arms))
    rejected = np.zeros_like(passed)
    np.put_along_axis(rejected, order, np.logical_and.accumulate(passed, 1), 1)
    decision = np.where(rejected, np.where(mean > 0, BETTER, WORSE), OPEN)
    return Answers(decision, np.full_like(decision, seeds))


def sequential(arms: int, most: int, margin: float | None = None) -> Design:
    level, schedule = nominal_level(arms), scheduled_looks(FIRST, most)
    return Design(f"looks at {FIRST} to {most}", most, lambda found: at_looks(found, schedule, level, margin))


def designs(arms: int) -> tuple[Design, ...]:
    """Designs without a margin. The last one is wrong: it does not pay for its looks."""
    each = range(FIRST, MOST + 1)
    return (
        sequential(arms, LAST),
        sequential(arms, MOST),
        Design(f"{MOST} seeds, Bonferroni", MOST, lambda found: at_looks(found, (MOST,), LEVEL / arms)),
        Design(f"{MOST} seeds, Holm", MOST, holm),
        Design("a look after every seed", MOST, lambda found: at_looks(found, each, LEVEL / arms)),
    )


def simulate(
    design: Design,
    effects: Sequence[float],
    noise: str = "Gaussian",
    baseline_noise: str = "Gaussian",
    sweeps: int = SWEEPS,
) -> Answers:
    """Answers of simulated sweeps."""
    random = np.random.default_rng(len(effects))
    spread = np.sqrt(2 - (noise == "none") - (baseline_noise == "none"))
    parts = []
    for _ in range(sweeps // CHUNK):
        own = NOISE[noise](random, (CHUNK, len(effects), design.seeds))
        shared = NOISE[baseline_noise](random, (CHUNK, 1, design.seeds))
        differences = (own - shared) / spread + np.array(effects)[:, None]
        parts.append(design.decide(differences))
    return Answers(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def false_claims(design: Design, arms: int, noise: str = "Gaussian", baseline_noise: str = "Gaussian") -> float:
    """Share of sweeps without an effect in which some arm is decided."""
    return simulate(design, [0.0] * arms, noise, baseline_noise).share_with_any(BETTER, WORSE)


def false_equals(arms: int, margin: float) -> float:
    """Share of sweeps with differences as large as the margin in which some arm is decided to be equal."""
    return simulate(sequential(arms, LAST, margin), [margin] * arms).share_with_any(EQUAL)


class Cost(NamedTuple):
    """Optimizer steps until all arms are decided, as shares of those of all arms trained whole on MOST seeds."""

    steps: float
    prefixes: float  # steps before the gate are shared, but no arm stops
    stopping: float  # arms stop, but share no steps
    answers: Answers


def mean_steps(seeds: npt.NDArray[np.int64], shared: int) -> float:
    """Optimizer steps of a sweep. seeds: [sweeps, arms]; the baseline trains as many as the last arm to be decided."""
    longest = seeds.max(1)
    return float((longest * shared + (longest + seeds.sum(1)) * (STEPS - shared)).mean())


def cost(effects: Sequence[float]) -> Cost:
    answers = simulate(sequential(len(effects), MOST, MARGIN), effects, sweeps=10 * SWEEPS)
    every = np.full((1, len(effects)), MOST)
    whole = mean_steps(every, 0)
    return Cost(
        steps=mean_steps(answers.seeds, GATE) / whole,
        prefixes=mean_steps(every, GATE) / whole,
        stopping=mean_steps(answers.seeds, 0) / whole,
        answers=answers,
    )


def cost_of_answer(_: object) -> None:
    """One sweep of four arms, whose effects are 0, 1, 2 and 3 standard deviations."""
    found, unit = cost(EFFECTS), f"of the steps of all arms whole on {MOST} seeds"
    figure("cost_of_answer", found.steps, unit)
    figure("cost_of_answer_prefixes", found.prefixes, unit)
    figure("cost_of_answer_stopping", found.stopping, unit)
    figure("power_of_answer", found.answers.share(BETTER, EFFECTS.index(1)), "of effects of 1 sd found")


def error_table() -> str:
    rows = [
        [str(arms), *(percent(false_claims(design, arms)) for design in designs(arms)),
         *(percent(false_equals(arms, margin)) for margin in (0.5, 0.7, 1.0))]
        for arms in ARMS
    ]  # fmt: skip
    names = [design.name for design in designs(1)]
    return table(["arms", *names, '"equal", margin 0.5 sd', "0.7 sd", "1 sd"], rows)


def noise_table() -> str:
    """Cells: looks to LAST / looks to MOST / Holm."""
    rows = []
    for noise in ("t3", "exponential", "log-normal"):
        sides = [(noise, "Gaussian"), ("Gaussian", noise), (noise, noise), (noise, "none"), ("none", noise)]
        for arm, baseline in sides:
            shares = [
                [percent(false_claims(designs(arms)[which], arms, arm, baseline)) for which in (0, 1, 3)]
                for arms in ARMS
            ]
            rows.append([arm, baseline, *(" / ".join(cells) for cells in shares)])
    return table(["arms", "baseline", *(f"{arms} arm{'s' * (arms > 1)}" for arms in ARMS)], rows)


def unchanged_table() -> str:
    """One arm: half of its differences are exactly 0, the others are 1 on average. The margin is the mean, 0.5."""
    random, cells = np.random.default_rng(0), {}
    for spread in (0.1, 0.5, 1.0, 2.0):
        differences = random.normal(1.0, spread, (SWEEPS, 1, LAST))
        differences[random.random(differences.shape) < 0.5] = 0.0
        answers = at_looks(differences, LOOKS, nominal_level(1), margin=0.5)
        cells[f"sd {spread:g}"] = percent(answers.share_with_any(EQUAL))
    return table(list(cells), [list(cells.values())])


def power_table() -> str:
    """One arm has an effect, the others none. Cells: share in which it is found, its mean number of seeds."""
    rows = []
    for arms in ARMS:
        for effect in (0.5, 1.0, 2.0, 3.0):
            found = [simulate(design, [effect, *[0.0] * (arms - 1)]) for design in designs(arms)[1:]]
            cells = [f"{percent(answers.share(BETTER))}, {answers.seeds[:, 0].mean():.1f}" for answers in found]
            rows.append([str(arms), f"{effect:g} sd", *cells])
    return table(["arms", "effect", *(design.name for design in designs(1)[1:])], rows)


def cost_table() -> str:
    rows = []
    for effects in (EFFECTS, *((effect,) * len(EFFECTS) for effect in EFFECTS)):
        found = cost(effects)
        shown = range(len(set(effects)))  # arms with the same effect are alike
        rows.append([
            ", ".join(f"{effect:g}" for effect in effects),
            *(f"{share:.3f}" for share in (found.steps, found.prefixes, found.stopping)),
            ", ".join(f"{found.answers.seeds[:, arm].mean():.1f}" for arm in shown),
            *(", ".join(percent(found.answers.share(kind, arm)) for arm in shown) for kind in (BETTER, EQUAL, OPEN)),
        ])  # fmt: skip
    names = ["effects, sd", "steps", "prefixes alone", "stopping alone", "mean seeds", "better", "equal", "open"]
    return table(names, rows)


def detectable_table() -> str:
    schedules = {most: scheduled_looks(FIRST, most) for most in LOOKS[1:]}
    rows = [
        [str(arms), *(f"{minimum_detectable_difference(1.0, schedule, nominal_level(arms)):.2f}"
                      for schedule in schedules.values())]
        for arms in ARMS
    ]  # fmt: skip
    return table(["arms", *(f"most: {most}" for most in schedules)], rows)


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows))


if __name__ == "__main__":
    for make in (error_table, noise_table, unchanged_table, power_table, cost_table, detectable_table):
        print(f"{make.__name__}\n\n{make()}\n", flush=True)
