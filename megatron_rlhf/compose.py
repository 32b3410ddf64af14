"""Typed configurations from `conf/` and the command line, through Hydra; mistakes become messages that name the key.

Only `examples/`, `tools/` and `cli` import this module; below them, configurations are plain dataclasses.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig

Config = TypeVar("Config")
CONF = Path(__file__).parent.parent / "conf"


def compose_config(
    stage: str, schema: type[Config], overrides: Sequence[str], missing: str | None = None
) -> tuple[Config, str]:
    """The typed configuration of a stage and its resolved YAML.

    Args:
        stage: name of `conf/<stage>.yaml`.
        missing: a text that stands in for texts that must be given and are not, for whoever reads only the numbers.

    Raises:
        UserError: unknown key (with the nearest right one), wrong type, missing value.
    """
    _require_known_keys(schema, overrides)
    store = ConfigStore.instance()
    store.store(name=f"{stage}_schema", node=schema)
    store.store(group="model", name="schema", node=ModelConfig)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            composed = compose(stage, overrides=[_for_hydra(stage, override) for override in overrides])
            if missing is not None:
                for key in OmegaConf.missing_keys(composed):
                    OmegaConf.update(composed, key, missing)
            config = OmegaConf.to_object(composed)
            resolved = OmegaConf.to_yaml(composed, resolve=True)
    # OmegaConf asserts on a.b=1 where a is null.
    except (HydraException, OmegaConfBaseException, AssertionError) as error:
        raise UserError(_explain(error, schema, overrides)) from error
    return config, resolved  # type: ignore[return-value]


def recipes(stage: str) -> list[str]:
    """Names that `recipe=` takes for a stage."""
    return sorted(path.parent.name for path in (CONF / "recipe").glob(f"*/{stage}.yaml"))


def _for_hydra(stage: str, override: str) -> str:
    """`recipe=NAME` means the recipe's file for this stage (`NAME/FILE`: another), `GROUP=null` no file of a group."""
    key, _, name = override.partition("=")
    if name == "null" and (CONF / key.split("@")[0]).is_dir():
        return f"~{key}"
    if key != "recipe":
        return override
    chosen = name if "/" in name else f"{name}/{stage}"
    if not (CONF / "recipe" / f"{chosen}.yaml").is_file():
        raise UserError(
            f"{override}: there is no conf/recipe/{chosen}.yaml; recipes for this stage: {', '.join(recipes(stage))}"
        )
    return f"recipe={chosen}"


def field_paths(schema: type, prefix: str = "") -> dict[str, tuple[dataclasses.Field, str]]:
    """Every key of a schema, dotted, with its field and docstring."""
    paths: dict[str, tuple[dataclasses.Field, str]] = {}
    docs = _field_docs(schema)
    hints = inspect.get_annotations(schema, eval_str=True)
    for base in schema.__mro__[1:-1]:
        hints = inspect.get_annotations(base, eval_str=True) | hints
    for field in dataclasses.fields(schema):
        path = f"{prefix}{field.name}"
        paths[path] = (field, docs.get(field.name, ""))
        nested = next((t for t in _alternatives(hints[field.name]) if dataclasses.is_dataclass(t)), None)
        if isinstance(nested, type):
            paths |= field_paths(nested, f"{path}.")
    return paths


def help_text(stage: str, schema: type) -> str:
    """`--help`: what the stage does, every key with its meaning and default, and a few commands."""
    lines = [
        inspect.cleandoc(schema.__doc__ or ""),
        "",
        f"usage: python examples/... [key=value ...]     settings start from conf/{stage}.yaml",
        "       --cfg prints the resolved configuration and stops; recipe=NAME and model=NAME choose files of conf/",
        "",
    ]
    for path, (field, doc) in field_paths(schema).items():
        default = field.default
        if isinstance(default, Enum):
            default = default.value
        shown = "" if default is dataclasses.MISSING else f" = {default}"
        lines.append(f"{path}{shown}")
        lines += textwrap.wrap(doc, 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _field_docs(schema: type) -> dict[str, str]:
    """The string under each field, read from the source: dataclasses do not keep them."""
    docs: dict[str, str] = {}
    for base in reversed(schema.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, doc in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(doc, ast.Expr)
                and isinstance(doc.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(doc.value.value).split())
    return docs


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__args__", None) or (hint,)


def _require_known_keys(schema: type, overrides: Sequence[str]) -> None:
    """Hydra would take an unknown key with a `+` before it, and nobody would read it."""
    known = [*field_paths(schema), *(path.name for path in CONF.iterdir() if path.is_dir())]
    for override in overrides:
        key = override.lstrip("+~").split("=")[0].split("@")[0]
        if key not in known and not key.startswith("data.columns."):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "--help lists all keys"
            raise UserError(f"{override}: there is no key {key}; {hint}")


def _explain(error: Exception, schema: type, overrides: Sequence[str]) -> str:
    """What is wrong, in one sentence: the key, its value, and what would be right."""
    paths = field_paths(schema)
    chain = [error, error.__cause__, getattr(error.__cause__, "__cause__", None)]
    cause = next((c for c in chain if isinstance(c, OmegaConfBaseException) and c.full_key), error)
    key = getattr(cause, "full_key", None) or ""
    meaning = f" ({paths[key][1]})" if key in paths else ""
    if isinstance(cause, MissingMandatoryValue):
        return f"{key} is not given{meaning}"
    if isinstance(error, AssertionError):
        return f"{' '.join(overrides)}: a key inside a group that is not chosen; choose it first, as in model=tiny"
    message = str(cause).splitlines()[0] if key else " ".join(str(cause).split("Config search path")[0].split())
    given = (
        next((override for override in reversed(overrides) if override.lstrip("+").startswith(f"{key}=")), key)
        if key
        else ""
    )
    return f"{given}: {message}{meaning}" if given else message
