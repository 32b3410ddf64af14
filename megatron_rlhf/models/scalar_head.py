"""A linear map from the last hidden state to one number per token: the reward, or the value."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ScalarHead(MegatronModule):
    """hidden [s, b, h] -> scalars [s, b, 1] in fp32.

    Weights start as N(0, 1 / (h + 1)) (Stiennon et al. 2020, appendix B.1), the bias as 0; it is set once, after
    training, so that demonstrations score 0 on average. Every tensor-parallel rank computes the whole head.
    """

    def __init__(self, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, device=torch.cuda.current_device()))
        self.bias = torch.nn.Parameter(torch.zeros(1, device=torch.cuda.current_device()))
        self.tp_group = groups.tp
        self.sequence_parallel = config.sequence_parallel
        self.reset(seed=0)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw the weights again, from a generator of their own: the same numbers on every rank of every layout."""
        drawn = torch.randn(self.weight.shape, generator=torch.Generator().manual_seed(seed), device="cpu")
        self.weight.copy_(drawn * (self.config.hidden_size + 1) ** -0.5)
        self.bias.zero_()

    def forward(
        self, hidden_sbh: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Has the signature of the output layer it replaces; both optional arguments belong to an unembedding."""
        if self.sequence_parallel:
            # Each rank back-propagates the same full gradient, so each takes its slice of it: no sum.
            hidden_sbh = gather_from_sequence_parallel_region(
                hidden_sbh, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return self.of(hidden_sbh), None

    def of(self, hidden: Tensor) -> Tensor:
        """[..., h] -> [..., 1]."""
        return torch.nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())
