"""One run's journal on its way to the tracking store."""

import fcntl
import json
import os
import select
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.journal import JOURNAL_FILE, JournalReader, Record, read_all
from pipeline.tracking.store import check_artifacts, context_tags, is_random, is_temporary, one_line, settle

HISTORY_FILE = "history.parquet"
POLL_SECONDS = 0.5  # how long a point may wait in the journal before it is delivered
BATCH_POINTS = 1000  # MLflow's limit for one log_batch
GIVE_UP_SECONDS = 60  # how long a store that does not answer is tried
STALE_TAGS = {"failure", "pruned", "branched_from", "branch_step"}  # of an earlier start: gone when a run starts over
LOCK_FILE = "writer.lock"
LOCK_SECONDS = 20  # how long the writer of a trainer that died may still take to deliver what there is


def _lock(file: Path, run_id: str) -> IO[bytes]:
    """Hold the run: one writer at a time. A process that dies lets go of it."""
    held = file.open("ab")
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except BlockingIOError:
            if time.monotonic() > end:
                held.close()
                raise ValueError(f"run {run_id} is being written by another process") from None
            time.sleep(0.1)


class Delivery:
    """Brings one run's journal to the tracking store."""

    def __init__(self, request: Mapping[str, Any], output_dir: Path) -> None:
        import mlflow
        from mlflow.exceptions import MlflowException

        settle()
        self.client = mlflow.MlflowClient()
        self.problems: list[str] = []
        self.points, self.given_up, self.ended = 0, False, False
        launcher = request["launcher"]
        run = self.client.get_run(request["run_id"]) if request["run_id"] else None
        wanted = request["experiment"]
        fixed = request["restart"] or not wanted
        if run and not fixed and self.client.get_experiment(run.info.experiment_id).name != wanted:
            launcher, run = run.info.run_id, None  # `mlflow run` opened it elsewhere: it only started ours
        if launcher:
            self.client.set_tag(launcher, "role", "launcher")
        if run is None:
            experiment_id = self._experiment(wanted, MlflowException)
            tags = context_tags() | request["tags"]  # at once: a run is never without what it is known by
            run = self.client.create_run(experiment_id, run_name=request["name"], tags=tags)
        elif is_random(run.info.run_name or ""):
            self.client.update_run(run.info.run_id, name=request["name"])
        self.run_id: str = run.info.run_id
        self.name: str = self.client.get_run(self.run_id).info.run_name
        self.params = dict(run.data.params)  # what `mlflow run` wrote as typed: cannot be changed, is not ours
        self.folder = output_dir / self.run_id
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = _lock(self.folder / LOCK_FILE, self.run_id)
        self.present: dict[tuple[str, int], tuple[float, int]] = {}  # (metric, step) -> (value, time) in the store
        if request["restart"]:
            (self.folder / JOURNAL_FILE).unlink(missing_ok=True)
            self.present = self._points_in_store()
            for tag in STALE_TAGS & run.data.tags.keys() - request["tags"].keys():
                self.client.delete_tag(self.run_id, tag)
            self.client.update_run(self.run_id, status="RUNNING")
        (self.folder / JOURNAL_FILE).touch()
        for key, value in {**request["tags"], "run_dir": str(self.folder)}.items():
            self.client.set_tag(self.run_id, key, value)
        self.reader = JournalReader(self.folder / JOURNAL_FILE)
        try:
            check_artifacts(run.info.artifact_uri)
        except OSError:
            self.client.set_terminated(self.run_id, "FAILED")
            raise

    def _experiment(self, name: str | None, refused: type[Exception]) -> str:
        name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if name is None:
            return os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name))
            except refused:
                found = self.client.get_experiment_by_name(name)  # another process was first
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise ValueError(f"experiment {name} is deleted; restore it, or name another")
        return str(found.experiment_id)

    def _points_in_store(self) -> dict[tuple[str, int], tuple[float, int]]:
        found = self.client.get_run(self.run_id).data.metrics
        return {
            (name, point.step): (point.value, point.timestamp)
            for name in found
            for point in self.client.get_metric_history(self.run_id, name)
        }

    def follow(self, requests: IO[str]) -> bool:
        """Deliver until the run is finished. True if the trainer asked, False if it is gone."""
        asked = False
        while True:
            if not self.deliver() and asked:
                break
            readable = asked or select.select([requests], [], [], POLL_SECONDS)[0]
            if not asked and readable:
                if not requests.readline():
                    break  # the trainer is gone
                asked = True
        while self.deliver():
            pass
        if not self.ended:
            self.end("FAILED")
        self.reader.close()
        self.lock.close()
        return asked

    def report(self) -> Record:
        used = os.times()
        return {"points": self.points, "problems": self.problems, "cpu_seconds": used.user + used.system}

    def deliver(self) -> bool:
        """Bring the next records to the store; False when there were none."""
        records = self.reader.read()
        steps: list[Record] = []
        for record in records:
            if record["op"] == "metrics":
                waiting = sum(len(step["values"]) for step in steps)
                if waiting and waiting + len(record["values"]) > BATCH_POINTS:
                    self.log_steps(steps)
                    steps = []
                steps.append(record)
                continue
            self.log_steps(steps)
            steps = []
            self.log_other(record)
        self.log_steps(steps)
        return bool(records)

    def log_steps(self, steps: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(key, float(value), step["time"], step["step"])
            for step in steps
            for key, value in step["values"].items()
            if (key, step["step"]) not in self.present
        ]
        self.points += sum(len(step["values"]) for step in steps) - len(points)
        for start in range(0, len(points), BATCH_POINTS):
            batch = points[start : start + BATCH_POINTS]
            if self.attempt(f"{len(batch)} points", self.client.log_batch, self.run_id, metrics=batch):
                self.points += len(batch)

    def log_other(self, record: Record) -> None:
        from mlflow.entities import Param, RunTag

        op = record["op"]
        if op == "params":
            new = [Param(key, value) for key, value in record["values"].items() if key not in self.params]
            # a dotted key typed as `-P optim.dense.lr=3e-4` stays as it was typed: its canonical text is a tag
            typed = {key: value for key, value in record["values"].items()
                     if "." in key and self.params.get(key, value) != value}  # fmt: skip
            for key, value in typed.items():
                self.attempt("tags", self.client.set_tag, self.run_id, f"canonical.{key}", value)
            self.params |= record["values"]
            for start in range(0, len(new), 100):
                self.attempt("params", self.client.log_batch, self.run_id, params=new[start : start + 100])
        elif op == "tags":
            tags = [RunTag(key, value) for key, value in record["values"].items()]
            self.attempt("tags", self.client.log_batch, self.run_id, tags=tags)
        elif op == "artifact":
            folder = record["folder"] or None
            self.attempt(record["file"], self.client.log_artifact, self.run_id, record["file"], folder)
        elif op == "input":
            self.attempt("input", self.log_input, record)
        elif op == "model":
            self.attempt("model", self.log_model, record)
        elif op == "finish":
            self.end(record["status"])

    def log_input(self, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=record["name"],
            digest=record["digest"][:32],  # MLflow takes 36 characters at most; the whole is in a tag
            source_type="local",
            source=json.dumps({"uri": record["source"]}),
            profile=json.dumps(record["profile"]),
        )
        tags = [InputTag("mlflow.data.context", "training")]
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    def log_model(self, record: Record) -> None:
        import mlflow

        from pipeline import serving

        if mlflow.active_run() is None:
            mlflow.start_run(self.run_id)  # models are logged to the active run; `end` ends it
        serving.log_model(record)

    def end(self, status: str) -> None:
        """Write the whole history beside the run, then end it."""
        import mlflow
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.ended = True
        columns: dict[str, list[Any]] = {"metric": [], "step": [], "value": [], "timestamp": []}
        for record in read_all(self.folder / JOURNAL_FILE):
            if record["op"] == "metrics":
                for key, value in record["values"].items():
                    kept = self.present.get((key, record["step"]), (float(value), record["time"]))
                    for column, entry in zip(columns.values(), (key, record["step"], *kept), strict=True):
                        column.append(entry)
        types = {"metric": pa.string(), "step": pa.int64(), "value": pa.float64(), "timestamp": pa.int64()}
        table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
        pq.write_table(table, self.folder / HISTORY_FILE)
        self.attempt(HISTORY_FILE, self.client.log_artifact, self.run_id, str(self.folder / HISTORY_FILE))
        if self.problems and status == "FINISHED":
            status = "FAILED"
        if mlflow.active_run() is not None:
            mlflow.end_run(status)
        self.attempt(f"status {status}", self.client.set_terminated, self.run_id, status)

    def attempt(self, what: str, call: Any, *arguments: Any, **named: Any) -> bool:
        """Call the store, again and again while it is away. A refusal is a problem that `report` tells."""
        started, pause = time.monotonic(), 0.5
        while True:
            try:
                call(*arguments, **named)
                return True
            except Exception as error:
                patient = not self.given_up and time.monotonic() - started < GIVE_UP_SECONDS
                if is_temporary(error) and patient:
                    time.sleep(pause)
                    pause = min(2 * pause, 5)
                    continue
                self.given_up |= is_temporary(error)
                self.problems.append(f"{what} not delivered: {one_line(error)}")
                return False
