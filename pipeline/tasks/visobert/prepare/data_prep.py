"""`data_prep`: sentiment distribution, alpha, duplicates and lengths of reviews, tracked as a separate run."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pipeline.config.strict_config import flatten
from pipeline.errors import UserError
from pipeline.names import metric_names
from pipeline.runtime.console import info, optional, table, warn
from pipeline.storage.files import write_json
from pipeline.storage.folders import published
from pipeline.tasks.visobert.config import EMBEDDED, DataPrepConfig, EmbeddedModelConfig
from pipeline.tasks.visobert.prepare.duplicates import Group, distinct, find_duplicates, summary, write_duplicates
from pipeline.tasks.visobert.prepare.review_statistics import ALL, distribution, token_lengths, write_distribution
from pipeline.tasks.visobert.reviews.alpha import ALPHA_FILE, Alpha, auto_alpha, compute_alpha, count_sentiments
from pipeline.tasks.visobert.reviews.reviews import Reviews
from pipeline.tasks.visobert.reviews.sentiments import SENTIMENTS
from pipeline.tasks.visobert.reviews.splits import read_splits
from pipeline.tasks.visobert.tokenizer import MANY_UNKNOWN, load_tokenizer, unknown_share
from pipeline.tracking import plots
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.writer_client import Writer, writer_for

PICTURE = "sentiment_distribution.png"
FILES = (
    "sentiment_distribution.json", "sentiment_distribution.csv", PICTURE,
    "duplicates.csv", "duplicates.json", "token_lengths.json", ALPHA_FILE,
)  # fmt: skip
OVERSAMPLED = 0.1  # a training split with a larger share of copies counts as oversampled
MAX_LISTED = 20  # number of dropped cells that are printed; the files contain all


@dataclass(frozen=True)
class Analysis:
    """The results of data_prep."""

    splits: Mapping[str, Reviews]  # train first; labels of detection-only aspects have no polarity
    with_text: Mapping[str, Reviews]  # the reviews of each split that have a text
    alpha: Alpha  # computed from the training split
    copies: int  # training reviews with the same text and labels as an earlier one
    alpha_of_distinct: tuple[float, float, float]  # alpha without these copies
    distributions: Mapping[str, Mapping[str, Any]]
    groups: Sequence[Group]
    duplicates: Mapping[str, Any]
    tokens: Mapping[str, Mapping[str, float]]

    @property
    def train(self) -> Reviews:
        return self.splits["train"]


def data_prep(config: DataPrepConfig, given: frozenset[str]) -> None:  # noqa: ARG001 (no key is without effect)
    """Entry point: analyse the reviews, print the results, write them to files and log them to MLflow."""
    with writer_for(config.tracking) as writer:
        _, run_id = prepare_reviews(config, writer, run_id=os.environ.get("MLFLOW_RUN_ID"))
    _print_next_command(config, run_id)


def prepare_reviews(
    config: DataPrepConfig, writer: Writer | None, *, run_id: str | None = None, launcher: str | None = None
) -> tuple[Alpha, str | None]:
    """Analyse the reviews; returns alpha and the id of the run with the results (None without tracking).

    `run_id`: id of an existing run to write to; `launcher`: id of the run that started this one.
    """
    analysis = _analyse(config)
    metrics = _metrics(analysis)
    files = _write(analysis, Path(config.output_dir))
    if generated := config.embedded():
        info(generated)
    _print(analysis)
    alpha, train = analysis.alpha, analysis.train
    if writer is None:
        return alpha, None
    stem = Path(train.source).stem
    run = MlflowRun(
        writer, RunRequest(f"data_prep {stem}"[:40], config.experiment, run_id, launcher), Path(config.runs_dir)
    )
    run.log_params(flatten(config) | {"alpha_vector": alpha.text, "alpha_mode": alpha.mode})
    run.set_tags({"data_digest": train.digest})
    profile = {"aspects": len(train.aspects), **{split: len(reviews) for split, reviews in analysis.splits.items()}}
    run.log_input(stem, train.digest, train.source, profile)
    run.log_metrics(0, metrics)
    for file in files:
        run.log_artifact(file)
    run.finish("FINISHED")
    return alpha, run.id


def _analyse(config: DataPrepConfig) -> Analysis:
    data = config.data
    if data.path is None and (data.validation or data.test):
        raise UserError("data.validation or data.test is given without data.path, the training file")
    splits, only = read_splits({"train": data.path, "validation": data.validation, "test": data.test}, data)
    train = splits["train"]
    alpha = compute_alpha(train, only, "auto")
    with_text = {split: reviews.with_text() for split, reviews in splits.items()}
    groups = find_duplicates(with_text)
    kept = distinct(train)
    copies = len(train) - len(kept)
    alpha_of_distinct = auto_alpha(count_sentiments(train.labels[kept]).sum(axis=0))
    duplicates = summary(with_text, groups) | {
        "train": {
            "copies_with_the_same_labels": copies,
            "share_of_reviews": copies / len(train),
            "oversampled": copies > OVERSAMPLED * len(train),
            "alpha": alpha.vector,
            "alpha_of_distinct_reviews": alpha_of_distinct,
        }
    }
    try:
        texts = with_text["train"].texts
        tokenizer = load_tokenizer(config.tokenizer, None, texts, EmbeddedModelConfig().vocabulary)
    except UserError as error:
        raise UserError(str(error).replace("model.name", "tokenizer")) from None
    tokens = {}
    for split, reviews in with_text.items():
        ids, lengths = tokenizer.encode(reviews.texts)
        tokens[split] = token_lengths(lengths) | {"unknown_share": unknown_share(tokenizer, ids)}
    distributions = {split: distribution(reviews) for split, reviews in splits.items()}
    return Analysis(splits, with_text, alpha, copies, alpha_of_distinct, distributions, groups, duplicates, tokens)


def _metrics(analysis: Analysis) -> dict[str, float]:
    train, names = analysis.distributions["train"], metric_names(analysis.train.aspects)
    metrics: dict[str, float] = {
        "reviews": train["reviews"],
        "labelled_cells": train["overall"]["labelled_cells"],
        "without_polarity": train["overall"]["without_polarity"],
        "dropped": len(analysis.train.dropped),
    }
    metrics |= {f"rows/{split}": len(reviews) for split, reviews in analysis.splits.items()}
    metrics |= {f"count/{name}": count for name, count in train["overall"]["counts"].items()}
    metrics |= {f"share/{name}": share for name, share in train["overall"]["shares"].items()}
    metrics |= analysis.alpha.metrics()
    weights = zip(SENTIMENTS, analysis.alpha_of_distinct, strict=True)
    metrics |= {f"alpha_of_distinct/{name}": weight for name, weight in weights}
    for aspect, row in train["aspects"].items():
        metrics |= {f"{name}/{names[aspect]}": count for name, count in row["counts"].items()}
        metrics[f"mentions/{names[aspect]}"] = row["mentions"]
    for kind in ("exact", "near"):
        counts = analysis.duplicates[kind]
        metrics |= {f"duplicates/{kind}_{name}": counts[name] for name in ("groups", "reviews", "copies")}
        metrics[f"duplicates/{kind}_conflicts"] = counts["conflicting_groups"]
        metrics[f"duplicates/{kind}_groups_across_splits"] = sum(
            group.kind == kind and len({split for split, _ in group.members}) > 1 for group in analysis.groups
        )
    metrics["duplicates/share_of_copies"] = analysis.duplicates["train"]["share_of_reviews"]
    return metrics | {f"tokens/{name}": value for name, value in analysis.tokens["train"].items()}


def _write(analysis: Analysis, output: Path) -> list[Path]:
    """Write FILES and return their paths. The picture is left out if plotting fails."""
    alpha, files = analysis.alpha, list(FILES)
    with published(output, files) as folder:
        more = {
            "sources": {split: {"source": reviews.source, "digest": reviews.digest}
                        for split, reviews in analysis.splits.items()},
            "detection_only": alpha.detection_only,
            "dropped": {split: [asdict(label) for label in reviews.dropped]
                        for split, reviews in analysis.splits.items()},
        }  # fmt: skip
        write_distribution(analysis.distributions, more, folder / FILES[0], folder / FILES[1])
        counts = dict(zip(alpha.aspects, alpha.per_aspect_counts, strict=True))
        with optional(PICTURE):
            plots.sentiments({ALL: alpha.counts} | counts, SENTIMENTS, folder / PICTURE)
        if not (folder / PICTURE).exists():
            files.remove(PICTURE)
        write_duplicates(analysis.with_text, analysis.groups, analysis.duplicates, folder)
        write_json(folder / "token_lengths.json", analysis.tokens)
        alpha.write(folder / ALPHA_FILE)
    if PICTURE not in files:
        (output / PICTURE).unlink(missing_ok=True)  # left by an earlier run
    return [output / name for name in files]


# ---------------------------------------------------------------- console


def _print(analysis: Analysis) -> None:
    for split, reviews in analysis.splits.items():
        for note in reviews.notes:
            warn(note)
        if reviews.dropped:
            warn(f"{split}: bad cells that are dropped: {len(reviews.dropped)}")
            for label in reviews.dropped[:MAX_LISTED]:
                info(f"  row {label.row}, column {label.column}: {label.value!r}")
            if len(reviews.dropped) > MAX_LISTED:
                info(f"  ... and {len(reviews.dropped) - MAX_LISTED} more")
    for split, row in analysis.distributions.items():
        info(f"{split}: {row['reviews']} reviews; {_counts_text(row['overall'])}")
    for aspect, row in analysis.distributions["train"]["aspects"].items():
        only = " (detection only)" if aspect in analysis.alpha.detection_only else ""
        info(f"  {aspect}{only}: {_counts_text(row)}")
    lengths = analysis.tokens["train"]
    info(f"tokens of a training review: mean {lengths['mean']:.1f}, p50 {lengths['p50']}, p95 {lengths['p95']}, "
        f"p99 {lengths['p99']}, longest {lengths['max']}")  # fmt: skip
    for split, tokens in analysis.tokens.items():
        if tokens["unknown_share"] > MANY_UNKNOWN:
            warn(f"{tokens['unknown_share']:.1%} of the tokens of {split} are unknown to the tokenizer")
    _print_copies(analysis)
    alpha = analysis.alpha
    info(f"alpha of {', '.join(SENTIMENTS)}: {alpha.text}, from {alpha.labelled_cells} labelled cells")
    if analysis.duplicates["train"]["oversampled"]:
        warn(
            f"{analysis.copies} of {len(analysis.train)} training reviews are exact copies of others, labels and all: "
            "the file looks oversampled, so that its alpha describes the repetition, not the data"
        )
        vectors = {"alpha of the file": alpha.vector, "alpha of the distinct reviews": analysis.alpha_of_distinct}
        info(table((name, dict(zip(SENTIMENTS, vector, strict=True))) for name, vector in vectors.items()))


def _print_copies(analysis: Analysis) -> None:
    report = info if analysis.train.source == EMBEDDED else warn  # the generator writes copies on purpose
    for kind in ("exact", "near"):
        counts = analysis.duplicates[kind]
        info(f"{kind} copies: {counts['copies']} in {counts['groups']} groups, {counts['conflicting_groups']} of these "
            "with labels in conflict")  # fmt: skip
        for first, second in combinations(analysis.splits, 2):
            across = counts["across"][f"{first}/{second}"][f"reviews_of_{second}"]
            if across:
                total = len(analysis.with_text[second])
                report(f"{across} of {total} {second} reviews have {kind} copies in {first}")


def _counts_text(row: Mapping[str, Any]) -> str:
    parts = []
    if row["labelled_cells"]:
        parts = [f"{count} {name} ({row['shares'][name]:.2%})" for name, count in row["counts"].items()]
    if row["without_polarity"]:
        parts.append(f"{row['without_polarity']} without polarity")
    return ", ".join(parts) or "never mentioned"


def _print_next_command(config: DataPrepConfig, run_id: str | None) -> None:
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
    info(f"next: train_visobert with {', '.join(f'{key}={value}' for key, value in keys.items())}")
