"""The writer process's incoming requests, and detection of the trainer's exit."""

import math
import os
import queue
import threading
import time
from typing import IO

from pipeline.runtime.protocol import read_messages
from pipeline.tracking.messages import WRITER_REQUESTS, FinishRun, WriterRequest

GONE_SECONDS = 5.0  # once the trainer has exited, end delivery after this long without progress
HANGING_SECONDS = 1.0  # further seconds until the process exits even if a call to the store hangs
WATCH_SECONDS = 0.2


class Inbox:
    """Requests that a thread reads from a stream.

    `FinishRun` and the end of the stream interrupt `wait`; other requests are queued.
    """

    def __init__(self, stream: IO[str] | None, finish: FinishRun | None = None) -> None:
        """stream: None if `finish` is the only request."""
        self.finish, self.gone = finish, False
        self.progress_at = self.finish_at = time.monotonic()
        self._interrupt, self._queue = threading.Event(), queue.Queue[WriterRequest | None]()
        if stream is not None:
            threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def next(self) -> WriterRequest | None:
        """Wait for the next request; None at the end of the stream."""
        return self._queue.get()

    def wait(self, seconds: float) -> None:
        """Pause for this time, or until `FinishRun` or the end of the stream."""
        self._interrupt.wait(seconds)
        self._interrupt.clear()

    def progress(self) -> None:
        """Note that the store accepted a call."""
        self.progress_at = time.monotonic()

    @property
    def ending(self) -> bool:
        """Whether the journal is complete, because the trainer finished the run or exited."""
        return self.gone or self.finish is not None

    @property
    def seconds_left(self) -> float:
        """Seconds until delivery gives up on a store that accepts nothing; infinite while the run is in progress."""
        if not self.ending:
            return math.inf
        patience = GONE_SECONDS if self.gone or self.finish is None else self.finish.patience
        since = self.finish_at if self.hurried else max(self.progress_at, self.finish_at)
        return max(0.0, since + patience - time.monotonic())

    @property
    def hurried(self) -> bool:
        """Whether the patience limits the total time rather than the time without progress."""
        return self.finish is not None and self.finish.hurry

    def _read(self, stream: IO[str]) -> None:
        try:
            for request in read_messages(stream, WRITER_REQUESTS):
                if isinstance(request, FinishRun):
                    self.finish_at, self.finish = time.monotonic(), request
                    self._interrupt.set()
                else:
                    self._queue.put(request)
        finally:
            self.finish_at, self.gone = time.monotonic(), True
            self._queue.put(None)
            self._interrupt.set()
        while time.monotonic() - max(self.progress_at, self.finish_at) < GONE_SECONDS + HANGING_SECONDS:
            time.sleep(WATCH_SECONDS)
        os._exit(1)  # a call to the store hangs, and the trainer has exited
