"""Summary run of a sweep, which holds the report and the sweep's resolved settings."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.comparison.families import FAMILY_TAG, Family, families_of
from pipeline.comparison.tables import plain
from pipeline.comparison.verdicts import compare, load_runs, to_markdown, to_text, write
from pipeline.errors import TrainingError, UserError
from pipeline.names import NOTE_LENGTH, QUESTION
from pipeline.runs.source_changes import PACKAGE, code_changes
from pipeline.runtime.console import info, optional
from pipeline.sweeps.adoption import EqualRuns
from pipeline.sweeps.sweep_plan import Plan, to_yaml
from pipeline.tracking.client import code_version
from pipeline.tracking.messages import RunRequest, StoredRun
from pipeline.tracking.mlflow_run import MlflowRun, end_early
from pipeline.tracking.stored_runs import (
    end_run,
    finished_runs,
    runs_of_ids,
    runs_of_sweep,
    runs_of_tag,
    store_exists,
    tag_run,
)
from pipeline.tracking.writer_client import Writer


class StoredSweep(NamedTuple):
    """Runs of a sweep that are already in the tracking store."""

    by_key: Mapping[str, StoredRun]  # run key -> run; a finished one if there are several
    summary: StoredRun | None

    @property
    def families(self) -> tuple[Family, ...]:
        return families_of(self.summary.tags) if self.summary else ()


def claim_launcher(plan_id: str) -> None:
    """Tag the launcher run that `mlflow run` opened for this start, and end those of earlier starts that were killed.

    This process holds the sweep's lock, so no process is left behind another launcher run that is still RUNNING. A
    launcher run that was killed before it was tagged is recognised by equal command-line params.
    """
    launcher = os.environ.get("MLFLOW_RUN_ID")
    if not store_exists():
        return
    (own,) = runs_of_ids([launcher]) if launcher else (None,)
    if own:
        tag_run(own.run_id, {"role": "launcher", "sweep_plan": plan_id})
    launchers = [run for run in runs_of_tag("sweep_plan", plan_id) if run.tags.get("role") == "launcher"]
    launchers += [run for run in runs_of_tag("mlflow.project.entryPoint", "sweep")
                  if own and "role" not in run.tags and run.params == own.params]  # fmt: skip
    for run in launchers:
        if run.status == "RUNNING" and run.run_id != launcher:
            end_run(run.run_id, "KILLED")


def stored_sweep(sweep_id: str) -> StoredSweep:
    runs = runs_of_sweep(sweep_id) if store_exists() else []
    summary = next((run for run in runs if run.tags.get("role") == "summary"), None)
    runs.sort(key=lambda run: run.status == "FINISHED")
    return StoredSweep({run.tags["run_key"]: run for run in runs if "run_key" in run.tags}, summary)


def equal_runs(plan: Plan, data_digest: str) -> EqualRuns:
    """Finished runs in the sweep's experiment that it may adopt; the store is searched when they are first needed."""

    def find() -> list[StoredRun]:
        runs = finished_runs(plan.experiment, data_digest) if store_exists() else []
        return [run for run in runs if plan.metric in run.metrics]

    return EqualRuns(find, code_version(), code_changes(PACKAGE))


class SummaryRun:
    """The open summary run."""

    def __init__(self, run: MlflowRun, sweep_id: str) -> None:
        self.run, self.sweep_id, self.ending = run, sweep_id, False

    @classmethod
    def open(
        cls, writer: Writer, plan: Plan, plan_id: str, data_digest: str, earlier: StoredRun | None
    ) -> "SummaryRun":
        """Reopen the summary run of an earlier start, or use the run that `mlflow run` opened, or create one."""
        launcher, config = os.environ.get("MLFLOW_RUN_ID"), plan.baseline.config
        sweep_id, margin = plan.identity(data_digest), plan.sweep.margin
        request = RunRequest(
            name=f"sweep {plan.title}"[:40],
            experiment=config.experiment,
            run_id=earlier.run_id if earlier else launcher,
            launcher=launcher if earlier and earlier.run_id != launcher else None,
            # the role comes last: the next start takes a run without a role for a launcher run and ends it
            tags={"sweep_id": sweep_id, "sweep_plan": plan_id, "task": config.task, "metric": plan.metric}
            | {"mode": plan.sweep.mode or "", QUESTION: plan.question(data_digest)}
            | {"margin": "" if margin is None else repr(margin), "role": "summary"},
            resume=earlier is not None,
            folder=earlier.tags.get("run_dir") if earlier else None,
        )  # fmt: skip
        return cls(MlflowRun(writer, request, Path(config.output_dir)), sweep_id)

    def record_families(self, families: Sequence[Family]) -> None:
        """Record the families before their arms are trained: their levels are fixed from then on."""
        self.run.set_tags({f"{FAMILY_TAG}{number}": family.to_tag() for number, family in enumerate(families, 1)})
        self.run.flush()

    def conclude(self, plan: Plan, folder: Path, failures: Mapping[tuple[str, int], str], remark: str = "") -> None:
        """Compare the finished runs, print and store the report, and end the summary run. remark: added to its note.

        Raises:
            TrainingError: there is nothing to compare.
        """
        with optional("sweep.yaml"):
            file = folder / "sweep.yaml"
            file.write_text(to_yaml(plan), encoding="utf-8", newline="\n")
            self.run.log_artifact(file)
        if failures:
            info(f"\nfailed:\n{_listed(failures)}")
        note = "\n\n".join(text for text in (plain(remark), _listed(failures, plain)) if text)
        files, refusal = list[Path](), None
        try:
            comparison = compare(load_runs(self.sweep_id), plan.metric, plan.sweep.mode, title=plan.title)
        except UserError as error:
            refusal, note = error, f"{plain(str(error))}\n\n{note}"
        else:
            info("\n" + to_text(comparison))
            with optional("the report"):
                files = write(comparison, folder)
            for file in files:
                self.run.log_artifact(file)
            with optional("the summary run's note"):
                note = f"{to_markdown(comparison, NOTE_LENGTH - len(note) - 2)}\n\n{note}"
        self.run.set_tags({"mlflow.note.content": note[:NOTE_LENGTH]})
        self.ending = True
        self.run.finish("FAILED" if failures or refusal else "FINISHED")
        if refusal:
            raise TrainingError(f"sweep {self.sweep_id}: nothing to compare: {refusal}")
        for file in files:
            if file.suffix == ".html":
                info(f"\nreport: {file.resolve().as_uri()}")
        info(f"sweep {self.sweep_id} in {self.run.tracking_uri}; summary run {self.run.id}")
        info("next: open the report; `make ui` opens MLflow on these runs")

    def abandon(self, error: BaseException) -> None:
        """End the run after an error, unless `conclude` has begun to end it."""
        if not self.ending:
            self.ending = True
            end_early(self.run, error)


def _listed(failures: Mapping[tuple[str, int], str], escape: Callable[[str], str] = str) -> str:
    return "\n".join(f"- {escape(arm)} s{seed}: {escape(why)}" for (arm, seed), why in failures.items())
