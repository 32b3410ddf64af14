"""What is trained on and what is held out: items that belong together are on the same side."""

import hashlib
from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.prompts import Prompt

Item = TypeVar("Item")


def held_out(
    items: Sequence[Item], fraction: float, seed: int, owners: Callable[[Item], Iterable[Hashable]] = lambda item: ()
) -> npt.NDArray[np.int64]:
    """Indices of a seeded share of the items, ascending, at least one where the fraction is positive.

    Items that have an owner in common stay together, so that the share may be smaller than asked for.

    Raises:
        UserError: All items belong together.
    """
    wanted = min(max(round(len(items) * fraction), 1), len(items) - 1) if fraction > 0 else 0
    owned = [tuple(owners(item)) for item in items]
    if not any(owned):
        return np.sort(np.random.default_rng(seed).permutation(len(items))[:wanted])
    groups = _together(owned)
    order = np.random.default_rng(seed).permutation(len(groups))
    held: set[int] = set()
    for group in (groups[i] for i in order):
        if len(held) + len(group) <= wanted:
            held.update(group)
    if wanted and not held:
        smallest: list[int] = min(groups, key=len)
        held.update(smallest)
    if len(held) == len(items):
        raise UserError(
            f"nothing can be held out of {len(items)} prompts of one user; give data.validation, or data.validation_fraction=0"
        )
    return np.array(sorted(held), dtype=np.int64)


def split_by_user(prompts: Iterable[Prompt], fractions: Sequence[float], seed: int) -> list[list[Prompt]]:
    """The prompts of each part, see `parts_by_user`."""
    items = list(prompts)
    return [[items[i] for i in part] for part in parts_by_user(items, fractions, seed)]


def parts_by_user(prompts: Iterable[Prompt], fractions: Sequence[float], seed: int) -> list[npt.NDArray[np.int64]]:
    """Indices of each part. Splits so that no user is in two parts, such as train, validation and test by `(0.9, 0.05, 0.05)`.

    A user's part follows from a hash of the user and the seed, so that adding prompts moves nobody. A prompt without a
    user counts as a user of its own. The fractions are shares of the users, relative to their sum.
    """
    assert fractions, "at least one fraction"
    parts = [array("q") for _ in fractions]
    for index, prompt in enumerate(prompts):
        parts[place_of(prompt.user, prompt.text, fractions, seed)].append(index)
    return [np.frombuffer(part, np.int64) if part else np.zeros(0, np.int64) for part in parts]


def place_of(user: str | None, text: str, fractions: Sequence[float], seed: int) -> int:
    """The part that a user's prompts are in, and that a prompt without a user is in; see `split_by_user`."""
    owner = f"text {text}" if user is None else f"user {user}"
    digest = hashlib.blake2b(f"{seed} {owner}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    bounds = (edge / sum(fractions) for edge in accumulate(fractions))
    return next((i for i, bound in enumerate(bounds) if place < bound), len(fractions) - 1)


def _together(owners: Sequence[Iterable[Hashable]]) -> list[list[int]]:
    """Groups of indices that share an owner, directly or via others."""
    leaders: dict[Hashable, Hashable] = {}

    def find(member: Hashable) -> Hashable:
        while leaders.setdefault(member, member) != member:
            leaders[member] = member = leaders[leaders[member]]
        return member

    groups: dict[Hashable, list[int]] = {}
    for index, names in enumerate(owners):
        for name in names:
            leaders[find(("owner", name))] = find(("item", index))
    for index in range(len(owners)):
        groups.setdefault(find(("item", index)), []).append(index)
    return list(groups.values())
