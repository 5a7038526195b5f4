"""`data_prep`: from reviews to their sentiment distribution, alpha, copies and lengths, tracked as a run of its own."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pipeline.config.strict_config import flatten
from pipeline.errors import UserError
from pipeline.names import metric_names
from pipeline.runtime.console import optional, say, table, warn
from pipeline.storage.folders import published
from pipeline.tasks.visobert.config import (
    DataPrepConfig,
    EmbeddedModelConfig,
    PrepDataConfig,
)
from pipeline.tasks.visobert.encoders.tokenizer import MANY_UNKNOWN, load_tokenizer, unknown_share
from pipeline.tasks.visobert.prepare.duplicates import (
    OVERSAMPLED,
    Group,
    distinct,
    find_duplicates,
    summary,
    write_duplicates,
)
from pipeline.tasks.visobert.prepare.review_statistics import ALL, distribution, token_lengths, write_distribution
from pipeline.tasks.visobert.reviews.alpha import ALPHA_FILE, Alpha, auto_alpha, compute_alpha, count_sentiments
from pipeline.tasks.visobert.reviews.reviews import Reviews
from pipeline.tasks.visobert.reviews.sentiments import SENTIMENTS
from pipeline.tasks.visobert.reviews.splits import read_splits
from pipeline.tracking import plots
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.writer import Writer, writer_for

PICTURE = "sentiment_distribution.png"
FILES = (
    "sentiment_distribution.json", "sentiment_distribution.csv", PICTURE,
    "duplicates.csv", "duplicates.json", "token_lengths.json", ALPHA_FILE,
)  # fmt: skip
PICTURED = 100  # aspects with the most labels, of which there is a picture; the files hold all
LISTED = 20  # dropped cells that are shown; the files hold all


@dataclass(frozen=True)
class Findings:
    """All that data_prep finds; alpha is of the training split."""

    splits: Mapping[str, Reviews]  # train first; detection-only aspects without polarity
    with_text: Mapping[str, Reviews]  # of these, the reviews that have a text
    alpha: Alpha
    copies: int  # training reviews with the text and the labels of an earlier one
    alpha_of_distinct: tuple[float, float, float]  # without those
    distributions: Mapping[str, Mapping[str, Any]]
    groups: Sequence[Group]
    duplicates: Mapping[str, Any]
    tokens: Mapping[str, Mapping[str, float]]

    @property
    def train(self) -> Reviews:
        return self.splits["train"]


def data_prep(config: DataPrepConfig, given: frozenset[str]) -> None:  # noqa: ARG001 (every key acts)
    """Read the reviews, say what they hold, and leave it in files and in MLflow."""
    with writer_for(config.tracking) as writer:
        _, run_id = prepare_reviews(config, writer, run_id=os.environ.get("MLFLOW_RUN_ID"))
    _tell_what_next(config, run_id)


def prepare_reviews(
    config: DataPrepConfig, writer: Writer | None, *, run_id: str | None = None, launcher: str | None = None
) -> tuple[Alpha, str | None]:
    """Alpha, and the id of the run that holds it with all else; None where nothing is tracked.

    `run_id`: a run that is there already; `launcher`: a run that only started this one.
    """
    splits, only = _read(config.data)
    found = _examine(splits, only, config)
    metrics = figures(found)  # aspects whose names clash there are refused before anything is written
    files = _write(found, Path(config.output_dir))
    if generated := config.embedded():
        say(generated)
    _tell(found)
    if writer is None:
        return found.alpha, None
    name = f"data_prep {Path(found.train.source).stem}"[:40]
    run = MlflowRun(writer, RunRequest(name, config.experiment, run_id, launcher), Path(config.runs_dir))
    train = found.train
    run.log_params(flatten(config) | {"alpha_vector": found.alpha.text, "alpha_mode": found.alpha.mode})
    run.set_tags({"data_digest": train.digest})
    profile = {"aspects": len(train.aspects), **{split: len(reviews) for split, reviews in found.splits.items()}}
    run.log_input(Path(train.source).stem, train.digest, train.source, profile)
    run.log_metrics(0, metrics)
    for file in files:
        run.log_artifact(file)
    run.finish("FINISHED")
    return found.alpha, run.id


def _read(data: PrepDataConfig) -> tuple[dict[str, Reviews], tuple[str, ...]]:
    """The splits there are, and the detection-only aspects."""
    if data.path is None and (data.validation or data.test):
        raise UserError("data.validation or data.test is given without data.path, the training file")
    return read_splits({"train": data.path, "validation": data.validation, "test": data.test}, data)


def _examine(splits: dict[str, Reviews], only: tuple[str, ...], config: DataPrepConfig) -> Findings:
    train = splits["train"]
    alpha = compute_alpha(train, only, "auto")
    kept = distinct(train)
    with_text = {split: reviews.with_text() for split, reviews in splits.items()}
    groups = find_duplicates(with_text)
    told = summary(with_text, groups)
    alpha_of_distinct = auto_alpha(count_sentiments(train.labels[kept]).sum(axis=0))
    copies = len(train) - len(kept)
    told["train"] = {
        "copies_with_the_same_labels": copies,
        "share_of_reviews": copies / len(train),
        "oversampled": copies > OVERSAMPLED * len(train),
        "alpha": alpha.vector,
        "alpha_of_distinct_reviews": alpha_of_distinct,
    }
    try:
        texts = with_text["train"].texts
        tokenizer = load_tokenizer(config.tokenizer, None, texts, EmbeddedModelConfig().vocabulary)
    except UserError as error:
        raise UserError(str(error).replace("model.name", "tokenizer")) from None
    tokens = {split: tokenizer.encode(reviews.texts) for split, reviews in with_text.items()}
    return Findings(
        splits=splits,
        with_text=with_text,
        alpha=alpha,
        copies=copies,
        alpha_of_distinct=alpha_of_distinct,
        distributions={split: distribution(reviews) for split, reviews in splits.items()},
        groups=groups,
        duplicates=told,
        tokens={
            split: token_lengths(found.lengths) | {"unknown_share": unknown_share(tokenizer, found.ids)}
            for split, found in tokens.items()
        },
    )


# ---------------------------------------------------------------- telling


def _tell(found: Findings) -> None:
    for split, reviews in found.splits.items():
        for note in reviews.notes:
            warn(note)
        if reviews.dropped:
            warn(f"{split}: bad cells that are dropped: {len(reviews.dropped)}")
            for label in reviews.dropped[:LISTED]:
                say(f"  row {label.row}, column {label.column}: {label.value!r}")
            if len(reviews.dropped) > LISTED:
                say(f"  ... and {len(reviews.dropped) - LISTED} more")
    for split, row in found.distributions.items():
        say(f"{split}: {row['reviews']} reviews; {_counted(row['overall'])}")
    for aspect, row in found.distributions["train"]["aspects"].items():
        only = " (detection only)" if aspect in found.alpha.detection_only else ""
        say(f"  {aspect}{only}: {_counted(row)}")
    lengths = found.tokens["train"]
    say(f"tokens of a training review: mean {lengths['mean']:.1f}, p50 {lengths['p50']}, p95 {lengths['p95']}, "
        f"p99 {lengths['p99']}, longest {lengths['max']}")  # fmt: skip
    for split, tokens in found.tokens.items():
        if tokens["unknown_share"] > MANY_UNKNOWN:
            warn(f"{tokens['unknown_share']:.1%} of the tokens of {split} are unknown to the tokenizer")
    _tell_copies(found)
    say(f"alpha of {', '.join(SENTIMENTS)}: {found.alpha.text}, from {found.alpha.labelled_cells} labelled cells")
    if found.duplicates["train"]["oversampled"]:
        warn(
            f"{found.copies} of {len(found.train)} training reviews are exact copies of others, labels and all: the "
            "file looks oversampled, and then its alpha says how it was made, nothing about the data"
        )
        vectors = {"alpha of the file": found.alpha.vector, "alpha of the distinct reviews": found.alpha_of_distinct}
        say(table((name, dict(zip(SENTIMENTS, vector, strict=True))) for name, vector in vectors.items()))


def _counted(row: Mapping[str, Any]) -> str:
    parts = []
    if row["labelled_cells"]:
        parts = [f"{count} {name} ({row['shares'][name]:.2%})" for name, count in row["counts"].items()]
    if row["without_polarity"]:
        parts.append(f"{row['without_polarity']} without polarity")
    return ", ".join(parts) or "never mentioned"


def _tell_copies(found: Findings) -> None:
    for kind in ("exact", "near"):
        told = found.duplicates[kind]
        say(f"{kind} copies: {told['copies']} in {told['groups']} groups, {told['conflicting_groups']} of these with "
            "labels in conflict")  # fmt: skip
        for one, other in combinations(found.splits, 2):
            across = told["across"][f"{one}/{other}"][f"reviews_of_{other}"]
            if across:
                warn(f"{across} of {len(found.with_text[other])} {other} reviews have {kind} copies in {one}")


def _tell_what_next(config: DataPrepConfig, run_id: str | None) -> None:
    default = flatten(DataPrepConfig())
    keys = {
        key.replace("data.path", "data.train"): value
        for key, value in flatten(config).items()
        if key.startswith("data.") and value != default[key]
    }
    if config.data.path is None:
        keys["config"] = "configs/config_multi_embedded.yaml"
    if run_id:
        keys["data_prep_run"] = run_id
    say(f"next: train_visobert with {', '.join(f'{key}={value}' for key, value in keys.items())}")


# ---------------------------------------------------------------- files


def _write(found: Findings, output: Path) -> list[Path]:
    files = list(FILES)
    with published(output, files) as folder:
        dropped = {
            split: [{"row": label.row, "column": label.column, "value": label.value} for label in reviews.dropped]
            for split, reviews in found.splits.items()
        }
        sources = {
            split: {"source": reviews.source, "digest": reviews.digest} for split, reviews in found.splits.items()
        }
        more = {"sources": sources, "detection_only": found.alpha.detection_only, "dropped": dropped}
        stem = folder / "sentiment_distribution"
        write_distribution(found.distributions, more, stem.with_suffix(".json"), stem.with_suffix(".csv"))
        counts = dict(zip(found.alpha.aspects, found.alpha.per_aspect_counts, strict=True))
        shown = set(sorted(counts, key=lambda aspect: -sum(counts[aspect]))[:PICTURED])
        pictured = {ALL: found.alpha.counts} | {aspect: counts[aspect] for aspect in counts if aspect in shown}
        with optional(PICTURE):
            plots.sentiments(pictured, SENTIMENTS, stem.with_suffix(".png"))
        if not stem.with_suffix(".png").exists():
            files.remove(PICTURE)
        write_duplicates(found.with_text, found.groups, found.duplicates, folder)
        (folder / "token_lengths.json").write_text(json.dumps(found.tokens, indent=2) + "\n", encoding="utf-8")
        found.alpha.write(folder / ALPHA_FILE)
    if PICTURE not in files:
        (output / PICTURE).unlink(missing_ok=True)  # of an earlier run
    return [output / name for name in files]


# ---------------------------------------------------------------- tracking


def figures(found: Findings) -> dict[str, float]:
    """What was found, under metric names."""
    train, names = found.distributions["train"], metric_names(found.train.aspects)
    values: dict[str, float] = {
        "reviews": train["reviews"],
        "labelled_cells": train["overall"]["labelled_cells"],
        "without_polarity": train["overall"]["without_polarity"],
        "dropped": len(found.train.dropped),
    }
    values |= {f"rows/{split}": len(reviews) for split, reviews in found.splits.items()}
    values |= {f"count/{name}": count for name, count in train["overall"]["counts"].items()}
    values |= {f"share/{name}": share for name, share in train["overall"]["shares"].items()}
    values |= found.alpha.metrics()
    values |= {
        f"alpha_of_distinct/{name}": weight for name, weight in zip(SENTIMENTS, found.alpha_of_distinct, strict=True)
    }
    for aspect, row in train["aspects"].items():
        values |= {f"{name}/{names[aspect]}": count for name, count in row["counts"].items()}
        values[f"mentions/{names[aspect]}"] = row["mentions"]
    for kind in ("exact", "near"):
        told = found.duplicates[kind]
        values |= {f"duplicates/{kind}_{name}": told[name] for name in ("groups", "reviews", "copies")}
        values[f"duplicates/{kind}_conflicts"] = told["conflicting_groups"]
        values[f"duplicates/{kind}_groups_across_splits"] = len(
            [group for group in found.groups if group.kind == kind and len({split for split, _ in group.members}) > 1]
        )
    values["duplicates/share_of_copies"] = found.duplicates["train"]["share_of_reviews"]
    return values | {f"tokens/{name}": value for name, value in found.tokens["train"].items()}
