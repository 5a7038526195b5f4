"""`prepare_ctr`: from raw files to a prepared folder, tracked as a run of its own."""

import os
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from pipeline.config import flatten
from pipeline.console import say, warn
from pipeline.names import metric_names
from pipeline.run import MlflowRun, RunRequest, Writer, writer_for
from pipeline.tasks.mmoe.config import PrepareCtrConfig
from pipeline.tasks.mmoe.prepare import prepare
from pipeline.tasks.mmoe.schema import SCHEMA_FILE, DataSchema

OUT_OF_VOCABULARY_WARNING = 0.2


def prepare_ctr(config: PrepareCtrConfig, given: frozenset[str]) -> None:  # noqa: ARG001 (every key acts)
    """Prepare, say what was found, and leave schema and figures in MLflow."""
    output = Path(config.output_dir)
    with tqdm(unit=" rows", unit_scale=True, disable=None) as bar:
        schema = prepare(Path(config.data), Path(config.schema_), output, progress=lambda rows: _advance(bar, rows))
    _tell(schema)
    with writer_for(config.tracking) as writer:
        if writer:
            _track(writer, config, schema, output)
    say(f"next: train_mmoe with data={output}")


def _advance(bar: "tqdm[NoReturn]", rows: int) -> None:
    bar.update(rows)


def figures(schema: DataSchema) -> dict[str, float]:
    """Counts, base rates and out-of-vocabulary shares under metric names."""
    found: dict[str, float] = {"base_rate/ctr": schema.base_rates.ctr, "base_rate/cvr": schema.base_rates.cvr}
    for name, split in schema.splits.items():
        found |= {f"rows/{name}": split.rows, f"clicks/{name}": split.clicks, f"conversions/{name}": split.conversions}
    names = metric_names([feature.name for feature in schema.features])
    for feature in schema.features:
        found |= {f"out_of_vocabulary/{names[feature.name]}/{split}": share
                  for split, share in feature.out_of_vocabulary.items()}  # fmt: skip
    return found


def _tell(schema: DataSchema) -> None:
    for name, split in schema.splits.items():
        say(f"{name}: {split.rows} rows, {split.clicks} clicks, {split.conversions} conversions")
    say(f"base rates of the training split: ctr {schema.base_rates.ctr:.6g}, cvr {schema.base_rates.cvr:.6g}")
    for feature in schema.features:
        shares = {split: share for split, share in feature.out_of_vocabulary.items() if share}
        if shares:
            text = ", ".join(f"{split} {share:.2%}" for split, share in shares.items())
            say(f"{feature.name}: {feature.size} ids; out of vocabulary: {text}")
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
