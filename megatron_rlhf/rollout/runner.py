"""The forward passes of decoding: what the model reads, and the tokens sampled from its output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.models.layers.cache import KeyValueCache
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.rollout.sampling import Sampler, mix
from megatron_rlhf.rollout.scheduler import Step


@dataclass
class ModelRunner:
    """One batch of slots on the device: the cache, and for each slot its keys, its length and its last token."""

    role: Role
    config: SamplingConfig
    slots: int
    capacity: int
    """Tokens of the longest sequence."""
    stop_ids: tuple[int, ...]
    static_shapes: bool = False
    """Decode all slots over the whole cache in every pass: more work, but the fixed shapes that a captured graph needs."""

    def __post_init__(self) -> None:
        device = collectives.device()
        self.cache = KeyValueCache(self.slots, self.capacity)
        config = self.config
        self.sampler = Sampler(config.temperature, config.top_k, config.top_p, config.repetition_penalty)
        self.seen_bv = None
        """bool, for each slot: tokens that its prompt and response hold, where there is a penalty on them."""
        if config.repetition_penalty != 1:
            self.seen_bv = torch.zeros(self.slots, self.role.model.vocab_size, dtype=torch.bool, device=device)
        self.stops = torch.tensor(self.stop_ids, device=device, dtype=torch.long)
        self.lengths_b, self.counts_b, self.tokens_b = torch.zeros(3, self.slots, dtype=torch.long, device=device)
        """For each slot: tokens in the cache, tokens sampled, and the one sampled last."""
        self.keys_bt = torch.zeros(self.slots, config.longest_response, dtype=torch.long, device=device)
        """For each slot: random keys of its response's tokens. Made together: a hash is two dozen kernels, for any number."""
        self.places = torch.arange(self.capacity, device=device)
        self.sampled = torch.zeros(0)

    def microbatch(self, step: Step) -> Microbatch:
        """The forward pass of a step. On the last stage it leaves the sampled tokens for `results`."""
        return self._prefill(step) if step.prefill else self._decode(step)

    def results(self, step: Step) -> list[tuple[int, float]]:
        """Token and log-probability of each of the step's sequences, on all stages."""
        count = len(step.sequences)
        if not self.role.layout.is_last_stage:
            self.sampled = torch.zeros(2, count, dtype=torch.float64, device=self.places.device)
        # Tokens are exact in fp64, and both travel in one message.
        self.sampled = collectives.from_last_stage(self.sampled, self.role.layout)
        slots = step.slots
        if not step.prefill:
            self.lengths_b[slots] += 1
        self.tokens_b[slots] = self.sampled[0].long()
        self.counts_b[slots] += 1
        if self.seen_bv is not None:
            self.seen_bv[slots].scatter_(1, self.tokens_b[slots].unsqueeze(-1), True)
        tokens, logprobs = self.sampled.tolist()
        return [(int(token), logprob) for token, logprob in zip(tokens, logprobs, strict=True)]

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Moves sequences to other slots."""
        if sources:
            self.cache.move(sources, targets)
            for values_b in (self.keys_bt, self.lengths_b, self.counts_b, self.tokens_b):
                values_b[targets] = values_b[sources]
            if self.seen_bv is not None:
                self.seen_bv[targets] = self.seen_bv[sources]

    def _prefill(self, step: Step) -> Microbatch:
        # A prompt that is sampled several times is read once.
        prompts = list(dict.fromkeys(tuple(sequence.prompt) for sequence in step.sequences))
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        device, slots = self.places.device, step.slots
        rows = torch.tensor([row_of[tuple(sequence.prompt)] for sequence in step.sequences], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        keys_b = torch.tensor([sequence.key for sequence in step.sequences], device=device)
        self.keys_bt[slots] = mix(keys_b.unsqueeze(-1), self.places[: self.config.longest_response])
        self.lengths_b[slots], self.counts_b[slots] = lengths[rows], 0
        if self.seen_bv is not None:
            read = torch.zeros(len(prompts), self.role.model.vocab_size, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                read[row, list(prompt)] = True
            self.seen_bv[slots] = read.to(device)[rows]
        tokens = tokens.to(device)
        positions = self.places[: tokens.shape[1]].expand_as(tokens)
        # Padding is on the right, where no real token attends to it: causal attention needs no mask.
        self.cache.prefill(positions, lengths - 1, rows, step.first_slot)
        return self._microbatch(tokens, positions, None, lambda logits_bv: self._sample(logits_bv[rows], step))

    def _decode(self, step: Step) -> Microbatch:
        count = self.slots if self.static_shapes else len(step.sequences)
        positions = [sequence.position for sequence in step.sequences]
        longest = self.capacity - 1 if self.static_shapes else max(positions)
        aligned = not self.static_shapes and min(positions) == longest
        lengths_b = self.lengths_b[:count]
        mask = None if aligned else (self.places[: longest + 1] <= lengths_b.unsqueeze(-1)).view(count, 1, 1, -1)
        self.cache.decode(lengths_b, longest, aligned)
        tokens, positions_b1 = self.tokens_b[:count].unsqueeze(-1), lengths_b.unsqueeze(-1)
        return self._microbatch(
            tokens, positions_b1, mask, lambda logits_bv: self._sample(logits_bv[: len(step.sequences)], step)
        )

    def _microbatch(self, tokens_bs: Tensor, positions_bs: Tensor, mask: Tensor | None, sample) -> Microbatch:
        inference = {"position_ids": positions_bs, "attention_mask": mask, "inference_context": self.cache}

        def draw(logits_b1v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            sample(self.role.respond(logits_b1v[:, -1])[:, : self.role.model.vocab_size])
            return logits_b1v.new_zeros(()), {}

        return Microbatch(tokens_bs, draw, inference)

    def _sample(self, logits_bv: Tensor, step: Step) -> None:
        slots, enough = step.slots, self.config.min_response_tokens - 1
        counts_b = self.counts_b[slots]
        too_early_b = counts_b < enough if any(len(each.tokens) < enough for each in step.sequences) else None
        seen_bv = None if self.seen_bv is None else self.seen_bv[slots]
        keys_b = self.keys_bt[slots].gather(1, counts_b.unsqueeze(-1)).squeeze(-1)
        tokens_b, logprobs_b = self.sampler(logits_bv, keys_b, self.stops, too_early_b, seen_bv)
        self.sampled = torch.stack([tokens_b.double(), logprobs_b.double()])
