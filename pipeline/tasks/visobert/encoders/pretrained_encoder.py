"""Pretrained encoders, loaded with transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import ModelConfig
from pipeline.tasks.visobert.encoders.embedded_encoder import Encoded
from pipeline.tasks.visobert.encoders.model_folder import model_folder


class PretrainedEncoder(nn.Module):
    """An encoder loaded with transformers' AutoModel."""

    def __init__(self, model: Any, keep_pooler: bool) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config
        self.width: int = self.config.hidden_size
        if not keep_pooler and getattr(model, "pooler", None) is not None:
            model.pooler = None

    def forward(self, ids: Tensor, mask: Tensor) -> Encoded:
        """ids: [B, L]; mask: [B, L], false where padded."""
        output = self.model(input_ids=ids.long(), attention_mask=mask.long())
        return Encoded(output.last_hidden_state, getattr(output, "pooler_output", None))


def load_encoder(
    config: ModelConfig, vocabulary: int, *, weights: bool, warn: Callable[[str], object]
) -> PretrainedEncoder:
    """Load the encoder in fp32. `weights` false: initialise new weights, regardless of `model.init`.

    Raises:
        UserError: files are missing or damaged, or do not match the tokenizer or the config.
    """
    pretrained = weights and config.init == "pretrained"
    folder = model_folder(config.name, config.revision, weights=pretrained)
    encoder = PretrainedEncoder(_load(folder, config, pretrained, warn), config.pooling == "pooler")
    _check_sizes(encoder.model, config, vocabulary)
    if config.pooling == "pooler" and getattr(encoder.model, "pooler", None) is None:
        raise UserError(f"model.pooling: found pooler, but {config.name} has none; allowed: cls, aspect_attention")
    return encoder


def _load(folder: Path, config: ModelConfig, pretrained: bool, warn: Callable[[str], object]) -> nn.Module:
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        architecture = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        if not pretrained:
            return cast(nn.Module, AutoModel.from_config(architecture, dtype=torch.float32, trust_remote_code=False))  # type: ignore[no-untyped-call]
        model, report = AutoModel.from_pretrained(
            str(folder),
            config=architecture,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.name {config.name}: transformers cannot load {folder}: {error}") from None
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise UserError(
            f"model.name {config.name}: the weights in {folder} lack {len(missing)} of the encoder's tensors "
            f"({missing[0]}, ...); allowed: all of them, or model.init: random"
        )
    if config.pooling == "pooler" and report["missing_keys"]:
        warn(f"model.pooling: the weights of {config.name} have no pooler: it starts from new ones")
    return cast(nn.Module, model)


def _check_sizes(model: Any, config: ModelConfig, vocabulary: int) -> None:
    if vocabulary > model.config.vocab_size:
        raise UserError(
            f"model.name {config.name}: its tokenizer has {vocabulary} entries, allowed: at most the "
            f"{model.config.vocab_size} that the model embeds"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    padding = getattr(getattr(getattr(model, "embeddings", None), "position_embeddings", None), "padding_idx", None)
    if positions is not None and padding is not None:
        positions -= padding + 1  # RoBERTa and similar models number positions from padding id + 1
    if positions is not None and config.max_tokens > positions:
        raise UserError(f"model.max_tokens: found {config.max_tokens}, allowed for {config.name}: at most {positions}")
