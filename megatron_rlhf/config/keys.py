"""The keys of a schema, dotted, each with its type and meaning, read from the dataclasses."""

import ast
import difflib
import inspect
import itertools
import textwrap
import typing
from collections.abc import Container, Iterable, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any


@dataclass(frozen=True)
class Key:
    """One key of a schema."""

    field: Field
    doc: str
    """The string under the field."""
    types: tuple[Any, ...]
    """Types its value may have; includes NoneType if the key may be null."""

    @property
    def optional(self) -> bool:
        return NoneType in self.types

    @property
    def holds_text(self) -> bool:
        return str in self.types and not {int, float} & set(self.types)  # a number, or a word instead of it

    @property
    def holds_texts(self) -> bool:
        """A list of them."""
        return any(typing.get_origin(kind) is list and typing.get_args(kind) == (str,) for kind in self.types)

    @property
    def schema(self) -> type | None:
        """The dataclass that holds the keys below this one."""
        return next((kind for kind in self.types if isinstance(kind, type) and is_dataclass(kind)), None)

    @property
    def named_schema(self) -> type | None:
        """The dataclass of each of several entries that have names of the user's."""
        arguments = (typing.get_args(kind) for kind in self.types if typing.get_origin(kind) is dict)
        return next((kind for _, kind in arguments if isinstance(kind, type) and is_dataclass(kind)), None)


NAME = "NAME"
"""Stands for any name in the path of a key: `rewards.NAME.weight`."""


def keys(schema: type, prefix: str = "") -> dict[str, Key]:
    """Every key of a schema, by its path."""
    found: dict[str, Key] = {}
    docs, hints = _docs(schema), typing.get_type_hints(schema)
    for field in fields(schema):
        key = Key(field, docs.get(field.name, ""), _alternatives(hints[field.name]))
        found[f"{prefix}{field.name}"] = key
        if key.schema is not None:
            found |= keys(key.schema, f"{prefix}{field.name}.")
        if key.named_schema is not None:
            found |= keys(key.named_schema, f"{prefix}{field.name}.{NAME}.")
    return found


def unnamed(path: str, known: Container[str]) -> str:
    """The path with NAME for a user's name, if there is such a key."""
    group, _, rest = path.partition(".")
    candidate = ".".join([group, NAME, *rest.split(".")[1:]])
    return candidate if path not in known and candidate in known else path


SYNONYMS = {
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "beta": "ppo.kl_coef",
    "kl": "ppo.kl_coef",
    "kl_beta": "ppo.kl_coef",
    "output_dir": "run.dir",
    "output": "run.dir",
    "save_steps": "run.save_every",
    "seed": "run.seed",
    "model_name_or_path": "policy.init_from",
    "model_path": "policy.init_from",
    "checkpoint": "policy.init_from",
    "tokenizer": "data.tokenizer",
    "tokenizer_name": "data.tokenizer",
    "dataset": "data.prompts",
    "batch": "batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "train_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "max_new_tokens": "max_response_tokens",
    "tp": "parallel.tensor",
    "tensor_parallel_size": "parallel.tensor",
    "pp": "parallel.pipeline",
    "bf16": "precision",
    "fp16": "precision",
    "dtype": "precision",
    "gradient_checkpointing": "parallel.recompute",
    "warmup": "warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "ptx": "ppo.ptx_coef",
    "num_samples": "ppo.samples_per_prompt",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "train_steps": "max_steps",
    "total_steps": "max_steps",
    "max_steps": "iterations",
}
"""Last words of keys elsewhere -> ends of ours, or what to try next."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was most likely meant: the same last word or one that means it, else a similar name."""
    known = list(known)
    word = name.lstrip("-").replace("-", "_").lower().rpartition(".")[2]
    end: str | None = word
    while end is not None:
        same = [path for path in known if path == end or path.endswith(f".{end}")]
        if same:
            return max(same, key=lambda path: (_common(path, name), path.startswith("policy."), -len(path)))
        end = SYNONYMS.get(end)
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def knows(known: Mapping[str, Key], path: str) -> bool:
    """Whether a stage with these keys has this one, which may be `GROUP@KEY`, or a name in a dictionary."""
    key = unnamed(path.split("@")[-1], known)
    parent = known.get(key.rpartition(".")[0])
    in_dictionary = parent is not None and any(typing.get_origin(kind) is dict for kind in parent.types)
    return key in known or key == "recipe" or in_dictionary


def _common(path: str, name: str) -> int:
    """Parts of two paths that are the same, from the beginning."""
    pairs = zip(path.split("."), name.split("."), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)


def _docs(schema: type) -> dict[str, str]:
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
