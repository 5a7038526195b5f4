"""Entry points as a user starts them: through MLproject (whose commands test_house compares), by hand, and wrongly."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from conftest import Call, Place, mlflow_run, one_writer, project_in, run_pipeline, without

from pipeline import demo as story
from pipeline.__main__ import ui_command
from pipeline.errors import UserError

TINY = {"max_steps": "8", "warmup_steps": "4", "batch_size": "256", "data.embedded.rows": "4000",
        "evaluation.every_steps": "4", "training.threads": "1"}  # fmt: skip
entry_points = pytest.mark.xdist_group("entry points")  # the long ones, beside the tests of one writer
TYPED = [part for key, value in TINY.items() for part in (f"--{key}", value)]

SCHEMA = """
labels: {click: clicked, conversion: bought}
features:
  color: categorical
  size: {kind: numeric, missing: mean}
split: {seed: 3}
"""


def raw_file(folder: Path, rows: int = 2000) -> Path:
    random = np.random.default_rng(0)
    color = random.integers(0, 5, rows)
    size = random.normal(size=rows).round(3)
    clicked = random.random(rows) < 0.2 + 0.1 * color
    bought = clicked & (random.random(rows) < 0.3 + 0.1 * (size > 0))
    frame = pd.DataFrame({"color": color, "size": size, "clicked": clicked.astype(int), "bought": bought.astype(int)})
    frame.loc[::50, "size"] = np.nan
    file = folder / "raw.csv"
    frame.to_csv(file, index=False)
    (folder / "schema.yaml").write_text(SCHEMA, encoding="utf-8")
    return file


@entry_points
def test_prepare_ctr_then_training_through_mlproject_and_predicting(
    lent: Place, tmp_path: Path, call_pipeline: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, client = project_in(tmp_path), lent.client
    opened = client.create_run("0", run_name="legendary-gnat-695").info.run_id  # as `mlflow run` does
    monkeypatch.setenv("MLFLOW_RUN_ID", opened)
    raw = raw_file(project)
    prepared = call_pipeline("prepare_ctr", "--data", str(raw), "--schema", "schema.yaml", "--output_dir", "prepared")
    assert prepared.returncode == 0, prepared.stderr
    monkeypatch.delenv("MLFLOW_RUN_ID")
    run = client.search_runs(["0"])[0]
    assert (run.info.run_id, run.info.status) == (opened, "FINISHED")
    frame = pd.read_csv(raw)
    metrics = run.data.metrics
    assert sum(metrics[f"rows/{split}"] for split in ("train", "validation", "test")) == 2000
    assert sum(metrics[f"conversions/{split}"] for split in ("train", "validation", "test")) == frame["bought"].sum()

    result = mlflow_run("train_mmoe", project, **TINY, **{"data": "prepared", "epochs": "2", "lambda": "1e-1"})
    assert result.returncode == 0, result.stderr
    run = client.search_runs(["0"])[0]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "mmoe l.1 g1 w4 s0"
    assert run.data.params["data.path"] == "prepared"
    assert run.data.params["lambda"] == "1e-1"  # as typed
    assert run.data.params["loss.aux_focal.lambda"] == "0.1"
    assert run.data.params["gamma"] == "1.0"
    assert run.data.params["training.batch_size"] == "256"
    shown = {name for name in run.data.tags if not name.startswith("mlflow.")}
    shown -= {"git_dirty", "code_changes"}  # of a repository alone
    assert shown == {"task", "seed", "data_digest", "run_key", "threads", "owner", "run_dir", "host", "precision",
                     "overrides", "weights_digest"}  # fmt: skip
    assert len(run.data.tags["data_digest"]) == 64
    assert run.inputs.dataset_inputs[0].dataset.digest == run.data.tags["data_digest"][:32]

    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [line["global_step"] for line in lines] == list(range(8))
    assert [line["aux_focal_on"] for line in lines] == [False] * 4 + [True] * 4
    for key in ("loss_total", "loss_ctr", "loss_ctcvr", "loss_ctcvr_bce", "loss_ctcvr_focal", "loss_cvr_aux",
                "aux_focal_on", "aux_focal_lambda", "aux_focal_gamma", "global_step", "lr/dense", "lr/embedding",
                "grad_norm/dense", "grad_norm/embedding", "system/rows_per_second"):  # fmt: skip
        points = {point.step: point.value for point in client.get_metric_history(run.info.run_id, key)}
        assert points == {line["global_step"]: float(line[key]) for line in lines if key in line}, key
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "history.parquet", "plots"}
    predicts_from_raw_values(project, run, frame)
    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    tested = {name: value for name, value in run.data.metrics.items() if name.startswith("test/")}
    assert {metric.key: metric.value for metric in model.metrics} == tested
    assert {metric.dataset_digest for metric in model.metrics} == {run.data.tags["data_digest"][:32]}
    assert {len(client.get_metric_history(run.info.run_id, name)) for name in tested} == {1}

    # the run's own config.yaml runs again to the same numbers
    config = client.download_artifacts(run.info.run_id, "config.yaml")
    assert (
        call_pipeline(
            "train_mmoe", "--config", config, "--tracking.log_report", "false", "--tracking.log_model", "false"
        ).returncode
        == 0
    )
    again = client.search_runs(["0"])[0]
    assert again.info.run_id != run.info.run_id
    histories = [
        pd.read_parquet(client.download_artifacts(which.info.run_id, "history.parquet")).query(
            "not metric.str.startswith('system/')"
        )[["metric", "step", "value"]].reset_index(drop=True)
        for which in (run, again)
    ]  # fmt: skip
    pd.testing.assert_frame_equal(*histories)


def predicts_from_raw_values(project: Path, run: Any, frame: pd.DataFrame) -> None:
    """Where nobody can import the project: its code comes from the model."""
    import mlflow

    with without("pipeline"):
        model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
        predicted, raw = (model.predict(frame[["color", "size"]], params={"raw": flag}) for flag in (False, True))
    assert list(predicted.columns) == ["p_ctr", "p_cvr", "p_ctcvr"]
    np.testing.assert_allclose(predicted.p_ctcvr, predicted.p_ctr * predicted.p_cvr, rtol=1e-9)
    assert not np.allclose(predicted.p_ctr, raw.p_ctr, rtol=1e-3)
    assert_predicts_like_the_evaluation(predicted, frame, project, run.data.metrics["test/logloss_ctr_calibrated"])
    assert_predicts_like_the_evaluation(raw, frame, project, run.data.metrics["test/logloss_ctr"])


@entry_points
def test_main_in_the_run_that_mlflow_opens(
    lent: Place, tmp_path: Path, call_pipeline: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    project_in(tmp_path)
    client = lent.client
    before = {run.info.run_id for run in client.search_runs(["0"])}
    launched = client.create_run("0", run_name="legendary-gnat-695")  # as `mlflow run` does
    monkeypatch.setenv("MLFLOW_RUN_ID", launched.info.run_id)
    monkeypatch.setattr(story, "REVIEW_EPOCHS", "1")
    monkeypatch.setattr(story, "CONFIGS", tmp_path / "configs")
    for name in ("data_prep", "config_multi_embedded"):
        with (tmp_path / "configs" / f"{name}.yaml").open("a") as config:
            config.write("\ndata: {embedded: {rows: 300}}\n")
    result = call_pipeline("main", *TYPED, "--tracking.log_model", "false", "--tracking.log_report", "false")
    assert result.returncode == 0, result.stderr
    runs = {run.info.run_name: run for run in client.search_runs(["0"]) if run.info.run_id not in before}
    assert runs["mmoe baseline s0"].data.tags["role"] == "baseline"
    assert runs["mmoe l.1 g1 w4 s0"].data.tags["role"] == "arm"
    launcher = next(run for run in runs.values() if run.data.tags.get("role") == "launcher")
    assert launcher.info.run_id == launched.info.run_id
    assert {run.info.status for run in runs.values() if run is not launcher} == {"FINISHED"}
    assert set(runs) - {launcher.info.run_name} == {
        "mmoe baseline s0", "mmoe l.1 g1 w4 s0", "data_prep embedded", "small auto g2 s0"
    }  # fmt: skip
    alpha = runs["data_prep embedded"]
    assert runs["small auto g2 s0"].data.params["data_prep_run"] == alpha.info.run_id
    assert runs["small auto g2 s0"].data.params["alpha_vector"] == alpha.data.params["alpha_vector"]
    assert "count/positive" not in launcher.data.metrics
    assert "loss_total" not in launcher.data.metrics
    assert runs["mmoe baseline s0"].data.metrics["aux_focal_on"] == 0
    assert runs["mmoe l.1 g1 w4 s0"].data.metrics["aux_focal_on"] == 1
    assert "make ui" in result.stderr
    assert f"{runs['mmoe baseline s0'].data.metrics['test/auc_ctr']:.4f}" in result.stderr


def assert_predicts_like_the_evaluation(
    predicted: pd.DataFrame, frame: pd.DataFrame, project: Path, logged: float
) -> None:
    """The test split's log loss, from raw rows through the logged model, is the one that the run logged."""
    test = pd.read_parquet(project / "prepared" / "test.parquet")
    filled = frame["size"].astype("float32")
    keys = set(zip(test["size"], test["click"], test["conversion"], strict=True))
    chosen = [
        key in keys for key in zip(filled.fillna(np.inf), frame["clicked"], frame["bought"], strict=True)
    ]  # sizes are distinct enough to find the rows again; missing ones were filled and are found by their number
    assert 0.7 * len(test) < sum(chosen) < 1.3 * len(test)
    p, y = predicted["p_ctr"][chosen], frame["clicked"][chosen]
    loss = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    assert loss == pytest.approx(logged, rel=0.05)


