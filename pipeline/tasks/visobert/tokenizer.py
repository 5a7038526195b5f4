"""Tokenizers of pretrained models, and a small tokenizer that is trained on the training split."""

import hashlib
import json
import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import EMBEDDED
from pipeline.tasks.visobert.encoders.model_folder import model_folder
from pipeline.tasks.visobert.segmenter import load_segmenter
from pipeline.tasks.visobert.spelling import one_spelling

TOKENIZER_FILE = "tokenizer.json"
# A tokenizer's folder must have one of these: without a vocabulary, transformers silently builds an empty tokenizer.
VOCABULARY_FILES = (TOKENIZER_FILE, "*.model", "vocab.txt", "vocab.json", "*.codes", "*.tiktoken")
PAD, UNKNOWN, START, MASK = "<pad>", "<unk>", "<s>", "<mask>"
MANY_UNKNOWN = 0.01  # warn above this share of unknown tokens


class Tokens(NamedTuple):
    """Concatenated token ids of N texts with T tokens in total."""

    ids: npt.NDArray[np.int32]  # [T]
    lengths: npt.NDArray[np.int64]  # [N]


class Tokenizer(Protocol):
    """Interface of tokenizers, which turn texts into token ids."""

    size: int  # all ids are below this
    pad_id: int
    mask_id: int  # replaces tokens in token dropout
    unknown_id: int | None  # replaces text that is not in the vocabulary
    digest: str  # equal for tokenizers that give equal ids

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> Tokens:
        """Tokenise the texts and add the model's special tokens; truncate each text to `max_tokens`."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files that `load_saved` reads."""
        ...


def load_tokenizer(
    name: str, revision: str | None, texts: Sequence[str], vocabulary: int, segmenter: str | None = None
) -> Tokenizer:
    """Load the tokenizer of a model, or train the embedded one.

    `name`: a hub id, a local folder, or `embedded`, which trains a tokenizer with `vocabulary` entries on `texts`.
    `segmenter`: see `ModelConfig.segmenter`.

    Raises:
        UserError: the folder or model does not exist, or has no tokenizer; the segmenter is not installed.
    """
    if name == EMBEDDED:
        segmented = list(map(load_segmenter(segmenter), _nfc(texts))) if segmenter else texts
        tokenizer: Tokenizer = EmbeddedTokenizer.train(segmented, vocabulary)
    else:
        tokenizer = PretrainedTokenizer(model_folder(name, revision, weights=False), name)
    return SegmentedTokenizer(tokenizer, segmenter) if segmenter else tokenizer


def load_saved(folder: Path, name: str, segmenter: str | None = None) -> Tokenizer:
    """Load the tokenizer of the model `name` from a folder that `save` wrote."""
    tokenizer: Tokenizer
    if name == EMBEDDED:
        tokenizer = EmbeddedTokenizer(Backend.from_file(str(folder / TOKENIZER_FILE)))
    else:
        tokenizer = PretrainedTokenizer(folder, name)
    return SegmentedTokenizer(tokenizer, segmenter) if segmenter else tokenizer


def unknown_share(tokenizer: Tokenizer, ids: npt.NDArray[np.int32]) -> float:
    """Share of tokens that are not in the vocabulary."""
    return float((ids == tokenizer.unknown_id).mean()) if tokenizer.unknown_id is not None and len(ids) else 0.0


class EmbeddedTokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) of lower-cased text in one spelling."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.size = backend.get_vocab_size()
        vocabulary = backend.get_vocab()
        self.pad_id: int = vocabulary[PAD]
        self.mask_id: int = vocabulary[MASK]
        self.unknown_id: int | None = vocabulary[UNKNOWN]
        self.digest = hashlib.sha256(f"one spelling {backend.to_str()}".encode()).hexdigest()

    @classmethod
    def train(cls, texts: Sequence[str], vocabulary: int) -> "EmbeddedTokenizer":
        backend = Backend(models.BPE(unk_token=UNKNOWN))
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        # Metaspace marks the start of words. With an end-of-word suffix instead, the trainer would number letters in
        # random order.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Whitespace(),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.Metaspace(prepend_scheme="always"),
            ]
        )
        special = [PAD, UNKNOWN, START, MASK]
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            min_frequency=2,
            limit_alphabet=vocabulary - len(special),  # keep the most frequent letters; others are unknown
            special_tokens=special,
            show_progress=False,
        )
        backend.train_from_iterator(map(one_spelling, texts), trainer)
        start = (START, backend.token_to_id(START))
        backend.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[start])
        return cls(backend)

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> Tokens:
        if max_tokens is None:
            self.backend.no_truncation()
        else:
            self.backend.enable_truncation(max_tokens)
        return _tokens([encoding.ids for encoding in self.backend.encode_batch_fast([*map(one_spelling, texts)])])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.no_truncation()
        self.backend.save(str(folder / TOKENIZER_FILE))


