"""Which sequences pass through a model together, and where their tokens are: work is proportional to tokens.

Sequences of similar length share a microbatch, and data-parallel ranks get equal numbers of tokens, not of rows. In a
microbatch each sequence is a row, padded to the longest, or all follow one another in a single row without padding (packed),
where a prompt that several sequences share occurs once. Everything is decided from lengths, which every rank knows.

Legend: n = sequences, b x s = what the model reads: n rows, or one row of all tokens.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rlhf.config.budgets import Budget


@dataclass(frozen=True)
class Sequences:
    """A whole batch, the same on every rank."""

    tokens_ns: Tensor
    """Padded on the right."""
    lengths: Sequence[int]
    """Tokens of each; beyond them is padding."""
    wanted_ns: Tensor | None = None
    """bool, on the CPU: tokens whose output is requested; None: all."""
    prompt_lengths: Sequence[int] | None = None
    """How many of its first tokens a sequence may share with others of its `prompt_index`."""
    prompt_index: Sequence[int] | None = None
    """Sequences with the same number begin with the same prompt; None: none do."""

    def until(self, stop: int | None) -> "Sequences":
        """Without the last -stop tokens of each; None: unchanged."""
        if stop is None:
            return self
        wanted = None if self.wanted_ns is None else self.wanted_ns[:, :stop]
        return replace(
            self, tokens_ns=self.tokens_ns[:, :stop], lengths=[n + stop for n in self.lengths], wanted_ns=wanted
        )

    def at_ends(self) -> "Sequences":
        """Only the output of each one's last token is requested."""
        until_s = torch.arange(1, 1 + self.tokens_ns.shape[1])
        return replace(self, wanted_ns=until_s == torch.tensor(self.lengths).unsqueeze(-1))

    def rows(self, rows: Sequence[int]) -> "Sequences":
        """Some of them."""
        lengths, prompt_lengths, prompt_index = (
            None if numbers is None else [numbers[row] for row in rows]
            for numbers in (self.lengths, self.prompt_lengths, self.prompt_index)
        )
        wanted = None if self.wanted_ns is None else self.wanted_ns[list(rows)]
        assert lengths is not None
        return Sequences(self.tokens_ns[list(rows)], lengths, wanted, prompt_lengths, prompt_index)

    def wanted(self, rows: Sequence[int]) -> Tensor:
        """`wanted_ns` of some rows, without padding: [rows, longest of them]."""
        lengths = torch.tensor([self.lengths[row] for row in rows])
        real = torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)
        return real if self.wanted_ns is None else real & self.wanted_ns[list(rows), : real.shape[1]]

    def groups(self, rows: Sequence[int]) -> list[list[int]]:
        """The rows, grouped by prompt."""
        if self.prompt_index is None:
            return [[row] for row in rows]
        found: dict[int, list[int]] = {}
        for row in rows:
            found.setdefault(self.prompt_index[row], []).append(row)
        return list(found.values())

    def shared(self, group: Sequence[int]) -> int:
        """Tokens of a prompt that the rows of a group share."""
        if len(group) == 1 or self.prompt_lengths is None:
            return 0
        return min(min(self.prompt_lengths[row], self.lengths[row]) for row in group)

    def tokens_of(self, group: Sequence[int]) -> int:
        """Tokens that pass forward for a group, its prompt counted once."""
        return sum(self.lengths[row] for row in group) - (len(group) - 1) * self.shared(group)


def as_sequences(tokens: Sequences | Tensor) -> Sequences:
    """Makes sequences of a tensor: rows without padding."""
    return tokens if isinstance(tokens, Sequences) else Sequences(tokens, [tokens.shape[1]] * len(tokens))


@dataclass(frozen=True)
class Block:
    """Consecutive tokens that attend causally to the parts of the row that `keys` names; their own part is the last."""

    part: int
    keys: tuple[int, ...]


