"""The run's tokenizer: the configured one, else one that came with a model. All models must be trained with it."""

import datetime
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.config.data import TokenizerConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.conversion.starting_point import StartingPoint
from megatron_rlhf.data.chat.files import read_chat_template, template_in
from megatron_rlhf.data.tokenizer import Tokenizer, load_tokenizer
from megatron_rlhf.runs.session import Session

log = logging.getLogger(__name__)

DAY = "day of the conversations"


def choose_tokenizer(data: TokenizerConfig, starts: Mapping[str, StartingPoint | None], session: Session) -> Tokenizer:
    """The tokenizer with all its end tokens; `session` saves it in every checkpoint.

    Args:
        starts: where models start from, by configuration key; the first is the model that generates text, if any does.

    Raises:
        UserError: No tokenizer is configured or came with a model, or one of the models was trained with another one.
    """
    tokenizer, named = find_tokenizer(data, starts)
    if session.resume_from is not None:
        carried = _fingerprint(session.resume_from, None)
        _require_same(data, "run.resume", session.resume_from, carried, tokenizer, named)
    template = json.dumps(tokenizer.hf.chat_template)
    digest = hashlib.sha256(template.encode()).hexdigest()[:16]
    session.require_same("chat template", ["data.chat_template", "data.tokenizer"], digest)
    if "strftime_now" in template:
        _fix_date(session, tokenizer)
    session.writer.tokenizer = tokenizer
    return tokenizer


def find_tokenizer(data: TokenizerConfig, starts: Mapping[str, StartingPoint | None]) -> tuple[Tokenizer, str]:
    """The tokenizer with all its end tokens, and what a message calls it; see `choose_tokenizer`."""
    sources = {key: start for key, start in starts.items() if start is not None}
    folders = {key: folder for key, start in sources.items() if (folder := start.tokenizer) is not None}
    if data.tokenizer is not None:
        tokenizer, named = load_tokenizer(data.tokenizer), f"data.tokenizer={data.tokenizer}"
    elif folders:
        key, folder = next(iter(folders.items()))
        tokenizer, named = load_tokenizer(folder), f"that of {key}, {folder}"
        log.info("tokenizer: %s", named)
    else:
        without = ", ".join(f"{key}={start.path}" for key, start in sources.items()) or "random weights"
        raise UserError(f"data.tokenizer is not given (a Hugging Face tokenizer folder), and none came with {without}")
    if data.chat_template is not None:
        tokenizer.use_chat_template(read_chat_template(data.chat_template, "data.chat_template", tokenizer.hf))
        named += " with data.chat_template"
    for key, start in sources.items():
        _warn_of_other_template(key, start, tokenizer)
        _require_same(data, key, start.path, _fingerprint(start.path, start.tokenizer), tokenizer, named)
    writer = next(iter(sources.values()), None)
    if writer is not None:
        tokenizer.take_stops(writer.tokenizer or writer.path)
    tokenizer.stop_also_at(text.replace("\\n", "\n") for text in data.stop)
    return tokenizer, named


def _require_same(
    data: TokenizerConfig, key: str, path: Path, fingerprint: str | None, tokenizer: Tokenizer, named: str
) -> None:
    if fingerprint is None or tokenizer.agrees_with(fingerprint):
        return
    difference = (
        f"{key}: {path} was trained with another tokenizer ({fingerprint}) than {named} ({tokenizer.fingerprint})"
    )
    if not data.allow_other_tokenizer:
        raise UserError(
            f"{difference}: the same ids would mean other texts. Give all models one tokenizer, or say "
            "data.allow_other_tokenizer=true if you know that the ids agree"
        )
    log.warning("%s; data.allow_other_tokenizer=true", difference)


def _fix_date(session: Session, tokenizer: Tokenizer) -> None:
    """Chat templates that ask for the date get that of the run's first day: a resumed run reads the same conversations."""
    day = [session.content_before(DAY) or datetime.date.today().isoformat()]
    dist.broadcast_object_list(day)  # ranks may ask on both sides of midnight
    tokenizer.today = datetime.date.fromisoformat(day[0])
    session.content[DAY] = day[0]


def _warn_of_other_template(key: str, start: StartingPoint, tokenizer: Tokenizer) -> None:
    """A model that learned conversations in another form is asked in a form that is new to it."""
    learned = None if start.tokenizer is None else template_in(start.tokenizer)
    used = tokenizer.hf.chat_template
    if learned is not None and isinstance(used, str) and learned.strip() != used.strip():
        log.warning("%s: %s came with another chat template than this run uses for messages", key, start.path)


def _fingerprint(path: Path, folder: Path | None) -> str | None:
    """Fingerprint of the tokenizer that a model was trained with; None if unknown."""
    if (path / sharded.META).is_file() and (carried := sharded.read_meta(path).get("tokenizer")) is not None:
        return carried
    return None if folder is None else load_tokenizer(folder).fingerprint
