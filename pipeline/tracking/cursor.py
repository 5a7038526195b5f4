"""Delivery position of a run's journal in each tracking store, kept in `delivered.json` in the run's folder.

The file is replaced after every batch, so that a new writer continues where a killed one stopped. Delivering a batch
twice changes nothing, since its points keep the times of the journal and the store keeps equal points only once.
"""

import json
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.runtime.console import warn
from pipeline.storage.files import check_file, replacing
from pipeline.storage.run_folder import RunFolder

MAX_PROBLEMS = 20


class Position(BaseModel):
    """The file's entry for one store."""

    model_config = ConfigDict(strict=True, extra="forbid")

    run_id: str | None = None  # id of the run in the store
    offset: Annotated[int, Field(ge=0)] = 0  # bytes of the journal that were delivered
    ended: str | None = None  # final status in the store
    problems: list[str] = []  # messages about records that the store refused
    more_problems: int = 0  # number of further problems, not listed


class Cursor:
    """Position of the delivery to one store."""

    def __init__(self, folder: RunFolder, store: str) -> None:
        self.file, self.journal, self.store = folder.delivered, folder.journal, store
        size = folder.journal.stat().st_size if folder.journal.exists() else 0
        # if the journal lost its tail, deliver it again from its beginning
        self.stores = {name: entry for name, entry in self._read().items() if entry.offset <= size}
        self.at = self.stores.get(store, Position())

    def rewind(self) -> None:
        """Return to the beginning of the journal."""
        self.at = Position(run_id=self.at.run_id)

    def add_problem(self, problem: str) -> bool:
        """Add a problem; returns False if it is only counted, because MAX_PROBLEMS are listed already."""
        if len(self.at.problems) < MAX_PROBLEMS:
            self.at.problems.append(problem)
            return True
        self.at.more_problems += 1
        return False

    def remaining(self) -> int:
        """Number of complete records that are not delivered yet."""
        count = 0
        with self.journal.open("rb") as stream:
            stream.seek(self.at.offset)
            while chunk := stream.read(1 << 20):
                count += chunk.count(b"\n")
        return count

    def save(self) -> None:
        """Write the file; an error only causes a warning, since delivering records twice is harmless."""
        self.stores[self.store] = self.at
        text = json.dumps({name: entry.model_dump() for name, entry in self.stores.items()}, indent=1)
        try:
            with replacing(self.file) as work:
                work.write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            warn(f"{self.file}: {error.strerror or error}; what was delivered may be delivered once more")

    def _read(self) -> dict[str, Position]:
        """Read the file, and skip invalid entries."""
        try:
            check_file(self.file)
            content = json.loads(self.file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        stores = {}
        for name, entry in content.items() if isinstance(content, dict) else ():
            try:
                stores[name] = Position.model_validate(entry)
            except ValidationError:
                continue
        return stores
