"""Sampling with our key/value cache against `transformers`' generate."""

import argparse
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.side_by_side import alternate, report, sizes
from megatron_rlhf.config.model import Activation, ModelConfig, Norm, ParallelConfig, Positions, Precision
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import runtime
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.rollout.generate import generate
from megatron_rlhf.rollout.sampling import row_keys


def arguments(parser: argparse.ArgumentParser) -> None:
    """Shape and sizes."""
    parser.add_argument("--arch", choices=("gpt2", "llama"), default="gpt2")
    sizes(parser, layers=4, hidden=256, heads=4, vocab=1024, batch=16, prompt=64, response=128, rounds=5, threads=1)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Sampling with our key/value cache against `transformers`' generate: same shape, batch, length, one process."""
    runtime.initialize()
    torch.set_num_threads(options.threads)
    layout = ParallelLayout.create(ParallelConfig())
    layout.seed(0)
    ours = Role.build("policy", shape(options), layout, Precision.fp32).frozen()
    theirs = peer(options).eval()
    prompts = torch.randint(2, options.vocab, (options.batch, options.prompt))
    keys = row_keys(0, 0, torch.arange(options.batch), torch.zeros(options.batch, dtype=torch.long))
    sampling = SamplingConfig(
        max_response_tokens=options.response, min_response_tokens=options.response, batch_size=options.batch
    )

    def run_ours() -> None:
        completions = generate(ours, prompts.tolist(), keys, sampling, [0])
        assert all(len(completion.tokens) == options.response for completion in completions)

    def run_theirs() -> None:
        with torch.no_grad():
            output = theirs.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                min_new_tokens=options.response,
                max_new_tokens=options.response,
                pad_token_id=0,
                eos_token_id=0,
            )
        assert output.shape[1] == options.prompt + options.response

    tokens = options.batch * options.response
    seconds = alternate({"megatron_rlhf": run_ours, "transformers": run_theirs}, options.rounds)
    runtime.shutdown()
    return report(seconds, tokens, "tokens/s")


def shape(options: argparse.Namespace) -> ModelConfig:
    """Our model: GPT-2's or Llama's kind."""
    llama: dict[str, Any] = {
        "positions": Positions.rope,
        "norm": Norm.rmsnorm,
        "activation": Activation.swiglu,
        "linear_bias": False,
        "tied_embeddings": False,
    }
    return ModelConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        vocab_size=options.vocab,
        max_sequence_length=options.prompt + options.response,
        **(llama if options.arch == "llama" else {}),
    )


def peer(options: argparse.Namespace) -> PreTrainedModel:
    """The same shape in `transformers`."""
    context = options.prompt + options.response
    if options.arch == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=options.vocab,
                hidden_size=options.hidden,
                intermediate_size=4 * options.hidden,
                num_hidden_layers=options.layers,
                num_attention_heads=options.heads,
                num_key_value_heads=options.heads,
                max_position_embeddings=context,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=options.vocab,
            n_positions=context,
            n_embd=options.hidden,
            n_layer=options.layers,
            n_head=options.heads,
        )
    )
