"""What a column of a format may be made by, in addition to a template: the small language of the YAML files.

prompt: "{question}\\n"                                   a template, see `Template`
prompt: {first: ["{instruction}\\n{input}", "{instruction}"]}  the first whose columns are all filled
responses: ["{answer_0}", "{answer_1}"]                   a list of such
messages: {each: "{conversations}", role: "{from}", content: "{value}", roles: {human: user, gpt: assistant}}
ranks: {scores: "{answers[].score}"}                      the highest is the best, equal ones tie
ranks: {order: "{answers[].rank}"}                        the lowest is the best
ranks: {best: "{choice}", of: 2}                          the number of the best, from 0
ranks: {votes: "{preference}"}                            on each pair: 1 the first, 2 the second, 0 neither
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.formats.record import Record
from megatron_rlhf.data.formats.template import Template
from megatron_rlhf.data.formats.votes import Cycle, dense, pairs, ranks_from_votes

Maker = Callable[[Record], Any]
CYCLE = "cyclic_votes"
"""Instead of ranks: votes that go in a circle."""


def maker(column: str, specification: Any) -> Maker:
    """The function that makes a column of a record.

    Raises:
        UserError: the specification is none.
    """
    if isinstance(specification, str):
        return Template(column, specification).fill
    if isinstance(specification, list) and specification:
        parts = [maker(column, item) for item in specification]
        return lambda record: [make(record) for make in parts]
    if isinstance(specification, Mapping):
        for name, (build, needed, optional) in _KINDS.items():
            if name in specification:
                if not {name, *needed} <= specification.keys() <= {name, *needed, *optional}:
                    expected = ", ".join((name, *needed)) + "".join(f" (and {key})" for key in optional)
                    raise UserError(f"columns.{column}: {specification!r:.80} must hold {expected}, and no more")
                return build(column, specification)
    kinds = ", ".join(f"{{{name}: ...}}" for name in _KINDS)
    raise UserError(f"columns.{column}: {specification!r:.80} is no template, no list of them, and none of {kinds}")


def _first(column: str, specification: Mapping[str, Any]) -> Maker:
    texts = specification["first"]
    if not isinstance(texts, list) or not texts:
        raise UserError(f"columns.{column}: first must be a list of templates, not {texts!r:.60}")
    templates = [Template(column, text) for text in texts]

    def make(record: Record) -> Any:
        return next((template for template in templates if not template.blank(record)), templates[-1]).fill(record)

    return make


def _each(column: str, specification: Mapping[str, Any]) -> Maker:
    items = maker(column, specification["each"])
    role, content = Template("role", specification["role"]), Template("content", specification["content"])
    roles = specification.get("roles", {})
    if not isinstance(roles, Mapping) or not all(isinstance(name, str) for pair in roles.items() for name in pair):
        raise UserError(
            f"columns.{column}: roles must be names by names, {{human: user, gpt: assistant}}, not {roles!r:.60}"
        )

    def make(record: Record) -> list[dict[str, Any]]:
        turns = items(record)
        if not isinstance(turns, list):
            raise record.mistake(f"{specification['each']} must be a list of messages, not {turns!r:.60}")
        return [turn(record, place, fields) for place, fields in enumerate(turns, start=1)]

    def turn(record: Record, place: int, fields: Any) -> dict[str, Any]:
        if not isinstance(fields, Mapping):
            raise record.mistake(f"{specification['each']}, turn {place}: must be an object, not {fields!r:.60}")
        inner = Record(f"{record.where}, turn {place}", fields)
        named = role.fill(inner)
        if not isinstance(named, str):
            raise inner.mistake(f"{specification['role']} must be a role's name, not {named!r:.60}")
        if roles and named not in roles:
            raise inner.mistake(f"role {named!r} is none of {', '.join(roles)}")
        return {"role": roles.get(named, named), "content": content.fill(inner)}

    return make


def _by_number(key: str, highest_is_best: bool) -> Callable[[str, Mapping[str, Any]], Maker]:
    def build(column: str, specification: Mapping[str, Any]) -> Maker:
        numbers = maker(column, specification[key])
        return lambda record: dense(_numbers(record, specification[key], numbers(record)), highest_is_best)

    return build


def _best(column: str, specification: Mapping[str, Any]) -> Maker:
    choice, count = maker(column, specification["best"]), specification["of"]
    if type(count) is not int or count < 2:
        raise UserError(f"columns.{column}: of must be how many responses there are, 2 or more, not {count!r:.60}")

    def make(record: Record) -> list[int]:
        (chosen,) = _numbers(record, specification["best"], [choice(record)])
        if chosen not in range(count):
            raise record.mistake(
                f"{specification['best']} is {chosen:g}; it must be the number of one of {count}, from 0"
            )
        return [int(place != chosen) for place in range(count)]

    return make


def _votes(column: str, specification: Mapping[str, Any]) -> Maker:
    given = maker(column, specification["votes"])

    def make(record: Record) -> list[int] | str:
        votes = _numbers(record, specification["votes"], given(record))
        count = (1 + math.isqrt(1 + 8 * len(votes))) // 2
        if len(pairs(count)) != len(votes) or not set(votes) <= {0, 1, 2}:
            raise record.mistake(
                f"{specification['votes']} must hold 0, 1 or 2 for each pair (1, 3, 6, ... of them), not {votes!r:.60}"
            )
        preferences = ((a, b, {0: 0, 1: 1, 2: -1}[int(vote)]) for (a, b), vote in zip(pairs(count), votes, strict=True))
        try:
            return ranks_from_votes(count, preferences)
        except Cycle:
            return CYCLE

    return make


def _numbers(record: Record, name: Any, values: Any) -> list[float]:
    """Numbers, also where they are written as text."""
    found = []
    for value in values if isinstance(values, list) else [values]:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isnan(number):
            raise record.mistake(f"{name} must hold numbers, not {value!r:.60}")
        found.append(number)
    return found


_KINDS: dict[str, tuple[Callable[[str, Mapping[str, Any]], Maker], tuple[str, ...], tuple[str, ...]]] = {
    "first": (_first, (), ()),
    "each": (_each, ("role", "content"), ("roles",)),
    "scores": (_by_number("scores", highest_is_best=True), (), ()),
    "order": (_by_number("order", highest_is_best=False), (), ()),
    "best": (_best, ("of",), ()),
    "votes": (_votes, (), ()),
}
"""By the key that tells them: how each is built, and the keys that it must and may have besides."""
