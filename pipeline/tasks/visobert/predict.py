"""A logged aspect sentiment model: texts in, sentiments of every aspect out."""

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
from pipeline.tasks.visobert.encoders.tokenizer import load_saved
from pipeline.tasks.visobert.model import AspectSentimentModel, Output, build_model
from pipeline.tasks.visobert.reviews.review_table import LengthBuckets, ReviewTable
from pipeline.tasks.visobert.scoring.predictions import ASPECTS_FILE, ENCODER_FOLDER, TOKENIZER_FOLDER, Answers


def load(folder: Path) -> Callable[..., pd.DataFrame]:
    """The predictor that `VisobertTask.export` wrote into the folder: predict(texts, raw=False).

    raw: probabilities as trained, without calibration.
    """
    config = load_config(VisobertConfig, folder / "config.yaml")
    told = json.loads((folder / ASPECTS_FILE).read_text(encoding="utf-8"))
    aspects, polar = told["aspects"], ~np.isin(told["aspects"], told["detection_only"])
    tokenizer = load_saved(folder / TOKENIZER_FOLDER, config.model.name)
    encoder = EMBEDDED if config.model.name == EMBEDDED else str(folder / ENCODER_FOLDER)
    built = config.model.model_copy(update={"name": encoder})
    model = build_model(built, len(aspects), tokenizer, weights=False)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.eval()
    size, budget = config.evaluation.batch_size, config.training.batch_tokens
    thresholds, calibration = model.thresholds.double().numpy(), read_calibration(folder)

    def predict(texts: Any, raw: bool = False) -> pd.DataFrame:
        column = text_column(texts, told["text_column"])
        listed = [_text(row, text) for row, text in enumerate(column, 1)]
        tokens = tokenizer.encode(listed, config.model.max_tokens)
        table = ReviewTable(tokens, np.empty((len(listed), 0), np.int8), tokenizer.pad_id)
        output = predict_logits(model, table, size, budget)
        answers = Answers(output, thresholds, aspects, polar, {} if raw else calibration)
        return answers.frame().set_index(column.index)

    return predict


def text_column(given: Any, name: str) -> pd.Series:
    """The texts of a list, a Series, or the column `name` of a frame or of dicts.

    Raises:
        UserError: found columns of other names, or several without one.
    """
    if isinstance(given, pd.Series):
        return given
    if isinstance(given, str | Mapping):
        given = [given]
    frame = given if isinstance(given, pd.DataFrame) else pd.DataFrame(list(given), dtype=object)
    columns = list(frame.columns)
    unnamed = all(str(column).isdigit() for column in columns)
    if unnamed and len(columns) <= 1:
        column = frame.iloc[:, 0] if columns else pd.Series(dtype=object)
    elif columns.count(name) == 1:
        column = frame[name]
    else:
        found = f"{len(columns)} columns without names" if unnamed else f"column {', '.join(map(repr, columns))}"
        raise UserError(f"texts: found {found}; allowed: column {name!r}, or a list of texts")
    several = len(column) == 1 and isinstance(column.iloc[0], list | tuple | np.ndarray)
    return pd.Series(list(column.iloc[0]), dtype=object) if several else column  # {"text": [...]}, in MLflow's hands


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
    """Logits of the table's rows from `first` to before `last`, in their order, on the CPU in fp32.

    The model must be in evaluation mode.
    """
    batches = LengthBuckets(table.lengths[first:last].numpy(), batch_size, batch_tokens)
    parts: list[Output] = []
    with torch.inference_mode():
        for rows in batches:
            batch = table.batch(rows + first).to(device)
            parts.append(model(batch.ids, batch.mask))
    if not parts:
        aspect = torch.empty(0, model.aspects) if model.detects else None
        return Output(torch.empty(0, model.aspects, 3), aspect)
    back = torch.from_numpy(np.argsort(np.concatenate(batches.batches)))
    sentiment = torch.cat([part.sentiment for part in parts]).float().cpu()[back]
    found = [part.aspect for part in parts if part.aspect is not None]
    return Output(sentiment, torch.cat(found).float().cpu()[back] if found else None)
