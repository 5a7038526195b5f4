"""Predictor of a logged MMoE model: raw feature columns to probabilities."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from pipeline.config.strict_config import load as load_config
from pipeline.data.encoding import Encoder
from pipeline.data.layout import Layout
from pipeline.data.schema import FIRST_ID, VOCABULARY_FILE, DataSchema, split_parts
from pipeline.maths.calibration import rescaled
from pipeline.storage.calibration_file import read_calibration
from pipeline.tasks.mmoe.config import HEADS, MmoeConfig
from pipeline.tasks.mmoe.impressions.impression_batch import assemble
from pipeline.tasks.mmoe.model import Mmoe

BATCH_ROWS = 8192


def load(folder: Path) -> Callable[..., pd.DataFrame]:
    """Load a model written by `MmoeTask.export`. Returns predict(frame, raw=False); raw=True skips calibration.

    A model of data without conversion labels predicts `p_ctr` alone.
    """
    schema, encoder = DataSchema.read(folder), Encoder.load(folder)
    layout = Layout(schema.features)
    model = Mmoe(load_config(MmoeConfig, folder / "config.yaml").model, layout, schema.base_rates)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.eval()
    calibration = read_calibration(folder)
    heads = HEADS[:1] if schema.click_only else HEADS

    def predict(frame: pd.DataFrame, raw: bool = False) -> pd.DataFrame:
        columns = encoder.encode(frame)
        logits = np.empty((len(frame), len(heads)))
        with torch.inference_mode():
            for first in range(0, len(frame), BATCH_ROWS):
                batch = assemble({name: column.slice(first, BATCH_ROWS) for name, column in columns.items()}, layout)
                logits[first : first + BATCH_ROWS] = model(batch).logits[:, : len(heads)].double().numpy()
        if calibration and not raw:
            logits = rescaled(torch.from_numpy(logits), calibration, heads).numpy()
        p = dict(zip((f"p_{head}" for head in heads), 1 / (1 + np.exp(-logits.T)), strict=True))
        if not schema.click_only:
            p["p_ctcvr"] = p["p_ctr"] * p["p_cvr"]
        return pd.DataFrame(p, index=frame.index)

    return predict


def raw_example(folder: Path, rows: int) -> dict[str, list[Any]]:
    """Raw columns of the first prepared validation rows, as the input example of a model."""
    schema = DataSchema.read(folder)
    files = split_parts(folder / schema.splits["validation"].file)
    encoded = next(batch for file in files for batch in pq.ParquetFile(file).iter_batches(batch_size=rows)).to_pydict()
    vocabulary = pq.read_table(folder / VOCABULARY_FILE).to_pandas()
    values = {name: dict(zip(part["id"], part["value"], strict=True)) for name, part in vocabulary.groupby("feature")}
    raw: dict[str, list[Any]] = {}
    for feature in schema.features:
        name, texts, column = feature.name, values.get(feature.name, {}), encoded[feature.name]
        if feature.kind == "numeric":
            raw[name] = column
        elif feature.kind == "categorical":
            raw[name] = [texts.get(number) for number in column]  # None if the value is not in the vocabulary
        else:
            weights = encoded.get(f"{name}.weights") or [[1.0] * len(cell) for cell in column]
            bags = [
                [(texts[number], f"{weight:g}".replace(".", schema.decimal))
                 for number, weight in zip(*pair, strict=True) if number >= FIRST_ID]
                for pair in zip(column, weights, strict=True)
            ]  # fmt: skip
            join = feature.weight_separator
            raw[name] = [feature.separator.join(join.join(pair) if join else pair[0] for pair in bag) for bag in bags]
            if feature.weights:
                raw[feature.weights] = [feature.separator.join(weight for _, weight in bag) for bag in bags]
    return raw