class PretrainedTokenizer:
    """A tokenizer loaded with transformers."""

    def __init__(self, folder: Path, name: str) -> None:
        """Load the tokenizer in the folder.

        Raises:
            UserError: the folder has no tokenizer, or it cannot be loaded.
        """
        self.backend: Any = _load(folder, name)
        self.size = len(self.backend)
        pad_ids = (self.backend.pad_token_id, self.backend.eos_token_id, 0)  # any id works: padding is masked
        self.pad_id = next(int(pad_id) for pad_id in pad_ids if pad_id is not None)
        mask = self.backend.mask_token_id
        self.mask_id = self.pad_id if mask is None else int(mask)
        self.unknown_id = self.backend.unk_token_id
        files = sorted({file for pattern in (*VOCABULARY_FILES, "*.json", "*.txt") for file in folder.glob(pattern)})
        self.digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> Tokens:
        if not len(texts):
            return _tokens([])
        encoding = self.backend(
            _nfc(texts),
            padding=False,  # ViSoBERT's tokenizer file pads and truncates to 256 by default
            truncation=max_tokens is not None,
            max_length=max_tokens,
            return_attention_mask=False,
            verbose=False,
        )
        return _tokens(encoding["input_ids"])

    def save(self, folder: Path) -> None:
        self.backend.save_pretrained(str(folder))


class SegmentedTokenizer:
    """A tokenizer of texts that are first segmented into words."""

    def __init__(self, tokenizer: Tokenizer, segmenter: str) -> None:
        self.tokenizer, self.segment = tokenizer, load_segmenter(segmenter)
        self.size, self.pad_id, self.mask_id = tokenizer.size, tokenizer.pad_id, tokenizer.mask_id
        self.unknown_id = tokenizer.unknown_id
        self.digest = hashlib.sha256(f"{segmenter} {tokenizer.digest}".encode()).hexdigest()

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> Tokens:
        return self.tokenizer.encode([self.segment(text) for text in _nfc(texts)], max_tokens)

    def save(self, folder: Path) -> None:
        self.tokenizer.save(folder)


def _nfc(texts: Sequence[str]) -> list[str]:
    """Normalise texts to NFC, in which a Vietnamese letter is one code point."""
    return [unicodedata.normalize("NFC", text) for text in texts]


def _tokens(ids: Sequence[Sequence[int]]) -> Tokens:
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    flat = np.concatenate([np.asarray(text, dtype=np.int32) for text in ids]) if len(ids) else np.empty(0, np.int32)
    return Tokens(flat, lengths)


def _load(folder: Path, name: str) -> Any:
    if not any(file for pattern in VOCABULARY_FILES for file in folder.glob(pattern)):
        raise UserError(
            f"model.name {name}: no tokenizer in {folder}, allowed: a folder with one of {', '.join(VOCABULARY_FILES)}"
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    logging.getLogger("transformers").setLevel(logging.ERROR)
    file = folder / TOKENIZER_FILE
    try:
        if not file.exists():
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        # Build the tokenizer from its file alone. AutoTokenizer in transformers 5 builds it from the class that the
        # config names: this fails for ViSoBERT, which uses byte-pair encoding but names a Unigram class, and it
        # lower-cases the texts for a cased BERT.
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **_special_tokens(folder))  # type: ignore[no-untyped-call]
    except UserError:
        raise
    except Exception as error:  # the type depends on the tokenizer's class
        path = file if file.exists() else folder
        raise UserError(f"model.name {name}: the tokenizer in {path} cannot be loaded: {error}") from None


def _special_tokens(folder: Path) -> dict[str, str]:
    """Read the special tokens (`pad_token`, ...) from the files in the folder."""
    tokens: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        try:
            entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError as error:
            raise UserError(f"{file}: not valid JSON: {error}") from None
        for key, value in entries.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                tokens[key] = text
    return tokens
