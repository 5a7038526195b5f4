"""A training in this process, one of several or alone, that writes what tests compare.

`main` is given a file of JSON: what to train (`task`, `config`, `overrides`), `steps` (all, without), `states` = at
which of them the whole state is kept beside the file, `compared` = a folder of such states whose gradients are to be
computed here. Rank 0 writes FILE.out beside it: the losses of every step, metrics of the evaluation at the end,
weights. It needs RANK and the like in its environment, as torchrun gives them.
"""

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.compute import distributed
from pipeline.config.strict_config import load
from pipeline.entries import find_entry
from pipeline.runs.launch import prepare_torch
from pipeline.runtime import process_rank
from pipeline.runtime.console import Console
from pipeline.runtime.importing import import_reference
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Training


def gradients(training: Training, step: int) -> dict[str, torch.Tensor]:
    """Of the window that comes at the step, with the weights as they are; nothing is updated."""
    window = next(iter(training._remaining(training.total_steps)))
    losses, _ = training._backward(window, training._load(window), step)
    found = {f"loss {name}": value for name, value in losses.items()}
    for name, parameter in training.model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.to_dense().clone()
        parameter.grad = None
    return found


def main(file: Path) -> None:
    asked: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    entry = find_entry(asked["task"])
    config = load(import_reference(entry.config), Path(asked["config"]), asked["overrides"])
    device = prepare_torch(config)
    distributed.init(device)
    run = MemoryRun()
    training = Training(import_reference(entry.target)(config), run, Console(0, quiet=True), device)
    training.load_state(distributed.broadcast(training.state))
    out: dict[str, Any] = {}
    if "compared" in asked:
        for kept in sorted(Path(asked["compared"]).glob("*.state")):
            training.load_state(torch.load(kept, weights_only=False))
            found = gradients(training, int(kept.stem))
            if process_rank.is_main_process():
                out[kept.stem] = found
    elif "steps" not in asked:
        training.train()
        out = {"points": run.points}
    else:
        training.model.train()
        for step in range(asked["steps"]):
            if step in asked.get("states", ()) and process_rank.is_main_process():
                torch.save(training.state(), file.parent / f"{step}.state")
            training.advance(step + 1)
        training._evaluate()
        training.recorder.drain()
        out = {"points": run.points, "metrics": training.result.metrics, "weights": training.model.state_dict()}
    if process_rank.is_main_process():
        torch.save(out, f"{file}.out")
    distributed.destroy()
    run.discard()