@dataclass
class Segments(PackedSeqParams):
    """Megatron-Core's parameters of packed sequences, for rows in which segments may continue an earlier one.

    A segment's tokens attend to those before them in it, and to all of the segment that it continues: this way several
    completions continue one prompt. Megatron-Core passes this on to the layers; its rotary embeddings would count from 0 in
    every segment, so positions are given with the tokens (`Arrangement`).
    """

    lengths: tuple[int, ...] = ()
    """Tokens of each segment; their sum is the row's. No segments: rows are not packed, each is one sequence."""
    prefixes: tuple[int | None, ...] = ()
    """The segment that each continues."""
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Causal masks of blocks, by queries and keys; the first layer makes them for all layers."""
    wanted: tuple[int, Tensor] | None = None
    """The number of a layer that computes its output only at some places, and these, in [s, b], flattened."""

    @classmethod
    def of(cls, lengths: Sequence[int], prefixes: Sequence[int | None], longest: int) -> "Segments":
        """`longest`: an upper bound; all positions in segments are smaller."""
        return cls(lengths=tuple(lengths), prefixes=tuple(prefixes), max_seqlen_q=longest, max_seqlen_kv=longest)

    def blocks(self, pieces: Sequence[tuple[int, int]]) -> tuple[list[int], list[Block]]:
        """(tokens of the parts that the row is cut into, blocks of the queries in `pieces` of the row, in order)."""
        ends = [0, *accumulate(self.lengths)]
        cuts = sorted({*ends, *(cut for piece in pieces for cut in piece)})
        parts = list(pairwise(cuts))
        of_segment: list[list[int]] = [[] for _ in self.lengths]
        segment_of = []
        segment = 0
        for part, (start, _) in enumerate(parts):
            while start >= ends[segment + 1]:
                segment += 1
            of_segment[segment].append(part)
            segment_of.append(segment)
        blocks = []
        for first, last in pieces:
            for part, (start, stop) in enumerate(parts):
                if first <= start and stop <= last:
                    segment = segment_of[part]
                    prefix = self.prefixes[segment]
                    before = of_segment[prefix] if prefix is not None else []
                    keys = (*before, *(other for other in of_segment[segment] if other <= part))
                    blocks.append(Block(part, keys))
        return [stop - start for start, stop in parts], blocks

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """bool [queries, keys]: the last query sees all keys, each one before it one less."""
        if (queries, keys) not in self.masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
            self.masks[queries, keys] = ones.tril(keys - queries)
        return self.masks[queries, keys]


@dataclass(frozen=True)
class Arrangement:
    """Some sequences as one input of a model."""

    tokens_bs: Tensor
    place_ns: Tensor
    """Where in tokens_bs, flattened, each token of each sequence is; on the CPU; -1 beyond its end."""
    positions_bs: Tensor | None = None
    """Position of each token in its own sequence; None: rows count from 0."""
    segments: Segments | None = None
    """Who attends to whom in a packed row."""

    @property
    def num_padding(self) -> int:
        """Tokens that belong to no sequence."""
        real = torch.zeros(self.tokens_bs.numel(), dtype=torch.bool)
        real[self.place_ns[self.place_ns >= 0]] = True
        return int((~real).sum())


@dataclass
class Tally:
    """Tokens that a model has read, and how many of them were padding."""

    read: int = 0
    padding: int = 0

    def add(self, arrangement: Arrangement) -> None:
        self.read += arrangement.tokens_bs.numel()
        self.padding += arrangement.num_padding

    def take(self) -> tuple[int, int]:
        """(read, padding) since the last call."""
        counts, self.read, self.padding = (self.read, self.padding), 0, 0
        return counts


def plan(sequences: Sequences, size: Budget | int, ranks: int) -> list[list[list[int]]]:
    """The rows of each microbatch of each data-parallel rank. A prompt's sequences stay together as far as they fit."""
    budget = Budget.of(size)
    groups = [
        part
        for group in sequences.groups(range(len(sequences.lengths)))
        for part in _fill([sequences.tokens_of([row]) for row in group], [1] * len(group), budget, group)
    ]
    shares = share_out([sequences.tokens_of(group) for group in groups], budget, ranks, [len(g) for g in groups])
    return [[[row for i in part for row in groups[i]] for part in share] for share in shares]


