"""Find the files of a pretrained model: in a local folder, in the cache of the Hugging Face hub, or on the hub."""

import os
from pathlib import Path

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import EMBEDDED

SMALL_CONFIG = "configs/config_multi_embedded.yaml"
NO_WEIGHTS = ("*.json", "*.txt", "*.model", "*.codes", "*.tiktoken")  # files of config and tokenizer
WEIGHTS = ("model.safetensors", "model-*.safetensors")
TIMEOUT_SECONDS = 5

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # safe, because no process is forked


def model_folder(name: str, revision: str | None, *, weights: bool) -> Path:
    """Return the folder with the model's config, tokenizer and, if `weights` is true, weights.

    Files in the hub's cache are used without a request to the hub; otherwise they are downloaded.

    Raises:
        UserError: a file is missing; the message names it and says how to provide it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        missing = _missing_file(folder, weights)
        if missing:
            hint = "" if missing == "config.json" else "; model.init: random trains its architecture from new weights"
            raise UserError(f"model.name {name}: {folder / missing} is missing{hint}")
        return folder
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        if folder.exists():
            raise HFValidationError
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"model.name: found {name!r}, allowed: a hub id, a folder that exists, or {EMBEDDED}") from None
    return _hub_folder(name, revision, weights)


def _missing_file(folder: Path, weights: bool) -> str | None:
    if not (folder / "config.json").is_file():
        return "config.json"
    if weights and not any(file for pattern in WEIGHTS for file in folder.glob(pattern)):
        return "model.safetensors"
    return None


def _hub_folder(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [*NO_WEIGHTS, *(WEIGHTS if weights else ())]
    missing: str | None = "config.json"
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=patterns))
        missing = _missing_file(folder, weights)
    except LocalEntryNotFoundError:
        pass
    if missing is None:
        return folder
    reason = "not on the hub"
    try:
        HfApi().model_info(name, timeout=TIMEOUT_SECONDS)  # fails at once; downloads retry for half a minute
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=TIMEOUT_SECONDS))
        missing = _missing_file(folder, weights)
    except Exception as error:  # from the hub, the network or the disk
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    if missing is None:
        return folder
    where = f"revision {revision} of {name}" if revision else name
    raise UserError(
        f"model.name {where}: {missing} is not in the local cache and could not be fetched "
        f"({reason}); put config.json, model.safetensors and the tokenizer's files into a folder "
        f"and name it (-P model.name=FOLDER), or train the small encoder: -P config={SMALL_CONFIG}"
    )
