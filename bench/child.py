"""Training in a separate process, to measure its threads and memory.

`python -m bench.child FOLDER [KEY=VALUE ...]` loads the data. For each line `STEPS` on standard input, it trains that
number of steps and prints one line of JSON with their time and the memory of the process.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.figures import ROOT


class Child:
    """The process as seen by its parent. Creating it waits until the data are loaded."""

    def __init__(self, data: Path, overrides: Mapping[str, object], threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "bench.child", str(data), *(f"{key}={v}" for key, v in overrides.items())]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, encoding="utf-8",
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        self.loaded = self._answer()

    def advance(self, steps: int) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the measured training ended with code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def memory() -> dict[str, int]:
    """Peak memory of this process, and its current memory without mapped files, in bytes.

    `ru_maxrss` is not used because it would include the memory of the parent process.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {name: 1024 * int(status[key].split()[0]) for name, key in (("peak", "VmHWM"), ("anonymous", "RssAnon"))}


def main(data: Path, overrides: Mapping[str, str]) -> None:
    from bench.workshop import Trainer, reference_config
    from pipeline.runs.launch import prepare_torch
    from pipeline.tasks.mmoe.task import MmoeTask
    from pipeline.tracking.run import MemoryRun

    answers = os.fdopen(os.dup(1), "w")

    def answer(**values: object) -> None:
        answers.write(json.dumps(values | memory()) + "\n")
        answers.flush()

    config = reference_config(data, overrides)
    prepare_torch(config)
    cpu = time.process_time()
    trainer = Trainer(MmoeTask(config), MemoryRun())
    answer(cpu=time.process_time() - cpu)
    for line in sys.stdin:
        wall, cpu = trainer.advance(int(line))
        answer(wall=wall, cpu=cpu)


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `python -m pipeline` sets it, before torch is loaded
    main(Path(sys.argv[1]), dict(text.split("=", 1) for text in sys.argv[2:]))
