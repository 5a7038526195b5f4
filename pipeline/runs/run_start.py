"""Open the run to train: a new one, or one that an earlier start began."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pipeline.config.run_config import RunConfig
from pipeline.names import THREADS
from pipeline.runs.earlier_runs import EarlierRun, find_earlier, one_at_a_time
from pipeline.runs.resume import find_origin
from pipeline.runtime.console import warn
from pipeline.storage.checkpoint_format import Checkpoint
from pipeline.storage.run_folder import RunFolder
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.run import MemoryRun, Run
from pipeline.tracking.writer_client import Writer


class RunStart(NamedTuple):
    run: Run
    resumed: bool  # an earlier start began it
    origin: Checkpoint | None  # checkpoint from which a fork starts


def open_run(
    config: RunConfig, writer: Writer | None, request: RunRequest, identity: Mapping[str, str]
) -> RunStart | EarlierRun:
    """Open the run to train, or return an earlier run that is already trained. identity: result of `identity_tags`."""
    if writer is None:
        return RunStart(MemoryRun(request.name), resumed=False, origin=None)
    with one_at_a_time(config, identity["run_key"]):
        earlier = find_earlier(config, identity, writer, None if request.resume else request.run_id)
        if earlier and (earlier.finished or earlier.ended_as == "FINISHED"):
            return earlier
        if earlier:
            request = _continuing(request, earlier)
        if request.resume and request.run_id:  # before opening: a run that cannot be resumed is not changed
            folder = Path(request.folder) if request.folder else Path(config.output_dir) / request.run_id
            RunFolder(folder).checkpoints().check_format()
        fresh = earlier is None or not RunFolder(earlier.folder).checkpoints().steps()
        origin = find_origin(config, writer) if fresh else None
        run = MlflowRun(writer, request, Path(config.output_dir), config.tracking.offline)
    return RunStart(run, request.resume, origin)


def _continuing(request: RunRequest, earlier: EarlierRun) -> RunRequest:
    """Change a request to resume an earlier run; a run that `mlflow run` opened becomes its launcher."""
    launcher = request.launcher if request.run_id in (None, earlier.run_id) else request.run_id
    if earlier.ended_as is None and earlier.folder.is_dir():
        warn(f"{earlier.name}: the last start of run {earlier.run_id} was killed, or the machine went down")
    tags = {name: value for name, value in request.tags.items() if name != THREADS}  # the first start's tag is kept
    return replace(request, run_id=earlier.run_id, resume=True, folder=str(earlier.folder), launcher=launcher,
                   tags=tags)  # fmt: skip
