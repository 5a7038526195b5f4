"""`prepare_ctr`: from raw files to a prepared folder, tracked as a run of its own."""

import os
from pathlib import Path
from typing import NoReturn, Self

from tqdm import tqdm

from pipeline.config.strict_config import flatten
from pipeline.names import metric_names
from pipeline.runtime.console import say, warn
from pipeline.runtime.text import visible
from pipeline.tasks.mmoe.config import PrepareCtrConfig
from pipeline.tasks.mmoe.prepare import prepare
from pipeline.tasks.mmoe.schema import SCHEMA_FILE, SPLITS, DataSchema
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.mlflow_run import MlflowRun, Writer, writer_for
from pipeline.tracking.store import check_uri

OUT_OF_VOCABULARY_WARNING = 0.2
# what raw Ali-CCP files had that is worth a word
MET = {
    "conversions_without_click": "samples with click 0 and buy 1 (conversion_without_click says what becomes of them)",
    "without_common_features": "samples without common features (without_common_features says what becomes of them)",
    "cut_lines": "files end within a line, which was left out",
    "malformed_lines": "malformed lines, which were left out",
    "repeated_common_features": "common features under an index that was there before: the first ones count",
    "repeated_fields": "repeated fields of categorical features: the first value of a row counts",
    "other_feat_num": "lines with another number of features than feat_num",
    "empty_ids": "features without an id, which are missing values",
}


def prepare_ctr(config: PrepareCtrConfig, given: frozenset[str]) -> None:  # noqa: ARG001 (every key acts)
    """Prepare, say what was found, and leave schema and figures in MLflow."""
    if config.tracking.enabled:
        check_uri()  # not once all is prepared
    output = Path(config.output_dir)
    with Bars() as bars:
        own = {split: Path(path) for split in SPLITS[1:] if (path := getattr(config.data, split))}
        schema = prepare(
            Path(config.data.train), Path(config.schema_), output, own=own, progress=bars.advance, stages=bars.show
        )
    _tell(schema)
    with writer_for(config.tracking) as writer:
        if writer:
            _track(writer, config, schema, output)
    say(f"next: train_mmoe with data={output}")


class Bars:
    """A progress bar for each thing that is being done, with rows/s and, where the end is known, the time left.

    Shown in a terminal alone.
    """

    def __init__(self) -> None:
        self._what: str | None = None
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, rows: int) -> None:
        """So many rows more, of nobody knows how many."""
        self._of("", 0).update(rows)

    def show(self, what: str, rows: int, share: float) -> None:
        """`rows` are done of `what`, which are the share of it; the rows in all follow from that."""
        bar = self._of(what, rows)
        bar.total = max(rows, round(rows / share)) if share else None
        bar.update(rows - bar.n)

    def _of(self, what: str, rows: int) -> "tqdm[NoReturn]":
        if self._bar is None or what != self._what:
            if self._bar is not None:
                self._bar.close()
            self._what = what
            # what an earlier process did is no speed of this one
            self._bar = tqdm(desc=visible(what) or None, initial=rows, unit=" rows", unit_scale=True, disable=None)
        return self._bar


def figures(schema: DataSchema) -> dict[str, float]:
    """Counts, base rates and out-of-vocabulary shares under metric names."""
    found: dict[str, float] = {"base_rate/ctr": schema.base_rates.ctr, "base_rate/cvr": schema.base_rates.cvr}
    for name, split in schema.splits.items():
        found |= {f"rows/{name}": split.rows, f"clicks/{name}": split.clicks, f"conversions/{name}": split.conversions}
    found |= {f"raw/{name}": count for name, count in schema.counts.items() if not name.startswith("rows/")}
    names = metric_names([feature.name for feature in schema.features])
    for feature in schema.features:
        found |= {f"out_of_vocabulary/{names[feature.name]}/{split}": share
                  for split, share in feature.out_of_vocabulary.items()}  # fmt: skip
    return found


def _tell(schema: DataSchema) -> None:
    for name, split in schema.splits.items():
        say(f"{name}: {split.rows} rows, {split.clicks} clicks, {split.conversions} conversions")
        for event, count in (("click", split.clicks), ("conversion", split.conversions)):
            if split.rows and not count:
                warn(f"{name} has no {event}: what is measured of {event}s is undefined there")
    for name, count in schema.counts.items():
        if count and name in MET:
            say(f"{count} {MET[name]}")
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
