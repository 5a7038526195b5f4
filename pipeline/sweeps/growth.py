"""How a sweep grows: the arms that a start adds become a family."""

from collections.abc import Sequence
from dataclasses import replace

from pipeline.comparison.families import Family
from pipeline.errors import UserError
from pipeline.maths.sequential import LEVEL, nominal_level, scheduled_looks
from pipeline.sweeps.sweep_plan import Arm, Plan

SETTINGS_LENGTH = 16  # characters of the hash of an arm's settings


def grown(families: Sequence[Family], plan: Plan) -> tuple[Family, ...]:
    """Add the arms of the plan that no earlier start has added to the sweep's families, as a family of their own.

    A larger number of seeds extends the looks of every family; the levels stay. Fixed seeds make one family, since the
    same sweep never has other arms.

    Raises:
        UserError: an arm has the name of an earlier one with other settings, or its settings under another name.
    """
    settings = {arm.name: _settings(arm) for arm in plan.arms if arm.role == "arm"}
    looks = plan.sweep.looks
    if not plan.sweep.is_sequential:
        return (Family(tuple(settings), LEVEL / len(settings), looks, tuple(settings.values())),)
    known = _known(families)
    for name, own in settings.items():
        if known.get(name, own) != own:
            raise UserError(f"arm {name} has other settings than the arm of that name which this sweep has tried; "
                            "allowed: another name")  # fmt: skip
        earlier = next((other for other, kept in known.items() if kept == own and other != name), None)
        if earlier:
            raise UserError(f"arm {name} has the settings of arm {earlier}, which this sweep has tried; allowed: its "
                            f"name, {earlier}")  # fmt: skip
    extended = [replace(family, looks=scheduled_looks(family.looks[0], max(family.looks[-1], looks[-1])))
                for family in families]  # fmt: skip
    added = {name: own for name, own in settings.items() if name not in known}
    if added:
        extended.append(Family(tuple(added), nominal_level(len(added)), looks, tuple(added.values())))
    return tuple(extended)


def with_known_name(families: Sequence[Family], arm: Arm) -> Arm:
    """Give an arm that a search chose the name under which the sweep has tried its settings, or else a free name."""
    known, own = _known(families), _settings(arm)
    names = [name for name, settings in known.items() if settings == own]
    names += [name for name in (arm.name, *(f"{arm.name} {n}" for n in range(2, len(known) + 3))) if name not in known]
    return replace(arm, name=names[0])


def _known(families: Sequence[Family]) -> dict[str, str]:
    """Map each arm that the sweep has tried to the hash of its settings."""
    return {name: own for family in families for name, own in zip(family.arms, family.settings, strict=True)}


def _settings(arm: Arm) -> str:
    return arm.config.fingerprint()[:SETTINGS_LENGTH]
