"""Settings in files of one's own: `config=my.yaml`, `recipe=path/to/file.yaml`, `--config-dir=DIR` with groups as in conf/."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.keys import Key, knows, nearest
from megatron_rlhf.config.stages import EvaluateConfig, PPOConfig, RewardModelConfig, SFTConfig

CONFIG_DIR = "--config-dir"
SCHEMAS = {"sft": SFTConfig, "reward-model": RewardModelConfig, "ppo": PPOConfig, "evaluate": EvaluateConfig}
_DEFAULTS = "defaults"
"""Hydra's list, which a recipe may begin with."""


@dataclass(frozen=True)
class OwnFiles:
    """Overrides of a command, without those that name files; what Hydra is told instead."""

    overrides: list[str]
    for_hydra: list[str]
    folders: list[Path]
    """Where groups are looked for, besides conf/."""
    names: dict[str, Path]
    """The files, by what Hydra calls them."""


def take(overrides: Sequence[str], known: Mapping[str, Key]) -> OwnFiles:
    """Read the files that overrides name: they come after the stage's own file and recipe, and before keys.

    Raises:
        UserError: a file that is not there, is no YAML, or has a key that the stage has not.
    """
    left: list[str] = []
    told: list[str] = []
    folders: list[Path] = []
    names: dict[str, Path] = {}
    store = ConfigStore.instance()
    for override in overrides:
        name, equals, value = override.partition("=")
        if name == CONFIG_DIR:
            folder = Path(value).expanduser()
            if not value or not folder.is_dir():
                raise UserError(f"{override}: there is no folder {value or 'given'}; give --config-dir=DIR")
            folders.append(folder.resolve())
        elif name == "config" and equals:
            group = f"own_{len(told)}"
            store.store(group=group, name="file", node=_read(override, value, known), package="_global_")
            told.append(f"+{group}=file")
            names[f"{group}/file"] = Path(value)
        elif name == "recipe" and is_path(value):
            store.store(group="recipe", name="own_file", node=_read(override, value, known), package="_global_")
            told.append("recipe=own_file")
            names["recipe/own_file"] = Path(value)
        else:
            left.append(override)
    if folders:
        quoted = ",".join(QuotedString(f"file://{folder}", Quote.single).with_quotes() for folder in folders)
        told.append(f"hydra.searchpath=[{quoted}]")
    return OwnFiles(left, told, folders, names)


def is_path(recipe: str) -> bool:
    """A recipe that is a file, and not a name in conf/recipe/."""
    return recipe.endswith((".yaml", ".yml")) or ("/" in recipe and Path(recipe).expanduser().is_file())


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML keeps the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read(override: str, value: str, known: Mapping[str, Key]) -> dict[str, Any]:
    path = Path(value).expanduser()
    if not value:
        raise UserError(f"{override}: names no file")
    if path.is_dir():
        inside = path / "config.yaml"
        hint = (
            f"; did you mean {inside}?" if inside.is_file() else "; --config-dir=DIR takes one of recipe/, model/, ..."
        )
        raise UserError(f"{override}: {path} is a folder, and a file of settings is needed{hint}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{override}: {path} cannot be read: {error.strerror}") from error
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # not UTF-8, a number of 5,000 digits; too many brackets
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise UserError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: settings are keys and values, as in `run: {{dir: runs/a}}`, not {type(content).__name__}"
        )
    if not isinstance(content.get(_DEFAULTS, []), list):
        raise UserError(f"{path}: {_DEFAULTS} is a list of files in conf/, as in [/recipe/first_try/sft, _self_]")
    _require_known(path, {name: value for name, value in content.items() if name != _DEFAULTS}, known, "")
    return content


def _require_known(path: Path, content: Mapping[Any, Any], known: Mapping[str, Key], prefix: str) -> None:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key == "recipe":
            raise UserError(
                f"{path}: a recipe is chosen in the command, recipe={value}, before or behind config={path}"
            )
        if "." in str(name) and knows(known, key):
            raise UserError(
                f"{path}: {name} is written as a key in a key: `{': {'.join(key.split('.'))}: ...{'}' * key.count('.')}`"
            )
        if not knows(known, key):
            near = nearest(key, known)
            hint = f"did you mean {near}?" if near else _other_stage(key) or "--help lists all keys"
            raise UserError(f"{path}: there is no key {key}; {hint}")
        group = any(other.startswith(f"{key}.") for other in known)
        if isinstance(value, dict) and group:
            _require_known(path, value, known, f"{key}.")
        elif group and not (value is None and known[key].optional):
            raise UserError(f"{path}: {key}: {value} has to be keys and values, as in `{key}: {{...}}`")


def _other_stage(key: str) -> str:
    """Whose key it is, if it is another stage's."""
    top = key.partition(".")[0]
    owners = [name for name, schema in SCHEMAS.items() if top in {field.name for field in dataclasses.fields(schema)}]
    return f"it is a key of {', '.join(owners)}: is this the file of another stage?" if owners else ""
