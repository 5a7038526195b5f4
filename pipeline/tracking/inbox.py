"""What the trainer asks of the writer process, and whether it is still there to ask."""

import math
import os
import queue
import threading
import time
from typing import IO

from pipeline.runtime.protocol import read_messages
from pipeline.tracking.messages import WRITER_REQUESTS, FinishRun, WriterRequest

GONE_SECONDS = 5.0  # how long what is left is tried without any progress once the trainer is gone
HANGING_SECONDS = 1.0  # then a call that does not return ends with the process
WATCH_SECONDS = 0.2


class Inbox:
    """Requests, as a thread reads them. `FinishRun` and the stream's end interrupt a pause; the rest waits in line."""

    def __init__(self, stream: IO[str] | None, finish: FinishRun | None = None) -> None:
        """`stream` None: there is only the one request `finish`."""
        self.finish, self.gone = finish, False
        self.moved = self.asked = time.monotonic()
        self._news, self._queue = threading.Event(), queue.Queue[WriterRequest | None]()
        if stream is not None:
            threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def next(self) -> WriterRequest | None:
        """The next request in line; None when there will be none."""
        return self._queue.get()

    def wait(self, seconds: float) -> None:
        """Until something new is there, at most so long."""
        self._news.wait(seconds)
        self._news.clear()

    def progress(self) -> None:
        """The store took something."""
        self.moved = time.monotonic()

    @property
    def leaving(self) -> bool:
        """What is in the journal now is all there will be."""
        return self.gone or self.finish is not None

    @property
    def seconds_left(self) -> float:
        """Until the rest is left in the journal, if the store goes on to take nothing; infinite before the end."""
        if not self.leaving:
            return math.inf
        patience = GONE_SECONDS if self.gone or self.finish is None else self.finish.patience
        since = self.asked if self.hurried else max(self.moved, self.asked)
        return max(0.0, since + patience - time.monotonic())

    @property
    def impatient(self) -> bool:
        """The store has taken nothing for so long that the rest is left in the journal."""
        return self.seconds_left == 0

    @property
    def hurried(self) -> bool:
        """The patience is all the time there is, progress or not."""
        return self.finish is not None and self.finish.hurry

    def _read(self, stream: IO[str]) -> None:
        try:
            for request in read_messages(stream, WRITER_REQUESTS):
                if isinstance(request, FinishRun):
                    self.asked, self.finish = time.monotonic(), request
                    self._news.set()
                else:
                    self._queue.put(request)
        finally:
            self.asked, self.gone = time.monotonic(), True
            self._queue.put(None)
            self._news.set()
        while time.monotonic() - max(self.moved, self.asked) < GONE_SECONDS + HANGING_SECONDS:
            time.sleep(WATCH_SECONDS)
        os._exit(1)  # a call to the store hangs, and nobody waits for it any more
