"""Where the files of a pretrained model lie: a local folder, the hub's cache, or the hub."""

import os
from pathlib import Path

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import EMBEDDED

SMALL_CONFIG = "configs/config_multi_embedded.yaml"
NO_WEIGHTS = ("*.json", "*.txt", "*.model", "*.codes", "*.tiktoken")  # configuration and tokenizer
WEIGHTS = ("model.safetensors", "model-*.safetensors")
ANSWER_SECONDS = 5


def model_folder(name: str, revision: str | None, *, weights: bool) -> Path:
    """The folder that holds the model's configuration and tokenizer, and its weights if they are asked for.

    A copy in the hub's cache is taken as it is; otherwise the files are downloaded.

    Raises:
        UserError: names the file that is missing, and how to provide it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check(folder, name, weights)
        return folder
    if folder.exists() or not _is_hub_id(name):
        raise UserError(f"model.name: found {name!r}, allowed: a hub id, a folder that exists, or {EMBEDDED}")
    return _hub_folder(name, revision, weights)


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _check(folder: Path, name: str, weights: bool) -> None:
    missing = _missing(folder, weights)
    if missing:
        hint = "; model.init: random trains its architecture from new weights" if missing != "config.json" else ""
        raise UserError(f"model.name {name}: {folder / missing} is missing{hint}")


def _missing(folder: Path, weights: bool) -> str | None:
    if not (folder / "config.json").is_file():
        return "config.json"
    if weights and not any(file for pattern in WEIGHTS for file in folder.glob(pattern)):
        return "model.safetensors"
    return None


def _hub_folder(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = [*NO_WEIGHTS, *(WEIGHTS if weights else ())]
    missing: str | None = "config.json"
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=wanted))
        missing = _missing(folder, weights)
    except LocalEntryNotFoundError:
        pass
    if missing is None:
        return folder
    reason = _why_not(name)
    if reason is None:
        try:
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=wanted, etag_timeout=ANSWER_SECONDS)
            )
            missing = _missing(folder, weights)
        except Exception as error:  # the hub's own errors, the network's and the disk's
            reason = " ".join(str(error).split())[:200]
    if missing is None:
        return folder
    where = f"revision {revision} of {name}" if revision else name
    raise UserError(
        f"model.name {where}: {missing} is not in the local cache and could not be fetched "
        f"({reason or 'not on the hub'}); put config.json, model.safetensors and the tokenizer's files into a folder "
        f"and name it (-P model.name=FOLDER), or train the small encoder: -P config={SMALL_CONFIG}"
    )


def _why_not(name: str) -> str | None:
    """None where the hub answers for the model. One try: the hub's own client would try for half a minute."""
    from huggingface_hub import constants, get_session, is_offline_mode
    from huggingface_hub.utils._headers import build_hf_headers

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        url = f"{constants.ENDPOINT}/api/models/{name}"
        answer = get_session().get(url, headers=build_hf_headers(), timeout=ANSWER_SECONDS)
    except Exception as error:  # whichever HTTP library it is built on
        return f"{constants.ENDPOINT}: {' '.join(str(error).split()) or type(error).__name__}"
    return None if answer.status_code == 200 else f"{constants.ENDPOINT} says {answer.status_code} for {name}"


os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # we do not fork
