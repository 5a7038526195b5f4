"""Two trainers that would write one run: the second is refused within seconds, and the first does not notice.

They meet in one folder, in a copy of it, under one MLFLOW_RUN_ID, under one key, and on two hosts.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import only_full, wait_for
from test_exits import folder, job, python, started, wait_for_step  # noqa: F401 (folder is a fixture)
from test_kills import points, runs

pytestmark = [pytest.mark.faults, only_full]

SECONDS = 60  # for a second start to be refused: its imports, and the 5 s that a run of another host is watched
ELSEWHERE = ["unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh"]  # a host of another name
MEETINGS = ("same folder", "copied folder", "same run id", "same run id, same folder", "same key", "copy, other host",
            "same key, other host", "same run id, other host")  # fmt: skip


def can_have_two_hosts() -> bool:
    return subprocess.run([*ELSEWHERE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("meeting", MEETINGS)
def test_one_writes_and_the_other_is_refused(
    meeting: str,
    folder: Path,  # noqa: F811
    impressions: Path,
    client: Any,
) -> None:
    if "host" in meeting and not can_have_two_hosts():
        pytest.skip("needs the right to have two host names: unshare --uts")
    alive = job(impressions)
    by_id = meeting.startswith("same run id")
    run_id = client.create_run("0").info.run_id if by_id else ""
    environment = {"MLFLOW_RUN_ID": run_id} if by_id else {}
    resume = () if by_id else ("--resume", "auto")
    with started(python(alive, *resume), folder, **environment) as process:
        wait_for_step(process, 250)
        reader = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
        ((run_id, _),) = runs(folder).items()
        where = "outputs"
        if meeting.startswith("cop"):
            where = str(shutil.copytree(folder / "outputs", folder / "copy"))
        elif "folder" not in meeting:
            where = "others"
        command = [*(ELSEWHERE if "host" in meeting else ()), *python(alive, *resume, "--output_dir", where)]
        begun = time.monotonic()
        second = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
                                timeout=600, check=False)  # fmt: skip
        assert time.monotonic() - begun < SECONDS
        assert second.returncode == 2, second.stderr
        message = second.stderr.strip().splitlines()[-1]
        assert message.startswith(f"error: run {run_id} is in use by process {process.pid} on "), message
        count = len(points(folder, run_id))
        wait_for(lambda: len(points(folder, run_id)) > count)  # the first goes on
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 128 + signal.SIGINT
        reader.wait(60)
    assert runs(folder) == {run_id: ("KILLED", "")}
    found = [(key, step) for key, step, _ in points(folder, run_id)]
    assert len(found) == len(set(found))
    assert "taken over" not in (folder / "stderr.txt").read_text()
