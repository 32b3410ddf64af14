"""Models and tokenizers by their names on the Hugging Face hub: downloaded where there is a network, else found in its cache."""

import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from megatron_rlhf.config.errors import UserError

TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "*/*.jinja")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")
"""Nothing that is pickled, and no code."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def fetch(name: str, key: str, files: Sequence[str]) -> Path | None:
    """The folder with these files of a model of the hub; None for what is a path of this machine.

    Raises:
        UserError: naming `key`: there is no such model, or no network to get it.
    """
    parts = Path(name).parts
    if not _NAME.fullmatch(name) or Path(parts[0]).exists():
        return None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except (RepositoryNotFoundError, GatedRepoError, HFValidationError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{key}={name}: no such folder, nor a model of the Hugging Face hub: {reason:.300}") from error
    except (OSError, ValueError) as error:  # no network, in one of a dozen ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{key}={name}: no such folder; a model of the Hugging Face hub cannot be downloaded here ({reason:.200}): run `hf "
            f"download {name} --local-dir {parts[-1]}` where there is a network, and give {key}={parts[-1]}"
        ) from error
