"""One update of fine-tuning, forward, backward and Adam: its rate as a share of that of bare matrix products.

The products are those of the same shapes, measured in the same run; FLOPs are the model's (attention's causal half
included), so what is neither a product nor hidden behind one lowers the share. Also `transformers` with torch's AdamW, and with
`--bf16` our own update in bf16.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.side_by_side import InAnotherProcess, alternate, report, sizes
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.models.microbatches import TokenBatch, language_model_microbatches
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import runtime
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.trainers.step import TrainedRole

BACKWARD_TOO = 3
"""Forward and backward together take three times the FLOPs of the forward pass."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Shape and batch."""
    parser.add_argument("--bf16", action="store_true", help="also in bf16, for processors with AVX512-BF16 or AMX")
    sizes(parser, layers=8, hidden=512, heads=8, vocab=8192, batch=4, length=512, rounds=5, threads=2)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """megatron_rlhf, `transformers` and the bare products in turn."""
    runtime.initialize()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # One more token than is read: the last is only predicted.
    tokens = torch.randint(0, options.vocab, (options.batch, options.length + 1))
    contenders: dict[str, Callable[[], object]] = {"megatron_rlhf": megatron_update(options, tokens)}
    if options.bf16:
        contenders["megatron_rlhf, bf16"] = megatron_update(options, tokens, Precision.bf16)
    contenders["transformers"] = InAnotherProcess(transformers_update, options, tokens)
    seconds = alternate({**contenders, "bare products": bare_products(options)}, options.rounds)
    runtime.shutdown()
    made = report({name: seconds[name] for name in contenders}, tokens.numel(), "tokens/s")
    products, whole = flops(options)
    shares = {
        name: sorted(
            (whole / step) / (products / bare)
            for step, bare in zip(seconds[name], seconds["bare products"], strict=True)
        )[options.rounds // 2]
        for name in ("megatron_rlhf", "transformers")
    }
    for name, share in shares.items():
        print(f"{name}: {share:.1%} of the rate of bare products")
    rate = products / sorted(seconds["bare products"])[options.rounds // 2] / 1e9
    return {**made, "ratio": shares["megatron_rlhf"], "shares": shares, "bare_products_gflops": rate}


def megatron_update(
    options: argparse.Namespace, tokens: torch.Tensor, precision: Precision = Precision.fp32
) -> Callable[[], object]:
    """As the SFT trainer does it."""
    layout = ParallelLayout.create(ParallelConfig())
    layout.seed(0)
    shape = ModelConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        vocab_size=options.vocab,
        max_sequence_length=options.length,
    )
    role = Role.build("policy", shape, layout, precision)
    trained = TrainedRole.create(role, OptimizerConfig(lr=1e-4), precision)
    batch = TokenBatch.pack(list(tokens), [1] * options.batch)
    return lambda: trained.update(language_model_microbatches(batch, role, options.batch, "loss"), 1e-4)


def transformers_update(options: argparse.Namespace, tokens: torch.Tensor) -> Callable[[], None]:
    """GPT-2 of the same shape, its own loss, gradients clipped as in megatron_update."""
    torch.set_num_threads(options.threads)
    config = GPT2Config(
        vocab_size=options.vocab,
        n_positions=options.length,
        n_embd=options.hidden,
        n_layer=options.layers,
        n_head=options.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)

    def update() -> None:
        optimizer.zero_grad()
        logits = model(tokens[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return update


def products(options: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how many) of the linear maps of a forward pass."""
    h, layers = options.hidden, options.layers
    return [(h, 3 * h, layers), (h, h, layers), (h, 4 * h, layers), (4 * h, h, layers), (h, options.vocab, 1)]


def flops(options: argparse.Namespace) -> tuple[int, int]:
    """FLOPs of the bare products, and of the whole model with attention."""
    tokens = options.batch * options.length
    linear = BACKWARD_TOO * sum(2 * tokens * inputs * outputs * many for inputs, outputs, many in products(options))
    scores = BACKWARD_TOO * 2 * tokens * options.length * options.hidden * options.layers
    return linear, linear + scores


def bare_products(options: argparse.Namespace) -> Callable[[], None]:
    """Forward, gradient of the input, gradient of the weight: nothing else."""
    tokens = options.batch * options.length
    made = [
        (torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs), many)
        for inputs, outputs, many in products(options)
    ]

    def multiply() -> None:
        for x, weight, gradient, many in made:
            for _ in range(many):
                torch.mm(x, weight.t())
                torch.mm(gradient, weight)
                torch.mm(gradient.t(), x)

    return multiply
