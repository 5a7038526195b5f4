"""MMoE training with DeepCTR-Torch and torch-rechub: their models, training loops and data loading, on the same data.

Both use their default settings, with the same embedding width, experts, gates, towers and batch size. Neither supports
weights of multi-valued ids, so they average the ids, padded to the longest bag as both require. Work that is done once
per epoch (stacking the columns, building the loader) is not counted. DeepCTR-Torch's default loss has an L2 penalty on
all embeddings; the `plain` figure leaves it out.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from bench.figures import Timed, clock, measured, silence
from bench.impressions import Column, Columns, read
from bench.workshop import Trainer, Workshop
from pipeline.tasks.mmoe.config import MmoeConfig

PAIRS = 5
OWN_ROWS_A_TURN, PEER_ROWS_A_TURN = 49_152, 20_480
Run = Callable[[], float]  # trains one epoch over the rows and returns its CPU seconds
Inputs = dict[str, npt.NDArray[np.int32]]  # [rows], or [rows, longest bag] padded with 0


def _against(label: str, peer: Callable[[Columns, MmoeConfig], Run], batch_size: int, shop: Workshop) -> None:
    name = f"mmoe_vs_{label}_b{batch_size}"
    task = shop.task({"training.batch_size": batch_size})
    rows = PEER_ROWS_A_TURN // batch_size * batch_size
    other = Timed(peer(read(shop.data(), rows), task.config), rows)
    with shop.tracked(name) as run:
        measured(name, Trainer(task, run).timed(OWN_ROWS_A_TURN // batch_size), other, PAIRS)


def deepctr(columns: Columns, config: MmoeConfig, **settings: float) -> Run:
    """Return a function that trains one epoch over the rows with `MMOE.fit` and returns its CPU seconds."""
    with silence(), patch("requests.get", side_effect=OSError):  # DeepCTR-Torch would query PyPI for its newest version
        before = set(threading.enumerate())
        from deepctr_torch.callbacks import Callback
        from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
        from deepctr_torch.models import MMOE

        for thread in set(threading.enumerate()) - before:
            thread.join()

    class Clock(Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
            self.started = time.process_time()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
            self.seconds = time.process_time() - self.started

    inputs, width = padded(columns), config.model.embedding_dim
    features = []
    for name, column in columns.ids.items():
        plain = SparseFeat(name, vocabulary_size=_table_rows(column), embedding_dim=width)
        features.append(plain if inputs[name].ndim == 1 else VarLenSparseFeat(plain, maxlen=inputs[name].shape[1]))
    with silence():
        model = MMOE(
            features, num_experts=config.model.experts.count, expert_dnn_hidden_units=config.model.experts.hidden,
            gate_dnn_hidden_units=(), tower_dnn_hidden_units=config.model.towers.hidden, **settings,
        )  # fmt: skip
        model.compile("adam", loss=["binary_crossentropy"] * 2)
    labels, clock = np.stack([columns.click, columns.conversion], 1), Clock()

    def seconds() -> float:
        with silence():
            model.fit(dict(inputs), labels, config.training.batch_size, epochs=1, verbose=0, callbacks=[clock])
        return clock.seconds

    return seconds


def rechub(columns: Columns, config: MmoeConfig, device: str = "cpu") -> Run:
    """Return a function that runs `MTLTrainer.train_one_epoch` over the rows and returns its seconds (see `clock`)."""
    from torch_rechub.basic.features import SequenceFeature, SparseFeature
    from torch_rechub.models.multi_task import MMOE
    from torch_rechub.trainers import MTLTrainer
    from torch_rechub.utils.data import DataGenerator

    inputs, width, kinds = padded(columns), config.model.embedding_dim, ["classification"] * 2
    features = [
        SparseFeature(name, _table_rows(column), width) if inputs[name].ndim == 1
        else SequenceFeature(name, _table_rows(column), width, pooling="mean", padding_idx=0)
        for name, column in columns.ids.items()
    ]  # fmt: skip
    tower = {"dims": list(config.model.towers.hidden), "activation": "relu"}
    expert = {"dims": list(config.model.experts.hidden), "activation": "relu"}
    model = MMOE(features, kinds, config.model.experts.count, expert, [tower] * 2)
    trainer = MTLTrainer(model, kinds, device=device)
    labels = np.stack([columns.click, columns.conversion], 1)
    loader = DataGenerator(inputs, labels).generate_dataloader(
        x_val=inputs, y_val=labels, x_test=inputs, y_test=labels, batch_size=config.training.batch_size
    )[0]

    def seconds() -> float:
        with silence():
            started = clock(device)
            trainer.train_one_epoch(loader)
            return clock(device) - started

    return seconds


def padded(columns: Columns) -> Inputs:
    """Convert every feature to an array. Ids are increased by one, because 0 is the padding."""
    inputs: Inputs = {}
    for name, column in columns.ids.items():
        lengths = np.diff(column.offsets)
        if (lengths == 1).all():
            inputs[name] = (column.ids + 1).astype(np.int32)
            continue
        row = np.repeat(np.arange(len(lengths)), lengths)
        table = np.zeros((len(lengths), lengths.max()), dtype=np.int32)
        table[row, np.arange(len(column.ids)) - column.offsets[row]] = column.ids + 1
        inputs[name] = table
    return inputs


def _table_rows(column: Column) -> int:
    return column.size + 1


def _plain_deepctr(columns: Columns, config: MmoeConfig) -> Run:
    return deepctr(columns, config, l2_reg_embedding=0.0)


deepctr_b1024, deepctr_b4096 = (partial(_against, "deepctr", deepctr, size) for size in (1024, 4096))
plain_deepctr_b1024 = partial(_against, "plain_deepctr", _plain_deepctr, 1024)
rechub_b1024, rechub_b4096 = (partial(_against, "rechub", rechub, size) for size in (1024, 4096))
