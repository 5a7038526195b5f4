"""The check of a sweep's data before any run: all arms have the same data, which define the metrics that it needs."""

from collections.abc import Mapping
from dataclasses import replace

from pipeline.config.strict_config import to_yaml
from pipeline.errors import UserError
from pipeline.names import LAST_KEPT
from pipeline.runtime.console import info, warn
from pipeline.sweeps.jobs import Job, Workers
from pipeline.sweeps.requests import DataDigest, DigestData
from pipeline.sweeps.sweep_plan import Arm, Plan


def check_data(plan: Plan, workers: Workers) -> tuple[Plan, str]:
    """Load the arms' data; returns the plan and the data's digest.

    If the test split does not define the default metric of the verdict, the returned plan has that of validation.

    Raises:
        UserError: arms have different data, or the data leave a required metric undefined.
    """
    jobs: dict[str, tuple[Arm, Job]] = {}  # by the settings on which digest and metrics depend
    loading: dict[str, Job] = {}  # data settings -> the job that loads (or generates) them first
    for arm in plan.arms:
        data, deciding = _settings(arm, "data."), _settings(arm, "data.", "model.", "evaluation.")
        if deciding not in jobs:
            request = DigestData(plan.sweep.task, to_yaml(arm.config), _required_metrics(plan, arm))
            job = Job(f"data of {arm.name}", request, needs=loading.get(data))
            loading.setdefault(data, job)
            jobs[deciding] = arm, job
    workers.work([job for _, job in jobs.values()])
    digests: dict[str, str] = {}  # -> the first arm that has it
    undefined: dict[tuple[str, str], Arm] = {}  # (key, reason) -> the first arm
    for arm, job in jobs.values():
        if job.error:
            raise UserError(job.error)
        assert isinstance(job.reply, DataDigest)
        digests.setdefault(job.reply.digest, arm.name)
        for key_and_reason in job.reply.undefined.items():
            undefined.setdefault(key_and_reason, arm)
    if len(digests) > 1:
        (digest, arm_name), (other_digest, other_name) = list(digests.items())[:2]
        raise UserError(f"{arm_name} has data {digest[:12]}..., {other_name} has {other_digest[:12]}...: a sweep is on "
                        "one data set")  # fmt: skip
    return _with_defined_metric(plan, undefined), next(iter(digests))


def _settings(arm: Arm, *prefixes: str) -> str:
    return str({key: value for key, value in arm.config.decisive().items() if key.startswith(prefixes)})


def _required_metrics(plan: Plan, arm: Arm) -> dict[str, str]:
    """Key that names a metric -> the metric that the arm's runs need."""
    search, evaluated = plan.sweep.search, arm.config.evaluation.metric
    metrics = {"evaluation.metric": evaluated} | ({"search.metric": search.metric or evaluated} if search else {})
    return metrics | {"metric": plan.metric}


def _with_defined_metric(plan: Plan, undefined: Mapping[tuple[str, str], Arm]) -> Plan:
    """The plan with a metric that the data define; see `check_data`."""
    evaluated = plan.baseline.config.evaluation.metric
    replaceable = not plan.sweep.metric and "evaluation.metric" not in {key for key, _ in undefined}
    for (key, reason), arm in undefined.items():
        required = {"evaluation.metric": arm.config.relies_on_metric(arm.overridden), "metric": not replaceable}
        if required.get(key, True):
            raise UserError(f"{key}: {reason}; allowed: a metric that these data define")
    for key, reason in undefined:
        if key == "metric":
            info(f"{key}: {reason}; the verdict is about {evaluated}")
            plan = replace(plan, metric=evaluated)
        else:
            warn(f"{key}: {reason}; {LAST_KEPT}")
    return plan
