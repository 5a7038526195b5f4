"""Calls to the tracking store for one run, repeated while the store is unreachable, until no time is left."""

import time
from collections.abc import Callable
from typing import Any

from pipeline.names import OWNER
from pipeline.runtime.console import info, warn
from pipeline.storage.ownership import owner_number
from pipeline.storage.run_folder import RunFolder
from pipeline.tracking.client import deletion_message, is_deleted, set_tags
from pipeline.tracking.cursor import Cursor
from pipeline.tracking.inbox import Inbox
from pipeline.tracking.messages import DeliveryNews, StoreUnavailable, TakenOver
from pipeline.tracking.store import store_key, tracking_uri
from pipeline.tracking.store_errors import Answer, classify, one_line

PAUSE_SECONDS = (0.25, 4.0)  # pause between two attempts: first, longest
CLAIM_SECONDS = 5.0  # between two checks of the run's claim in the store
FAILING_SECONDS = 20.0  # after this long, a call that fails (HTTP 500) while others succeed counts as refused


class GaveUpError(Exception):
    """Delivery ends early: no time is left, or the run was deleted or taken over. The rest stays in the journal."""


class StoreCalls:
    """Calls to the store for one run, on behalf of one owner of its folder."""

    def __init__(
        self,
        folder: RunFolder,
        owner: int,
        claim: str | None,
        inbox: Inbox,
        send: Callable[[DeliveryNews], None],
    ) -> None:
        """owner: owner number. claim: the run's expected claim; None: not checked."""
        self.folder, self.owner, self.claim = folder, owner, claim
        self.inbox, self.send = inbox, send
        self.cursor = Cursor(folder, store_key())
        self.client: Any = None
        self.run_id, self.host = "", ""  # the run's id in the store, and the value of its tag `host`
        self.reason = ""  # why the rest of the journal is not delivered
        self.superseded = False  # the run was taken over
        self._is_away = False
        self._claim_checked_at = -CLAIM_SECONDS

    def waiting(self) -> int:
        """Number of records that are not delivered; 1 if only the end of the run is missing."""
        return self.cursor.remaining() or int(self.inbox.ending and self.cursor.at.ended is None)

    def require(self, subject: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Call `function(client, run_id, *arguments)`; if the store refuses the call, add a problem to the cursor."""
        if refusal := self.attempt(subject, lambda: function(self.client, self.run_id, *arguments)):
            self.add_problem(subject, refusal)

    def attempt(self, subject: str, call: Callable[[], Any], patient: bool = False) -> Exception | None:
        """Repeat a call until the store accepts it (returns None) or refuses it (returns the error).

        patient: repeat refused calls too.

        Raises:
            GaveUpError: no time is left, or the run was deleted or taken over.
        """
        pause, longest = PAUSE_SECONDS
        failing_since: float | None = None
        while True:
            self.check()
            try:
                call()
            except Exception as error:
                answer = classify(error)
                if answer is Answer.FAILED:
                    failing_since = failing_since or time.monotonic()
                    if time.monotonic() - failing_since > FAILING_SECONDS and self._accepts_other_calls():
                        answer = Answer.REFUSED
                if answer is Answer.REFUSED and not patient:
                    self._check_deleted()
                    return error
                self.reason = f"{subject}: {one_line(error)}"
                self._report_away()
            else:
                self._report_back()
                self.inbox.progress()
                return None
            if self.inbox.seconds_left == 0:
                raise GaveUpError
            self.inbox.wait(min(pause, self.inbox.seconds_left))
            pause = min(2 * pause, longest)

    def add_problem(self, subject: str, error: Exception) -> None:
        """Record a refusal, and warn at once, since the training may go on for hours."""
        problem = f"{subject} not delivered: {one_line(error)}"
        if self.cursor.add_problem(problem) and not self.inbox.ending:
            warn(f"run {self.run_id}: {problem}")

    def check(self) -> None:
        """Raise GaveUpError if the folder has a higher owner number, or if the run is hurried and no time is left."""
        if owner_number(self.folder.path) > self.owner:
            self.superseded = True
            raise GaveUpError
        if self.inbox.hurried and self.inbox.seconds_left == 0:
            self.reason = self.reason or "there was no time for it"
            raise GaveUpError

    def check_claim(self) -> None:
        """Raise GaveUpError if the run's claim has changed; queried at most every CLAIM_SECONDS."""
        if self.claim is None or time.monotonic() - self._claim_checked_at < CLAIM_SECONDS:
            return
        try:
            tags = self.client.get_run(self.run_id).data.tags
        except Exception:  # the next call reports the error
            return
        self._claim_checked_at = time.monotonic()
        if tags.get(OWNER, self.claim) != self.claim:
            by = f"process {tags[OWNER].partition(' ')[0]} on {tags.get('host')}"
            self.superseded, self.reason = True, f"run {self.run_id} was taken over by {by}"
            self.send(TakenOver(by))
            raise GaveUpError

    def _check_deleted(self) -> None:
        """If the run was deleted in MLflow, warn once and raise GaveUpError."""
        if not self.run_id:
            return
        try:
            run = self.client.get_run(self.run_id)
        except Exception:  # keep the original refusal
            return
        if is_deleted(run):
            self.reason = deletion_message(self.run_id)
            if not self.inbox.ending:
                warn(f"{self.reason}; what it logs from now on waits in {self.folder.journal}")
            raise GaveUpError

    def _accepts_other_calls(self) -> bool:
        """Whether the store accepts setting a tag to the value that it already has."""
        try:
            set_tags(self.client, self.run_id, {"host": self.host})
        except Exception:
            return False
        return True

    def _report_away(self) -> None:
        if self.inbox.finish:
            self.send(StoreUnavailable(self.waiting(), self.reason))
        elif not self._is_away and not self.inbox.ending:
            warn(f"tracking store {tracking_uri()} is unavailable ({self.reason}); training continues, and "
                 f"what it logs waits in {self.folder.journal}")  # fmt: skip
            self._is_away = True

    def _report_back(self) -> None:
        if self._is_away:
            info(f"tracking store {tracking_uri()} is back")
            self._is_away = False
        self.reason = ""