def share_out(
    tokens: Sequence[int], size: Budget | int, ranks: int, counts: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Assigns items of `tokens` tokens to ranks and microbatches: [rank][microbatch] -> items, the longest first.

    Each item goes to the rank that has fewest tokens so far. An item larger than the budget is a microbatch of its own.

    Args:
        counts: how many sequences each item counts for; 1 by default.
    """
    counts = counts or [1] * len(tokens)
    order = sorted(range(len(tokens)), key=lambda item: (-tokens[item], item))
    loads = [(0, rank) for rank in range(ranks)]
    mine: list[list[int]] = [[] for _ in range(ranks)]
    for item in order:
        load, rank = heapq.heappop(loads)
        mine[rank].append(item)
        heapq.heappush(loads, (load + tokens[item], rank))
    return [_fill([tokens[i] for i in items], [counts[i] for i in items], Budget.of(size), items) for items in mine]


def _fill(tokens: Sequence[int], counts: Sequence[int], budget: Budget, items: Sequence[int]) -> list[list[int]]:
    """Puts items, in their order, into parts within the budget, each into the first that has room."""
    parts: list[list[int]] = []
    room: list[tuple[int, float, float]] = []  # part, tokens and sequences that still fit
    smallest = min(tokens, default=0)
    for item, cost, count in zip(items, tokens, counts, strict=True):
        for i, (part, left, places) in enumerate(room):
            if cost <= left and count <= places:
                parts[part].append(item)
                room[i] = part, left - cost, places - count
                break
        else:
            parts.append([item])
            left = float("inf") if budget.tokens is None else budget.tokens - cost
            places = float("inf") if budget.sequences is None else budget.sequences - count
            room.append((len(parts) - 1, left, places))
        room = [entry for entry in room if entry[1] >= smallest and entry[2] >= 1]
    return parts


def arrange(sequences: Sequences, rows: Sequence[int], multiple: int, packed: bool) -> Arrangement:
    """Some of the sequences as the model reads them; in one row if a prompt is shared, or if packed and rows would have padding.

    Args:
        multiple: the model needs the tokens of a row to be a multiple of this.
    """
    groups = sequences.groups(rows)
    lengths = torch.tensor([sequences.lengths[row] for row in rows])
    longest = int(lengths.max())
    width = -(-longest // multiple) * multiple
    if any(sequences.shared(group) for group in groups) or (packed and bool((lengths < width).any())):
        return _in_one_row(sequences, rows, groups, multiple)
    tokens = sequences.tokens_ns[list(rows), :longest]
    place = torch.arange(len(rows)).unsqueeze(-1) * width + torch.arange(longest)
    place = torch.where(torch.arange(longest) < lengths.unsqueeze(-1), place, -1)
    return Arrangement(torch.nn.functional.pad(tokens, (0, width - longest)), place)


def _in_one_row(
    sequences: Sequences, rows: Sequence[int], groups: Sequence[Sequence[int]], multiple: int
) -> Arrangement:
    index = {row: i for i, row in enumerate(rows)}
    stride = sequences.tokens_ns.shape[1]
    place = torch.full((len(rows), max(sequences.lengths[row] for row in rows)), -1)
    sources, positions = [], []
    lengths: list[int] = []
    prefixes: list[int | None] = []

    def lay(group: Sequence[int], first: int, stop: int, prefix: int | None) -> None:
        if stop > first:
            start = sum(lengths)
            for row in group:
                place[index[row], first:stop] = torch.arange(start, start + stop - first)
            positions.append(torch.arange(first, stop))
            sources.append(group[0] * stride + positions[-1])
            lengths.append(stop - first)
            prefixes.append(prefix)

    for group in groups:
        shared = sequences.shared(group)
        prompt = len(lengths) if shared else None
        lay(group, 0, shared, None)
        for row in group:
            lay([row], shared, sequences.lengths[row], prompt)
    padding = -sum(lengths) % multiple
    if padding:
        positions.append(torch.arange(padding))
        sources.append(torch.zeros(padding, dtype=torch.long))
        lengths.append(padding)
        prefixes.append(None)
    device = sequences.tokens_ns.device
    source, position = torch.cat(sources), torch.cat(positions)
    tokens = sequences.tokens_ns.flatten()[source.to(device)]
    longest = -(-(int(position.max()) + 1) // multiple) * multiple
    segments = Segments.of(lengths, prefixes, longest)
    return Arrangement(tokens.unsqueeze(0), place, position.unsqueeze(0).to(device), segments)