def test_a_bad_override_through_mlproject_fails_the_run(
    project: Path, client: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the function behind `mlflow run`, whose own start takes seconds."""
    import mlflow.projects

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # its `python`
    with pytest.raises(mlflow.projects.ExecutionException):
        mlflow.projects.run(str(project), "train_mmoe", parameters={"lamda": "0.1"}, env_manager="local")
    message = capfd.readouterr().err
    assert "unknown key lamda; did you mean lambda?" in message
    assert "Traceback" not in message
    assert [run.info.status for run in client.search_runs(["0"])] == ["FAILED"]


def assert_one_line(result: subprocess.CompletedProcess[str], *parts: str, code: int = 2) -> None:
    lines = result.stderr.strip().splitlines()
    assert result.returncode == code, result.stderr
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--lambda", "abc"], ["loss.aux_focal.lambda", "found 'abc', allowed: number >= 0"]),
        (["--loss.aux_focal.target_head", "ctr"], ["target_head", "'ctr'", "ctcvr"]),
        (["--config", "absent.yaml"], ["absent.yaml", "No such file"]),
        (["--data", "nowhere"], ["nowhere", "no such folder"]),
        (["--lambda"], ["lambda", "requires an argument"]),
        (["--data", ""], ["error: --data: found '', allowed: text or null"]),
        (["--config", ""], ["error: --config: found '', allowed: a YAML file"]),
        (
            ["--evaluation.metric", "valid/auc_ctrr", "--data.embedded.rows", "1000"],
            ["error: evaluation.metric: found valid/auc_ctrr, allowed: a metric", "did you mean valid/auc_ctr?"],
        ),
        (["0.1"], ["unexpected extra argument"]),
        (["--data.embedded.cache", "/proc/nothing"], ["/proc/nothing", "cache"]),
        (["--output_dir", "/proc/nothing", "--data.embedded.rows", "1000"], ["output_dir /proc/nothing"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_input_is_one_line_and_code_2(
    workplace: Path, call_pipeline: Call, arguments: list[str], parts: list[str]
) -> None:
    assert_one_line(call_pipeline("train_mmoe", *arguments), *parts)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(["sweep", "--data="], "--data"), (["sync", ""], "folder"), (["doctor", " "], "run"), (["verify", ""], "folder"),
     (["doctor", "run", "--output_dir", ""], "output_dir"), (["prepare_ctr", "--data", ""], "--data")],
    ids=" ".join,
)  # fmt: skip
def test_an_empty_argument_is_one_line(workplace: Path, call_pipeline: Call, arguments: list[str], name: str) -> None:
    assert_one_line(call_pipeline(*arguments), f"error: {name}: found '", "allowed: ")


def test_bad_input_in_a_process_of_its_own(workplace: Path) -> None:
    parts = ["loss.aux_focal.lambda", "found -1", "number >= 0"]
    assert_one_line(run_pipeline("train_mmoe", "--lambda", "-1", cwd=workplace), *parts)
    assert_one_line(run_pipeline("trainmmoe", cwd=workplace), "did you mean train_mmoe?")


@pytest.mark.parametrize(
    "arguments",
    ["train_mmoe", "train_visobert", "data_prep", "prepare_ctr --data x.csv --schema x.yaml --output_dir out", "sweep",
     "compare --sweep_id a", "sync run", "doctor run"],
)  # fmt: skip
def test_a_tracking_uri_that_is_none_is_one_line(
    arguments: str, tmp_path: Path, call_pipeline: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.jsonl").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@[::1")
    result = call_pipeline(*arguments.split())
    assert_one_line(result, "error: MLFLOW_TRACKING_URI: found 'http://[::1', allowed: the URI of a tracking store")
    assert "hunter2" not in result.stderr


def test_the_page_of_a_tracking_uri_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://[::1")
    error = CliRunner().invoke(ui_command, []).exception
    assert isinstance(error, UserError)
    assert str(error).startswith("MLFLOW_TRACKING_URI: found 'http://[::1', allowed: the URI of a tracking store")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return raw_file(tmp_path, rows=60)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda lines: lines[:1], ["no rows"]),
        (lambda lines: lines[:0], ["empty"]),
        (lambda lines: [*lines[:7], lines[7].rsplit(",", 2)[0] + ",2,0", *lines[8:]], ["row 7", "clicked", "'2'"]),
        (lambda lines: [*lines[:7], lines[7].rsplit(",", 2)[0] + ",0,1", *lines[8:]], ["row 7", "without a click"]),
        (lambda lines: [lines[0].replace("color", "colour"), *lines[1:]], ["color", "colour"]),
        (lambda lines: [*lines[:-1], "3,0.5"], ["row 60"]),
        (lambda lines: [*lines[:3], "3,big,1,0", *lines[4:]], ["row 3", "size", "'big'"]),
    ],
    ids=["header only", "empty", "third value", "conversion without click", "absent column", "cut line", "no number"],
)
def test_bad_raw_data(workplace: Path, call_pipeline: Call, raw: Path, change: Any, parts: list[str]) -> None:
    lines = change(raw.read_text(encoding="utf-8").splitlines())
    raw.write_text("\n".join(lines) + ("\n" if lines else ""), encoding="utf-8")
    arguments = ["--data", str(raw), "--schema", "schema.yaml", "--output_dir", "prepared"]
    assert_one_line(call_pipeline("prepare_ctr", *arguments), *parts)
    assert not list((workplace / "prepared").glob("*"))


@one_writer
def test_nan_without_a_rule_a_cut_gzip_and_a_cut_parquet(
    lent: Place, tmp_path: Path, call_pipeline: Call, raw: Path
) -> None:
    schema = tmp_path / "schema.yaml"
    schema.write_text(SCHEMA.replace("{kind: numeric, missing: mean}", "numeric"))
    arguments = ["--schema", "schema.yaml", "--output_dir", "prepared", "--data"]
    assert_one_line(call_pipeline("prepare_ctr", *arguments, str(raw)), "row 1", "size")
    schema.write_text(SCHEMA)
    whole = gzip.compress(raw.read_bytes())
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    assert_one_line(call_pipeline("prepare_ctr", *arguments, "cut.csv.gz"), "cut.csv.gz")
    pd.read_csv(raw).to_parquet(tmp_path / "cut.parquet")
    content = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    assert_one_line(call_pipeline("prepare_ctr", *arguments, "cut.parquet"), "cut.parquet")
    prepared = call_pipeline("prepare_ctr", *arguments, str(raw))
    assert prepared.returncode == 0, prepared.stderr
    split = tmp_path / "prepared" / "train.parquet"
    split.write_bytes(split.read_bytes()[:-100])
    assert_one_line(call_pipeline("train_mmoe", "--data", "prepared"), "train.parquet", "Parquet")


@one_writer
def test_a_loss_that_explodes_ends_the_run_failed(lent: Place, call_pipeline: Call) -> None:
    result = call_pipeline("train_mmoe", *TYPED, "--optim.dense.lr", "1e30", "--optim.embedding.lr", "1e30")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: loss_ctr is ")
    run = lent.client.search_runs(["0"])[0]
    assert run.info.status == "FAILED"
    assert "at step 1" in run.data.tags["failure"]
    assert [point.step for point in lent.client.get_metric_history(run.info.run_id, "loss_total")] == [0]
    assert len(result.stdout.splitlines()) == 1


def test_untracked_training_leaves_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call_pipeline: Call
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call_pipeline("train_mmoe", *TYPED, "--tracking.enabled", "false")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"data_cache"}
