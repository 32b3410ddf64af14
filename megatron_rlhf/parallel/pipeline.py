"""Microbatches through Megatron-Core's schedules: the only caller of them.

A microbatch has its own loss, already divided by global counts, so one schedule handles microbatches of several kinds
and lengths, and gradients are plain sums over microbatches and data-parallel ranks.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model, get_model_config, unwrap_model
from torch import Tensor

from megatron_rlhf.parallel import context
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.parallel.packing import Arrangement

Statistics = dict[str, Tensor]


@dataclass
class Microbatch:
    """Tokens [b, s], and what to do with the model's output [b, s, ...] on the last stage."""

    tokens_bs: Tensor
    loss: Callable[[Any], tuple[Tensor, Statistics]]
    inference: dict[str, Any] | None = None
    """Arguments of a decoding pass: position_ids, attention_mask, inference_context."""
    arrangement: Arrangement | None = None
    """How sequences are arranged in the tokens; None: one row each, padded on the right."""
    wanted_n: Tensor | None = None
    """Places in [b, s], flattened, whose output the loss gets: [n, ...], or a language model's `Logits`. None: all, as a
    tensor [b, s, ...]."""

    @classmethod
    def of(cls, arrangement: Arrangement, wanted_nw: Tensor, loss: Callable[[Any], tuple[Tensor, Statistics]]):
        """`wanted_nw`: which tokens of each sequence, on the CPU; the loss gets theirs, sequence by sequence."""
        wanted = arrangement.place_ns[wanted_nw].to(arrangement.tokens_bs.device, non_blocking=True)
        return cls(arrangement.tokens_bs, loss, arrangement=arrangement, wanted_n=wanted)

    def sequences(self) -> list[list[int]]:
        """Token ids of each sequence."""
        if self.arrangement is None:
            return self.tokens_bs.tolist()
        tokens = self.tokens_bs.flatten().tolist()
        return [[tokens[i] for i in places if i >= 0] for places in self.arrangement.place_ns.tolist()]


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    layout: ParallelLayout,
    forward_only: bool = False,
) -> list[Statistics]:
    """Run all microbatches in one schedule (one fill, one drain), where there is something to schedule: gradients, or stages.
    Returns their statistics, on the last stage only."""
    if forward_only and layout.config.pipeline == 1:
        return _forward(chunks[0], microbatches, layout)
    config = get_model_config(chunks[0])
    virtual = layout.virtual_stages
    count = len(microbatches)
    assert count > 0, "a schedule needs at least one microbatch"
    if virtual is not None and count % layout.config.pipeline:
        microbatches = [*microbatches, *[_empty(microbatches[0])] * (-count % layout.config.pipeline)]
    arguments: dict[str, Any] = {
        "forward_step_func": _forward_step,
        "data_iterator": [_told(microbatches, layout), *(iter(microbatches) for _ in chunks[1:])],
        "model": list(chunks),
        "num_microbatches": len(microbatches),
        "seq_length": 1,  # ignored: lengths vary
        "micro_batch_size": 1,
        "forward_only": forward_only,
        "pg_collection": layout.groups,
        "p2p_communicator": P2PCommunicator(layout.groups.pp, config),
    }
    schedule = get_forward_backward_func(layout.config.pipeline, virtual)
    if virtual is None:  # the non-interleaved schedules take one iterator and one model
        arguments["data_iterator"] = arguments["data_iterator"][0]
    with layout, torch.set_grad_enabled(not forward_only):
        return schedule(**arguments)[:count]


def _forward(model: torch.nn.Module, microbatches: Sequence[Microbatch], layout: ParallelLayout) -> list[Statistics]:
    """One after the other, without a schedule, whose own work would be some hundredths of a decoded token's."""
    if isinstance(model, MegatronModule):
        model.set_is_first_microbatch()  # weights that Transformer Engine keeps in fp8 are made anew
    told = _told(microbatches, layout)

    def one() -> Statistics:
        output, loss_of = _forward_step(told, model)
        return loss_of(output)[-1]

    with layout, torch.no_grad():
        return [one() for _ in microbatches]


def _told(microbatches: Sequence[Microbatch], layout: ParallelLayout) -> Iterator[Microbatch]:
    """The microbatches, one by one as their turn comes, which `layout.watch` hears of; decoding tells by itself."""
    for done, microbatch in enumerate(microbatches):
        if layout.watch is not None and microbatch.inference is None:
            layout.watch(done, len(microbatches))
        yield microbatch


def _forward_step(
    data_iterator: Iterator[Microbatch], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Statistics]]]:
    microbatch = next(data_iterator)
    tokens, group = microbatch.tokens_bs, get_attr_wrapped_model(model, "pg_collection").cp
    if microbatch.inference is not None:
        output = model(tokens, **microbatch.inference, runtime_gather_output=True)
    else:
        output = _read(model, microbatch, group)

    def loss_of(output: Tensor) -> tuple[Tensor, Tensor, Statistics]:
        logits_of = getattr(unwrap_model(model), "logits", None) if microbatch.wanted_n is not None else None
        if microbatch.inference is None:
            # Of hidden states, each rank will use its own: it shares the work on logits with the others.
            output = context.gather(output, 1, group, sum_gradients=logits_of is not None)
        if microbatch.wanted_n is not None:
            output = output.flatten(0, 1)
            if group.size() > 1:  # otherwise the model has already selected them
                output = output[microbatch.wanted_n]
        loss, statistics = microbatch.loss(output if logits_of is None else logits_of(output))
        # The token count of zero tells Megatron-Core that the loss is normalised already.
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), statistics

    return output, loss_of


def _read(model: torch.nn.Module, microbatch: Microbatch, group: dist.ProcessGroup) -> Tensor:
    tokens, arrangement = microbatch.tokens_bs, microbatch.arrangement
    packed: dict[str, Any] = {}
    if arrangement is not None and arrangement.segments is not None:
        packed["packed_seq_params"] = arrangement.segments
    positions = arrangement.positions_bs if arrangement is not None else None
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    mine = context.split(tokens, 1, group)
    if microbatch.wanted_n is not None:
        whole = group.size() == 1  # else wanted tokens are found among those of all ranks, later
        packed["loss_mask"] = microbatch.wanted_n if whole else torch.arange(mine.numel(), device=mine.device)
    output = model(mine, context.split(positions, 1, group), None, **packed)
    if microbatch.wanted_n is None or group.size() == 1 or not unwrap_model(model).post_process:
        return output
    return output.view(len(mine), mine.shape[1], -1)


def _empty(like: Microbatch) -> Microbatch:
    # The interleaved schedule needs a multiple of the pipeline size; these fill it up with a loss of zero.
    def nothing(output: Any) -> tuple[Tensor, Statistics]:
        made_of = getattr(output, "made_of", (output,))  # logits need not exist for that
        return sum(tensor.sum() for tensor in made_of) * 0.0, {}

    return dataclasses.replace(like, loss=nothing)
