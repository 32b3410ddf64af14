"""Settings in files of one's own: `config=my.yaml`, `recipe=path/to/file.yaml`, `--config-dir=DIR` with groups as in conf/."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.keys import Key, knows, nearest

CONFIG_DIR = "--config-dir"
_DEFAULTS = "defaults"
"""Hydra's list, which a recipe may begin with."""


@dataclass(frozen=True)
class OwnFiles:
    """Overrides of a command, without those that name files; what Hydra is told instead."""

    overrides: list[str]
    for_hydra: list[str]
    folders: list[Path]
    """Where groups are looked for, besides conf/."""


def take(overrides: Sequence[str], known: Mapping[str, Key]) -> OwnFiles:
    """Read the files that overrides name: they come after the stage's own file and recipe, and before keys.

    Raises:
        UserError: a file that is not there, is no YAML, or has a key that the stage has not.
    """
    left: list[str] = []
    told: list[str] = []
    folders: list[Path] = []
    store = ConfigStore.instance()
    for override in overrides:
        name, _, value = override.partition("=")
        if name == CONFIG_DIR:
            folder = Path(value).expanduser()
            if not folder.is_dir():
                raise UserError(f"{override}: there is no folder {folder}")
            folders.append(folder.resolve())
        elif name == "config":
            group = f"own_{len(told)}"
            store.store(group=group, name="file", node=_read(override, value, known), package="_global_")
            told.append(f"+{group}=file")
        elif name == "recipe" and is_path(value):
            store.store(group="recipe", name="own_file", node=_read(override, value, known), package="_global_")
            told.append("recipe=own_file")
        else:
            left.append(override)
    if folders:
        quoted = ",".join(QuotedString(f"file://{folder}", Quote.single).with_quotes() for folder in folders)
        told.append(f"hydra.searchpath=[{quoted}]")
    return OwnFiles(left, told, folders)


def is_path(recipe: str) -> bool:
    """A recipe that is a file, and not a name in conf/recipe/."""
    return recipe.endswith((".yaml", ".yml"))


def _read(override: str, value: str, known: Mapping[str, Key]) -> dict[str, Any]:
    path = Path(value).expanduser()
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{override}: {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise UserError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: settings are keys and values, as in `run: {{dir: runs/a}}`, not {type(content).__name__}"
        )
    _require_known(path, {name: value for name, value in content.items() if name != _DEFAULTS}, known, "")
    return content


def _require_known(path: Path, content: Mapping[Any, Any], known: Mapping[str, Key], prefix: str) -> None:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if not knows(known, key):
            near = nearest(key, known)
            raise UserError(
                f"{path}: there is no key {key}; " + (f"did you mean {near}?" if near else "--help lists all keys")
            )
        if isinstance(value, dict) and any(path.startswith(f"{key}.") for path in known):
            _require_known(path, value, known, f"{key}.")
