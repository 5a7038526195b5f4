"""Speed of MMoE training in rows per CPU second, on one thread, logging every step to MLflow, without evaluation.

The CPU time of the writer process is not included; `logging_writer_cpu` reports it.
"""

import torch

from bench import dense, sparse_adam
from bench.figures import Timed, measured
from bench.workshop import Trainer, Workshop
from pipeline.tasks.mmoe.config import MmoeConfig

PAIRS = 11
ROWS_A_TURN = 65_536
ALL_PARTS = {f"model.heads.{head}.{part}": "true" for head in ("ctr", "cvr") for part in ("wide", "fm")}


def limit(config: MmoeConfig, features: int, steps: int) -> Timed:
    """CPU seconds of forward and backward passes of the dense part, in fp32, on one fixed batch."""
    rows, model = config.training.batch_size, config.model
    part = dense.Dense(features * model.embedding_dim, model.experts.count, model.experts.hidden[0])
    embedded = (0.1 * torch.randn(rows, features * model.embedding_dim)).requires_grad_()
    click = (torch.rand(rows) < 0.04).float()
    conversion = click * (torch.rand(rows) < 0.015).float()

    def step() -> None:
        dense.loss(part(embedded), click, conversion).backward()
        part.zero_grad(set_to_none=True)
        embedded.grad = None

    return dense.timed(step, steps, rows)


def against_limit(shop: Workshop, name: str, batch_size: int) -> None:
    task = shop.task({"training.batch_size": batch_size})
    steps = ROWS_A_TURN // batch_size
    with shop.tracked(name) as run:
        own = Trainer(task, run).timed(steps)
        measured(name, own, limit(task.config, len(task.data.schema.features), steps), PAIRS)


def mmoe_b1024(shop: Workshop) -> None:
    against_limit(shop, "mmoe_b1024", 1024)


def mmoe_b4096(shop: Workshop) -> None:
    against_limit(shop, "mmoe_b4096", 4096)


def mmoe_deepfm_b1024(shop: Workshop) -> None:
    """Wide, FM and deep parts in both heads, against a reference with the deep part only."""
    task = shop.task(ALL_PARTS)
    steps = ROWS_A_TURN // task.config.training.batch_size
    with shop.tracked("mmoe_deepfm_b1024") as run:
        own = Trainer(task, run).timed(steps)
        measured("mmoe_deepfm_b1024", own, sparse_adam.training(shop.data(), task.config, steps), PAIRS)
