"""Sampling by Megatron-Core's dynamic inference engine (0.19): paged cache, shared prefixes, captured graphs.

The engine decides which tokens a pass reads, and keeps their keys and values. What is sampled from the logits, and when a
response ends, is decided here, by the code that our own engine uses: its random numbers, its log-probabilities.

An engine lives as long as its prompts take. The next ones get a new one, so its cache never outlives the weights.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.inference.config import InferenceConfig, PrefixCachingEvictionPolicy
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rlhf.config.model import Positions
from megatron_rlhf.config.rollout import BLOCK
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.rollout.sampling import Sampler, mix
from megatron_rlhf.rollout.sequences import SampledSequence, StopWatch, in_reading_order, sequences_of, tokens_done
from megatron_rlhf.rollout.types import Completion

PREFILL_TOKENS = 8192
"""Tokens that a pass reads at most, unless a prompt is longer."""
GRAPHS = 16
"""Numbers of requests, at most, for which a pass over one token each is captured; others are padded to the next."""


class _NoTokenizer:
    """The engine turns finished responses into text that nobody reads."""

    eod = -1

    def detokenize(self, tokens: list[int]) -> str:
        return ""


@dataclass
class _Draws:
    """Takes the place of the engine's own sampling: one token for each active request."""

    role: Role
    config: SamplingConfig
    stop_ids: Sequence[int]
    sequences: list[SampledSequence]
    listen: Callable[[int, int], object] | None
    tell_ended: Callable[[SampledSequence], object] | None
    finished: set[int] = field(default_factory=set)
    """Requests that the pass has ended."""

    def __post_init__(self) -> None:
        config = self.config
        self.sampler = Sampler(config.temperature, config.top_k, config.top_p, config.repetition_penalty)
        self.stops = torch.tensor(self.stop_ids, device=collectives.device(), dtype=torch.long)

    def sample_kernel(self, logits: Tensor, n: int, context: Any, *, output: Tensor, **_: Any) -> Tensor:
        """Token of each active request, from its row of the logits, into `output`."""
        ids = context.request_ids[context.paused_request_count : context.total_request_count].tolist()
        active = [self.sequences[i] for i in ids]
        logits_bv = self.role.respond(logits[:n])[:, : self.role.model.vocab_size]
        numbers = torch.tensor([(each.key, len(each.tokens)) for each in active], device=logits.device)
        keys_b, counts_b = numbers.unbind(dim=1)
        minimum = self.config.min_response_tokens
        too_early_b = counts_b < minimum - 1 if minimum > 1 else None
        tokens_b, logprobs_b = self.sampler(
            logits_bv, mix(keys_b, counts_b), self.stops, too_early_b, self._seen(active)
        )
        output.copy_(tokens_b)
        stops = frozenset(self.stop_ids)
        for sequence, token, logprob in zip(active, tokens_b.tolist(), logprobs_b.tolist(), strict=True):
            sequence.append(token, logprob, stops, minimum, self.config.longest_response)
            if self.listen is not None:
                self.listen(sequence.index, token)
            if self.tell_ended is not None and sequence.is_finished:
                self.tell_ended(sequence)
        self.finished = {sequence.index for sequence in active if sequence.is_finished}
        return output

    def ended(self, active_ids: list[int]) -> set[int]:
        """Which of these requests have ended: the engine asks after each pass."""
        return self.finished & set(active_ids)

    def _seen(self, active: list[SampledSequence]) -> Tensor | None:
        if self.config.repetition_penalty == 1:
            return None
        seen_bv = torch.zeros(len(active), self.role.model.vocab_size, dtype=torch.bool)
        for row, sequence in zip(seen_bv, active, strict=True):
            row[[*sequence.prompt, *sequence.tokens]] = True
        return seen_bv.to(collectives.device())


