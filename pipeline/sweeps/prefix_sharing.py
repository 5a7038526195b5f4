"""Which runs of a seed share a prefix: those that are identical until a gate opens."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config.run_config import RunConfig
from pipeline.sweeps.sweep_plan import Arm


@dataclass(frozen=True)
class PrefixGroup:
    """Arms whose runs with one seed share a prefix."""

    key: str  # hash of the prefix's config and data
    config: RunConfig  # of the prefix
    branch_steps: dict[str, int]  # arm -> step at which its run leaves the prefix
    saved_steps: tuple[int, ...]  # steps at which the prefix's state is saved, ascending

    def computed_steps(self, run_steps: int) -> int:
        """Optimizer steps of the prefix and of all its runs, each of which has `run_steps`."""
        branches = [min(step, run_steps) for step in self.branch_steps.values()]
        return max(branches) + sum(run_steps - step for step in branches)


def prefix_groups(arms: Sequence[Arm], seed: int, data_digest: str) -> list[PrefixGroup]:
    """The groups of arms that can share a prefix with this seed; a group may consist of one arm."""
    groups: dict[str, list[tuple[Arm, RunConfig, int | None]]] = {}
    for arm in arms:
        config, step = arm.at(seed).shared_prefix()
        key = config.fingerprint(f"{data_digest} {config.tracking} {config.device}")
        groups.setdefault(key, []).append((arm, config, step))
    shared = []
    for key, group in groups.items():
        steps = sorted({step for _, _, step in group if step})
        sharing = [entry for entry in group if entry[2] != 0]
        if steps:
            branches = {arm.name: step or steps[-1] for arm, _, step in sharing}
            shared.append(PrefixGroup(key, sharing[0][1], branches, tuple(steps)))
    return shared
