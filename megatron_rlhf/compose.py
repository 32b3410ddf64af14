"""Typed configurations from `conf/` and the command line, through Hydra; mistakes become messages that name the key.

Only `examples/`, `tools/` and `cli` import this module; below them, configurations are plain dataclasses.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from megatron_rlhf import own_files
from megatron_rlhf.config.checking.files import CONF
from megatron_rlhf.config.checking.ranges import check_ranges
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.keys import Key, keys, knows, nearest, unnamed
from megatron_rlhf.config.model import ModelConfig

Config = TypeVar("Config")
MISSING = "???"


def compose_config(
    stage: str, schema: type[Config], overrides: Sequence[str], missing: str | None = None
) -> tuple[Config, str]:
    """The typed configuration of a stage and its resolved YAML.

    Args:
        stage: name of `conf/<stage>.yaml`.
        overrides: key=value; also config=FILE, recipe=FILE and --config-dir=DIR (`own_files`).
        missing: a text to use for required texts that are not given, for callers that read only the numbers.

    Raises:
        UserError: unknown key (with the nearest valid one), wrong type, missing value, number out of range.
    """
    known = keys(schema)
    files = own_files.take(overrides, known)
    overrides = files.overrides
    require_known_keys(known, overrides)
    for_hydra = [_for_hydra(stage, known, override, files.folders) for override in overrides]
    for override, readable in zip(overrides, for_hydra, strict=True):
        _require_readable(override, readable)
    for_hydra += files.for_hydra
    store = ConfigStore.instance()
    store.store(name=f"{stage}_schema", node=schema)
    store.store(group="model", name="schema", node=ModelConfig)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            composed = compose(stage, overrides=for_hydra)
            if missing is not None:
                for key in OmegaConf.missing_keys(composed):
                    OmegaConf.update(composed, key, missing)
            config = OmegaConf.to_object(composed)
            resolved = OmegaConf.to_yaml(composed, resolve=True)
    # OmegaConf asserts on a.b=1 where a is null.
    except (HydraException, OmegaConfBaseException, AssertionError) as error:
        raise UserError(_explain(error, known, overrides, files.names)) from error
    check_ranges(config)
    return config, resolved  # type: ignore[return-value]


def values_of(override: str) -> list[str]:
    """The override once for each value that Hydra's grammar sees in it: `key=1,2`, `key=range(3)`."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return [override]  # composing says what is wrong with it
    if not parsed.is_sweep_override():
        return [override]
    return [f"{override.partition('=')[0]}={one}" for one in parsed.sweep_string_iterator()]


def as_yaml(config: Any) -> str:
    """A configuration as `config.yaml` has it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def share_out(schemas: Mapping[str, type], overrides: Sequence[str]) -> dict[str, list[str]]:
    """Overrides of a job of several stages: each stage gets those whose key it has.

    Raises:
        UserError: before the first stage runs, for a key that no stage has, or a value that one of them refuses.
    """
    known = {stage: keys(schema) for stage, schema in schemas.items()}
    require_known_keys({path: key for each in known.values() for path, key in each.items()}, overrides)
    shares = {
        stage: [o for o in overrides if knows(each, o.partition("=")[0].lstrip("+~"))] for stage, each in known.items()
    }
    for stage, share in shares.items():
        # Keys of a shape wait for the stage that chooses one.
        now = [o for o in share if not ((key := known[stage].get(o.split(".")[0])) and key.optional)]
        compose_config(stage, schemas[stage], now, missing="-")
    return shares


def choices(group: str) -> list[str]:
    """Names that `model=`, `placement=` or `cluster=` accepts."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def recipes(stage: str) -> list[str]:
    """Names that `recipe=` accepts for a stage."""
    return sorted(path.parent.name for path in (CONF / "recipe").glob(f"*/{stage}.yaml"))


def _for_hydra(stage: str, known: Mapping[str, Key], override: str, folders: Sequence[Path] = ()) -> str:
    """The override in Hydra's grammar.

    A key that holds text takes everything after `=` literally, unless it is quoted in Hydra's way, or is null where
    that is allowed. So do lists of texts, as one text, unless a list is given. `${...}` is left to Hydra, except in
    templates, whose braces name columns. `recipe=NAME` means the recipe's file for this stage (`NAME/FILE`: another),
    `GROUP=null` no file of a group.
    """
    name, _, value = override.partition("=")
    path = name.lstrip("+")
    if path in known or path == "recipe":  # Hydra's + is for what is not there: it would be refused
        name, override = path, f"{path}={value}"
    if value == "null" and (CONF / path.split("@")[0]).is_dir():
        return f"~{path}"
    if path == "recipe":
        return f"{name}={_recipe_file(stage, override, value, folders)}"
    if (CONF / path.split("@")[0]).is_dir():
        _require_file(override, path.split("@")[0], value, folders)
    key = known.get(unnamed(path, known))
    if key is not None and path not in known:  # in a dictionary, whose entries are only merged whole
        group, entry, name = path.split(".", 2)
        return (
            f"+{group}={{{entry}: {{{name}: {_quoted(value, key) if key.holds_text and value != 'null' else value}}}}}"
        )
    if key is not None and key.named_schema is not None:
        return f"+{path}={value}"
    if key is None or not (key.holds_text or key.holds_texts) or value == MISSING or (value == "null" and key.optional):
        return override
    if key.holds_texts and not key.holds_text:
        return override if value.startswith("[") else f"{name}=[{_quoted(value, key)}]"
    return f"{name}={_quoted(value, key)}"


