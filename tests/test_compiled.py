"""Machine code that is kept on disk."""

import os
import subprocess
import sys
from pathlib import Path

from pipeline import compiled


def test_what_is_compiled_anew(tmp_path: Path) -> None:
    """Code kept on disk is of the same common parts."""
    program = (
        "import sys, numpy, pipeline.compiled\n"
        "if len(sys.argv) > 1: pipeline.compiled.STAMP = sys.argv[1]\n"
        "from pipeline.optimizers import _increase\n"
        "assert _increase(numpy.arange(3))\n"
        "print(sum(_increase.stats.cache_hits.values()))"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    hits = [
        subprocess.run([sys.executable, "-c", program, *stamp], env=environment, capture_output=True, text=True,
                       check=True, cwd=Path(compiled.__file__).parents[1]).stdout.strip()
        for stamp in ([], [], ["another"])
    ]  # fmt: skip
    assert hits == ["0", "1", "0"]
