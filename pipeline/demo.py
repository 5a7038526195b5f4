"""`main`, the demo on embedded data: train the MMoE with and without the focal loss, and a review model."""

import os
from pathlib import Path
from typing import Any

from pipeline.comparison import wording
from pipeline.config.strict_config import keys, load
from pipeline.errors import UserError
from pipeline.runs.launch import Trained, train_run
from pipeline.runtime.console import info, optional, table, warn
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.tasks.visobert.config import DataPrepConfig, VisobertConfig
from pipeline.tasks.visobert.prepare.data_prep import prepare_reviews
from pipeline.tasks.visobert.task import VisobertTask
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.writer_client import Writer, writer_for

FOCAL_KEYS = frozenset(key.path for key in keys(MmoeConfig) if key.path.startswith("loss.aux_focal."))
CONFIGS = Path(__file__).parent.parent / "configs"
REVIEW_EPOCHS = "6"  # enough to see the model learn; the config file has 15
RANKING_METRICS = ("test/auc_ctr", "test/auc_ctcvr", "test/pr_auc_ctcvr", "test/logloss_ctcvr")
REVIEW_METRICS = ("aspect_f1_macro", "sentiment_f1_macro", "pair_f1_micro")


def main(config: MmoeConfig, given: frozenset[str]) -> None:
    """Train the baseline and the focal arm from the same seed, then a review model, and print the results."""
    if config.fork or config.resume:
        raise UserError("main trains several runs; resume and fork are for train_mmoe and train_visobert")
    if "loss.aux_focal.enabled" in given:
        warn("loss.aux_focal.enabled has no effect here: one arm has it off, the other on")
    launcher = os.environ.get("MLFLOW_RUN_ID")  # id of the run that `mlflow run` created
    with writer_for(config.tracking) as writer:
        ranking = _ranking(config, given, writer, launcher)
        reviews = _reviews(config, writer, launcher)
    info("")
    info(table((run.name, {name: run.metrics.get(name) for name in RANKING_METRICS}) for run in ranking))
    bayes = {f"{name}_bayes": value for name in RANKING_METRICS[:2]
             if (value := ranking[0].metrics.get(f"{name}_bayes")) is not None}  # fmt: skip
    if bayes:
        info(
            "the best that a model can be expected to reach: "
            + ", ".join(f"{name} {value:.4f}" for name, value in bayes.items())
        )
    info(f"{wording.ONE_SEED}\n")
    rows = {reviews.name: "", "TF-IDF, logistic regression": "_tfidf", "majority": "_majority"}
    info(table((row, {f"test/{name}": reviews.metrics.get(f"test/{name}{suffix}") for name in REVIEW_METRICS})
              for row, suffix in rows.items()))  # fmt: skip
    runs = [*ranking, reviews]
    if reviews.tracking_uri:
        with optional("the report"):
            _report([run.id for run in ranking], Path(config.output_dir))
    store = reviews.tracking_uri or "memory only"
    info(f"\n{len(runs)} runs in {store}: " + ", ".join(f"{run.name} ({run.id})" for run in runs))
    info("next: open the report; `make ui` opens MLflow: select the first two runs and press Compare. Is it really "
        "better? `python -m pipeline sweep` runs five settings with three seeds each and gives a verdict")  # fmt: skip


def _report(run_ids: list[str], output_dir: Path) -> None:
    """Write the HTML page that compares the two arms."""
    from pipeline.comparison.verdicts import compare, load_runs, write

    files = write(compare(load_runs(runs=run_ids), title="make demo"), output_dir / "main")
    info(f"\nreport: {files[-1].resolve().as_uri()}")


def _ranking(config: MmoeConfig, given: frozenset[str], writer: Writer | None, launcher: str | None) -> list[Trained]:
    """Train the MMoE without the auxiliary focal loss (baseline) and with it."""
    arms = {"baseline": _with_focal(config, enabled=False), "focal": _with_focal(config, enabled=True)}
    runs = []
    for arm, arm_config in arms.items():
        acting = given - FOCAL_KEYS if arm == "baseline" else given
        tags = {"arm": arm, "role": "baseline" if arm == "baseline" else "arm"}
        runs.append(train_run(arm_config, MmoeTask, writer, RunRequest(launcher=launcher, tags=tags), given=acting))
    return runs


def _reviews(config: MmoeConfig, writer: Writer | None, launcher: str | None) -> Trained:
    """Compute alpha of the embedded reviews, then train the small model with it."""
    shared = {"experiment": config.experiment or "null", "data.cache": config.data.embedded.cache}
    switch = {"tracking.enabled": str(config.tracking.enabled).lower()}
    preparing = load(DataPrepConfig, CONFIGS / "data_prep.yaml", shared | switch | {"runs_dir": config.output_dir})
    alpha, alpha_run = prepare_reviews(preparing, writer, launcher=launcher)
    own = {"training.num_train_epochs": REVIEW_EPOCHS, "data_prep_run": alpha_run or "null"}
    same = {
        "output_dir": config.output_dir,
        "seed": str(config.seed),
        "device": config.device,
        "training.max_steps": str(config.training.max_steps or "null"),
        "training.threads": str(config.training.threads or "null"),
        "tracking.log_model": str(config.tracking.log_model).lower(),
    }
    training = load(VisobertConfig, CONFIGS / "config_multi_embedded.yaml", shared | switch | own | same)
    return train_run(training, lambda ready: VisobertTask(ready, alpha), writer, RunRequest(launcher=launcher))


def _with_focal(config: MmoeConfig, **values: Any) -> MmoeConfig:
    loss = config.loss.model_dump(by_alias=True)
    loss["aux_focal"] |= values
    return config.with_values(loss=loss)
