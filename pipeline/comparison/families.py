"""Families of a sweep: arms that one start added, with the level of their intervals."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from pipeline.maths import sequential

FAMILY_TAG = "family_"  # tags of the summary run: family_1, family_2, ...


@dataclass(frozen=True)
class Family:
    """Arms that a start of a sweep added. The probability of any false claim about them is at most 5%."""

    arms: tuple[str, ...]  # names; controls and the baseline are no members
    level: float  # two-sided level of each member's interval, at each look
    looks: tuple[int, ...]  # numbers of seeds at which the members are looked at
    settings: tuple[str, ...] = ()  # hash of each member's settings: a name may not get others

    def to_tag(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_tag(cls, text: str) -> "Family":
        tree = json.loads(text)
        settings = tuple(tree.get("settings", ()))
        return cls(tuple(tree["arms"]), float(tree["level"]), tuple(tree["looks"]), settings)


def families_of(tags: Mapping[str, str]) -> tuple[Family, ...]:
    """The families in a summary run's tags, in the order of their numbers."""
    numbers = sorted(int(name.removeprefix(FAMILY_TAG)) for name in tags if name.startswith(FAMILY_TAG))
    return tuple(Family.from_tag(tags[f"{FAMILY_TAG}{number}"]) for number in numbers)


def arm_looks(  # noqa: PLR0917
    values: Mapping[int, float],
    baseline: Mapping[int, float],
    family: Family,
    mode: Literal["max", "min"],
    margin: float | None,
    digests: Mapping[int, tuple[str, str]],
) -> tuple[sequential.Look, ...]:
    """The looks at one arm of a family so far, at the scheduled numbers of seeds only.

    values, baseline: seed -> metric of the finished run, without a seed that has not finished or has failed.
    digests: seed -> digests of the last weights of the arm's run and of the baseline's.
    """
    seeds = range(family.looks[-1])
    pairs = ((values.get(seed), baseline.get(seed)) for seed in seeds)
    return sequential.looks(
        [None if own is None or reference is None else own - reference for own, reference in pairs],
        family.looks,
        family.level,
        higher_is_better=mode == "max",
        margin=margin,
        same_weights=[seed in digests and digests[seed][0] == digests[seed][1] for seed in seeds],
    )
