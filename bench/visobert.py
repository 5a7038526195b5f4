"""Two layers as wide as ViSoBERT's, on texts as long as real reviews: our training against other scripts."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from bench.figures import Timed, clock, figure, measured, silence
from bench.workshop import Workshop
from pipeline.compute.device import precision
from pipeline.config.strict_config import load
from pipeline.runtime.console import Console
from pipeline.tasks.base import TOTAL, Rows
from pipeline.tasks.visobert.config import VisobertConfig
from pipeline.tasks.visobert.reviews.review_table import ReviewBatch
from pipeline.tasks.visobert.task import VisobertTask
from pipeline.tasks.visobert.tokenizer import PAD, START, UNKNOWN, EmbeddedTokenizer
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Training, Window

REVIEWS, LAYERS, WIDTH, ASPECTS, PAIRS, FEW_PAIRS = 6000, 2, 768, 11, 5, 3
UNIT = "reviews per CPU second"
LENGTH_MEDIAN, LENGTH_SIGMA = 26, 0.68  # log-normal: mean 33, p50 26, p90 62, p99 126
NAIVE_LENGTH, NAIVE_BATCH = 256, 16
STEPS, NAIVE_STEPS = 8, 2  # per measurement
VOCABULARY = 15_002


def write_reviews(file: Path, reviews: int = REVIEWS) -> list[str]:
    """Write texts of made-up words, one token each, with random labels. Returns the texts."""
    generator = np.random.Generator(np.random.PCG64(0))
    letters = np.array(list("abcdeghiklmnopqrstuvxy"))
    words = ["".join(generator.choice(letters, 6)) for _ in range(4000)]
    lengths = np.clip(generator.lognormal(np.log(LENGTH_MEDIAN), LENGTH_SIGMA, reviews), 3, 300).astype(int)
    texts = [" ".join(generator.choice(words, max(1, length - 1))) for length in lengths]
    labels = generator.choice(["", "Positive", "Negative", "Neutral"], (reviews, ASPECTS), p=[0.8, 0.1, 0.07, 0.03])
    frame = pd.DataFrame(labels, columns=[f"aspect {index}" for index in range(ASPECTS)])
    frame.insert(0, "data", texts)
    frame.to_csv(file, index=False)
    return texts


def write_model(folder: Path, texts: list[str], layers: int = LAYERS, width: int = WIDTH) -> None:
    """Write the configuration and tokenizer of an encoder; ViSoBERT has 12 layers and a width of 768."""
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig

    own = EmbeddedTokenizer.train(texts, 12_000)
    own.save(folder / "own")
    special = {"pad_token": PAD, "unk_token": UNKNOWN, "bos_token": START}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "own" / "tokenizer.json"), **special)
    tokenizer.save_pretrained(str(folder))
    XLMRobertaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=12,
        intermediate_size=4 * width, max_position_embeddings=514, pad_token_id=own.pad_id, type_vocab_size=2,
    ).save_pretrained(str(folder))  # fmt: skip


class NaiveReviews(Dataset[dict[str, Any]]):
    """Dataset of the naive script: each item is tokenised on access and padded to the maximum length."""

    def __init__(self, tokenizer: Any, texts: list[str], labels: np.ndarray) -> None:
        self.tokenizer, self.texts, self.labels = tokenizer, texts, labels

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = self.tokenizer(
            self.texts[index], padding="max_length", truncation=True, max_length=NAIVE_LENGTH, return_tensors="pt"
        )
        return {
            "ids": tokens["input_ids"][0], "mask": tokens["attention_mask"][0].bool(),
            "labels": torch.from_numpy(self.labels[index]),
        }  # fmt: skip


def naive(task: VisobertTask) -> Timed:
    """CPU seconds of a few steps of the naive script: batches of 16 items, fp32, AdamW."""
    torch.manual_seed(0)
    model = task.model().train()
    train = task.data.splits.train
    reviews = NaiveReviews(task.data.tokenizer.backend, list(train.texts), train.labels)
    batches = iter(DataLoader(reviews, NAIVE_BATCH, shuffle=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)

    def steps() -> float:
        started = time.process_time()
        for _ in range(NAIVE_STEPS):
            items = next(batches)
            batch = ReviewBatch(items["ids"], items["mask"], items["labels"])
            optimizer.zero_grad()
            task.losses(task.forward(model, batch), batch, task.counts(batch), 1)[TOTAL].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return time.process_time() - started

    return Timed(steps, NAIVE_STEPS * NAIVE_BATCH)


def spread_out(batches: Sequence[Rows], lengths: npt.NDArray[np.int64]) -> list[Rows]:
    """Select `STEPS` batches with about the same distribution of lengths as the epoch."""
    ordered = sorted(batches, key=lambda rows: int(lengths[rows].max()))
    return [ordered[int((part + 0.5) * len(ordered) / STEPS)] for part in range(STEPS)]


def ours(task: VisobertTask) -> Timed:
    """CPU seconds of a few steps of our training, including their share of tokenising and of planning the epoch.

    Tokenising is counted as if there were only one epoch.
    """
    training = Training(task, MemoryRun(), Console(0, quiet=True), "cpu")
    started = time.process_time()
    task.data.tokenizer.encode(task.data.splits.train.texts, task.config.model.max_tokens)
    plan = task.plan(0)
    lengths = task.data.table("train").lengths.numpy()
    preparing = time.process_time() - started
    training.model.train()
    sample = spread_out(plan, lengths)
    rows = sum(len(part) for part in sample)

    def steps() -> float:
        begun = time.process_time()
        for part in sample:
            window = Window([part], ends_epoch=False)
            training._step(window, training._load(window))
        training.recorder.drain()
        return time.process_time() - begun + preparing * rows / len(task.data.splits.train)

    return Timed(steps, rows)


class TokenisedReviews(Dataset[dict[str, Any]]):
    """Token ids and labels in the format of Hugging Face's Trainer."""

    def __init__(self, task: VisobertTask) -> None:
        train = task.data.splits.train
        tokens = task.data.tokenizer.encode(train.texts, task.config.model.max_tokens)
        self.ids = np.split(tokens.ids, tokens.lengths.cumsum()[:-1])
        self.labels = train.labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class WithLoss(torch.nn.Module):
    """The task's model, with the loss in the output of `forward`, as Hugging Face's Trainer expects."""

    def __init__(self, task: VisobertTask) -> None:
        super().__init__()
        self.task, self.model = task, task.model()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        batch = ReviewBatch(input_ids, attention_mask, labels)
        return {
            "loss": self.task.losses(self.task.forward(self.model, batch), batch, self.task.counts(batch), 1)[TOTAL]
        }


