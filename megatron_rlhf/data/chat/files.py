"""Chat templates as files: one that the user names, and that of a tokenizer's folder."""

import json
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.special_tokens import read_object

FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"


def read_chat_template(given: str, key: str, hf: PreTrainedTokenizerFast) -> str:
    """A template that the configuration's `key` gives: the template itself, or a file with it.

    Raises:
        UserError: there is no such file, or no template of Jinja's in it.
    """
    if "{%" in given or "{{" in given:
        template, named = given, key
    else:
        path = Path(given).expanduser()
        named = f"{key}={given}"
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{named}: a Jinja file, or the template itself, is needed: {error}") from error
    try:
        hf.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
    except Exception as error:
        if type(error).__name__ in ("TemplateSyntaxError", "TemplateAssertionError"):
            line = getattr(error, "lineno", "?")
            raise UserError(f"{named}: no template of Jinja's: line {line}: {error}") from error
        # What else it may object to is this question: a conversation of the data will show.
    if "{%" not in template and "{{" not in template:
        raise UserError(f"{named}: no template of Jinja's: there is neither {{% nor {{{{ in it")
    return template


def template_in(folder: Path) -> str | None:
    """The template in a tokenizer's folder, without loading the tokenizer; None if it has none, or several."""
    if (folder / FILE).is_file():
        return (folder / FILE).read_text(encoding="utf-8")
    settings = folder / SETTINGS
    found = read_object(settings).get("chat_template") if settings.is_file() else None
    return found if isinstance(found, str) else None


def replace_template(folder: Path, template: str) -> None:
    """Of a copy of a tokenizer's files, which may hold the former one in several places."""
    path = folder / SETTINGS
    settings = read_object(path) if path.is_file() else {}
    if settings.pop("chat_template", None) is not None:
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    (folder / FILE).write_text(template, encoding="utf-8")
