"""What a rollout contains, field by field.

Legend: b = episodes (the whole batch, on every rank), s = prompt and response padded on the right, t = response positions.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from megatron_rlhf.parallel.packing import Sequences


@dataclass(frozen=True)
class Completion:
    """One sampled response."""

    tokens: list[int]
    logprobs: list[float]
    """Log-probability of each token as sampled: temperature applied, before top-k and top-p."""
    stopped: bool
    """It ended with a stop token, not at the length limit."""


@dataclass(frozen=True)
class Responses:
    """Prompts and responses as tensors."""

    tokens_bs: Tensor
    """Prompt then response, padded on the right."""
    prompt_lengths_b: Tensor
    response_lengths_b: Tensor
    """Tokens kept, the stop token included."""
    stopped_b: Tensor
    """bool: ended with a stop token."""

    @classmethod
    def pack(
        cls, prompts: list[list[int]], completions: list[Completion], pad_id: int, device: torch.device
    ) -> "Responses":
        rows = [prompt + completion.tokens for prompt, completion in zip(prompts, completions, strict=True)]
        tokens = torch.full((len(rows), max(map(len, rows))), pad_id, dtype=torch.long)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        return cls(
            tokens_bs=tokens.to(device),
            prompt_lengths_b=torch.tensor([len(prompt) for prompt in prompts], device=device),
            response_lengths_b=torch.tensor([len(c.tokens) for c in completions], device=device),
            stopped_b=torch.tensor([c.stopped for c in completions], device=device),
        )

    @functools.cached_property
    def sequences(self) -> Sequences:
        """What the roles evaluate: each response, from its prompt's last token on. Samples of one prompt share it."""
        prompts, responses = self.prompt_lengths_b.tolist(), self.response_lengths_b.tolist()
        lengths = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        texts = [tuple(row[:prompt]) for row, prompt in zip(self.tokens_bs.tolist(), prompts, strict=True)]
        numbers_of = {text: number for number, text in enumerate(texts)}
        first, ends = (torch.tensor(numbers).unsqueeze(-1) for numbers in (prompts, lengths))
        places = torch.arange(self.tokens_bs.shape[1])
        wanted = (places >= first - 1) & (places < ends)
        return Sequences(self.tokens_bs, lengths, wanted, prompts, [numbers_of[text] for text in texts])

    @property
    def mask_bt(self) -> Tensor:
        """bool: there is a response token here."""
        return torch.arange(int(self.response_lengths_b.max()), device=self.tokens_bs.device) < (
            self.response_lengths_b.unsqueeze(-1)
        )

    @property
    def positions_bt(self) -> Tensor:
        """Sequence position whose output predicts response token t: prompt_length - 1 + t, kept inside the sequence."""
        steps = torch.arange(int(self.response_lengths_b.max()), device=self.tokens_bs.device)
        positions = self.prompt_lengths_b.unsqueeze(-1) - 1 + steps
        return positions.clamp(max=self.tokens_bs.shape[1] - 2)

    @property
    def last_b(self) -> Tensor:
        """Sequence position of the last response token, where the reward is read."""
        return self.prompt_lengths_b + self.response_lengths_b - 1

    def at_response(self, values_bs: Tensor) -> Tensor:
        """Pick [b, t] out of [b, s] or [b, s - 1]: 0 where the response has ended."""
        picked = values_bs.gather(1, self.positions_bt.clamp(max=values_bs.shape[1] - 1))
        return torch.where(self.mask_bt, picked, 0.0)


