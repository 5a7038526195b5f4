"""`main`: the whole story on one page: the same model with and without the auxiliary focal loss."""

import os
from typing import Any

from pipeline.config import keys
from pipeline.console import say, table, warn
from pipeline.launch import train_run
from pipeline.run import MlflowRun, writer_for
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.task import MmoeTask

FOCAL_KEYS = frozenset(key.path for key in keys(MmoeConfig) if key.path.startswith("loss.aux_focal."))


def main(config: MmoeConfig, given: frozenset[str]) -> None:
    """Train the baseline and the focal arm from the same seed, and show them side by side."""
    if "loss.aux_focal.enabled" in given:
        warn("loss.aux_focal.enabled has no effect here: one arm has it off, the other on")
    arms = {"baseline": _with_focal(config, enabled=False), "focal": _with_focal(config, enabled=True)}
    launcher = os.environ.get("MLFLOW_RUN_ID")  # `mlflow run` opens a run; ours are two of their own
    rows, store = [], "memory alone"
    with writer_for(config.tracking) as writer:
        for arm, arm_config in arms.items():
            acting = given - FOCAL_KEYS if arm == "baseline" else given
            tags = {"arm": arm, "role": "baseline" if arm == "baseline" else "arm"}
            run, result = train_run(arm_config, MmoeTask, writer, given=acting, launcher=launcher, tags=tags)
            rows.append((run, result))
            store = run.tracking_uri if isinstance(run, MlflowRun) else store
    shown = ("test/auc_ctr", "test/auc_ctcvr", "test/pr_auc_ctcvr", "test/logloss_ctcvr")
    say("")
    say(table((run.name, {name: result.metrics.get(name) for name in shown}) for run, result in rows))
    bayes = {f"{name}_bayes": rows[0][1].metrics[f"{name}_bayes"] for name in shown[:2]
             if f"{name}_bayes" in rows[0][1].metrics}  # fmt: skip
    if bayes:
        say("no model can beat " + ", ".join(f"{name} {value:.4f}" for name, value in bayes.items()))
    say("One seed cannot tell a better setting from luck.")
    say(f"\n{len(rows)} runs in {store}: " + ", ".join(f"{run.name} ({run.id})" for run, _ in rows))
    say("next: `make ui` opens MLflow; select both runs and press Compare")


def _with_focal(config: MmoeConfig, **values: Any) -> MmoeConfig:
    loss = config.loss.model_dump(by_alias=True)
    loss["aux_focal"] |= values
    return config.with_values(loss=loss)
