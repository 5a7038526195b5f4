"""Several processes train as one does: gradients, losses, evaluation; and what remains where one of them is killed."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ranked
import torch
from conftest import FULL, ROOT, Call, only_full

from pipeline.compute import distributed
from pipeline.config.strict_config import load
from pipeline.data.contract import describe
from pipeline.data.schema import DataSchema
from pipeline.runtime import process_rank
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.task import MmoeTask

MMOE = {
    "training.amp": "no", "training.batch_size": "51",
    "model.embedding_dim": "4", "model.experts.hidden": "[16]", "model.towers.hidden": "[8]",
    "loss.aux_focal.warmup_steps": "30", "model.gate.entropy_weight": "0.1", "model.gate.balance_weight": "0.1",
    "evaluation.every_steps": "100000", "tracking.influence_every": "7",
}  # fmt: skip

pytestmark = pytest.mark.xdist_group("ranks")  # one process forks them all

# A step's sums over 51 rows and up to 112 inputs of a layer, added up in another order and by kernels for another
# shape: so many roundings of fp32 at the most. Shares that are wrong (26 of 51 rows for a half) are off by 2e-2.
SUMS = (51 + 112) * 2.0**-24
TEST_PAIR = 1 / 400  # of a conversion and another row of the test split: what one rounding may change of an AUC


# of a process that has imported torch and what its optimizers need, for seconds, once
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["pipeline.runs.launch", "pipeline.training.loop", "pipeline.tasks.mmoe.task",
                               "pipeline.tasks.visobert.task", "torch._dynamo"])  # fmt: skip


def become(rank: int, port: int, size: int, file: Path) -> None:
    """As torchrun starts it, without its agent; what it prints goes to a file beside the one that says what to do."""
    with open(f"{file}.{rank}.log", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "RANK": str(rank),
                   "LOCAL_RANK": str(rank)}  # fmt: skip
    ranked.main(file)


def trained(folder: Path, size: int, overrides: Mapping[str, str], **asked: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "asked.json"
    base = {"task": "train_mmoe", "config": str(ROOT / "configs" / "mtl_mmoe.yaml"), "overrides": dict(overrides)}
    file.write_text(json.dumps(base | asked), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORKED.Process(target=become, args=(rank, port, size, file), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        process.join(timeout=900)
        assert process.exitcode == 0, Path(f"{file}.{rank}.log").read_text(encoding="utf-8")
    return torch.load(f"{file}.out", weights_only=False)


def losses(found: Any) -> dict[str, np.ndarray[Any, Any]]:
    steps = [values for _, values in found["points"] if "global_step" in values]
    names = {name for values in steps for name in values if name.startswith(("loss_", "grad_norm/", "influence/"))}
    return {name: np.array([values.get(name, np.nan) for values in steps]) for name in names}


def assert_like(one: Any, other: Any, relative: float) -> None:
    """Every loss of every step, and the final evaluation."""
    first, second = losses(one), losses(other)
    assert first.keys() == second.keys()
    for name in first:
        if name.startswith("loss_"):
            # the gates' losses are differences of numbers near 1 that begin at 0
            nothing = 2e-7 if "gate" in name else 1e-9
            np.testing.assert_allclose(second[name], first[name], rtol=relative, atol=nothing, err_msg=name)
    assert one["metrics"].keys() == other["metrics"].keys()
    for name, value in one["metrics"].items():
        if "auc" in name:
            assert other["metrics"][name] == pytest.approx(value, abs=TEST_PAIR), name


def test_gradients_from_the_same_states_are_those_of_one_process(tmp_path: Path, impressions: Path) -> None:
    """10 points of a training; 51 rows do not divide by 2, and most batches leave a rank without a click."""
    settings = MMOE | {"data.path": str(impressions)}
    points = range(0, 60, 6)
    trained(tmp_path, 1, settings, steps=60, states=list(points))
    one = trained(tmp_path / "one", 1, settings, compared=str(tmp_path))
    for size in (2, 3) if FULL else (2,):
        many = trained(tmp_path / str(size), size, settings, compared=str(tmp_path))
        assert sorted(map(int, many)) == list(points)
        for step, found in one.items():
            assert found.keys() == many[step].keys()
            assert any("focal" in name for name in found) == (int(step) >= 30)
            for name, value in found.items():
                np.testing.assert_allclose(many[step][name], value, rtol=1e-4, atol=1e-5, err_msg=f"{name} at {step}")
            weights = [name for name in found if not name.startswith("loss ")]
            whole = torch.cat([found[name].flatten() for name in weights])
            apart = whole - torch.cat([many[step][name].flatten() for name in weights])
            assert torch.linalg.norm(apart) <= SUMS * torch.linalg.norm(whole)

    config = load(MmoeConfig, ROOT / "configs" / "mtl_mmoe.yaml", settings)
    task = MmoeTask(config)
    plan = task.plan(0)
    clicks = [[float(task.batch(plan[step][rank::2]).click.sum()) for rank in range(2)] for step in points]
    assert any(0 in found and sum(found) for found in clicks)  # a rank without a click, beside one with


@pytest.mark.faults
@pytest.mark.parametrize(
    ("optimizer", "steps"), [("sparse_adam", 100), pytest.param("row_adagrad", 20, marks=only_full)]
)
def test_losses_and_auc_are_those_of_one_process(tmp_path: Path, impressions: Path, optimizer: str, steps: int) -> None:
    """4,000 training rows are 78 batches of 51 and one of 22; 100 steps are an epoch and a part."""
    settings = MMOE | {
        "data.path": str(impressions), "optim.embedding.name": optimizer, "training.num_train_epochs": "4",
        "optim.embedding.lr": "1e-3" if optimizer == "sparse_adam" else "0.02", "optim.dense.lr": "1e-3",
    }  # fmt: skip
    found = {size: trained(tmp_path / str(size), size, settings, steps=steps) for size in (1, 2)}
    assert len(losses(found[1])["loss_total"]) == steps
    assert_like(found[1], found[2], 10 * SUMS)  # which steps add up, and Adam divides by


def test_fewer_rows_than_processes(tmp_path: Path, impressions: Path) -> None:
    """A step's window of 2 rows and of 1, with accumulation, on three processes."""
    settings = MMOE | {"data.path": str(impressions), "training.batch_size": "2", "training.accumulation_steps": "2"}
    found = {size: trained(tmp_path / str(size), size, settings, steps=6) for size in (1, 3)}
    assert_like(found[1], found[3], 10 * SUMS)


