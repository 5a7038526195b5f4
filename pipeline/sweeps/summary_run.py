"""The run that stands for a whole sweep: it holds the report and what the sweep is made of."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.comparison.tables import plain
from pipeline.comparison.verdicts import compare, load_runs, to_markdown, to_text, write
from pipeline.errors import TrainingError, UserError
from pipeline.names import NOTE_LENGTH
from pipeline.runtime.console import optional, say
from pipeline.sweeps.sweep_plan import Plan, to_yaml
from pipeline.tracking.messages import RunRequest, StoredRun
from pipeline.tracking.mlflow_run import MlflowRun, Writer, end_early
from pipeline.tracking.stored_runs import end_run, runs_of_ids, runs_of_sweep, runs_of_tag, store_exists, tag_run


@dataclass(frozen=True)
class KnownRuns:
    """What the store has of a sweep already."""

    by_key: Mapping[str, StoredRun]  # by run key, the finished one where there are several
    summary: StoredRun | None


def claim_launcher(plan_id: str) -> None:
    """Tag the run that `mlflow run` opened for this start; end those of earlier starts that were killed.

    We hold the plan's lock, so no other process is at it: what such starts left RUNNING is dead. One that was killed
    before it had tagged its run is known by what was typed.
    """
    launcher = os.environ.get("MLFLOW_RUN_ID")
    if not store_exists():
        return
    (ours,) = runs_of_ids([launcher]) if launcher else (None,)
    if ours:
        tag_run(ours.run_id, {"role": "launcher", "sweep_plan": plan_id})
    left = [run for run in runs_of_tag("sweep_plan", plan_id) if run.tags.get("role") == "launcher"]
    left += [run for run in runs_of_tag("mlflow.project.entryPoint", "sweep")
             if ours and "role" not in run.tags and run.params == ours.params]  # fmt: skip
    for run in left:
        if run.status == "RUNNING" and run.run_id != launcher:
            end_run(run.run_id, "KILLED")


def known_runs(sweep_id: str) -> KnownRuns:
    """Look the sweep up."""
    runs = runs_of_sweep(sweep_id) if store_exists() else []
    summary = next((run for run in runs if run.tags.get("role") == "summary"), None)
    runs = [run for run in runs if "run_key" in run.tags]
    return KnownRuns({run.tags["run_key"]: run for run in sorted(runs, key=_finished)}, summary)


def _finished(run: StoredRun) -> bool:
    return run.status == "FINISHED"


class Summary:
    """Opens the summary run: the one of an earlier start, else the one that `mlflow run` opened, else a new one."""

    def __init__(self, writer: Writer, plan: Plan, sweep_id: str, known: KnownRuns) -> None:
        self.plan, self.sweep_id = plan, sweep_id
        launcher = os.environ.get("MLFLOW_RUN_ID")
        config, before = plan.baseline.config, known.summary
        request = RunRequest(
            name=f"sweep {plan.title}"[:40],
            experiment=config.experiment,
            run_id=before.run_id if before else launcher,
            launcher=launcher if before and before.run_id != launcher else None,
            # the role last: until then a launcher's run is one that the next start ends
            tags={"sweep_id": sweep_id, "sweep_plan": plan.identity(), "task": config.task, "metric": plan.metric}
            | {"mode": plan.sweep.mode or "", "role": "summary"},
            resume=before is not None,
            folder=before.tags.get("run_dir") if before else None,
        )  # fmt: skip
        self.run = MlflowRun(writer, request, Path(config.output_dir))
        self.finishing = False

    def abandon(self, error: BaseException) -> None:
        """End the run that an error cut off; what cannot be delivered is told, but does not hide the error."""
        if self.finishing:
            return
        self.finishing = True
        end_early(self.run, error)

    def conclude(self, folder: Path, failed: Mapping[tuple[str, int], str]) -> None:
        """Compare what finished, show it, and end the run."""
        with optional("sweep.yaml"):
            file = folder / "sweep.yaml"
            file.write_text(to_yaml(self.plan), encoding="utf-8")
            self.run.log_artifact(file)
        note = _failures(failed)
        if note:
            say(f"\nfailed:\n{note}")
            note = _failures(failed, plain)
        files, refused = list[Path](), None
        try:
            found = compare(load_runs(self.sweep_id), self.plan.metric, self.plan.sweep.mode, title=self.plan.title)
            say("\n" + to_text(found))
            with optional("the report"):
                files = write(found, folder)
            for file in files:
                self.run.log_artifact(file)
            with optional("the summary run's note"):
                note = f"{to_markdown(found, NOTE_LENGTH - len(note) - 2)}\n\n{note}"
        except UserError as error:
            refused = error
            note = f"{plain(str(error))}\n\n{note}"
        self.run.set_tags({"mlflow.note.content": note[:NOTE_LENGTH]})
        self.finishing = True
        self.run.finish("FAILED" if failed or refused else "FINISHED")
        if refused:
            raise TrainingError(f"sweep {self.sweep_id}: nothing to compare: {refused}")
        for file in files:
            if file.suffix == ".html":
                say(f"\nreport: {file.resolve().as_uri()}")
        say(f"sweep {self.sweep_id} in {self.run.tracking_uri}; summary run {self.run.id}")
        say("next: open the report; `make ui` opens MLflow on these runs")


def _failures(failed: Mapping[tuple[str, int], str], written: Callable[[str], str] = str) -> str:
    return "\n".join(f"- {written(arm)} s{seed}: {written(why)}" for (arm, seed), why in failed.items())