class _Model(GPTInferenceWrapper):
    """The model as the engine calls it. Passes over one token of each request are captured, and replayed from then on."""

    def __init__(self, module: GPTModel, context: DynamicInferenceContext, captures: bool) -> None:
        super().__init__(module, context)
        self.captures = captures
        self.captured: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        """By the size of the pass: the graph, and where it leaves the logits."""

    def run_one_forward_step(self, inference_input: dict[str, Any], recv_buffer_seq_len: int | None = None) -> Tensor:
        """Logits of a pass. The engine's buffers, which the pass reads, keep their addresses."""
        context, run = self.inference_context, super().run_one_forward_step
        if not (self.captures and context.using_cuda_graph_this_step()):
            return run(inference_input, recv_buffer_seq_len)
        size = context.padded_batch_dimensions
        if size in self.captured:
            graph, logits = self.captured[size]
            graph.replay()
            return logits
        # Kernels that are made or tuned at their first call are so now. Keys and values are written once more below, the same.
        logits = run(inference_input, recv_buffer_seq_len).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may be using the GPU
            self.captured[size] = graph, run(inference_input, recv_buffer_seq_len)
        return logits


def generate(
    role: Role,
    prompts: Sequence[Sequence[int]],
    keys: Tensor,
    config: SamplingConfig,
    stop_ids: Sequence[int],
    stop_watch: Callable[[], StopWatch | None] = lambda: None,
    listen: Callable[[int, int], object] | None = None,
    ended: Callable[[SampledSequence], object] | None = None,
    cache_gb: float | None = None,
) -> list[Completion]:
    """As `rollout.generate.generate`. Without `cache_gb`, the cache holds the longest response in every slot."""
    sequences = sequences_of(prompts, keys, stop_watch)
    limit, watch = config.longest_response, role.layout.watch or (lambda *_: None)
    watch(*tokens_done(sequences, limit))
    with role.layout, role.decoding(), InferenceMode.active():
        draws = _Draws(role, config, tuple(stop_ids), sequences, listen, ended)
        engine = _engine(role, sequences, config, cache_gb)
        engine.controller._sampling = draws
        engine.controller.set_stop_word_finished_ids_callback(draws.ended)
        for sequence in in_reading_order(sequences):
            asked = SamplingParams(num_tokens_to_generate=limit, termination_id=_NoTokenizer.eod)
            engine.add_request(sequence.index, list(sequence.prompt), asked)
        while engine.has_unfinished_requests():
            engine.step_modern()
            watch(*tokens_done(sequences, limit))
    del engine
    gc.collect()  # its parts refer to each other: without this, the cache would stay for a while
    assert all(sequence.is_finished for sequence in sequences), "Megatron-Core's engine refused a prompt"
    return [sequence.completion() for sequence in sequences]


def _engine(
    role: Role, sequences: Sequence[SampledSequence], config: SamplingConfig, cache_gb: float | None
) -> DynamicInferenceEngine:
    (module,) = role.modules
    parallel, groups = role.layout.config, role.layout.groups
    longest = max(len(sequence.prompt) for sequence in sequences) + config.longest_response
    if role.model.positions is Positions.rope:
        # The table is kept for later passes of this length; made by the engine it could not be kept for a backward pass.
        module.rotary_pos_emb(longest, packed_seq=False, cp_group=None)
    slots = min(config.batch_size, len(sequences))
    slots += -slots % parallel.tensor
    if cache_gb is None:
        # One block is for rows that only pad, half a one against rounding.
        cache_gb = (slots * -(-longest // BLOCK) + 1.5) * BLOCK * _bytes_of_a_token(module) / 2**30
    captures = parallel.pipeline == 1
    settings = InferenceConfig(
        block_size_tokens=BLOCK,
        buffer_size_gb=cache_gb,  # a fraction serves, too
        max_requests=slots,
        max_tokens=max(PREFILL_TOKENS, longest, slots),
        max_sequence_length=longest,
        pg_collection=groups,
        enable_prefix_caching=True,
        # Shared as long as a request has them. Blocks that nobody has any more (LRU) would be missing to requests that wait for
        # one: the engine counts free blocks only, and fails when all of its requests wait.
        prefix_caching_eviction_policy=PrefixCachingEvictionPolicy.REF_ZERO,
        num_cuda_graphs=GRAPHS if captures else None,
        use_cuda_graphs_for_non_decode_steps=False,
    )
    context = DynamicInferenceContext(module.config, settings)
    return DynamicInferenceEngine(TextGenerationController(_Model(module, context, captures), _NoTokenizer()), context)


def _bytes_of_a_token(module: GPTModel) -> int:
    """Its keys and values on this rank."""
    config = module.config
    groups = config.num_query_groups // config.tensor_model_parallel_size
    return 2 * config.params_dtype.itemsize * len(module.decoder.layers) * groups * config.kv_channels
