"""Models of `transformers`, read one unpadded sequence at a time, and the optimizer that all three stages share."""

import math
from collections.abc import Callable, Iterable

import torch
from reference.data import Settings
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForTokenClassification

Weights = dict[str, Tensor]


def language_model(folder: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def scalar_model(folder: object, head_seed: int | None = None) -> torch.nn.Module:
    """One number per token; a new head is N(0, 1 / (width + 1)) (Stiennon et al. 2020, appendix B.1), a missing bias 0."""
    model = LlamaForTokenClassification.from_pretrained(str(folder), dtype=torch.float32, num_labels=1).eval()
    if head_seed is not None:
        width = model.config.hidden_size
        drawn = torch.randn(1, width, generator=torch.Generator().manual_seed(head_seed))
        model.score.weight.data.copy_(drawn / math.sqrt(width + 1))
        model.score.bias.data.zero_()
    return model


def weights_of(model: torch.nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def count_weights(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def cost(model: torch.nn.Module, tokens: int) -> dict[str, float]:
    """Cost of a step that trains on `tokens` tokens: 6 FLOPs per weight and token (Kaplan et al. 2020)."""
    return {"step_tokens": tokens, "step_flops": 6 * tokens * count_weights(model)}


def logprobs(model: torch.nn.Module, tokens: list[int], temperature: float = 1.0, known: int | None = None) -> Tensor:
    """[length - 1, known] whole distributions: row i is that of the token after tokens[: i + 1].

    `known`: only this many of the embedding's rows are tokens, the others have no probability; None: all are.
    """
    logits = model(input_ids=torch.tensor([tokens[:-1]])).logits[0, :, :known]
    return torch.log_softmax(logits / temperature, dim=-1)


def of_tokens(distributions: Tensor, tokens: list[int]) -> Tensor:
    """[length - 1] log-probability of each token except the first."""
    return distributions.gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)


def scalars(model: torch.nn.Module, tokens: list[int]) -> Tensor:
    """[length] the head's number at each token."""
    return model(input_ids=torch.tensor([tokens])).logits[0, :, 0]


def text_loss(
    model: torch.nn.Module, sequences: Iterable[tuple[list[int], int]], then: Callable[[Tensor], object]
) -> float:
    """Mean over target tokens of -log p, given (tokens, first target); `then` gets each sequence's part of it."""
    sequences = list(sequences)
    targets = sum(len(tokens) - first for tokens, first in sequences)
    total = 0.0
    for tokens, first in sequences:
        part = -of_tokens(logprobs(model, tokens), tokens)[first - 1 :].sum() / targets
        then(part)
        total += part.item()
    return total


class Adam:
    """Adam with decoupled weight decay (Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2).

    Gradients are first scaled down to a global norm; matrices decay, biases and norms do not.
    """

    def __init__(self, model: torch.nn.Module, settings: Settings, role: str):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.steps = 0
        keys = ("betas", "epsilon", "weight_decay", "clip_norm")
        self.betas, self.epsilon, self.decay, self.clip_norm = (settings[f"{role}.optimizer.{key}"] for key in keys)

    @torch.no_grad()
    def step(self, rate: float) -> float:
        """One update with the gradients, which are then cleared. Returns their norm before clipping."""
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in self.parameters))
        scale = self.clip_norm / max(norm, self.clip_norm)
        self.steps += 1
        first_decay, second_decay = self.betas
        for parameter, (first, second) in zip(self.parameters, self.moments, strict=True):
            gradient = parameter.grad * scale
            first.copy_(first_decay * first + (1 - first_decay) * gradient)
            second.copy_(second_decay * second + (1 - second_decay) * gradient**2)
            if parameter.dim() > 1:
                parameter -= rate * self.decay * parameter
            unbiased_first = first / (1 - first_decay**self.steps)
            unbiased_second = second / (1 - second_decay**self.steps)
            parameter -= rate * unbiased_first / (unbiased_second.sqrt() + self.epsilon)
            parameter.grad = None
        return norm


def cosine_rate(step: int, total: int, peak: float, floor: float, warmup: int) -> float:
    """Linear from 0 over the warmup, then half a cosine down to `floor` times the peak (Ouyang et al. 2022, appendix C)."""
    if step < warmup:
        return peak * step / warmup
    share = (step - warmup) / (total - warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2)
