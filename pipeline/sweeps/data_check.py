"""Check before any run that all arms of a sweep have the same data, and that the required metrics are defined."""

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
    """Load the data of every arm. Returns the plan and the digest of the data.

    If the default metric of the verdict is undefined on the test split, the returned plan uses `evaluation.metric`.

    Raises:
        UserError: arms have different data, or the data leave a required metric undefined.
    """
    jobs: dict[str, tuple[Arm, Job]] = {}  # key: data, model and evaluation settings, which decide digest and metrics
    loading: dict[str, Job] = {}  # data settings -> first job, which loads or generates the data
    for arm in plan.arms:
        data, deciding = _settings(arm, *arm.config.data_keys), _deciding(arm)
        if deciding not in jobs:
            request = DigestData(plan.sweep.task, to_yaml(arm.config), _required_metrics(plan, arm))
            job = Job(f"data of {arm.name}", request, needs=loading.get(data))
            loading.setdefault(data, job)
            jobs[deciding] = arm, job
    workers.work([job for _, job in jobs.values()])
    for _, job in jobs.values():
        if job.error:
            raise UserError(job.error)
    if (resolved := _with_metrics_of_data(plan, jobs)) != plan:
        return check_data(resolved, workers)
    digests: dict[str, str] = {}  # digest -> first arm with it
    undefined: dict[tuple[str, str], Arm] = {}  # (key, reason) -> first arm concerned
    for arm, job in jobs.values():
        assert isinstance(job.reply, DataDigest)
        digests.setdefault(job.reply.digest, arm.name)
        for key_and_reason in job.reply.undefined.items():
            undefined.setdefault(key_and_reason, arm)
    if len(digests) > 1:
        (digest, arm_name), (other_digest, other_name) = list(digests.items())[:2]
        raise UserError(f"{arm_name} has data {digest[:12]}..., {other_name} has {other_digest[:12]}...: a sweep is on "
                        "one data set")  # fmt: skip
    return _with_defined_metric(plan, undefined), next(iter(digests))


def _with_metrics_of_data(plan: Plan, jobs: Mapping[str, tuple[Arm, Job]]) -> Plan:
    """Replace the evaluation metrics of arms that did not choose one by the defaults for their data."""
    arms = []
    for arm in plan.arms:
        reply = jobs[_deciding(arm)][1].reply
        assert isinstance(reply, DataDigest)
        if "evaluation.metric" not in arm.overridden and reply.metric != arm.config.evaluation.metric:
            evaluation = arm.config.evaluation.model_dump() | {"metric": reply.metric}
            arm = replace(arm, config=arm.config.with_values(evaluation=evaluation))  # noqa: PLW2901
        arms.append(arm)
    metric = plan.sweep.metric or arms[0].config.evaluation.metric.replace("valid/", "test/", 1)
    return replace(plan, arms=tuple(arms), metric=metric)


def _deciding(arm: Arm) -> str:
    """The settings that decide the digest of the data and the metrics that they define."""
    return _settings(arm, *arm.config.data_keys, "model.", "evaluation.")


def _settings(arm: Arm, *prefixes: str) -> str:
    return str({key: value for key, value in arm.config.decisive().items() if key.startswith(prefixes)})


def _required_metrics(plan: Plan, arm: Arm) -> dict[str, str]:
    """Map each config key that names a metric to the metric that the arm's runs need."""
    search, evaluated = plan.sweep.search, arm.config.evaluation.metric
    metrics = {"evaluation.metric": evaluated} | ({"search.metric": search.metric or evaluated} if search else {})
    return metrics | {"metric": plan.metric}


def _with_defined_metric(plan: Plan, undefined: Mapping[tuple[str, str], Arm]) -> Plan:
    """Replace the plan's metric if the data leave it undefined; see `check_data`."""
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
