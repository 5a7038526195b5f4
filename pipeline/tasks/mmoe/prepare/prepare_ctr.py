"""`prepare_ctr`: convert raw files to a prepared folder, tracked as a separate MLflow run."""

import os
from pathlib import Path
from typing import NoReturn, Self

from tqdm import tqdm

from pipeline.config.strict_config import flatten
from pipeline.data.schema import SCHEMA_FILE, SPLITS, DataSchema
from pipeline.names import metric_names
from pipeline.runtime.console import info, warn
from pipeline.runtime.text import visible
from pipeline.tasks.mmoe.config import PrepareCtrConfig
from pipeline.tasks.mmoe.prepare.determining_features import determining_features
from pipeline.tasks.mmoe.prepare.preparation import prepare
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.store import check_uri
from pipeline.tracking.writer_client import Writer, writer_for

OUT_OF_VOCABULARY_WARNING = 0.2
IRREGULARITIES = {  # in raw Ali-CCP files
    "conversions_without_click": "samples with click 0 and buy 1 (treated as conversion_without_click says)",
    "without_common_features": "samples without common features (treated as without_common_features says)",
    "cut_lines": "files end within a line, which was left out",
    "malformed_lines": "malformed lines, which were left out",
    "repeated_common_features": "common features with an index that was there before: the first ones count",
    "repeated_fields": "repeated fields of categorical features: the first value of a row counts",
    "other_feat_num": "lines with another number of features than feat_num",
    "empty_ids": "features without an id, which are missing values",
}


def prepare_ctr(config: PrepareCtrConfig, given: frozenset[str]) -> None:  # noqa: ARG001 (all keys have an effect)
    """Prepare the data, print a summary, and log schema and metrics to MLflow."""
    if config.tracking.enabled:
        check_uri()  # fail before the data is prepared
    output = Path(config.output_dir)
    own = {split: Path(path) for split in SPLITS[1:] if (path := getattr(config.data, split))}
    with ProgressBars() as bars:
        schema = prepare(Path(config.data.train), Path(config.schema_), output, own=own, progress=bars.show)
    _report(schema)
    for warning in determining_features(output, schema):
        warn(warning)
    with writer_for(config.tracking) as writer:
        if writer:
            _track(writer, config, schema, output)
    info(f"next: train_mmoe with data={output}")


class ProgressBars:
    """A progress bar for each stage, in a terminal: rows/s and, if the total is known, the time left."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, stage: str, rows: int, share: float) -> None:
        """Update the bar. share: share of the stage that is done, used to estimate the total; 0 = unknown."""
        if self._bar is None or stage != self._stage:
            self.__exit__()
            self._stage = stage
            self._bar = tqdm(desc=visible(stage), initial=rows, unit=" rows", unit_scale=True, disable=None)
        self._bar.total = max(rows, round(rows / share)) if share else None
        self._bar.update(rows - self._bar.n)


def figures(schema: DataSchema) -> dict[str, float]:
    """Counts, base rates and out-of-vocabulary shares as metrics."""
    metrics: dict[str, float] = {"base_rate/ctr": schema.base_rates.ctr}
    metrics |= {} if schema.click_only else {"base_rate/cvr": schema.base_rates.cvr}
    for name, split in schema.splits.items():
        counts = ("rows", "clicks") if schema.click_only else ("rows", "clicks", "conversions")
        metrics |= {f"{count}/{name}": getattr(split, count) for count in counts}
    metrics |= {f"raw/{name}": count for name, count in schema.counts.items() if not name.startswith("rows/")}
    names = metric_names([feature.name for feature in schema.features])
    for feature in schema.features:
        metrics |= {f"out_of_vocabulary/{names[feature.name]}/{split}": share
                    for split, share in feature.out_of_vocabulary.items()}  # fmt: skip
    return metrics


def _report(schema: DataSchema) -> None:
    if schema.click_only:
        info("labels.conversion is null: the data are of clicks alone, and train_mmoe trains loss_ctr alone")
    for name, split in schema.splits.items():
        conversions = "" if schema.click_only else f", {split.conversions} conversions"
        info(f"{name}: {split.rows} rows, {split.clicks} clicks{conversions}")
    for warning in schema.warnings():
        warn(warning)
    for name, count in schema.counts.items():
        if count and name in IRREGULARITIES:
            info(f"{count} {IRREGULARITIES[name]}")
    cvr = "" if schema.click_only else f", cvr {schema.base_rates.cvr:.6g}"
    info(f"base rates of the training split: ctr {schema.base_rates.ctr:.6g}{cvr}")
    for feature in schema.features:
        shares = {split: share for split, share in feature.out_of_vocabulary.items() if share}
        if shares:
            text = ", ".join(f"{split} {share:.2%}" for split, share in shares.items())
            info(f"{feature.name}: {feature.size} ids; out of vocabulary: {text}")
        if max(feature.out_of_vocabulary.values(), default=0) > OUT_OF_VOCABULARY_WARNING:
            warn(f"{feature.name}: over {OUT_OF_VOCABULARY_WARNING:.0%} of a split is out of vocabulary")


def _track(writer: Writer, config: PrepareCtrConfig, schema: DataSchema, output: Path) -> None:
    request = RunRequest(f"prepare {output.name}"[:40], config.experiment, os.environ.get("MLFLOW_RUN_ID"))
    run = MlflowRun(writer, request, Path(config.runs_dir))
    run.log_params(flatten(config))
    run.set_tags({"data_digest": schema.digest})
    run.log_input(
        output.name, schema.digest, schema.source, {name: split.rows for name, split in schema.splits.items()}
    )
    run.log_metrics(0, figures(schema))
    run.log_artifact(output / SCHEMA_FILE)
    run.finish("FINISHED")
