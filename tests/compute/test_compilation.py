"""Compiled methods. Here torch only traces them; the code that it generates is tested by `make faults`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from pipeline.compute.compilation import check_compiler, compile_method, compiling
from pipeline.config.run_config import TrainingConfig
from pipeline.errors import UserError
from pipeline.runs.launch import prepare_torch
from pipeline.runtime.console import Console
from pipeline.runtime.interrupts import Interrupted
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Training

Make = Callable[..., MmoeConfig]


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that were traced, each of which would be compiled; they run as they are."""
    graphs: list[Any] = []
    compile_function: Any = torch.compile

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def trace(function: Any, *, options: Any, **settings: Any) -> Any:
        return compile_function(function, backend=keep, **settings)

    monkeypatch.setattr(torch, "compile", trace)
    monkeypatch.setattr("pipeline.compute.compilation._model", None)
    torch.compiler.reset()
    return graphs


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.linear(x)  # type: ignore[no-any-return]


class Looping(nn.Module):
    """A loop over rows, which torch unrolls."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(x.shape[1])
        for row in range(x.shape[0]):
            total = total + x[row]
        return total


def test_one_compilation_serves_all_sizes_and_leaves_evaluation_alone(traces: list[Any]) -> None:
    module = Doubled()
    names = list(module.state_dict())
    compile_method(module, "forward")
    assert list(module.state_dict()) == names
    for rows in (4, 2, 7, 3):
        x = torch.randn(rows, 3)
        expected = 2 * (x @ module.linear.weight.T + module.linear.bias)
        torch.testing.assert_close(module(x), expected)
    assert len(traces) == 1
    module.eval()
    module(torch.randn(1, 3))
    assert len(traces) == 1
    module.train()
    module(torch.randn(1, 3))  # a single row is another case for torch
    assert len(traces) == 2


def test_what_exceeds_the_limit_runs_uncompiled_with_one_warning(
    traces: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    module = Looping()
    compile_method(module, "forward")
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in (2, 3, 4, 5, 2):
            x = torch.randn(rows, 6)
            torch.testing.assert_close(module(x), x.sum(0))
    assert len(traces) == 2
    assert capsys.readouterr().err.splitlines() == [
        "warning: training.compile: Looping.forward was compiled for as many cases as torch allows "
        "(torch._dynamo.config.recompile_limit); others are not compiled, so they are slower"
    ]


def test_another_model_has_the_whole_limit_and_the_same_one_is_not_compiled_again(
    traces: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        for rows in (2, 2, 3):  # as three runs in the worker of a sweep, the last with another model
            module = Looping()
            compile_method(module, "forward")
            with compiling(f"{rows} rows", alone=False):
                module(torch.ones(rows, 6))
    assert len(traces) == 2
    assert capsys.readouterr().err == ""


def test_processes_with_one_cache_compile_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for alone in (True, False):
        with compiling("model", alone=alone):
            (file,) = tmp_path.glob("*.lock")
            other = FileLock(file, blocking=False, is_singleton=False)
            with pytest.raises(Timeout) if alone else other:
                other.acquire()


def test_a_model_that_cannot_be_compiled_is_one_line(traces: list[Any]) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    module = Branching()
    compile_method(module, "forward")
    with (
        pytest.raises(UserError, match=r"^training\.compile: torch cannot compile the model: .*") as caught,
        compiling("model", alone=False),
    ):
        module(torch.ones(2))
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_compiler_is_one_line_before_the_data_are_read(small: Make) -> None:
    config = small(training__compile=True)
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(UserError, match=r"^training\.compile: found no C\+\+ compiler, allowed: .*") as caught:
            prepare_torch(config)
        assert len(str(caught.value).splitlines()) == 1
        prepare_torch(small())
        check_compiler("cuda")  # it compiles with another one


def trained(config: MmoeConfig, steps: int | None = None, state: Any = None) -> tuple[MemoryRun, Training]:
    run = MemoryRun()
    training = Training(MmoeTask(config), run, Console(0, quiet=True), "cpu")
    if state:
        training.load_state(state)
    training.advance(steps)
    training.recorder.drain()
    return run, training


def test_compiling_leaves_no_trace_in_the_training(small: Make, traces: list[Any]) -> None:
    """Neither its gradients nor the random numbers of its dropout: the same graph gives the same bits, also resumed."""
    noisy = {"model.experts.dropout": 0.2, "model.gate.noise": 0.5, "model.embedding_dropout": 0.1}
    _, plain = trained(small(**noisy))
    assert traces == []
    config = small(**noisy, training__compile=True)
    _, whole = trained(config)
    _, first = trained(config, 5)
    _, second = trained(config, state=first.state())
    assert len(traces) == 1  # the same model in one process
    for training in (whole, second):
        assert training.result.steps == 12
        assert all(torch.equal(weight, plain.model.state_dict()[name])
                   for name, weight in training.model.state_dict().items())  # fmt: skip


def test_an_interrupted_compilation_leaves_the_state_to_save(
    small: Make, traces: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(
        MmoeTask(small(model__experts__dropout=0.2, training__compile=True)), MemoryRun(), Console(0, quiet=True), "cpu"
    )
    backward, before = training._backward, training.random["cpu"]

    def interrupted(*arguments: Any) -> Any:
        backward(*arguments)
        raise Interrupted(15)

    monkeypatch.setattr(training, "_backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.advance()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(weight.grad is None for weight in training.model.parameters())
    assert (training.result.steps, training.compiled) == (0, False)


def test_it_is_off_by_default() -> None:
    assert not TrainingConfig().compile