def _quoted(value: str, key: Key) -> str:
    """A text in Hydra's quotes; an already quoted one is unchanged."""
    if value[:1] in ("'", '"') and len(value) > 1:
        try:
            if isinstance(OverridesParser.create().parse_override(f"key={value}")._value, QuotedString):
                return value
        except HydraException:
            pass  # quotes that belong to the text
    if key.field.metadata.get("template"):
        value = re.sub(r"(\\*)\$\{", lambda found: found.group(1) * 2 + r"\${", value)
    return QuotedString(value, Quote.single).with_quotes()


def _require_file(override: str, group: str, value: str, folders: Sequence[Path]) -> None:
    """`GROUP=NAME` names a file of conf/GROUP/, or of a folder of the user's, or `schema`."""
    names = sorted(path.stem for folder in (CONF, *folders) for path in (folder / group).glob("*.yaml"))
    if value not in (*names, "schema") and not value.startswith(("{", "???")):
        raise UserError(f"{override}: there is no conf/{group}/{value}.yaml; there are {', '.join(names)}")


def _recipe_file(stage: str, override: str, name: str, folders: Sequence[Path]) -> str:
    chosen = name if "/" in name else f"{name}/{stage}"
    if not any((folder / "recipe" / f"{chosen}.yaml").is_file() for folder in (CONF, *folders)):
        raise UserError(
            f"{override}: there is no conf/recipe/{chosen}.yaml; recipes for this stage: {', '.join(recipes(stage))}, or "
            "a file of yours, recipe=path/to/file.yaml"
        )
    return chosen


def require_known_keys(known: Mapping[str, Key], overrides: Sequence[str]) -> None:
    """Raise UserError for what is not `key=value`, or no key. Hydra would take an unknown key with a `+` before it."""
    for override in overrides:
        name, equals, _ = override.partition("=")
        if name.startswith("-"):
            raise UserError(f"{override}: there is no such flag; {_instead_of_flag(name, known)}")
        if not equals and not name.startswith("~"):
            raise UserError(f"{override}: a setting is key=value, as in {name}=... (no blanks around =)")
        path = name.lstrip("+~")
        group = known.get(path.rpartition(".")[0])
        if group is not None and group.named_schema is not None and not override.partition("=")[2].startswith("{"):
            below = ", ".join(f"{path}.{field.name}" for field in fields(group.named_schema))
            raise UserError(f"{override}: {path} is a group of keys: {below}")
        if name.startswith("~") and path in known and not known[path].optional:
            raise UserError(f"{override}: {path} cannot be taken away; leave this out, and it has its default")
        if not knows(known, path):
            near = nearest(path, [*known, "recipe"])
            hint = f"did you mean {near}?" if near else "--help lists all keys"
            raise UserError(f"{override}: there is no key {path}; {hint}")


def _instead_of_flag(flag: str, known: Mapping[str, Key]) -> str:
    if flag in ("-m", "--multirun"):
        return "a run takes one value of each key: start a run for each, in a loop of the shell or as a Slurm job array"
    if "config" in flag:
        return "settings in a file are config=FILE, a folder of groups is --config-dir=DIR"
    near = nearest(flag, known)
    instead = f"did you mean {near}=...? Settings" if near else "settings"
    return f"{instead} are key=value, and --help lists them"


def _require_readable(override: str, for_hydra: str) -> None:
    """Raise UserError for invalid Hydra grammar, or several values."""
    try:
        parsed = OverridesParser.create().parse_override(for_hydra)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{override}: not a value that can be read ({reason}); inside of [...] and {{...}}, put text in quotes"
        ) from error
    if parsed.is_sweep_override():
        key, _, values = override.partition("=")
        raise UserError(
            f"{override}: a run takes one value; add -m for a run of each, or start a run for each of several, as in: "
            f"for x in {values.replace(',', ' ')}; do ... {key}=$x run.dir=runs/$x; done"
        )


def _explain_file(path: Path, reason: str, known: Mapping[str, Key]) -> str:
    """What Hydra finds wrong in a file of the user's."""
    key = next(iter(re.findall(r"full_key: (\S+)", reason)), "")
    meaning = f" ({known[key].doc})" if key in known else ""
    return f"{path}: {f'{key}: ' if key else ''}{reason.splitlines()[0].strip()}{meaning}"


def _explain(error: Exception, known: Mapping[str, Key], overrides: Sequence[str], names: Mapping[str, Path]) -> str:
    """What is wrong, in one sentence: the key, its value, and what is valid."""
    found = re.match(r"In '([^']+)': (?:\w+ raised while composing config:)?\s*(.*)", str(error), re.DOTALL)
    if found and found[1] in names:
        return _explain_file(names[found[1]], found[2], known)
    chain = [error, error.__cause__, getattr(error.__cause__, "__cause__", None)]
    cause = next((c for c in chain if isinstance(c, OmegaConfBaseException) and c.full_key), error)
    key = getattr(cause, "full_key", None) or ""
    meaning = f" ({known[key].doc})" if key in known else ""
    if isinstance(cause, MissingMandatoryValue):
        return f"{key} is not given{meaning}"
    if isinstance(error, AssertionError):
        below = [o for o in overrides if (parent := known.get(o.lstrip("+").split(".")[0])) and parent.optional]
        return f"{' '.join(below)}: a key inside a group that is not chosen; choose it first, as in model=tiny"
    message = str(cause).splitlines()[0] if key else " ".join(str(cause).split("Config search path")[0].split())
    given = next((o for o in reversed(overrides) if o.lstrip("+").startswith(f"{key}=")), key) if key else ""
    if isinstance(cause, InterpolationKeyError | InterpolationToMissingValueError):
        message = f"{message}; ${{...}} stands for another key's value: write \\${{...}} for the characters themselves"
    return f"{given}: {message}{meaning}" if given else message
