"""The data of a run: its splits, tokens, and scores of the baselines."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.tasks.base import Dataset
from pipeline.tasks.visobert.config import VisobertConfig
from pipeline.tasks.visobert.reviews.review_table import ReviewTable, capped_repeats, tokenise
from pipeline.tasks.visobert.reviews.reviews import folded
from pipeline.tasks.visobert.reviews.sentiments import labelled
from pipeline.tasks.visobert.reviews.splits import Splits, load_splits
from pipeline.tasks.visobert.scoring.baselines import Baselines
from pipeline.tasks.visobert.tokenizer import MANY_UNKNOWN, Tokenizer, load_tokenizer, unknown_share

MANY_TRUNCATED = 0.01  # warn above this share of truncated reviews


class ReviewData:
    """The splits of a config, which are tokenised on first use."""

    splits: Splits
    baselines: Baselines
    tokenizer: Tokenizer
    _tables: dict[str, ReviewTable]

    def __init__(self, config: VisobertConfig, like: "ReviewData | None" = None) -> None:
        """Read the files, or share the data of `like` where the configs agree.

        Raises:
            UserError: a file or the tokenizer is missing or damaged.
        """
        self.config, model = config, config.model
        if like and like.config.data == config.data:
            self.splits, self.baselines = like.splits, like.baselines
        else:
            self.splits = load_splits(config.data)
            self.baselines = Baselines(self.splits)
        if like and like.splits is self.splits and like.config.model == model:
            self.tokenizer, self._tables = like.tokenizer, like._tables
        else:
            texts = self.splits.train.texts
            vocabulary = model.embedded.vocabulary
            self.tokenizer = load_tokenizer(model.name, model.revision, texts, vocabulary, model.segmenter)
            self._tables = {}
        self.repeats: npt.NDArray[np.float64] | None = None  # [N], average number of times per epoch
        if config.data.oversampling != "none":
            self.repeats = capped_repeats(self.splits.train.labels, config.data.oversampling_ratio)

    def table(self, split: str) -> ReviewTable:
        if split not in self._tables:
            reviews, limit = self.splits.by_name[split], self.config.model.max_tokens
            tokens = tokenise(self.tokenizer, reviews.texts, limit, Path(self.config.data.cache))
            self._tables[split] = ReviewTable(tokens, reviews.labels, self.tokenizer.pad_id)
        return self._tables[split]

    @property
    def dataset(self) -> Dataset:
        train = self.splits.train
        profile: dict[str, object] = {"train_file_digest": train.digest}
        for name, reviews in self.splits.by_name.items():
            cells = int(labelled(reviews.labels).sum())
            profile[name] = {"reviews": len(reviews), "labelled_cells": cells, "file": reviews.source}
        return Dataset(Path(train.source).name, self.splits.digest, train.source, profile)

    def warnings(self) -> list[str]:
        """Warnings about dropped cells, unknown tokens, reviews that are also in train, and truncated texts."""
        warnings: list[str] = []
        for name, reviews in self.splits.by_name.items():
            warnings += reviews.notes
            if reviews.dropped:
                warnings.append(f"{reviews.source}: bad cells that are dropped: {len(reviews.dropped)} ({name})")
            unknown = unknown_share(self.tokenizer, self.table(name).ids[:-1].numpy())
            if unknown > MANY_UNKNOWN:
                warnings.append(f"{unknown:.1%} of the tokens of {name} are unknown to the tokenizer")
            copies = self._copies_of_train(name)
            if copies:
                warnings.append(f"{copies} of {len(reviews)} {name} reviews are in train")
            warnings += self._truncation(name)
        return warnings

    def _truncation(self, split: str) -> list[str]:
        """Warning about what `model.max_tokens` cuts off, if it cuts more than MANY_TRUNCATED of the reviews."""
        texts, lengths = self.splits.by_name[split].texts, self.table(split).lengths.numpy()
        limit = self.config.model.max_tokens
        longest = np.flatnonzero(lengths >= limit).tolist()  # some of them may be exactly as long as the limit
        whole = self.tokenizer.encode([texts[row] for row in longest]).lengths
        cut, total = int((whole > limit).sum()), int(lengths.sum() + (whole - limit).sum())
        if cut <= MANY_TRUNCATED * len(texts):
            return []
        lost = (whole - limit).sum() / total
        return [f"model.max_tokens {limit} truncates {cut} of {len(texts)} {split} reviews: {lost:.1%} of all tokens"]

    def _copies_of_train(self, split: str) -> int:
        """Count reviews that are in the training file too; 0 for embedded reviews, where copies are intended."""
        data = self.config.data
        if split == "train" or data.train is None or (split == "valid" and data.validation is None):
            return 0
        training_file = set(map(folded, self.splits.train.texts))
        if data.validation is None:  # the validation split is a part of the training file
            training_file |= set(map(folded, self.splits.valid.texts))
        return sum(folded(text) in training_file for text in self.splits.by_name[split].texts)
