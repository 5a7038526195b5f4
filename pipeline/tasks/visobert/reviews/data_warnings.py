"""Warnings about the reviews of a run: copies across files, unknown tokens, truncated texts."""

from collections.abc import Callable

from pipeline.tasks.visobert.config import TrainDataConfig, VisobertConfig
from pipeline.tasks.visobert.encoders.tokenizer import MANY_UNKNOWN, Tokenizer, unknown_share
from pipeline.tasks.visobert.reviews.review_table import ReviewTable
from pipeline.tasks.visobert.reviews.reviews import folded
from pipeline.tasks.visobert.reviews.splits import Splits

MANY_TRUNCATED = 0.01  # share of truncated training reviews above which a warning is given


def data_warnings(
    config: VisobertConfig, splits: Splits, tokenizer: Tokenizer, table: Callable[[str], ReviewTable]
) -> list[str]:
    """What looks like a mistake in the data. `table`: the tokens of a split."""
    warnings: list[str] = []
    for name, reviews in splits.by_name.items():
        warnings += reviews.notes
        if reviews.dropped:
            warnings.append(f"{reviews.source}: bad cells that are dropped: {len(reviews.dropped)} ({name})")
        unknown = unknown_share(tokenizer, table(name).ids[:-1].numpy())
        if unknown > MANY_UNKNOWN:
            warnings.append(f"{unknown:.1%} of the tokens of {name} are unknown to the tokenizer")
        copies = _copies_of_train(splits, name, config.data)
        if copies:
            warnings.append(f"{copies} of {len(reviews)} {name} reviews are in train")
    limit = config.model.max_tokens
    truncated = float((table("train").lengths.numpy() >= limit).mean())
    if truncated > MANY_TRUNCATED:
        warnings.append(f"{truncated:.1%} of the training reviews reach model.max_tokens {limit}")
    return warnings


def _copies_of_train(splits: Splits, split: str, data: TrainDataConfig) -> int:
    """Reviews of a file that are in the training file too; the embedded reviews have some on purpose."""
    if split == "train" or data.train is None or (split == "valid" and data.validation is None):
        return 0
    training_file = set(map(folded, splits.train.texts))
    if data.validation is None:  # the validation split is a share of it
        training_file |= set(map(folded, splits.valid.texts))
    return sum(folded(text) in training_file for text in splits.by_name[split].texts)
