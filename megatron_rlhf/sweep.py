"""`-m` (or `--multirun`): one run for each combination of `key=1,2`, one after the other, each in a folder of its own."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rlhf.compose import compose_config, values_of
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.keys import Key, keys, unnamed

FLAGS = ("-m", "--multirun")
GROUPS = ("model", "recipe", "placement")
RESUME = "run.resume=true"


@dataclass(frozen=True)
class Combination:
    """One run of a sweep."""

    name: str
    """What is special about it, which is also the name of its folder in `run.dir`."""
    overrides: list[str]


def combinations(stage: str, schema: type, arguments: Sequence[str]) -> list[Combination]:
    """The runs that a command with `-m` asks for; every one is composed first, so that a mistake is named before any run.

    Raises:
        UserError: no key has several values, or a combination is not valid.
    """
    overrides = [argument for argument in arguments if argument not in FLAGS]
    known = keys(schema)
    choices = [_choices(override, known) for override in overrides]
    if all(len(values) == 1 for values in choices):
        compose_config(stage, schema, overrides)  # another mistake explains it
        raise UserError(
            "-m: no key has several values; give them as in ppo.kl_coef=0.02,0.05 (texts are taken as they are)"
        )
    several = [
        override.partition("=")[0] for override, values in zip(overrides, choices, strict=True) if len(values) > 1
    ]
    made = []
    for chosen in itertools.product(*choices):
        name = ",".join(one for one in chosen if one.partition("=")[0] in several)
        folder = Path(compose_config(stage, schema, list(chosen))[0].run.dir) / name.replace("/", "_")
        # An interrupted sweep goes on: of its runs, those that had not begun have nothing to resume.
        own = [one for one in chosen if one != RESUME or folder.exists()]
        made.append(Combination(name, [*own, f"run.dir={folder}"]))
    return made


def _choices(override: str, known: Mapping[str, Key]) -> list[str]:
    """The override once for each of its values; texts, in which a comma may stand, have one."""
    name, _, value = override.partition("=")
    path = name.lstrip("+")
    key = known.get(unnamed(path, known))
    if path.partition("@")[0] in GROUPS:
        return [f"{name}={one}" for one in value.split(",")]
    if key is None or key.holds_text or key.holds_texts:
        return [override]
    return values_of(override)