def test_weighted_rows_are_trained_as_by_one_process(tmp_path: Path, impressions: Path) -> None:
    """Weights of very different sizes, whose sums per rank differ much more than their numbers of rows."""
    folder, random = tmp_path / "weighted", np.random.default_rng(0)
    folder.mkdir()
    (folder / "vocabulary.parquet").write_bytes((impressions / "vocabulary.parquet").read_bytes())
    schema = DataSchema.read(impressions)
    for split in schema.splits:
        table = pq.read_table(impressions / f"{split}.parquet").drop_columns(["p_ctr", "p_cvr"])
        weights = pa.array(np.exp(random.normal(0, 2, table.num_rows)), pa.float32())
        pq.write_table(table.append_column("sample_weight", weights), folder / f"{split}.parquet")
    describe(folder, schema.features, sample_weight=True)
    settings = MMOE | {"data.path": str(folder), "loss.aux_focal.warmup_steps": "2", "training.accumulation_steps": "2"}
    found = {size: trained(tmp_path / str(size), size, settings, steps=6) for size in (1, 2)}
    assert_like(found[1], found[2], 10 * SUMS)
    assert "loss_gate_balance" in losses(found[1])


def test_reviews_are_trained_as_by_one_process(tmp_path: Path) -> None:
    """Batches of unequal lengths, padded by each process for itself; oversampled rows; thresholds tuned alike."""
    settings = {
        "data.embedded.rows": "300", "model.embedded.width": "16", "training.batch_size": "17", "training.amp": "no",
        "model.embedded.dropout": "0", "model.embedded.token_dropout": "0", "model.dropout": "0", "baselines": "false",
        "training.accumulation_steps": "2", "data.cache": str(tmp_path / "cache"),
        "optim.encoder.lr": "1e-4", "evaluation.every_steps": "100000", "training.num_train_epochs": "3",
    }  # fmt: skip
    asked = {"task": "train_visobert", "config": str(ROOT / "configs" / "config_multi_embedded.yaml"), "steps": 8}
    found = {size: trained(tmp_path / str(size), size, settings, **asked) for size in (1, 2)}
    first, second = losses(found[1]), losses(found[2])
    for name in first:
        np.testing.assert_allclose(second[name], first[name], rtol=10 * SUMS, atol=1e-6, err_msg=name)
    for name, value in found[1]["metrics"].items():  # a score may count one cell of 30 reviews otherwise
        tolerance = 10 * SUMS if "/loss" in name else 0.05
        assert found[2]["metrics"][name] == pytest.approx(value, abs=tolerance), name


def test_alone_nothing_is_added_up() -> None:
    values = {"a": torch.ones(2), "b": torch.tensor(3)}
    assert distributed.all_reduce(values) == values
    assert distributed.check_same({"x": 1})
    assert process_rank.is_main_process()
    assert process_rank.world_size() == 1
    rows = np.arange(5)
    assert distributed.local_rows(rows).tolist() == rows.tolist()


@pytest.mark.parametrize(("rows", "size"), [(7, 3), (3, 3), (2, 3), (1, 4)])
def test_shares_cover_each_row_once(monkeypatch: pytest.MonkeyPatch, rows: int, size: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(size))
    taken = np.zeros(rows)
    for rank in range(size):
        monkeypatch.setenv("RANK", str(rank))
        np.add.at(taken, distributed.local_rows(np.arange(rows)), distributed.local_weight(rows))
    np.testing.assert_allclose(taken, 1)


