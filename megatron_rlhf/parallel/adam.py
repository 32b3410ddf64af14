"""Adam for machines without Transformer Engine and Apex, with or without GPUs, whose state can be saved and resharded."""

from typing import Any

import torch


def use_where_torch_would_serve() -> None:
    """Tell Megatron-Core that `AdamWithGroupStep` is its fused Adam, for when it would fall back to torch's.

    The distributed optimizer's fully reshardable checkpoints read `step` from the parameter group, where the fused
    Adams of Apex and Transformer Engine keep it; torch's keeps it with each parameter.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = AdamWithGroupStep
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = AdamWithGroupStep
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


class AdamWithGroupStep(torch.optim.AdamW):
    """AdamW that counts steps in the parameter group, as the fused Adams do, so that its state reshards like theirs.

    It is torch's fused kernel: one pass over weights, gradients and moments instead of a dozen.
    """

    def __init__(self, params, *args, adam_w_mode: bool = True, **kwargs) -> None:
        super().__init__(params, *args, fused=True, **kwargs)
        self.decoupled = adam_w_mode
        for group in self.param_groups:
            group["step"] = 0
            group["decoupled_weight_decay"] = adam_w_mode

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Adam's own method looks for a `step` in every parameter's state.
        torch.optim.Optimizer.__setstate__(self, state)

    def step(self, closure=None):
        """One update; the per-parameter `step` that torch's kernels need exists only during it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if parameter.grad is None:
                    continue
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] = torch.full((), float(group["step"]), device=parameter.device)
            group["step"] += 1
        loss = super().step(closure)
        for state in self.state.values():
            state.pop("step", None)
        return loss
