"""A reward function as a user names it: found, loaded, and what it returns checked. Nothing here imports torch."""

import hashlib
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Function = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]
MOST = 1e15
"""Size of a score: the square of a larger one, in the variance of advantages, is near the end of fp32."""
SIGNATURE = "def NAME(prompts: list[str], responses: list[str], records: list[dict]) -> list[float]"


class Mistake(Exception):
    """What is wrong with a function, or with what it returned: the end of a sentence that begins with its name."""


def find(spec: str) -> tuple[Path | None, str, str]:
    """(file, module, name) of `path/to/file.py:name` or `module:name`; no code of the user's runs.

    A module is found by Python's path, to which the current folder belongs.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise Mistake("is not PATH/TO/FILE.py:NAME or MODULE:NAME")
    if where.endswith(".py") or "/" in where:
        path = Path(where).expanduser()
        if not path.is_file():
            raise Mistake(f"there is no file {path}")
        return path.resolve(), path.stem, name
    try:
        found = importlib.util.find_spec(where)
    except (ImportError, ValueError):  # of a package around it
        found = None
    if found is None:
        raise Mistake(f"there is no module {where} on Python's path, to which {Path.cwd()} belongs")
    return Path(found.origin) if found.has_location and found.origin else None, where, name


def fingerprint(spec: str) -> dict[str, str]:
    """What identifies a function in a checkpoint: its name and its file's content, wherever that is now."""
    path, module, name = find(spec)
    return {"name": name, "source": hashlib.sha256(path.read_bytes()).hexdigest() if path else module}


def load(spec: str) -> Function:
    """Import the function; its file may import its neighbours."""
    path, module, name = find(spec)
    if spec.rpartition(":")[0] == module:
        loaded = importlib.import_module(module)
    else:
        assert path is not None
        sys.path.insert(0, str(path.parent))
        found = importlib.util.spec_from_file_location(module, path)
        assert found is not None
        assert found.loader is not None
        loaded = importlib.util.module_from_spec(found)
        sys.modules[module] = loaded  # classes in it can be pickled
        found.loader.exec_module(loaded)
    function = getattr(loaded, name, None)
    if not callable(function):
        functions = [n for n, value in vars(loaded).items() if inspect.isfunction(value) and value.__module__ == module]
        there = f"; it has {', '.join(functions)}" if functions else ""
        raise Mistake(f"has no function {name}{there}")
    try:
        inspect.signature(function).bind([], [], [])
    except TypeError as error:
        raise Mistake(f"does not take (prompts, responses, records): {error}; needed is {SIGNATURE}") from error
    return function


def numbers_of(returned: Any, names: Sequence[str]) -> list[float]:
    """What a function returned, as one finite number for each response; `names` are the responses', for messages."""
    if isinstance(returned, str | bytes | dict) or not hasattr(returned, "__iter__"):
        raise Mistake(f"returned {_shown(returned)}, not a list of {len(names)} numbers")
    values = list(returned)
    if len(values) != len(names):
        raise Mistake(f"returned {len(values)} numbers for {len(names)} responses")
    return [_number(value, name) for value, name in zip(values, names, strict=True)]


def _number(value: Any, name: str) -> float:
    if not isinstance(value, numbers.Real) and hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()  # a scalar of NumPy's or torch's
    if not isinstance(value, numbers.Real):
        raise Mistake(f"returned {_shown(value)} for {name}, not a number")
    try:
        number = float(value)
    except OverflowError:  # a whole number of 400 digits
        number = math.inf
    if not abs(number) <= MOST:  # nor is NaN
        raise Mistake(f"returned {value} for {name}; a score must be finite, and at most {MOST:g} in size")
    return number


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"
