"""Start from a saved state: `resume` continues a run, `fork` begins a new one at another run's checkpoint."""

from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.config.run_config import RunConfig
from pipeline.errors import UserError
from pipeline.names import FORKED_FROM, THREADS
from pipeline.runs.earlier_runs import folder_of, query_store
from pipeline.runtime.console import info, warn
from pipeline.storage.checkpoint_format import Checkpoint
from pipeline.storage.journal import Record, read_points
from pipeline.storage.run_folder import RunFolder
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.writer_client import Writer
from pipeline.training.loop import Training


def identity_tags(config: RunConfig, digest: str) -> dict[str, str]:
    """Tags by which a later start finds the run. digest: SHA-256 of the data."""
    tags = {"task": config.task, "seed": str(config.seed), "data_digest": digest,
            "run_key": config.fingerprint(digest), THREADS: str(torch.get_num_threads())}  # fmt: skip
    return tags | ({FORKED_FROM: config.fork} if config.fork else {})


def newest_state(run: MlflowRun) -> Checkpoint | None:
    """The run's newest intact checkpoint, or None; warns if the journal has lost records that preceded it."""
    checkpoint = RunFolder(run.folder).checkpoints().latest()
    run.check_position(checkpoint.facts["position"] if checkpoint else 0)
    return checkpoint


def restore(training: Training, checkpoint: Checkpoint) -> None:
    """Load a checkpoint, and set the number of threads to its own, since another number rounds differently.

    Raises:
        UserError: the state does not fit the model.
    """
    try:
        training.restore(checkpoint)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{checkpoint.folder}: its state does not fit this config: {error}") from None
    facts = checkpoint.facts
    _set_threads(facts["threads"])
    if facts["torch"] != torch.__version__:
        warn(f"the checkpoint is of torch {facts['torch']}, this is {torch.__version__}: numbers may differ")


def find_origin(config: RunConfig, writer: Writer) -> Checkpoint | None:
    """Read the checkpoint that `config.fork` names (`<run id>@<step>`); None if the config has no fork.

    Raises:
        UserError: there is no such run or checkpoint.
    """
    if config.fork is None:
        return None
    run_id, _, step = config.fork.partition("@")
    stored = query_store(config, writer, run_id=run_id)
    folder = folder_of(stored[0], Path(config.output_dir)) if stored else Path(config.output_dir) / run_id
    if not folder.is_dir():
        raise UserError(f"fork {config.fork}: found no folder of run {run_id}; allowed: one whose checkpoints are here")
    try:
        return RunFolder(folder).checkpoints().at(int(step))
    except UserError as error:
        raise UserError(f"fork {config.fork}: {error}") from None


def use_first_threads(run: MlflowRun) -> None:
    """Set the run's first number of threads. For a run without checkpoint, whose points must be reproduced exactly."""
    opened = RunFolder(run.folder).opening() or {"tags": {}}
    _set_threads(int(opened["tags"].get(THREADS, torch.get_num_threads())))


def _set_threads(number: int) -> None:
    if number != torch.get_num_threads():
        info(f"{number} CPU threads, as before: {torch.get_num_threads()} would round differently")
        torch.set_num_threads(number)


def fork(training: Training, run: MlflowRun, origin: Checkpoint) -> None:
    """Start from another run's checkpoint: log that run's points up to it, and keep this config's optimizer settings.

    Raises:
        UserError: the state does not fit the model.
    """
    options = [{key: value for key, value in group.items() if key != "params"}
               for optimizer in training.optimizers.values() for group in optimizer.param_groups]  # fmt: skip
    restore(training, origin)
    groups = [group for optimizer in training.optimizers.values() for group in optimizer.param_groups]
    for group, own in zip(groups, options, strict=True):
        group.update(own)
    for record in _points_before(origin):
        run.log_metrics(record["step"], record["values"], record["time"])


def _points_before(checkpoint: Checkpoint) -> Iterator[Record]:
    """Points of the steps before a checkpoint, and of the evaluation at its step if that preceded the checkpoint.

    Later points in the journal, logged after the checkpoint, are skipped.
    """
    was_evaluated = checkpoint.state["evaluated_at"] == checkpoint.step
    for record in read_points(RunFolder(checkpoint.folder.parent.parent).journal):
        of_evaluation = any(name.startswith("valid/") for name in record["values"])
        if record["step"] < checkpoint.step or (record["step"] == checkpoint.step and was_evaluated and of_evaluation):
            yield record
