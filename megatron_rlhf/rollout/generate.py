"""Sampling responses from the model that trains, with a key/value cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhf.config.model import Precision
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.models.attention import KeyValueCache
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.pipeline import Microbatch, forward_backward
from megatron_rlhf.rollout.sampling import Sampler
from megatron_rlhf.rollout.types import Completion

StopWatch = Callable[[int], bool]
"""Reads a response token by token; True when it is to end with this one."""


def generate(
    role: Role,
    prompts: Sequence[Sequence[int]],
    keys: Tensor,
    config: SamplingConfig,
    stop_ids: Sequence[int],
    stop_watch: Callable[[], StopWatch | None] = lambda: None,
) -> list[Completion]:
    """Sample one response a prompt, on every rank of this data-parallel replica together.

    Args:
        prompts: token ids, any lengths; prompt and longest response must fit the model's context.
        keys: [number of prompts] random keys (`sampling.row_keys`); a row's text depends on its key and prompt alone.
        stop_ids: tokens that end a response.
        stop_watch: makes what ends a response besides; called once for each response.

    As many batches as there are pipeline stages are in flight, so that no stage waits for the sampled token of another.
    """
    assert role.layout.virtual_stages is None, "decoding needs a layout without virtual stages"
    device = collectives.device()
    # Prompts of like length share a batch, so little is spent on padding; it does not change what is sampled.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    completions: dict[int, Completion] = {}
    in_flight = role.layout.config.pipeline
    with role.decoding(in_fp8=config.precision is Precision.fp8_hybrid):
        for start in range(0, len(batches), in_flight):
            decoders = [
                Decoder(
                    role, rows, [prompts[i] for i in rows], keys[rows].to(device), config, tuple(stop_ids), stop_watch
                )
                for rows in batches[start : start + in_flight]
            ]
            while active := [decoder for decoder in decoders if decoder.unfinished]:
                forward_backward(
                    role.chunks, [decoder.microbatch() for decoder in active], role.layout, forward_only=True
                )
                for decoder in active:
                    decoder.advance()
            for decoder in decoders:
                completions |= decoder.completions()
    return [completions[i] for i in range(len(prompts))]


@dataclass
class Decoder:
    """One batch being decoded. Prompts are padded on the left, so that every row's next token has the same slot."""

    role: Role
    indices: list[int]
    prompts: list[Sequence[int]]
    keys_b: Tensor
    config: SamplingConfig
    stop_ids: tuple[int, ...]
    stop_watch: Callable[[], StopWatch | None] = lambda: None

    def __post_init__(self) -> None:
        device = self.keys_b.device
        lengths = [len(prompt) for prompt in self.prompts]
        width, limit = max(lengths), self.config.max_response_tokens
        self.pads_b = torch.tensor([width - n for n in lengths], device=device)
        self.has_padding = min(lengths) < width
        self.next_tokens = torch.zeros(len(lengths), width, dtype=torch.long)
        for row, prompt in enumerate(self.prompts):
            self.next_tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        self.next_tokens = self.next_tokens.to(device)
        self.slots = torch.arange(width + limit, device=device)
        self.cache = KeyValueCache(capacity=width + limit)
        self.sampler = Sampler(self.config.temperature, self.config.top_k, self.config.top_p)
        self.stops = torch.tensor(self.stop_ids, dtype=torch.long, device=device)
        self.rows = list(range(len(lengths)))  # still decoded, of those we started with
        self.rows_b = torch.tensor(self.rows, device=device)
        self.tokens_bt = torch.zeros(len(lengths), limit, dtype=torch.long, device=device)
        self.logprobs_bt = torch.zeros(len(lengths), limit, device=device)
        self.lengths_b = torch.zeros(len(lengths), dtype=torch.long, device=device)
        self.stopped_b = torch.zeros(len(lengths), dtype=torch.bool, device=device)
        self.watches = [self.stop_watch() for _ in lengths]
        self.step = 0
        # Filled by the last stage, then broadcast: token (exact in fp64) and log-probability of every decoded row.
        self.sampled = torch.zeros(2, len(lengths), dtype=torch.float64, device=device)

    @property
    def unfinished(self) -> bool:
        return len(self.rows_b) > 0

    def microbatch(self) -> Microbatch:
        """The forward pass that yields the next token of every unfinished row."""
        start, count = self.cache.length, self.next_tokens.shape[1]
        query = self.slots[start : start + count]
        positions = (query - self.pads_b.unsqueeze(-1)).clamp(min=0)
        self.cache.start(positions)
        inference = {
            "position_ids": positions,
            "attention_mask": self._attention_mask(query, start + count),
            "inference_context": self.cache,
        }
        return Microbatch(self.next_tokens, self._sample, inference)

    def _attention_mask(self, query: Tensor, length: int) -> Tensor | None:
        """[b, 1, queries, keys], True = attend: causal, and not to padding. None where nothing is hidden or all is causal."""
        if not self.has_padding:
            return None
        key = self.slots[:length]
        visible = (key <= query.unsqueeze(-1)) & (key >= self.pads_b.view(-1, 1, 1))
        itself = key == query.unsqueeze(-1)  # a padding row attends to itself: a softmax over nothing is NaN
        return (visible | itself).unsqueeze(1)

    def _sample(self, logits_b1v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits_bv = self.role.respond(logits_b1v[:, -1])[:, : self.role.model.vocab_size]
        too_early = self.stops if self.step < self.config.min_response_tokens - 1 else None
        tokens_b, logprobs_b = self.sampler(logits_bv, self.keys_b, torch.full_like(self.keys_b, self.step), too_early)
        self.sampled = torch.stack([tokens_b.double(), logprobs_b.double()])
        return logits_b1v.new_zeros(()), {}

    def advance(self) -> None:
        """Take in the sampled tokens, on all stages."""
        self.sampled = collectives.from_last_stage(self.sampled, self.role.layout)
        tokens_b, logprobs_b = self.sampled[0].long(), self.sampled[1].float()
        rows = self.rows_b
        self.tokens_bt[rows, self.step] = tokens_b
        self.logprobs_bt[rows, self.step] = logprobs_b
        self.lengths_b[rows] += 1
        # The only answer of the device that a token waits for.
        answers = torch.stack([tokens_b, torch.isin(tokens_b, self.stops).long()]).tolist()
        stopped = [bool(end) or text for end, text in zip(answers[1], self._stopped_by_text(answers[0]), strict=True)]
        self.cache.length += self.next_tokens.shape[1]
        self.next_tokens = tokens_b.unsqueeze(-1)
        self.step += 1
        if any(stopped):
            self.stopped_b[rows] = torch.tensor(stopped, device=tokens_b.device)
        if self.step == self.config.max_response_tokens:
            self._keep([])
        elif any(stopped):
            self._keep([place for place, has_stopped in enumerate(stopped) if not has_stopped])

    def _stopped_by_text(self, tokens: list[int]) -> list[bool]:
        """A text that is complete before the shortest response is long enough ends nothing."""
        long_enough = self.step + 1 >= self.config.min_response_tokens
        watches = [self.watches[row] for row in self.rows]
        complete = [watch is not None and watch(token) for watch, token in zip(watches, tokens, strict=True)]
        return [long_enough and text for text in complete]

    def _keep(self, kept: list[int]) -> None:
        self.rows = [self.rows[place] for place in kept]
        rows = torch.tensor(kept, dtype=torch.long, device=self.rows_b.device)
        self.rows_b, self.keys_b, self.pads_b = self.rows_b[rows], self.keys_b[rows], self.pads_b[rows]
        self.next_tokens, self.sampled = self.next_tokens[rows], self.sampled[:, rows]
        self.cache.keep_rows(rows)

    def completions(self) -> dict[int, Completion]:
        """Finished responses by their index among all prompts."""
        tokens, logprobs, lengths, stopped = (
            x.tolist() for x in (self.tokens_bt, self.logprobs_bt, self.lengths_b, self.stopped_b)
        )
        return {
            index: Completion(tokens[row][: lengths[row]], logprobs[row][: lengths[row]], stopped[row])
            for row, index in enumerate(self.indices)
        }
