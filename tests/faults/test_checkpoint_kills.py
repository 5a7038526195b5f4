"""Kills in the middle of saves: at every moment one complete checkpoint is on disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FULL
from test_checkpoint import assert_intact, hidden, save

from pipeline.storage.checkpoints import Checkpoints

pytestmark = pytest.mark.faults

KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from pipeline.storage.checkpoints import Checkpoints

def state(step):
    return {"step": step, "weight": torch.full((SIZE,), float(step))}

def saves(folder, pipe, at_event):
    \"\"\"Save step after step, each step's number into the pipe; die at the n-th change of the file system.\"\"\"
    events = 0

    def count(event, arguments):
        nonlocal events
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"):
            if "checkpoints" in str(arguments[0]) or event in ("os.remove", "os.rmdir"):
                events += 1
                if events == at_event:
                    os.kill(os.getpid(), signal.SIGKILL)

    if at_event:
        sys.addaudithook(count)
        os.fsync = lambda _: None  # for a process that is killed it changes nothing, and takes long
    checkpoints = Checkpoints(folder, last=1)
    for step in range(1, 3 if at_event else 10_000):
        checkpoints.save(step, state(step), {}, {"linked": folder / "linked"}, None)
        os.write(pipe, step.to_bytes(4, "big"))

def child(folder, at_event=0):
    \"\"\"A process that saves; its id, and the pipe with the steps that it has saved.\"\"\"
    Path(folder, "linked").parent.mkdir()
    Path(folder, "linked").write_bytes(bytes(10))
    out, pipe = os.pipe()
    process = os.fork()
    if not process:
        try:
            saves(folder, pipe, at_event)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    os.close(pipe)
    return process, out

def outcome(process, out, saved=b""):
    _, status = os.waitpid(process, 0)
    saved += b"".join(iter(lambda: os.read(out, 1 << 16), b""))
    os.close(out)
    return os.waitstatus_to_exitcode(status), int.from_bytes(saved[-4:], "big")

torch.set_num_threads(1)
base, moments, stride = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
random.seed(0)
found = []
SIZE = 2_000_000
for moment in range(moments):
    folder = base / f"moment-{moment}"
    process, out = child(folder)
    first = os.read(out, 4)
    time.sleep(random.uniform(0, 0.2))  # wherever it is by then
    os.kill(process, signal.SIGKILL)
    found.append([folder.name, *outcome(process, out, first)])
SIZE = 50
for event in range(1, 1000, stride):
    folder = base / f"event-{event}"
    found.append([folder.name, *outcome(*child(folder, event))])
    if found[-1][1] == 0:
        break
print(json.dumps(found))
"""


def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At random moments of saves that follow each other, and at every change of the file system in turn.

    In the short form at every fourth change.
    """
    moments, stride = (50, 1) if FULL else (3, 4)
    command = [sys.executable, "-c", KILLS, str(tmp_path), str(moments), str(stride)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert {code for _, code, _ in found[:-1]} == {-9}
    assert found[-1][1:] == [0, 2]  # one that had fewer changes than that
    assert len(found) - moments > 20 / stride
    monkeypatch.setattr(os, "fsync", lambda _: None)
    cut_short = 0
    for name, _, saved in found:
        checkpoints = Checkpoints(tmp_path / name)
        cut_short += bool(hidden(checkpoints)) if checkpoints.folder.exists() else 0
        latest = checkpoints.latest()
        if saved == 0 and latest is None:
            continue  # killed in the first save
        assert_intact(latest, saved if latest.step == saved else saved + 1)  # one interval at most
        assert (latest.folder / "linked").read_bytes() == bytes(10)
        next_step = latest.step + 1
        save(checkpoints, next_step)
        assert hidden(checkpoints) == []
        assert_intact(checkpoints.latest(), next_step)
        shutil.rmtree(tmp_path / name)
    assert cut_short > len(found) / 4  # the kills did hit saves
    assert capsys.readouterr().err == ""  # nothing damaged was passed over
