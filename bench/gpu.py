"""Check training on a GPU against the CPU, then measure its speed: `python -m bench.gpu [--device cuda|cpu] [--small]`.

For a machine with a GPU, Python 3.12, torch, transformers, numba, pyarrow, pandas, scikit-learn and scipy, and without
a network: `python -m bench.gpu --wheels` prints the command that fetches all else. Nothing is tracked, so MLflow is not
needed. Takes at most 8 minutes: what does not fit is named as not measured. `--device cpu --small` runs the same code
with tiny sizes, to test it.

Prints one JSON object per figure, like `python -m bench`; docs/performance.md explains them. The exit code is 1 if a
check fails or a figure could not be measured.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench import wheels
from bench.figures import ROOT
from bench.gpu_training import mmoe_task, reviews_task, train, untracked

SECONDS = 8 * 60
TOLERANCE = 1e-5
STEPS = 200
SLOW = {"optim.encoder.lr": 1e-5, "optim.head.lr": 1e-5}


@dataclass(frozen=True)
class Size:
    """How much to train: on a GPU, or to test this script on a CPU."""

    steps: int = STEPS
    impressions: int = 300_000
    mmoe_batch: int = 4096
    mmoe_steps: int = 60  # per measurement
    reviews: int = 4000
    layers: int = 12
    width: int = 768
    matrix: int = 8192
    pairs: int = 3


SMALL = Size(steps=10, impressions=3000, mmoe_batch=256, mmoe_steps=4, reviews=96, layers=1, width=96, matrix=256,
             pairs=1)  # fmt: skip


Make = Callable[..., Any]  # creates a task: (device, folder, **settings)


class CheckError(Exception):
    """The GPU does not compute what the CPU computes."""


class Bench:
    """The checks and figures, in the order of their importance."""

    def __init__(self, folder: Path, device: str, size: Size) -> None:
        self.folder, self.device, self.size = folder, device, size

    def parts(self) -> dict[str, Callable[[], None]]:
        return {
            "gradients of the MMoE": partial(self.gradients, mmoe_task),
            "gradients of the reviews": partial(self.gradients, reviews_task),
            "steps of the MMoE": partial(self.trajectory, "mmoe", mmoe_task),
            "steps of the reviews": partial(self.trajectory, "reviews", partial(reviews_task, **SLOW)),
            "resume": self.resume,
            "training of the reviews": self.reviews,
            "speed of the MMoE": partial(self.mmoe_speed, compiled=False),
            "speed of ViSoBERT": partial(self.reviews_speed, compiled=False),
            "steps of the MMoE, compiled": partial(self.trajectory, "mmoe_compiled", mmoe_task, compiled=True),
            "speed of the MMoE, compiled": partial(self.mmoe_speed, compiled=True),
            "speed of ViSoBERT, compiled": partial(self.reviews_speed, compiled=True),
        }

    # --- checks ------------------------------------------------------------------------------------------------------

    def gradients(self, make: Make) -> None:
        """Losses and gradients of one batch in fp32, against those of the CPU."""
        from pipeline.training.loop import Window

        found = []
        for device in ("cpu", self.device):
            training = untracked(make(device, self.folder), device)
            window = Window([training.plan(0)[0]], ends_epoch=False)
            losses, _ = training._backward(window, training._load(window), 0)
            gradients = {name: weight.grad.to_dense() for name, weight in training.model.named_parameters()
                         if weight.grad is not None}  # fmt: skip
            found.append((_on_cpu(losses), _on_cpu(gradients)))
        (losses, gradients), (other_losses, other_gradients) = found
        task = training.task.config.task
        self.check(f"gpu_{task}_losses", _distance(losses, other_losses))
        self.check(f"gpu_{task}_gradients", _distance(gradients, other_gradients))

    def trajectory(self, label: str, make: Make, compiled: bool = False) -> None:
        """The logged total loss of every step, against the CPU's; compiled: against the same device without.

        Adam divides gradients by their size, so rounding in near-zero gradients moves weights, and differences grow:
        little with a low learning rate (2e-6 for matrix products that are rounded otherwise), without bound at the
        usual one.
        """
        from pipeline.tasks.base import TOTAL

        runs = []
        ways = [(self.device if compiled else "cpu", {}), (self.device, {"training.compile": compiled})]
        for device, settings in ways:
            training = untracked(make(device, self.folder, **settings), device)
            training.advance(until=self.size.steps)
            training.recorder.drain()
            runs.append([values[TOTAL] for _, values in training.run.history() if TOTAL in values])
        worst = max(abs(one - other) / abs(one) for one, other in zip(*runs, strict=True))
        self.check(f"gpu_{label}_{self.size.steps}_steps", worst, TOLERANCE if compiled else 1e-4)

    def resume(self) -> None:
        """Weights of a training that is killed and resumed, against an undisturbed one, bit by bit, fp32 and fp16.

        With deterministic algorithms, for which cuBLAS needs a workspace of fixed size.
        """
        from pipeline.storage.weights import load_weights

        start = partial(subprocess.run, cwd=ROOT, env=os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
        for amp in ("no", "fp16"):
            command = [sys.executable, "-m", "bench.gpu", "--device", self.device, "--train", amp,
                       "--steps", str(self.size.steps // 2)]  # fmt: skip
            whole, killed = (self.folder / f"{name}-{amp}" for name in ("whole", "killed"))
            start([*command, "--scratch", str(whole)], check=True)
            first = start([*command, "--scratch", str(killed), "--kill"], check=False)
            if first.returncode != -signal.SIGKILL:
                raise CheckError(f"the training to kill ended with code {first.returncode}")
            start([*command, "--scratch", str(killed)], check=True)
            one, other = (load_weights(folder / "weights.safetensors") for folder in (whole, killed))
            different = sum(int((one[name] != other[name]).sum()) for name in one)
            self.check(f"gpu_resume_{amp}", different, 0, "weights that differ")

    def reviews(self) -> None:
        """The reviews' task with evaluation, thresholds and calibration: its last score, beside that of the CPU."""
        from bench.figures import figure

        scores = []
        for device in ("cpu", self.device):
            task = reviews_task(device, self.folder, **{"training.max_steps": self.size.steps})
            result = untracked(task, device).train()
            scores.append(result.metrics["test/sentiment_f1_macro"])
        figure("gpu_reviews_f1", scores[1], "F1 on the test split, reference: on the CPU", scores[0])

    def check(self, name: str, value: float, allowed: float = TOLERANCE, unit: str = "relative difference") -> None:
        from bench.figures import figure

        figure(name, value, f"{unit}, allowed {allowed:g}")
        if not value <= allowed:
            raise CheckError(f"{name} is {value:g}, allowed: {allowed:g}")

    # --- speed -------------------------------------------------------------------------------------------------------

    def mmoe_speed(self, compiled: bool) -> None:
        """Training rows per second against torch-rechub's model in its own loop and data loading."""
        from bench.figures import Timed, clock, measured
        from bench.impressions import prepared, read
        from bench.peers import rechub
        from bench.workshop import reference_config
        from pipeline.tasks.mmoe.task import MmoeTask

        size, data = self.size, prepared(self.folder, self.size.impressions)
        rows = size.mmoe_batch * size.mmoe_steps
        settings = {"device": self.device, "training.batch_size": size.mmoe_batch, "training.compile": compiled,
                    "training.amp": "no"}  # fmt: skip
        training = untracked(MmoeTask(reference_config(data, settings)), self.device)

        def seconds() -> float:
            training.advance(until=training.result.steps)  # compiles
            started = clock(self.device)
            training.advance(until=training.result.steps + size.mmoe_steps)
            training.recorder.drain()
            return clock(self.device) - started

        few = min(rows, size.impressions // size.mmoe_batch * size.mmoe_batch)
        other = Timed(rechub(read(data, few), training.config, self.device), few)
        measured(f"gpu_mmoe_{_way(compiled)}_vs_rechub", Timed(seconds, rows), other, size.pairs, self.unit("rows"))

    def reviews_speed(self, compiled: bool) -> None:
        """Reviews per second with an encoder of ViSoBERT's shape, against Hugging Face's Trainer; the matrix rate."""
        from bench.figures import Timed, clock, figure, measured
        from bench.visobert import transformers_trainer, write_model, write_reviews
        from pipeline.config.strict_config import load
        from pipeline.tasks.visobert.config import VisobertConfig
        from pipeline.tasks.visobert.task import VisobertTask

        size, folder = self.size, self.folder / "visobert"
        if not folder.exists():
            folder.mkdir()
            write_model(folder / "model", write_reviews(folder / "reviews.csv", size.reviews), size.layers, size.width)
        settings = {
            "data.train": folder / "reviews.csv", "data.cache": folder / "cache", "model.name": folder / "model",
            "model.init": "random", "training.amp": "bf16", "baselines": False, "device": self.device,
            "training.batch_size": 64, "training.batch_tokens": 64 * 256, "training.compile": compiled,
            "training.num_train_epochs": 100, "evaluation.every_steps": 10**9,
        }  # fmt: skip
        task = VisobertTask(load(VisobertConfig, None, {key: str(value) for key, value in settings.items()}))
        training, seconds_of_own = untracked(task, self.device), []
        train = task.data.splits.train
        steps = len(task.plan(0))

        def seconds() -> float:
            training.advance(until=training.result.steps)  # compiles
            started = clock(self.device)
            training.advance(until=training.result.steps + steps)
            training.recorder.drain()
            seconds_of_own.append(clock(self.device) - started)
            return seconds_of_own[-1]

        name = f"gpu_visobert_{_way(compiled)}"
        other = transformers_trainer(task, folder, self.device, steps=None)
        measured(f"{name}_vs_trainer", Timed(seconds, len(train)), other, size.pairs, self.unit("reviews"))
        lengths = task.data.table("train").lengths.double()
        work = 3 * _forward_operations(float(lengths.sum()), float(lengths.square().sum()), size.layers, size.width)
        rate = work / min(seconds_of_own[1:]) / 1e12
        figure(f"{name}_rate", rate, "TFLOP/s of tokens, reference: a product of bf16 matrices", self.matrix_rate())

    def matrix_rate(self) -> float:
        """TFLOP/s of the product of two square bf16 matrices."""
        import torch

        from bench.figures import clock

        one, other = (torch.randn(self.size.matrix, self.size.matrix, device=self.device, dtype=torch.bfloat16)
                      for _ in range(2))  # fmt: skip
        rates = []
        for _ in range(4):
            started = clock(self.device)
            for _ in range(10):
                one @ other
            rates.append(10 * 2 * self.size.matrix**3 / (clock(self.device) - started) / 1e12)
        return max(rates)

    def unit(self, what: str) -> str:
        return f"{what} per CPU second" if self.device == "cpu" else f"{what} per second"


def _forward_operations(tokens: float, squares: float, layers: int, width: int) -> float:
    """Floating-point operations of the encoder's matrix products. squares: sum of the squared lengths of the texts.

    A layer has 4 width^2 weights in its attention and 8 width^2 in its two other products; a weight is a multiplication
    and an addition for each token. Scores and mixtures of the attention take 2 * 2 * width for each pair of tokens.
    """
    return layers * (2 * 12 * width**2 * tokens + 4 * width * squares)


def _on_cpu(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.detach().double().cpu() for name, value in values.items()}


def _distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest norm of a difference, relative to that of the first tensor."""
    return max(float((one[name] - other[name]).norm() / one[name].norm().clamp_min(1e-30)) for name in one)


def _way(compiled: bool) -> str:
    return "compiled" if compiled else "eager"


def run(folder: Path, device: str, size: Size) -> int:
    """Check and measure. Returns the exit code: 1 if something failed or did not fit into the time."""
    begun, code, bench = time.monotonic(), 0, Bench(folder, device, size)
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
    for name, part in bench.parts().items():
        started = time.monotonic()
        try:
            part()
        except Exception as error:
            code = 1
            traceback.print_exc()
            print(f"failed: {name}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        print(f"{time.monotonic() - started:.0f} s for {name}", file=sys.stderr, flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(f"{time.monotonic() - begun:.0f} s in all", file=sys.stderr)
    return code


def _out_of_time(*_: object) -> None:
    """End this part, and each of the following within a second."""
    raise TimeoutError(f"not measured: {SECONDS} s are over")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to test the script")
    parser.add_argument("--scratch", type=Path, help="folder for generated data")
    parser.add_argument("--wheels", action="store_true", help="print how to fetch what a bare machine lacks")
    for name, kind in (("--train", str), ("--steps", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--kill", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.wheels:
        print(wheels.commands())
        return 0
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("found no CUDA device; allowed here: --device cpu", file=sys.stderr)
        return 2
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.train:
        options.scratch.mkdir(parents=True, exist_ok=True)
        train(options.scratch, options.device, options.train, options.steps, options.kill)
        return 0
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(json.dumps({"name": "machine", "device": card, "torch": torch.__version__, "python": sys.version.split()[0]}))
    with tempfile.TemporaryDirectory(prefix="focal-gpu-") as temporary:
        return run((options.scratch or Path(temporary)).resolve(), options.device, SMALL if options.small else Size())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
