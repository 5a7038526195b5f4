"""From texts to token ids: tokenizers of pretrained models, and one of our own."""

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

TOKENIZER_FILE = "tokenizer.json"
# one of these must be there: without a vocabulary transformers makes up an empty one, and says nothing
VOCABULARY_FILES = (TOKENIZER_FILE, "*.model", "vocab.txt", "vocab.json", "*.codes", "*.tiktoken")
PAD, UNKNOWN, START, MASK = "<pad>", "<unk>", "<s>", "<mask>"
MANY_UNKNOWN = 0.01  # share of tokens that a warning is worth


class Tokens(NamedTuple):
    """Texts as one flat stream. T = all tokens, N = texts."""

    ids: npt.NDArray[np.int32]  # [T]
    lengths: npt.NDArray[np.int64]  # [N]


class Tokenizer(Protocol):
    size: int  # ids are below this
    pad_id: int
    mask_id: int  # stands for a token that is hidden
    unknown_id: int | None  # stands for what the vocabulary lacks
    digest: str  # equal digests give equal ids

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> Tokens:
        """Ids with the tokens that the model wants around a text; longer texts are cut."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load_saved` reads."""
        ...


def unknown_share(tokenizer: Tokenizer, ids: npt.NDArray[np.int32]) -> float:
    """Share of the tokens that stand for what the vocabulary lacks."""
    return float((ids == tokenizer.unknown_id).mean()) if tokenizer.unknown_id is not None and len(ids) else 0.0


def normalise(text: str) -> str:
    """Unicode NFC: one code for one Vietnamese letter, however it was typed."""
    return unicodedata.normalize("NFC", text)


def load_tokenizer(name: str, revision: str | None, texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """The tokenizer of a model.

    `name`: a hub id, a local folder, or `embedded`: then one of `vocabulary` entries is trained on `texts`.

    Raises:
        UserError: there is no such folder or model, or no tokenizer in it.
    """
    if name == EMBEDDED:
        return EmbeddedTokenizer.train(texts, vocabulary)
    return PretrainedTokenizer(model_folder(name, revision, weights=False), name)


def load_saved(folder: Path, name: str) -> Tokenizer:
    """The tokenizer that `save` wrote, of the model `name`."""
    if name == EMBEDDED:
        return EmbeddedTokenizer(Backend.from_file(str(folder / TOKENIZER_FILE)))
    return PretrainedTokenizer(folder, name)


class EmbeddedTokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) of lower-cased text, trained on the training split."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.size = backend.get_vocab_size()
        self.pad_id: int = backend.get_vocab()[PAD]
        self.mask_id: int = backend.get_vocab()[MASK]
        self.unknown_id: int | None = backend.get_vocab()[UNKNOWN]
        self.digest = hashlib.sha256(backend.to_str().encode()).hexdigest()

    @classmethod
    def train(cls, texts: Sequence[str], vocabulary: int) -> "EmbeddedTokenizer":
        backend = Backend(models.BPE(unk_token=UNKNOWN))
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        # words are told apart by a mark before them: with a suffix the trainer numbers letters in a random order
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
            limit_alphabet=vocabulary - len(special),  # the most frequent letters; others are unknown
            special_tokens=special,
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        start = (START, backend.token_to_id(START))
        backend.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[start])
        return cls(backend)

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> Tokens:
        if max_tokens is None:
            self.backend.no_truncation()
        else:
            self.backend.enable_truncation(max_tokens)
        found = self.backend.encode_batch_fast([normalise(text) for text in texts])
        return _flat([encoding.ids for encoding in found])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.no_truncation()
        self.backend.save(str(folder / TOKENIZER_FILE))


class PretrainedTokenizer:
    """Whatever transformers can load, and what it should be able to."""

    def __init__(self, folder: Path, name: str) -> None:
        """Read the tokenizer in the folder.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        self.backend: Any = _load(folder, name)
        self.size = len(self.backend)
        pads = (self.backend.pad_token_id, self.backend.eos_token_id, 0)  # a mask hides what is padded anyway
        self.pad_id = next(int(pad) for pad in pads if pad is not None)
        mask = self.backend.mask_token_id
        self.mask_id = self.pad_id if mask is None else int(mask)
        self.unknown_id = self.backend.unk_token_id
        self.digest = hashlib.sha256(_definition(self.backend, folder)).hexdigest()

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> Tokens:
        if not len(texts):
            return _flat([])
        # padding and truncation are said outright: ViSoBERT's file has both baked in, to 256
        found = self.backend(
            [normalise(text) for text in texts],
            padding=False,
            truncation=max_tokens is not None,
            max_length=max_tokens,
            return_attention_mask=False,
            verbose=False,
        )
        return _flat(found["input_ids"])

    def save(self, folder: Path) -> None:
        self.backend.save_pretrained(str(folder))


def _load(folder: Path, name: str) -> Any:
    if not any(found for pattern in VOCABULARY_FILES for found in folder.glob(pattern)):
        raise UserError(
            f"model.name {name}: no tokenizer in {folder}, allowed: a folder with one of {', '.join(VOCABULARY_FILES)}"
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    logging.getLogger("transformers").setLevel(logging.ERROR)
    file = folder / TOKENIZER_FILE
    try:
        if file.exists():
            # The file says all. transformers 5 rather builds what the named class stands for: for ViSoBERT, which is
            # byte-pair encoding, it fails on a Unigram; of a BERT that keeps capitals and tones it loses both.
            special = _special_tokens(folder)
            return PreTrainedTokenizerFast(tokenizer_file=str(file), **special)  # type: ignore[no-untyped-call]
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # what is raised depends on the tokenizer's class
        shown = file if file.exists() else folder
        raise UserError(f"model.name {name}: the tokenizer in {shown} cannot be loaded: {error}") from None


def _special_tokens(folder: Path) -> dict[str, str]:
    """Names of the special tokens (`pad_token`, ...), as the folder's files give them."""
    found: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        try:
            entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError as error:
            raise UserError(f"{file}: not valid JSON: {error}") from None
        for key, value in entries.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


def _definition(backend: Any, folder: Path) -> bytes:
    """All that decides the ids."""
    if backend.is_fast:
        backend.backend_tokenizer.no_truncation()
        backend.backend_tokenizer.no_padding()
        return bytes(backend.backend_tokenizer.to_str(), "utf-8")
    files = sorted(file for pattern in (*VOCABULARY_FILES, "*.json", "*.txt") for file in folder.glob(pattern))
    return repr(type(backend)).encode() + b"".join(file.read_bytes() for file in files)


def _flat(ids: Sequence[Sequence[int]]) -> Tokens:
    lengths = np.fromiter((len(text) for text in ids), dtype=np.int64, count=len(ids))
    flat = np.concatenate([np.asarray(text, dtype=np.int32) for text in ids]) if len(ids) else np.empty(0, np.int32)
    return Tokens(flat, lengths)
