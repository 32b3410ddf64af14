"""`--help`: what one needs first, then every key; `--help WORD` searches."""

import dataclasses
import inspect
import textwrap
from collections.abc import Mapping
from enum import Enum

from megatron_rlhf.compose import choices, recipes
from megatron_rlhf.config.keys import Key, keys, nearest

_ALL = (
    "run.dir",
    "run.resume",
    "run.save_every",
    "data.tokenizer",
    "parallel.tensor",
    "parallel.pipeline",
    "precision",
)
FIRST = {
    "sft": (
        *("policy.init_from", "data.demonstrations", "data.validation", *_ALL),
        *("sft.epochs", "sft.batch_size", "sft.micro_batch_size", "policy.optimizer.lr", "data.max_response_tokens"),
    ),
    "reward_model": (
        *("reward.init_from", "data.comparisons", "data.validation_fraction", *_ALL),
        *("reward_model.epochs", "reward_model.batch_size", "reward_model.micro_batch_size", "reward.optimizer.lr"),
        "reward_model.max_completions",
    ),
    "ppo": (
        *("policy.init_from", "reward.init_from", "data.prompts", "data.pretraining.source", *_ALL),
        *("ppo.iterations", "ppo.batch_size", "ppo.kl_coef", "ppo.ptx_coef"),
    ),
    "evaluate": (
        *("policy.init_from", "reward.init_from", "data.prompts", "data.pretraining.source", *_ALL),
        *("evaluate.samples", "evaluate.ema", "evaluate.few_shot", "sampling.temperature"),
    ),
}
"""The fifteen keys of each stage that a first run needs."""


def help_text(stage: str, schema: type, word: str | None = None) -> str:
    """The whole help, or the keys in whose name or meaning a word is."""
    known = keys(schema)
    if word is not None:
        found = {path: key for path, key in known.items() if word.lower() in f"{path} {key.doc}".lower()}
        if found:
            return _listed(found)
        near = nearest(word, known)
        return f"no key of {stage} has {word} in its name or meaning" + (f"; did you mean {near}?" if near else "")
    command = stage.replace("_", "-")
    first = [path for path in FIRST.get(stage, ()) if path in known]
    return "\n".join(
        [
            inspect.cleandoc(schema.__doc__ or ""),
            "",
            f"usage: megatron-rlhf {command} [key=value ...]     settings start from conf/{stage}.yaml",
            f"       recipe=NAME           {', '.join(recipes(stage))}; or a file of yours, path/to/file.yaml",
            *_wrapped("       model=NAME            ", ", ".join(choices("model"))),
            *([f"       placement=NAME        {', '.join(choices('placement'))}"] if "placement" in known else []),
            "       config=FILE           settings in a file of yours, such as another run's config.yaml",
            "       --config-dir=DIR      a folder of recipe/, model/, ... beside conf/",
            "       -m                    a run for each value of key=1,2, one after the other, in folders of run.dir",
            "       --cfg                 print the resolved configuration and stop",
            "       --help WORD           the keys in whose name or meaning WORD is",
            "",
            *(["what a first run needs", "", _listed({path: known[path] for path in first}), ""] if first else []),
            "all keys",
            "",
            _listed(known),
        ]
    )


def _listed(known: Mapping[str, Key]) -> str:
    lines = []
    for path, key in known.items():
        default = key.field.default
        if isinstance(default, Enum):
            default = default.value
        shown = "" if default is dataclasses.MISSING else f" = {default}"
        lines.append(f"{path}{shown}")
        lines += textwrap.wrap(key.doc, 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=start, subsequent_indent=" " * len(start))
