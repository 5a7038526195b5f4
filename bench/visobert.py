"""ViSoBERT's width at two layers on texts as long as real reviews: our training against the usual script's."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from bench.figures import Timed, figure, measured
from pipeline.config import load
from pipeline.console import Console
from pipeline.run import MemoryRun
from pipeline.task import TOTAL
from pipeline.tasks.visobert.config import VisobertConfig
from pipeline.tasks.visobert.data import ReviewBatch, padding_efficiency
from pipeline.tasks.visobert.task import VisobertTask
from pipeline.tasks.visobert.tokenizer import PAD, START, UNKNOWN, EmbeddedTokenizer
from pipeline.training import Training, Window

REVIEWS, LAYERS, ASPECTS, PAIRS = 6000, 2, 11, 5
LENGTH_MEDIAN, LENGTH_SIGMA = 26, 0.68  # of a log-normal: mean 33, p50 26, p90 62, p99 126
NAIVE_LENGTH, NAIVE_BATCH = 256, 16
STEPS, NAIVE_STEPS = 8, 3  # timed at a time
VOCABULARY = 15_002


def write_reviews(file: Path) -> list[str]:
    """Texts of made-up words, one token each, with labels at random."""
    generator = np.random.Generator(np.random.PCG64(0))
    letters = np.array(list("abcdeghiklmnopqrstuvxy"))
    words = ["".join(generator.choice(letters, 6)) for _ in range(4000)]
    lengths = np.clip(generator.lognormal(np.log(LENGTH_MEDIAN), LENGTH_SIGMA, REVIEWS), 3, 300).astype(int)
    texts = [" ".join(generator.choice(words, max(1, length - 1))) for length in lengths]
    labels = generator.choice(["", "Positive", "Negative", "Neutral"], (REVIEWS, ASPECTS), p=[0.8, 0.1, 0.07, 0.03])
    frame = pd.DataFrame(labels, columns=[f"aspect {index}" for index in range(ASPECTS)])
    frame.insert(0, "data", texts)
    frame.to_csv(file, index=False)
    return texts


def write_model(folder: Path, texts: list[str]) -> None:
    """Configuration and tokenizer of an encoder as wide as ViSoBERT."""
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig

    own = EmbeddedTokenizer.train(texts, 12_000)
    own.save(folder / "own")
    special = {"pad_token": PAD, "unk_token": UNKNOWN, "bos_token": START}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "own" / "tokenizer.json"), **special)
    tokenizer.save_pretrained(str(folder))
    XLMRobertaConfig(
        vocab_size=VOCABULARY, hidden_size=768, num_hidden_layers=LAYERS, num_attention_heads=12,
        intermediate_size=3072, max_position_embeddings=514, pad_token_id=own.pad_id, type_vocab_size=2,
    ).save_pretrained(str(folder))  # fmt: skip


class NaiveReviews(Dataset[dict[str, Any]]):
    """What scripts do: tokenise an item when it is asked for, and pad it to the longest there may be."""

    def __init__(self, tokenizer: Any, texts: list[str], labels: np.ndarray) -> None:
        self.tokenizer, self.texts, self.labels = tokenizer, texts, labels

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = self.tokenizer(
            self.texts[index], padding="max_length", truncation=True, max_length=NAIVE_LENGTH, return_tensors="pt"
        )
        return {
            "ids": found["input_ids"][0], "mask": found["attention_mask"][0].bool(),
            "labels": torch.from_numpy(self.labels[index]),
        }  # fmt: skip


def naive(task: VisobertTask) -> Timed:
    """CPU seconds of a few steps of the usual script: batches of 16 items, fp32, AdamW as it comes."""
    torch.manual_seed(0)
    model = task.model().train()
    train = task.splits.train
    reviews = NaiveReviews(task.tokenizer.backend, list(train.texts), train.labels)
    batches = iter(DataLoader(reviews, NAIVE_BATCH, shuffle=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)

    def steps() -> float:
        started = time.process_time()
        for _ in range(NAIVE_STEPS):
            found = next(batches)
            batch = ReviewBatch(found["ids"], found["mask"], found["labels"])
            optimizer.zero_grad()
            task.losses(model, batch, task.counts(batch), 1)[TOTAL].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return time.process_time() - started

    return Timed(steps, NAIVE_STEPS * NAIVE_BATCH)


def ours(task: VisobertTask) -> Timed:
    """CPU seconds of a few steps of our training, with their share of tokenising and of planning the epoch.

    Tokenising is counted whole, as if there were one epoch; the second and the cached runs do without.
    """
    training = Training(task, MemoryRun(), Console(0, quiet=True), "cpu")
    started = time.process_time()
    task.tokenizer.encode(task.splits.train.texts, task.config.model.max_tokens)
    plan = task.plan(0)
    lengths = task.table("train").lengths.numpy()
    preparing = time.process_time() - started
    training.model.train()
    ordered = sorted(plan, key=lambda rows: int(lengths[rows].max()))
    sample = [ordered[int((part + 0.5) * len(ordered) / STEPS)] for part in range(STEPS)]  # all lengths take part
    rows = sum(len(part) for part in sample)

    def steps() -> float:
        begun = time.process_time()
        for part in sample:
            window = Window([part], ends_epoch=False)
            training._step(window, training._load(window))
        training.recorder.drain()
        return time.process_time() - begun + preparing * rows / len(task.splits.train)

    return Timed(steps, rows)


def main(folder: Path) -> None:
    """Samples per CPU second in bf16 and fp32, and the padding efficiency of an epoch's batches."""
    texts = write_reviews(folder / "reviews.csv")
    write_model(folder / "model", texts)
    for amp in ("bf16", "no"):
        overrides = {
            "data.train": folder / "reviews.csv", "data.cache": folder / "cache", "model.name": folder / "model",
            "model.init": "random", "training.amp": amp, "baselines": "false", "training.clip_norm": "1.0",
        }  # fmt: skip
        task = VisobertTask(load(VisobertConfig, None, {key: str(value) for key, value in overrides.items()}))
        if amp == "bf16":
            lengths = task.table("train").lengths.numpy()
            figure("padding_efficiency", padding_efficiency(lengths, task.plan(0)), "tokens of all cells")
            quantiles = np.quantile(lengths, [0.5, 0.9, 0.99]).tolist()
            figure("tokens_mean", float(lengths.mean()), f"tokens a review; p50, p90, p99: {quantiles}")
        name = f"visobert_2_layers_{'bf16' if amp == 'bf16' else 'fp32'}"
        measured(name, ours(task), naive(task), PAIRS)
