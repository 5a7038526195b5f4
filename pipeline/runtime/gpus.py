"""The GPUs of this machine, found without importing torch."""

import os
import subprocess
from itertools import takewhile

VARIABLE = "CUDA_VISIBLE_DEVICES"  # limits a process to some GPUs if it is set before CUDA starts


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as in CUDA_VISIBLE_DEVICES; [] if there are none."""
    names = os.environ.get(VARIABLE)
    if names is not None:  # CUDA ignores what follows an empty or negative entry
        return list(takewhile(lambda name: name and not name.startswith("-"), map(str.strip, names.split(","))))
    try:
        listed = subprocess.run(["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True,
                                text=True, timeout=30, check=True)  # fmt: skip
    except (OSError, subprocess.SubprocessError):  # no driver, or no GPU
        return []
    return listed.stdout.split()
