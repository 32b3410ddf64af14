"""Training a part of a model: low-rank adapters beside frozen matrices (LoRA), or some of its weights."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import Activation, ModelConfig


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): a frozen W x becomes W x + alpha / rank * B A x; A and B train."""

    rank: int | None = None
    """Train adapters of this rank, and nothing else of the model but a scalar head; not given: no adapters."""
    alpha: float = 32.0
    """The adapters' output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapters' input, in training."""
    targets: list[str] = field(default_factory=list)
    """Projections that get an adapter, by Llama's names for every architecture: q_proj, k_proj, v_proj, o_proj, gate_proj,
    up_proj, down_proj, or patterns of these; not given: all that the model has."""

    def adapter(self, model: ModelConfig, key: str) -> "Adapter | None":
        """The adapters of a model; None: it has none.

        Raises:
            UserError: for a target that the model does not have.
        """
        if self.rank is None:
            return None
        known = [name for parts in projections(model).values() for name in parts]
        for target in self.targets:
            if not any(fnmatchcase(name, target) for name in known):
                raise UserError(
                    f"{key}.targets: {target} matches no projection of this model; it has {', '.join(known)}"
                )
        chosen = [n for n in known if not self.targets or any(fnmatchcase(n, target) for target in self.targets)]
        return Adapter(self.rank, self.alpha, tuple(chosen))


@dataclass(frozen=True)
class Adapter:
    """Which adapters a model has."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Adapted projections, in the order of `projections`."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def parts(self, linear: str, model: ModelConfig) -> dict[str, tuple[int, int]]:
        """The adapted projections of a linear layer, with their outputs and inputs."""
        return {name: shape for name, shape in projections(model)[linear].items() if name in self.targets}

    def parameters(self, model: ModelConfig, tensor: int = 1) -> int:
        """Weights of the adapters of one layer, on one of `tensor` ranks: of the two factors, one is split."""
        count = 0
        for linear, parts in projections(model).items():
            for name, (rows, columns) in parts.items():
                if name in self.targets:
                    split, whole = (columns, rows) if linear in ROW_PARALLEL else (rows, columns)
                    count += self.rank * (split // tensor + whole)
        return count

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> "Adapter | None":
        return None if content is None else cls(content["rank"], content["alpha"], tuple(content["targets"]))


ROW_PARALLEL = ("self_attention.linear_proj", "mlp.linear_fc2")
"""Linear layers whose input is split over tensor-parallel ranks; that of the others is their output."""


def projections(model: ModelConfig) -> dict[str, dict[str, tuple[int, int]]]:
    """The linear layers of a transformer layer, and the projections that each holds, as (outputs, inputs)."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    width = model.head_dim or hidden // heads
    keys = (model.num_query_groups or heads) * width
    ffn = model.ffn_hidden_size or 4 * hidden
    gate = {"gate_proj": (ffn, hidden)} if model.activation is Activation.swiglu else {}
    return {
        "self_attention.linear_qkv": {
            "q_proj": (heads * width, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
        },
        "self_attention.linear_proj": {"o_proj": (hidden, heads * width)},
        "mlp.linear_fc1": {**gate, "up_proj": (ffn, hidden)},
        "mlp.linear_fc2": {"down_proj": (hidden, ffn)},
    }


_LAYERS = re.compile(r"layers\.(\d+)(-(\d*))?")
_IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\..+")


def selects(pattern: str, name: str) -> bool:
    """`layers.4-7`, `layers.4-` or `layers.4` selects layers, counted from 0; else a weight's name, the beginning of one up
    to a dot, or a pattern with `*`."""
    if layers := _LAYERS.fullmatch(pattern):
        found = _IN_LAYER.fullmatch(name)
        first, last = int(layers[1]), layers[3] if layers[2] else layers[1]
        return found is not None and first <= int(found[1]) and (last == "" or int(found[1]) <= int(last))
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
