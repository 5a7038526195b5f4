"""The trainings that `bench.gpu` compares: both tasks on generated data, logged to memory."""

import os
import signal
from pathlib import Path
from typing import Any

from bench.figures import ROOT


def mmoe_task(device: str, folder: Path, **settings: object) -> Any:
    """The MMoE on embedded data, in fp32 without dropout; with a low learning rate, differences grow slowly."""
    from pipeline.config.strict_config import load
    from pipeline.tasks.mmoe.config import MmoeConfig
    from pipeline.tasks.mmoe.task import MmoeTask

    values = {"data.embedded.rows": 20_000, "loss.aux_focal.warmup_steps": 0, "evaluation.every_steps": 10**9,
              "optim.dense.lr": 1e-4, "optim.embedding.lr": 1e-4, "training.batch_size": 512,
              "training.num_train_epochs": 100, "training.amp": "no", "device": device,
              "output_dir": folder / "outputs"}  # fmt: skip
    texts = {key: str(value) for key, value in (values | settings).items()}
    return MmoeTask(load(MmoeConfig, ROOT / "configs/mtl_mmoe.yaml", texts))


def reviews_task(device: str, folder: Path, **settings: object) -> Any:
    """The small encoder on embedded reviews, in fp32 without dropout."""
    from pipeline.config.strict_config import load
    from pipeline.tasks.visobert.config import VisobertConfig
    from pipeline.tasks.visobert.task import VisobertTask

    values = {"data.embedded.rows": 1000, "data.cache": folder / "cache", "baselines": False, "training.amp": "no",
              "training.num_train_epochs": 100, "evaluation.every_steps": 10**9, "model.dropout": 0,
              "model.embedded.dropout": 0, "model.embedded.token_dropout": 0, "device": device}  # fmt: skip
    texts = {key: str(value) for key, value in (values | settings).items()}
    return VisobertTask(load(VisobertConfig, ROOT / "configs/config_multi_embedded.yaml", texts))


def untracked(task: Any, device: str) -> Any:
    """A training that logs to memory."""
    from pipeline.runtime.console import Console
    from pipeline.tracking.run import MemoryRun
    from pipeline.training.loop import Training

    return Training(task, MemoryRun(), Console(0, quiet=True), device)


def train(folder: Path, device: str, amp: str, steps: int, kill: bool) -> None:
    """Train from the state in the folder, if there is one; kill: save it halfway, and die some steps later.

    With PyTorch's deterministic algorithms; it warns of operators that have none.
    """
    import torch

    from pipeline.storage.checkpoint_format import read_checkpoint, write_checkpoint
    from pipeline.storage.weights import save_weights

    torch.use_deterministic_algorithms(True, warn_only=True)
    dropout = {"model.experts.dropout": 0.2, "model.gate.noise": 0.1, "training.amp": amp}
    training = untracked(mmoe_task(device, folder.parent, **dropout), device)
    state = folder / "state"
    if state.exists():
        training.restore(read_checkpoint(state))
    if kill:
        training.advance(until=steps // 2)
        state.mkdir(parents=True)
        write_checkpoint(state, training.state(), training.result.steps)
        training.advance(until=steps * 3 // 4)
        os.kill(os.getpid(), signal.SIGKILL)
    training.advance(until=steps)
    save_weights(training.model.state_dict(), folder / "weights.safetensors")