@dataclass(frozen=True)
class Rollout:
    """One iteration's episodes as evaluated by all four roles. Log-probabilities are at the sampling temperature."""

    responses: Responses
    sampled_logprobs_bt: Tensor
    """As the sampler saw them, token by token."""
    logprobs_bt: Tensor
    """The policy's before the update, its "old" ones: recomputed in one pass, or as sampled."""
    ref_logprobs_bt: Tensor
    """The reference's."""
    values_bt: Tensor
    """The value model's, before each token; zeros where there is none."""
    scores_b: Tensor
    """The reward's own: penalties come later."""
    prompts_b: Tensor
    """Ids of the prompts; several samples of a prompt have the same."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """What the score is the weighted sum of, by name, [b]."""
    timeouts: int | None = None
    """Scores that stand for those of functions which did not return in time, where that does not end the run."""
    recomputed_logprobs_bt: Tensor | None = None
    """The policy's in one pass, where one was made."""
    portions_b: Tensor | None = None
    """Which rows reward and value model read together: the number of a portion; None: all."""

    @property
    def mask_bt(self) -> Tensor:
        return self.responses.mask_bt

    def totals(self, missing_stop_penalty: float) -> Tensor:
        """[b]: scores, less a penalty for responses without an end."""
        return self.scores_b - missing_stop_penalty * ~self.responses.stopped_b


@dataclass(frozen=True)
class Experience:
    """What an update learns from: one row per episode."""

    tokens_bs: Tensor
    positions_bt: Tensor
    mask_bt: Tensor
    logprobs_bt: Tensor
    values_bt: Tensor
    advantages_bt: Tensor
    returns_bt: Tensor

    @classmethod
    def of(cls, rollout: Rollout, advantages_bt: Tensor, returns_bt: Tensor) -> "Experience":
        responses = rollout.responses
        return cls(
            responses.tokens_bs,
            responses.positions_bt,
            rollout.mask_bt,
            rollout.logprobs_bt,
            rollout.values_bt,
            advantages_bt,
            returns_bt,
        )

    def __len__(self) -> int:
        return len(self.tokens_bs)

    def rows(self, indices: Tensor | slice) -> "Experience":
        """Some of the episodes."""
        return Experience(*(getattr(self, field.name)[indices] for field in fields(self)))

    @functools.cached_property
    def _response_lengths(self) -> Tensor:
        return self.mask_bt.sum(dim=1).cpu()

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return int(self._response_lengths.sum())

    @functools.cached_property
    def sequences(self) -> Sequences:
        """What is read to predict the responses: all but the last token of each; wanted are the tokens that predict."""
        first = self.positions_bt[:, 0].cpu()
        ends = first + self._response_lengths
        places = torch.arange(self.tokens_bs.shape[1])
        wanted = (places >= first.unsqueeze(-1)) & (places < ends.unsqueeze(-1))
        return Sequences(self.tokens_bs, ends.tolist(), wanted)

    def response_tokens(self, rows: Sequence[int], counts: bool = True) -> "ExperienceTokens":
        """The response tokens of some episodes, one after the other."""
        index = torch.tensor(rows)
        columns = torch.arange(self.mask_bt.shape[1])
        row_n, column_n = (columns < self._response_lengths[index].unsqueeze(-1)).nonzero(as_tuple=True)
        place = (index[row_n].to(self.tokens_bs.device), column_n.to(self.tokens_bs.device))
        targets_n = self.tokens_bs[place[0], self.positions_bt[place] + 1]
        floats = (getattr(self, field.name)[place] for field in fields(self)[3:])
        return ExperienceTokens(place, targets_n, torch.full_like(targets_n, counts, dtype=torch.bool), *floats)

    def minibatches(self, size: int, seed: tuple[int, ...], epochs: int) -> Iterator["Experience"]:
        """Minibatches of all epochs, shuffled anew in each; `seed` is hashed, so (run seed, step) gives the same order on
        every rank."""
        for epoch in range(epochs):
            generator = torch.Generator().manual_seed(hash((*seed, epoch)) % 2**63)
            for indices in torch.randperm(len(self), generator=generator).split(size):
                yield self.rows(indices.to(self.tokens_bs.device))


@dataclass(frozen=True)
class ExperienceTokens:
    """Response tokens of a microbatch and what is known of each, [n]."""

    place_n: tuple[Tensor, Tensor]
    """Their row and column in [b, t]."""
    targets_n: Tensor
    """Their ids."""
    mask_n: Tensor
    """False if a microbatch only keeps a schedule going."""
    logprobs_n: Tensor
    values_n: Tensor
    advantages_n: Tensor
    returns_n: Tensor
