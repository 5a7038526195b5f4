"""Finished runs that a sweep adopts instead of training the same again."""

from collections.abc import Callable, Iterable
from functools import cached_property

from pipeline.config.run_config import RunConfig
from pipeline.names import CODE_CHANGES, FORKED_FROM, GIT_COMMIT, THREADS
from pipeline.runtime.text import listed
from pipeline.tracking.messages import StoredRun

CODE_SHOWN = 7  # characters of a git commit


class EqualRuns:
    """Finished runs of other sweeps, or of none, with the same settings and data as runs of this one.

    A run is adopted if it was made by the same version of the code with the same number of threads; otherwise its
    numbers may differ. The version is the git commit with the changes of Python files that are not committed.
    """

    def __init__(self, find: Callable[[], Iterable[StoredRun]], commit: str, changes: str) -> None:
        """find: the finished runs in the tracking store, oldest first.

        commit: git commit of this code; "" if unknown. changes: hash of its uncommitted changes; "" if there are none.
        """
        self.find, self.code = find, (commit, changes)
        self.refused: list[str] = []  # runs that were not adopted, and why

    def adopt(self, name: str, config: RunConfig, data_digest: str) -> StoredRun | None:
        """The newest run to adopt as the run with this name and config; None if there is none."""
        runs = self._by_key.get(config.fingerprint(data_digest), [])
        threads = str(config.training.threads or _default_threads()) if runs else ""
        differences = ""
        for run in reversed(runs):
            code = run.tags.get(GIT_COMMIT, ""), run.tags.get(CODE_CHANGES, "")
            others = [_described(*code)] * (code != self.code)
            others += [f"{run.tags.get(THREADS, '?')} threads"] * (run.tags.get(THREADS) != threads)
            if not others:
                return run
            differences = differences or f"{name} ({', '.join(others)})"
        self.refused += [differences] if differences else []
        return None

    def note(self) -> str:
        """Which equal runs were not adopted; "" if there are none."""
        if not self.refused:
            return ""
        here = _described(*self.code)
        return f"finished runs of other code or threads are not adopted: {listed(self.refused)}; here: {here}"

    @cached_property
    def finished(self) -> list[StoredRun]:
        """All finished runs, whatever their settings, oldest first."""
        return list(self.find())

    @cached_property
    def _by_key(self) -> dict[str, list[StoredRun]]:
        """Run key -> runs. Trials of a search may have been stopped early; forks and ranks change the numbers."""
        runs: dict[str, list[StoredRun]] = {}
        for run in self.finished:
            tags = run.tags
            if "run_key" in tags and tags.get("role") != "trial" and not tags.keys() & {FORKED_FROM, "processes"}:
                runs.setdefault(tags["run_key"], []).append(run)
        return runs


def _described(commit: str, changes: str) -> str:
    return f"code {commit[:CODE_SHOWN] or 'unknown'}" + (f" with uncommitted changes {changes}" if changes else "")


def _default_threads() -> int:
    """Number of threads of a run whose config has none."""
    from pipeline.runs.launch import TORCH_THREADS

    return max(1, TORCH_THREADS - 1)
