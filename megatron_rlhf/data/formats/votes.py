"""Rankings of several responses from votes on pairs of them, and back."""

import itertools
from collections.abc import Iterable, Mapping, Sequence


class Cycle(ValueError):
    """Votes that no ranking agrees with: each of these responses is preferred to the next, and the last to the first."""

    def __init__(self, responses: Sequence[int]):
        super().__init__(" > ".join(map(str, [*responses, responses[0]])))
        self.responses = tuple(responses)


def ranks_from_votes(count: int, votes: Iterable[tuple[int, int, float]]) -> list[int]:
    """Ranks of `count` responses, 0 = best, equal = tie.

    Args:
        votes: (a, b, vote): more than 0 prefers a, less b, and 0 neither. The votes on a pair add up.

    A response ranks just behind the last of those that are preferred to it: no vote is contradicted, and a pair without a
    preference ties where the votes on others leave it so.

    Raises:
        Cycle: the preferences go in a circle.
    """
    balance: dict[tuple[int, int], float] = {}
    for a, b, vote in votes:
        pair, sign = ((a, b), 1) if a < b else ((b, a), -1)
        balance[pair] = balance.get(pair, 0) + sign * vote
    better: dict[int, set[int]] = {response: set() for response in range(count)}
    for (a, b), vote in balance.items():
        if vote:
            better[b if vote > 0 else a].add(a if vote > 0 else b)
    ranks: dict[int, int] = {}
    while len(ranks) < count:
        free = [response for response in range(count) if response not in ranks and better[response] <= ranks.keys()]
        if not free:
            raise Cycle(
                _cycle({response: better[response] - ranks.keys() for response in better if response not in ranks})
            )
        rank = max(ranks.values(), default=-1) + 1
        ranks |= dict.fromkeys(free, rank)
    return [ranks[response] for response in range(count)]


def _cycle(better: Mapping[int, set[int]]) -> list[int]:
    """A shortest circle; every response has a better one."""
    found = []
    for start in better:
        paths = [[start]]
        seen: set[int] = set()
        while paths and start not in seen:
            paths = [[*path, worse] for path in paths for worse in sorted(better[path[-1]]) if worse not in seen]
            closed = next((path for path in paths if path[-1] == start), None)
            if closed is not None:
                found.append(closed[:0:-1])
            seen |= {path[-1] for path in paths}
    shortest = min(found, key=len)
    first = shortest.index(min(shortest))
    return [*shortest[first:], *shortest[:first]]


def pairs(count: int) -> list[tuple[int, int]]:
    """All pairs in the order in which people list them: 1 and 2, 1 and 3, ..."""
    return list(itertools.combinations(range(count), 2))


def votes_from_ranks(ranks: Sequence[float]) -> list[tuple[int, int, int]]:
    """(a, b, vote) for each pair of responses; 1 prefers a, -1 b, and 0 is a tie."""
    return [(a, b, (ranks[a] < ranks[b]) - (ranks[a] > ranks[b])) for a, b in pairs(len(ranks))]


def dense(values: Sequence[float], highest_is_best: bool = False) -> list[int]:
    """Ranks from any numbers: 0 for the best, equal numbers tie."""
    order = sorted(set(values), reverse=highest_is_best)
    return [order.index(value) for value in values]
