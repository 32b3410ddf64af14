"""Sampling responses from the model that trains, with a key/value cache."""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_rlhf.config.model import Precision
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.pipeline import forward_backward
from megatron_rlhf.rollout.beam_runner import beam_search
from megatron_rlhf.rollout.runner import ModelRunner
from megatron_rlhf.rollout.scheduler import Scheduler
from megatron_rlhf.rollout.sequences import SampledSequence, StopWatch, in_reading_order, sequences_of, tokens_done
from megatron_rlhf.rollout.types import Completion


def generate(
    role: Role,
    prompts: Sequence[Sequence[int]],
    keys: Tensor,
    config: SamplingConfig,
    stop_ids: Sequence[int],
    stop_watch: Callable[[], StopWatch | None] = lambda: None,
    static_shapes: bool | None = None,
    listen: Callable[[int, int], object] | None = None,
    ended: Callable[[SampledSequence], object] | None = None,
) -> list[Completion]:
    """Sample one response per prompt, on all ranks of this data-parallel replica together.

    There are as many batches of slots in flight as pipeline stages, so that no stage waits for another's sampled token. They
    share the waiting prompts: a slot whose sequence has finished takes the next one.

    Args:
        prompts: token ids, any lengths; prompt and longest response must fit the model's context.
        keys: [number of prompts] random keys (`sampling.row_keys`); a row's text depends only on its key and prompt.
        stop_ids: tokens that end a response.
        stop_watch: makes what else ends a response; called once for each response.
        static_shapes: decode all slots in every pass; on GPUs by default.
        listen: called with each token as it is sampled, and the number of its prompt; not by beam search.
        ended: called with each response as it ends; not by beam search.
    """
    assert role.layout.virtual_stages is None, "decoding needs a layout without virtual stages"
    static = torch.cuda.is_available() if static_shapes is None else static_shapes
    if config.beams > 1:
        return beam_search(role, prompts, config, stop_ids, stop_watch, static)
    sequences = sequences_of(prompts, keys, stop_watch)
    waiting = deque(in_reading_order(sequences))
    batches, limit = role.layout.config.pipeline, config.longest_response
    slots = min(config.batch_size, len(sequences))
    capacity = max(map(len, prompts)) + limit
    schedulers = [Scheduler(waiting, slots) for _ in range(batches)]
    runners = [ModelRunner(role, config, slots, capacity, tuple(stop_ids), static) for _ in range(batches)]
    stops = frozenset(stop_ids)

    def tell() -> None:
        if role.layout.watch is not None:
            role.layout.watch(*tokens_done(sequences, limit))

    tell()
    with role.decoding(in_fp8=config.precision is Precision.fp8_hybrid):
        while True:
            steps = [
                (scheduler, runner, step)
                for scheduler, runner in zip(schedulers, runners, strict=True)
                if (step := scheduler.next()) is not None
            ]
            if not steps:
                return [sequence.completion() for sequence in sequences]
            microbatches = [runner.microbatch(step) for _, runner, step in steps]
            forward_backward(role.chunks, microbatches, role.layout, forward_only=True)
            for scheduler, runner, step in steps:
                for sequence, (token, logprob) in zip(step.sequences, runner.results(step), strict=True):
                    sequence.append(token, logprob, stops, config.min_response_tokens, limit)
                    if listen is not None:
                        listen(sequence.index, token)
                    if ended is not None and sequence.is_finished:
                        ended(sequence)
                runner.move(*scheduler.drop_finished())
            tell()