# ---------------------------------------------------------------- torchrun


def torchrun(size: int, here: Path, *arguments: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    command = [sys.executable, *launcher, "-m", "pipeline", "train_mmoe", *arguments]
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{here}/mlflow.db", "PYTHONPATH": str(ROOT),
                                "OMP_NUM_THREADS": "1"}  # fmt: skip
    return subprocess.Popen(command, cwd=here, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)  # fmt: skip


def points_of(here: Path) -> dict[str, Any]:
    """status -> runs, and the points of the one run, straight from the database."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(here / "mlflow.db")) as store:
        runs = store.execute("select run_uuid, status from runs").fetchall()
        found = store.execute("select key, step, value from metrics").fetchall()
        tags = dict(store.execute("select key, value from tags").fetchall())
    assert len(found) == len({(key, step) for key, step, _ in found})  # each once: rank 0 alone tracks
    return {"runs": runs, "points": {(key, step): value for key, step, value in found}, "tags": tags}


def settings_for(impressions: Path) -> dict[str, str]:
    return MMOE | {
        "data.path": str(impressions), "training.num_train_epochs": "2", "checkpoint.every_steps": "20",
        "evaluation.every_steps": "60", "tracking.log_model": "false", "tracking.log_report": "false",
    }  # fmt: skip


def arguments_for(impressions: Path) -> list[str]:
    settings = settings_for(impressions) | {"resume": "auto"}
    return [text for name, value in settings.items() for text in (f"--{name}", value)]


def assert_same_run(found: Mapping[str, Any], reference: Mapping[tuple[str, int], float]) -> None:
    assert [status for _, status in found["runs"]] == ["FINISHED"]
    compared = [key for key in reference if key[0].startswith(("loss_", "valid/", "test/", "best_step"))]
    assert len(compared) > 300
    for key in compared:
        expected = reference[key]
        tolerance = TEST_PAIR if "auc" in key[0] or "ap_" in key[0] else 10 * SUMS * max(1, abs(expected))
        assert found["points"][key] == pytest.approx(expected, abs=tolerance), key


@pytest.mark.faults
@only_full
def test_a_killed_rank_ends_the_job_and_any_number_goes_on(
    tmp_path: Path, impressions: Path, empty_store: Path, call_pipeline: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    here = tmp_path / "two"
    here.mkdir()
    shutil.copyfile(empty_store, here / "mlflow.db")
    arguments = arguments_for(impressions)
    undisturbed = trained(tmp_path / "reference", 1, settings_for(impressions))
    expected = {(name, step): value for step, values in undisturbed["points"] for name, value in values.items()}

    job = torchrun(2, here, *arguments)
    assert job.stdout
    for line in job.stdout:
        if line.startswith("{") and json.loads(line)["global_step"] >= 45:
            break
    victim = int(subprocess.run(
        ["pgrep", "-f", "-P", str(job.pid), "pipeline train_mmoe"], capture_output=True, text=True, check=True
    ).stdout.split()[-1])  # fmt: skip
    os.kill(victim, signal.SIGKILL)
    _, stderr = job.communicate(timeout=900)
    assert job.returncode == 1
    assert "SIGKILL" in stderr
    assert "resume=auto continues it" in stderr
    assert [status for _, status in points_of(here)["runs"]] in (["KILLED"], ["FAILED"])

    alone = Path(shutil.copytree(here, tmp_path / "alone"))
    monkeypatch.chdir(alone)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{alone}/mlflow.db")
    done = call_pipeline("train_mmoe", *arguments)
    assert done.returncode == 0, done.stderr
    assert "continues after step" in done.stderr
    assert_same_run(points_of(alone), expected)
    for size in (2, 3):  # as many as before, and more
        folder = tmp_path / str(size)
        shutil.copytree(here, folder)
        job = torchrun(size, folder, *arguments)
        _, stderr = job.communicate(timeout=900)
        assert job.returncode == 0, stderr
        assert "continues after step" in stderr
        assert_same_run(points_of(folder), expected)
    job = torchrun(2, tmp_path / "2", *arguments)
    _, stderr = job.communicate(timeout=900)
    assert job.returncode == 0, stderr
    assert "is finished already" in stderr


def test_other_entry_points_are_for_one_process(monkeypatch: pytest.MonkeyPatch, call_pipeline: Call) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for entry in ("main", "sweep", "data_prep", "compare"):
        done = call_pipeline(entry)
        assert done.returncode == 2
        assert done.stderr == (f"error: rank 1: {entry}: found WORLD_SIZE 2, allowed: 1 (torchrun is for train_mmoe "
                               "and train_visobert)\n")  # fmt: skip
