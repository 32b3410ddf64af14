"""Beam search with the model that trains: the beams of a prompt are in neighbouring slots of the cache."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rlhf.config.model import Precision
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.pipeline import forward_backward
from megatron_rlhf.rollout.beams import BeamSearch, Candidate
from megatron_rlhf.rollout.runner import ModelRunner
from megatron_rlhf.rollout.sampling import penalise
from megatron_rlhf.rollout.scheduler import Step
from megatron_rlhf.rollout.sequences import SampledSequence, StopWatch
from megatron_rlhf.rollout.types import Completion


class BeamRunner(ModelRunner):
    """Forward passes that leave, for each prompt, the best continuations of its beams."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.totals_b = torch.zeros(self.slots, device=self.places.device)
        beams = self.config.beams
        # Every stop token may end every beam; as many again go on.
        self.kept = min(max(2, 1 + len(self.stop_ids)), self.role.model.vocab_size) * beams

    def candidates(self, step: Step) -> list[list[Candidate]]:
        """Of each prompt of the step, best first, on all stages."""
        groups = len(step.sequences) // self.config.beams
        if not self.role.layout.is_last_stage:
            self.sampled = torch.zeros(3, groups, self.kept, dtype=torch.float64, device=self.places.device)
        self.sampled = collectives.from_last_stage(self.sampled, self.role.layout)
        vocab = self.role.model.vocab_size
        return [
            [
                Candidate(total, int(index) // vocab, int(index) % vocab, logprob)
                for total, index, logprob in zip(*rows, strict=True)
            ]
            for rows in self.sampled.transpose(0, 1).tolist()
        ]

    def keep(self, step: Step, searches: Sequence[BeamSearch]) -> list[int]:
        """Bring the beams that go on, of the searches that are not over, to the first slots; returns which of the searches."""
        count, device = len(step.sequences), self.places.device
        if not step.prefill:
            self.lengths_b[:count] += 1
        going = [i for i, search in enumerate(searches) if not search.is_over]
        rows = torch.tensor(
            [i * self.config.beams + parent for i in going for parent in searches[i].parents], device=device
        )
        beams = [beam for i in going for beam in searches[i].beams]
        if beams:
            self.cache.take(rows)
            into = slice(0, len(beams))
            self.lengths_b[into], self.counts_b[into] = self.lengths_b[rows], len(beams[0].tokens)
            self.tokens_b[into] = torch.tensor([beam.tokens[-1] for beam in beams], device=device)
            self.totals_b[into] = torch.tensor([beam.total for beam in beams], device=device)
            if self.seen_bv is not None:
                self.seen_bv[into] = self.seen_bv[rows].scatter(1, self.tokens_b[into].unsqueeze(-1), True)
        return going

    def _sample(self, logits_bv: Tensor, step: Step) -> None:
        logprobs_bv = torch.log_softmax(logits_bv.float(), dim=-1)
        wanted_bv = logprobs_bv
        if self.seen_bv is not None:
            penalised_bv = penalise(logprobs_bv, self.config.repetition_penalty)
            wanted_bv = torch.where(self.seen_bv[step.slots], penalised_bv, logprobs_bv)
        if int(self.counts_b[0]) < self.config.min_response_tokens - 1:
            wanted_bv = wanted_bv.index_fill(-1, self.stops, -torch.inf)
        width = self.config.beams * logprobs_bv.shape[-1]
        totals_gn = (self.totals_b[step.slots].unsqueeze(-1) + wanted_bv).view(-1, width)
        best_gk, index_gk = totals_gn.topk(self.kept)
        own_gk = logprobs_bv.reshape(-1, width).gather(1, index_gk)
        self.sampled = torch.stack([best_gk.double(), index_gk.double(), own_gk.double()])


def beam_search(
    role: Role,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    stop_ids: Sequence[int],
    stop_watch: Callable[[], StopWatch | None] = lambda: None,
    static_shapes: bool = False,
) -> list[Completion]:
    """The best response to each prompt that `config.beams` beams find; arguments as of `generate.generate`."""
    at_once = max(1, config.batch_size // config.beams)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Completion] = {}

    def tell() -> None:
        if role.layout.watch is not None:
            role.layout.watch(len(found) * config.longest_response, len(prompts) * config.longest_response)

    with role.decoding(in_fp8=config.precision is Precision.fp8_hybrid):
        for start in range(0, len(order), at_once):
            tell()
            chosen = order[start : start + at_once]
            texts = [prompts[i] for i in chosen]
            found |= zip(chosen, _search(role, texts, config, stop_ids, stop_watch, static_shapes), strict=True)
    tell()
    return [found[i] for i in range(len(prompts))]


def _search(
    role: Role,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    stop_ids: Sequence[int],
    stop_watch: Any,
    static: bool,
) -> list[Completion]:
    """Prompts that are read together."""
    limit, stops = config.longest_response, frozenset(stop_ids)

    def ends(tokens: list[int]) -> bool:
        watch = stop_watch()  # beams fork: each is read from its beginning
        is_whole = [watch(token) for token in tokens][-1] if watch is not None else False
        return tokens[-1] in stops or (is_whole and len(tokens) >= config.min_response_tokens)

    searches = [BeamSearch(config.beams, limit, ends) for _ in prompts]
    capacity = max(map(len, prompts)) + limit
    runner = BeamRunner(role, config, len(prompts) * config.beams, capacity, tuple(stop_ids), static)
    runner.totals_b[:] = torch.tensor([beam.total for search in searches for beam in search.beams])
    active, prefill = list(range(len(prompts))), True
    while active:
        sequences = [
            SampledSequence(i, prompts[i], 0, tokens=beam.tokens) for i in active for beam in searches[i].beams
        ]
        step = Step(sequences, 0, prefill)
        forward_backward(role.chunks, [runner.microbatch(step)], role.layout, forward_only=True)
        for i, candidates in zip(active, runner.candidates(step), strict=True):
            searches[i].advance(candidates)
        active = [active[row] for row in runner.keep(step, [searches[i] for i in active])]
        prefill = False
    best = [search.finished[0] for search in searches]
    return [Completion(each.beam.tokens, each.beam.logprobs, each.stopped) for each in best]
