"""What is trained on and what is held out: items that belong together are on the same side."""

import hashlib
from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.prompts import Prompt

Item = TypeVar("Item")


def held_out(
    items: Iterable[Item], fraction: float, seed: int, owners: Callable[[Item], Iterable[Hashable]] = lambda item: ()
) -> npt.NDArray[np.int64]:
    """Indices of a seeded share of the items, ascending, at least one where the fraction is positive.

    Items that have an owner in common stay together, so that the share may be smaller than asked for.

    Raises:
        UserError: All items belong together.
    """
    group_of = _together(items, owners)
    count = len(group_of)
    wanted = min(max(round(count * fraction), 1), count - 1) if fraction > 0 else 0
    sizes = np.bincount(group_of)
    chosen, left = np.zeros(len(sizes), dtype=bool), wanted
    for group in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[group] <= left:
            chosen[group] = True
            left -= sizes[group]
        if not left:
            break
    if wanted and not chosen.any():
        chosen[np.argmin(sizes)] = True
    if wanted and chosen.all():
        raise UserError(
            f"nothing can be held out of {count} prompts of one user; give data.validation, or data.validation_fraction=0"
        )
    return np.flatnonzero(chosen[group_of])


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


def _together(items: Iterable[Item], owners: Callable[[Item], Iterable[Hashable]]) -> npt.NDArray[np.int64]:
    """Each item's group: those that share an owner, directly or via others. Groups are numbered by their first items."""
    item_of, owner_of, count = array("q"), array("q"), 0
    for item in items:
        for owner in owners(item):
            item_of.append(count)
            owner_of.append(hash(owner))
        count += 1
    if not owner_of:
        return np.arange(count)
    names, nodes = np.unique(np.frombuffer(owner_of, np.int64), return_inverse=True)
    ends, size = (np.frombuffer(item_of, np.int64), count + nodes), count + len(names)
    _, component = connected_components(coo_matrix((np.ones(len(nodes), np.int8), ends), (size, size)), directed=False)
    _, first, group = np.unique(component[:count], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[group]
