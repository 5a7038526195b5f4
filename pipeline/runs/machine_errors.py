"""Report out-of-memory and disk errors as one-line user errors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.errors import TrainingError, UserError


@contextmanager
def one_line_machine_errors() -> Iterator[None]:
    """Raise out-of-memory and disk errors as one-line TrainingErrors; other errors are unchanged."""
    try:
        yield
    except Exception as error:
        explanation = explained(error)
        if explanation is error:
            raise
        raise explanation from error


def explained(error: BaseException) -> BaseException:
    """Convert an out-of-memory or disk error to a `TrainingError`; returns other errors unchanged."""
    if isinstance(error, UserError | KeyboardInterrupt):
        return error
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return TrainingError(f"out of memory: {text or 'an allocation failed'}; try a smaller training.batch_size, or "
                             "close what else runs")  # fmt: skip
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return TrainingError(f"{where}{error.strerror}")
    return error
