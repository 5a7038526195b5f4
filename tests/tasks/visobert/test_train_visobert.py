"""`train_visobert` as a user starts it: with the embedded reviews, with files, with a model from a folder, wrongly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, Call, Place, one_writer, project_in
from sklearn.metrics import f1_score

from pipeline.config.strict_config import load
from pipeline.runtime.console import Console
from pipeline.tasks.base import evaluate
from pipeline.tasks.visobert.config import VisobertConfig
from pipeline.tasks.visobert.task import VisobertTask
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Training

EMBEDDED = {"config": "configs/config_multi_embedded.yaml"}
TINY = {"training.threads": "1", "data.embedded.rows": "300", "model.embedded.width": "16", "batch_size": "32"}
ASPECTS = ("Battery", "Camera", "Shop&Service", "Others")


def write_reviews(file: Path, rows: int = 120, seed: int = 0) -> pd.DataFrame:
    """A wide file in which a word decides each label; `Others` carries no polarity, so it is detection-only."""
    generator = np.random.default_rng(seed)
    words = {"Positive": "tốt", "Negative": "tệ", "Neutral": "thường"}
    rows_of: list[dict[str, str]] = []
    for row in range(rows):
        cells = dict.fromkeys(ASPECTS, "")
        parts = [f"máy số {row}"]
        for aspect in ASPECTS[:3]:
            if generator.random() < 0.6:
                cells[aspect] = str(generator.choice(list(words), p=[0.5, 0.3, 0.2]))
                parts.append(f"{aspect.lower()} {words[cells[aspect]]}")
        rows_of.append({"data": ", ".join(parts), **cells})
    frame = pd.DataFrame(rows_of)
    labels = [
        ";".join(
            [f"{{{aspect}#{row[aspect]}}}" for aspect in ASPECTS[:3] if row[aspect]] + ["{Others}"] * (index % 4 == 0)
        )
        for index, row in frame.iterrows()
    ]
    labelled = pd.DataFrame({"data": frame["data"], "label": labels})
    labelled.to_csv(file, index=False)
    return labelled


def files(folder: Path) -> dict[str, str]:
    for seed, name in enumerate(("train", "validation", "test")):
        write_reviews(folder / f"{name}.csv", seed=seed)
    return {f"data.{name}": str(folder / f"{name}.csv") for name in ("train", "validation", "test")}


def options(values: dict[str, str]) -> list[str]:
    return [part for key, value in values.items() for part in (f"--{key}", value)]


def small_task(folder: Path, **overrides: str) -> VisobertTask:
    texts = TINY | {"data.cache": str(folder / "cache"), "output_dir": str(folder / "outputs")} | overrides
    texts["training.batch_size"] = texts.pop("batch_size")
    return VisobertTask(load(VisobertConfig, ROOT / "configs/config_multi_embedded.yaml", texts))


def trained(task: VisobertTask) -> tuple[MemoryRun, Training]:
    run = MemoryRun()
    training = Training(task, run, Console(0, quiet=True), "cpu")
    training.train()
    return run, training


@one_writer
def test_embedded_reviews(lent: Place, tmp_path: Path, call_pipeline: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    project, client = project_in(tmp_path), lent.client
    opened = client.create_run("0", run_name="legendary-gnat-695").info.run_id  # as `mlflow run` does
    monkeypatch.setenv("MLFLOW_RUN_ID", opened)
    switched = {"epochs": "2", "alpha": "auto", "tracking.log_model": "false"}
    result = call_pipeline("train_visobert", *options(EMBEDDED | TINY | switched))
    assert result.returncode == 0, result.stderr
    run = client.get_run(opened)
    assert client.search_runs(["0"])[0].info.run_id == opened  # none was begun after it
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "small auto g2 s0"
    assert "Using epochs from command line: 2 (overrides config)" in result.stderr
    first = "embedded data: generated, 300 reviews, because data.train is null"
    assert result.stderr.splitlines()[0] == first
    params, metrics = run.data.params, run.data.metrics
    assert params["multi_label.focal_alpha"] == "auto"
    assert params["model.name"] == "embedded"

    # alpha from the training file by pandas alone
    (folder,) = (project / "data_cache").glob("reviews-300-*")
    labels = pd.read_csv(folder / "train.csv", encoding="utf-8-sig").drop(columns="data").stack()
    counts = [int((labels == name).sum()) for name in ("Positive", "Negative", "Neutral")]
    alpha = [sum(counts) / (3 * count) for count in counts]
    assert json.loads(params["alpha_vector"]) == pytest.approx(alpha, abs=5e-5)
    assert params["alpha_mode"] == "auto"
    assert [metrics[f"alpha/{name}"] for name in ("positive", "negative", "neutral")] == pytest.approx(alpha)
    alpha_file = json.loads(Path(client.download_artifacts(run.info.run_id, "alpha.json")).read_text(encoding="utf-8"))
    assert alpha_file["counts"] == counts
    assert f"distribution positive {counts[0]}, negative {counts[1]}, neutral {counts[2]}" in result.stderr
    assert f"Total parameters: {int(params['parameters']):,}\n" in result.stderr
    for line in (f"alpha_vector {params['alpha_vector']}", "alpha_mode auto", "gamma 2.0", "aspects 11",
                 f"parameters {params['parameters']}"):  # fmt: skip
        assert line in result.stderr

    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [line["global_step"] for line in lines] == list(range(len(lines)))
    for line in lines:
        assert line["loss_total"] == pytest.approx(line["loss_sentiment"] + 2 * line["loss_aspect"], rel=1e-5)
    for key in ("loss_total", "loss_sentiment", "loss_aspect", "global_step", "lr/encoder", "lr/head",
                "grad_norm/encoder", "grad_norm/head", "system/rows_per_second"):  # fmt: skip
        points = {point.step: point.value for point in client.get_metric_history(run.info.run_id, key)}
        assert points == {line["global_step"]: float(line[key]) for line in lines}, key
    assert [point.step for point in client.get_metric_history(run.info.run_id, "valid/pair_f1_micro")] == [
        len(lines) // 2, len(lines)
    ]  # fmt: skip
    for name in ("aspect_f1_macro", "aspect_f1_micro", "sentiment_f1_macro", "pair_f1_micro", "sentiment_accuracy",
                 "f1/Shop_Service", "pair_f1_micro_tfidf", "pair_f1_micro_majority"):  # fmt: skip
        assert 0 <= metrics[f"valid/{name}"] <= 1
        assert 0 <= metrics[f"test/{name}"] <= 1

    # the scores are those of the predictions that were left
    table = pd.read_csv(client.download_artifacts(run.info.run_id, "evaluation/test_predictions.csv"))
    truth = pd.read_csv(folder / "test.csv", encoding="utf-8-sig")
    cells = [(row, aspect) for row in range(len(truth)) for aspect in truth.columns[1:]]
    gold = {
        (row, aspect, str(truth[aspect][row]).lower()) for row, aspect in cells if isinstance(truth[aspect][row], str)
    }
    said = {(row, aspect, table[aspect][row]) for row, aspect in cells if isinstance(table[aspect][row], str)}
    assert metrics["test/pair_f1_micro"] == pytest.approx(2 * len(gold & said) / (len(gold) + len(said)))
    most = table[[f"Battery/{name}" for name in ("positive", "negative", "neutral")]].to_numpy().argmax(1)
    rows = truth["Battery"].notna().to_numpy()
    codes = truth["Battery"].map({"Positive": 0, "Negative": 1, "Neutral": 2})[rows].astype(int)
    expected = f1_score(codes, most[rows], labels=[0, 1, 2], average="macro", zero_division=0)
    assert metrics["test/f1/Battery"] == pytest.approx(expected)
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id, "evaluation")}
    tables = {f"evaluation/test_{name}.csv" for name in ("aspects", "confusion", "errors", "predictions")}
    assert artifacts == tables | {"evaluation/test_rows.parquet"}
    assert {item.path for item in client.list_artifacts(run.info.run_id, "plots")} == {
        "plots/losses.png", "plots/test_confusion.png"
    }  # fmt: skip


@one_writer
def test_files_data_prep_run_and_the_logged_model(lent: Place, tmp_path: Path, call_pipeline: Call) -> None:
    import mlflow

    project, client = project_in(tmp_path), lent.client
    paths = files(project)
    prepared = call_pipeline("data_prep", "--data", paths["data.train"])
    assert prepared.returncode == 0, prepared.stderr
    alpha_run = client.search_runs(["0"])[0]
    shared = options(EMBEDDED | {"data_prep_run": alpha_run.info.run_id})
    quick = TINY | {"epochs": "1", "tracking.log_report": "false"}
    result = call_pipeline("train_visobert", *shared, *options(quick | paths))
    assert result.returncode == 0, result.stderr
    run = client.search_runs(["0"])[0]
    assert run.data.params["alpha_vector"] == alpha_run.data.params["alpha_vector"]
    assert run.data.metrics["test/f1/Shop_Service"] >= 0  # what MLflow refuses in a name is replaced
    assert "test/f1/Others" not in run.data.metrics

    model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    texts = ["battery tốt, camera tệ", "shop&service thường"]
    answers = model.predict(texts)
    assert list(answers.columns[:4]) == sorted(ASPECTS)
    assert list(answers.columns[4:]) == [
        f"{aspect}/{part}" for aspect in sorted(ASPECTS)
        for part in ("mentioned", *(() if aspect == "Others" else ("positive", "negative", "neutral")))
    ]  # fmt: skip
    assert {value for value in answers[list(ASPECTS[:3])].to_numpy().ravel() if isinstance(value, str)} <= {
        "positive", "negative", "neutral"
    }  # fmt: skip
    assert {value for value in answers["Others"] if isinstance(value, str)} <= {"mentioned"}
    sums = answers[[f"Battery/{name}" for name in ("positive", "negative", "neutral")]].sum(axis=1)
    assert sums.to_numpy() == pytest.approx([1, 1])
    for form in (pd.Series(texts, name="other"), pd.DataFrame({"id": [1, 2], "data": texts}), {"data": texts},
                 [{"data": text} for text in texts]):  # fmt: skip
        pd.testing.assert_frame_equal(model.predict(form), answers)
    for form, shown in (({"id": ["r1", "r2"]}, "column 'id'"), (np.array([["r1", "ok"]]), "2 columns without names")):
        with pytest.raises(Exception, match=f"texts: found {shown}; allowed: column 'data'"):  # its own UserError
            model.predict(form)

    raw = model.predict(texts, params={"raw": True})
    pd.testing.assert_frame_equal(raw[sorted(ASPECTS)], answers[sorted(ASPECTS)])
    ratio = [np.log(frame["Battery/positive"] / frame["Battery/negative"]) for frame in (raw, answers)]
    temperature = float(run.data.params["calibration.sentiment.temperature"])
    np.testing.assert_allclose(ratio[0], ratio[1] * temperature, rtol=1e-9)

    # alpha of another file is refused
    write_reviews(project / "other.csv", seed=7)
    paths["data.train"] = str(project / "other.csv")
    refused = call_pipeline("train_visobert", *shared, *options(paths))
    assert refused.returncode == 2
    assert "train.csv" in refused.stderr
    assert "other.csv" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    nobody = EMBEDDED | {"data_prep_run": "0123456789abcdef0123456789abcdef"}
    refused = call_pipeline("train_visobert", *options(nobody | paths))
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    assert "0123456789abcdef" in line


def test_learns_what_a_word_decides(tmp_path: Path) -> None:
    """Masking, heads, thresholds and the best weights together: separable data are learned.

    To scores of 1.0 here; nine tenths leave room for a training that rounds otherwise, where chance has a half.
    """
    run, training = trained(
        small_task(tmp_path, **files(tmp_path), baselines="false", **{
            "training.num_train_epochs": "25", "model.embedded.width": "32", "model.embedded.token_dropout": "0",
            "optim.encoder.lr": "0.01", "optim.head.lr": "0.01",
        })
    )  # fmt: skip
    scores = training.result.metrics
    assert scores["test/sentiment_f1_macro"] > 0.9
    assert scores["test/aspect_f1_macro"] > 0.9
    assert scores["test/pair_f1_micro"] > 0.9
    losses = [values["loss_total"] for _, values in run.points if "loss_total" in values]
    assert np.mean(losses[-5:]) < 0.25 * np.mean(losses[:5])


@pytest.mark.xdist_group("review model")  # of whose process transformers is imported
@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"data.aspects": "[Battery, Kamera]"}, ["Kamera"]),
        ({"data.text_column": "dta"}, ["dta", "data"]),
    ],
)
def test_bad_input_is_one_line(
    workplace: Path, call_pipeline: Call, overrides: dict[str, str], parts: list[str]
) -> None:
    values = files(workplace) | overrides
    result = call_pipeline("train_visobert", "--config", str(ROOT / EMBEDDED["config"]), *options(values))
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    for part in parts:
        assert part in line


def test_without_detection_no_score_of_mentions_is_logged(tmp_path: Path) -> None:
    task = small_task(tmp_path, **files(tmp_path), **{"model.aspect_detection": "false"})
    assert task.config.evaluation.metric == "valid/sentiment_f1_macro"
    names = set(evaluate(task, task.model(), "valid", "cpu"))
    assert {"valid/sentiment_f1_macro", "valid/sentiment_f1_macro_tfidf", "valid/sentiment_f1_macro_majority"} <= names
    assert not [name for name in names if "aspect" in name or "pair" in name]


def test_a_model_folder_that_lacks_a_file_is_one_line_before_a_run_exists(
    workplace: Path, client: Any, call_pipeline: Call
) -> None:
    folder = workplace / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    values = {"model.name": "model", "data.train": str(workplace / "train.csv")}
    write_reviews(workplace / "train.csv")
    result = call_pipeline("train_visobert", *options(values))
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "model.safetensors" in line
    assert not client.search_runs(["0"])
