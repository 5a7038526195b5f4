"""Prediction with a logged model: from texts to the sentiment of every aspect."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

from pipeline.config.strict_config import load as load_config
from pipeline.errors import UserError
from pipeline.storage.calibration_file import read_calibration
from pipeline.tasks.visobert.config import EMBEDDED, VisobertConfig
from pipeline.tasks.visobert.model import AspectSentimentModel, Output, build_model
from pipeline.tasks.visobert.reviews.review_table import ReviewTable, length_buckets
from pipeline.tasks.visobert.scoring.predictions import Predictions
from pipeline.tasks.visobert.tokenizer import load_saved

WEIGHTS_FILE, CONFIG_FILE, ASPECTS_FILE = "model.safetensors", "config.yaml", "aspects.json"
TOKENIZER_FOLDER, ENCODER_FOLDER = "tokenizer", "encoder"


def load(folder: Path) -> Callable[..., pd.DataFrame]:
    """Load the function `predict(texts, raw=False)` from a folder that `VisobertTask.export` wrote.

    raw: return probabilities without calibration.
    """
    config = load_config(VisobertConfig, folder / CONFIG_FILE)
    saved = json.loads((folder / ASPECTS_FILE).read_text(encoding="utf-8"))
    aspects, polar = saved["aspects"], ~np.isin(saved["aspects"], saved["detection_only"])
    tokenizer = load_saved(folder / TOKENIZER_FOLDER, config.model.name, config.model.segmenter)
    encoder = EMBEDDED if config.model.name == EMBEDDED else str(folder / ENCODER_FOLDER)
    model = build_model(config.model.model_copy(update={"name": encoder}), len(aspects), tokenizer, weights=False)
    model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    model.eval()
    size, budget = config.evaluation.batch_size, config.training.batch_tokens
    thresholds, calibration = model.thresholds.double().numpy(), read_calibration(folder)

    def predict(texts: Any, raw: bool = False) -> pd.DataFrame:
        column = text_column(texts, saved["text_column"])
        tokens = tokenizer.encode([_text(row, text) for row, text in enumerate(column, 1)], config.model.max_tokens)
        table = ReviewTable(tokens, np.empty((len(column), 0), np.int8), tokenizer.pad_id)
        output = predict_logits(model, table, size, budget)
        predictions = Predictions(output, thresholds, aspects, polar, {} if raw else calibration)
        return predictions.frame().set_index(column.index)

    return predict


def text_column(texts: Any, name: str) -> pd.Series:
    """The texts in a list or Series, or in the column `name` of a DataFrame or of dicts.

    Raises:
        UserError: there is no column `name`, or there are several columns without names.
    """
    if isinstance(texts, pd.Series):
        return texts
    if isinstance(texts, str | Mapping):
        texts = [texts]
    frame = texts if isinstance(texts, pd.DataFrame) else pd.DataFrame(list(texts), dtype=object)
    columns = list(frame.columns)
    unnamed = all(str(column).isdigit() for column in columns)
    if unnamed and len(columns) <= 1:
        column = frame.iloc[:, 0] if columns else pd.Series(dtype=object)
    elif columns.count(name) == 1:
        column = frame[name]
    else:
        found = f"{len(columns)} columns without names" if unnamed else f"column {', '.join(map(repr, columns))}"
        raise UserError(f"texts: found {found}; allowed: column {name!r}, or a list of texts")
    if len(column) == 1 and isinstance(column.iloc[0], list | tuple | np.ndarray):
        return pd.Series(list(column.iloc[0]), dtype=object)  # MLflow passes {"text": [...]} as one row
    return column


def _text(row: int, value: Any) -> str:
    if isinstance(value, str):
        return value
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    raise UserError(f"texts: row {row}: found {type(value).__name__} {str(value)[:60]!r}, allowed: text")


def predict_logits(
    model: AspectSentimentModel,
    table: ReviewTable,
    batch_size: int,
    batch_tokens: int,
    device: str = "cpu",
    *,
    first: int = 0,
    last: int | None = None,
) -> Output:
    """Logits of the table's rows `first` to `last` (exclusive), in the table's order, on the CPU in fp32.

    The model must be in evaluation mode.
    """
    batches = length_buckets(table.lengths[first:last].numpy(), batch_size, batch_tokens)
    outputs: list[Output] = []
    with torch.inference_mode():
        for rows in batches:
            batch = table.batch(rows + first).to(device)
            outputs.append(model(batch.ids, batch.mask))
    if not outputs:
        aspect = torch.empty(0, model.aspects) if model.detects else None
        return Output(torch.empty(0, model.aspects, 3), aspect)
    order = torch.from_numpy(np.argsort(np.concatenate(batches)))
    heads = zip(*(output.parts for output in outputs), strict=True)
    return Output(*(torch.cat(logits).float().cpu()[order] for logits in heads))
