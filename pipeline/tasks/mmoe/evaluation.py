"""The metrics that an evaluation of impressions gives, and what the labels must have for each."""

from collections.abc import Mapping

from pipeline.data.schema import DataSchema, Split
from pipeline.names import CALIBRATED

SPLIT_FILES = {"valid": "validation", "test": "test"}
EVENTS = ("ctr", "cvr", "ctcvr")
EVALUATED_GAMMAS = (1, 2)  # the same for every arm, whatever its own
DEPEND_ON_CALIBRATION = ("ece", "logloss", "calibration")
REQUIRED = "a conversion, more clicks than conversions, more rows than clicks"  # for a calibration, of validation
COMMON_LOSSES = {
    "ctr": ["loss_ctr"],
    "cvr": ["loss_cvr_aux"],
    "ctcvr": ["loss_ctcvr_bce", *(f"loss_ctcvr_focal_g{gamma}" for gamma in EVALUATED_GAMMAS)],
}


def known_metrics(schema: DataSchema, split: str, calibrated: bool) -> dict[str, str]:
    """Every metric of a split (`valid` or `test`) -> what its labels lack for it, "" where nothing."""
    name = SPLIT_FILES[split]
    there = _counts(schema.splits.get(name))
    found: dict[str, str] = {}
    for event, happened, among in (("ctr", "clicks", "rows"), ("cvr", "conversions", "clicks"),
                                   ("ctcvr", "conversions", "rows")):  # fmt: skip
        events, rows = there[happened], there[among]
        told = f"{name} has {events:,} {happened} of {rows:,} {among}"
        classes, some = (
            "" if 0 < events < rows else f"needs both classes: {told}",
            "" if rows else f"needs {among}: {told}",
        )
        found |= {f"auc_{event}": classes, f"pr_auc_{event}": classes}
        found |= dict.fromkeys([f"logloss_{event}", f"ece_{event}", *COMMON_LOSSES[event]], some)
        found[f"calibration_{event}"] = "" if events else f"needs {happened}: {told}"
        if schema.truth:
            found[f"auc_{event}_bayes"] = classes
    if split == "test" and calibrated:
        lacks = _lacks_for_calibration(_counts(schema.splits.get(SPLIT_FILES["valid"])))
        fitted = ["auc_ctcvr", *(f"{kind}_{event}" for kind in DEPEND_ON_CALIBRATION for event in EVENTS)]
        found |= {f"{metric}{CALIBRATED}": found[metric] or lacks for metric in fitted}
    return {f"{split}/{metric}": lacks for metric, lacks in found.items()}


def _counts(split: Split | None) -> Mapping[str, int]:
    counts = (split.rows, split.clicks, split.conversions) if split else (0, 0, 0)
    return dict(zip(("rows", "clicks", "conversions"), counts, strict=True))


def _lacks_for_calibration(validation: Mapping[str, int]) -> str:
    if 0 < validation["conversions"] < validation["clicks"] < validation["rows"]:
        return ""
    return f"needs {REQUIRED}: validation has " + ", ".join(f"{count:,} {name}" for name, count in validation.items())
