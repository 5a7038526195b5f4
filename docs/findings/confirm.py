"""What a second sweep, on other seeds, confirms: one-sided t tests with Holm's adjustment over all of them (Holm 1979).

python docs/findings/confirm.py [EXPERIMENT]

Of each arm that a sweep with `seeds: {first, most}` called better or worse, the sweep with a list of seeds on the same
metric and data is looked up; none of its seeds is one of the first sweep. An arm without such a sweep is listed, too.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress

import pandas as pd
from scipy.stats import ttest_1samp

from pipeline.comparison.results import ArmResult, Comparison
from pipeline.comparison.verdicts import compare, load_runs, load_sweeps
from pipeline.errors import UserError

SEEDS = 10  # of a second sweep; with fewer finished it is not looked at


def confirmations(experiment: str) -> pd.DataFrame:
    """A row for each arm that was called better or worse."""
    results = list(finished(experiment))
    second = {(arm.name, result.metric, result.data_digest): (arm, result)
              for result in results if result.design == "fixed" for arm in result.arms}  # fmt: skip
    table = pd.DataFrame([
        {"metric": result.metric, "data": result.data_digest[:8], "arm": arm.name, "first": arm.verdict}
        | confirmation(arm, result, *second.get((arm.name, result.metric, result.data_digest), (None, None)))
        for result in results if result.design == "sequential"
        for arm in result.arms if arm.verdict.startswith(("better", "worse"))
    ])  # fmt: skip
    if "p" not in table:
        return table
    table = table.sort_values("p", ignore_index=True)
    tested = table["p"].notna()
    table["p (Holm)"] = (table["p"] * (tested.sum() - table.index)).clip(upper=1).cummax()
    return table.assign(confirmed=table["p (Holm)"].le(0.05).where(tested, "not tested"))


def finished(experiment: str) -> Iterator[Comparison]:
    """The sweeps of an experiment of which a run is finished."""
    for sweep in load_sweeps(experiment)["sweep_id"]:
        with suppress(UserError):
            yield compare(load_runs(sweep), new_rows=False)


def confirmation(
    first: ArmResult, sweep: Comparison, arm: ArmResult | None, second: Comparison | None
) -> dict[str, float]:
    """Number of seeds, mean difference and one-sided p of the second sweep, in the direction of the first."""
    if arm is None or second is None or arm.difference is None or set(arm.values) & set(first.values):
        return {}
    up = first.verdict.startswith("better") == (sweep.mode == "max")
    base = second.arms[0].values
    differences = [value - base[seed] for seed, value in arm.values.items() if seed in base]
    if len(differences) < SEEDS:
        return {}
    p = ttest_1samp(differences, 0, alternative="greater" if up else "less").pvalue
    return {"seeds": len(differences), "difference": arm.difference.mean, "p": float(p)}


if __name__ == "__main__":
    print(confirmations(*(sys.argv[1:] or ["findings"])).to_string(index=False))
