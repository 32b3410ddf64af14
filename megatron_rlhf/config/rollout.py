"""How PPO samples responses, and by which engine."""

from dataclasses import dataclass, field
from enum import Enum

from megatron_rlhf.config.placement import GenerationLayoutConfig
from megatron_rlhf.config.training import SamplingConfig

BLOCK = 256
"""Tokens of a block of the cache of Megatron-Core's engine: flash-attn's kernels want multiples of this."""


class SamplingEngine(Enum):
    """What keeps the keys and values of responses, and decides which of them a pass continues."""

    native = "native"
    megatron = "megatron"


@dataclass(kw_only=True)
class RolloutConfig(SamplingConfig):
    """How responses are sampled, by which engine, and at what layout."""

    engine: SamplingEngine = SamplingEngine.native
    """native: our own, everywhere; megatron: Megatron-Core's (paged cache, shared prefixes, captured graphs), on GPUs with
    flash-attn and Megatron-Core 0.19. Both draw with the same random numbers. docs/sampling.md."""
    cache_gb: float | None = None
    """engine=megatron: GiB of each GPU for keys and values while it samples. Not given: as much as `batch_size` responses of
    the greatest length need; with less, responses wait for each other, and some are read again."""
    parallel: GenerationLayoutConfig = field(default_factory=GenerationLayoutConfig)
    """If given, the policy's weights are copied every iteration to a second copy at this layout, by Megatron-Core's
    resharding."""


def blocks_of(tokens: int) -> int:
    """Blocks that hold so many tokens of a sequence."""
    return -(-tokens // BLOCK)