def transformers_trainer(task: VisobertTask, folder: Path, device: str = "cpu", steps: int | None = STEPS) -> Timed:
    """Seconds (see `clock`) of a few steps of Hugging Face's Trainer with length grouping; None = of an epoch.

    Work before the first step (tokenising, sorting, creating the optimizer) is not counted.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    reviews, training = TokenisedReviews(task), task.config.training
    lengths = np.array([len(ids) for ids in reviews.ids])

    class Sampled(Trainer):
        def _get_train_sampler(self, *arguments: Any) -> list[int]:
            order = np.array(list(super()._get_train_sampler(*arguments)))
            if steps is None:
                return order.tolist()
            batches = np.split(order, range(training.batch_size, len(order), training.batch_size))
            return np.concatenate(spread_out(batches, lengths)).tolist()

    class Clock(TrainerCallback):
        seconds = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = clock(device)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.seconds = clock(device) - self.started

    def padded(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = np.array([len(item["input_ids"]) for item in items])
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(mask.shape, task.data.tokenizer.pad_id, dtype=np.int32)
        ids[mask] = np.concatenate([item["input_ids"] for item in items])
        labels = np.stack([item["labels"] for item in items])
        arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: torch.from_numpy(values) for name, values in arrays.items()}

    watch = Clock()
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), use_cpu=device == "cpu", num_train_epochs=1, bf16=training.amp == "bf16",
        per_device_train_batch_size=training.batch_size, train_sampling_strategy="group_by_length",
        learning_rate=task.config.optim.encoder.lr, weight_decay=task.config.optim.encoder.weight_decay,
        max_grad_norm=training.clip_norm or 0.0, save_strategy="no", report_to="none", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=device != "cpu",
    )  # fmt: skip
    with silence():
        trainer = Sampled(WithLoss(task), arguments, padded, reviews, callbacks=[watch])

    def seconds() -> float:
        with silence():
            trainer.train()
        return watch.seconds

    return Timed(seconds, len(reviews) if steps is None else steps * training.batch_size)


def make_task(folder: Path, amp: str) -> VisobertTask:
    file, model = folder / "reviews.csv", folder / "model"
    write_model(model, write_reviews(file))
    overrides = {
        "data.train": file, "data.cache": folder / "cache", "model.name": model, "model.init": "random",
        "training.amp": amp, "baselines": "false",
    }  # fmt: skip
    return VisobertTask(load(VisobertConfig, None, {key: str(value) for key, value in overrides.items()}))


def naive_bf16(shop: Workshop) -> None:
    """Speed against the naive script, and the padding efficiency of an epoch's batches."""
    task = make_task(shop.folder, "bf16")
    lengths = task.data.table("train").lengths.numpy()
    plan = task.plan(0)
    cells = sum(len(rows) * int(lengths[rows].max()) for rows in plan)
    figure("padding_efficiency", sum(int(lengths[rows].sum()) for rows in plan) / cells, "tokens of all cells")
    measured("visobert_vs_naive_bf16", ours(task), naive(task), PAIRS, UNIT)


def naive_fp32(shop: Workshop) -> None:
    task = make_task(shop.folder, "no")
    measured("visobert_vs_naive_fp32", ours(task), naive(task), FEW_PAIRS, UNIT)


def trainer(shop: Workshop) -> None:
    """The same model, reviews and batch size, in the precision that `training.amp: auto` selects on this machine."""
    task = make_task(shop.folder, precision("auto", "cpu"))
    measured("visobert_vs_trainer", ours(task), transformers_trainer(task, shop.folder), PAIRS, UNIT)
