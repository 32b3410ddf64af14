"""Sampling with our key/value cache against `transformers`' generate."""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.side_by_side import InAnotherProcess, alternate, report, sizes
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
    parser.add_argument(
        "--varied",
        action="store_true",
        help="four times as many prompts as slots, of 8 to --prompt tokens; responses stop with probability 1/64 a token",
    )
    sizes(parser, layers=4, hidden=256, heads=4, vocab=1024, batch=16, prompt=64, response=128, rounds=5, threads=1)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Sampling with our key/value cache against `transformers`' generate: same shape, batch and lengths."""
    runtime.initialize()
    torch.set_num_threads(options.threads)
    layout = ParallelLayout.create(ParallelConfig())
    layout.seed(0)
    role = Role.build("policy", shape(options), layout, Precision.fp32).frozen()
    generator = torch.Generator().manual_seed(1)
    count = 4 * options.batch if options.varied else options.batch
    lengths = [options.prompt] * count
    if options.varied:
        lengths = torch.randint(8, options.prompt + 1, (count,), generator=generator).tolist()
    # One token in 64 stops a response; random weights give them all about the same probability.
    stops = list(range(options.vocab // 64)) if options.varied else [0]
    prompts = [torch.randint(len(stops), options.vocab, (n,), generator=generator).tolist() for n in lengths]
    keys = row_keys(0, 0, torch.arange(count), torch.zeros(count, dtype=torch.long))
    sampling = SamplingConfig(
        max_response_tokens=options.response, min_response_tokens=minimum(options), batch_size=options.batch
    )
    other = InAnotherProcess(transformers_sampling, options, prompts, stops)
    tokens: dict[str, list[int]] = {"megatron_rlhf": [], "transformers": []}

    def sample() -> None:
        completions = generate(role, prompts, keys, sampling, stops)
        tokens["megatron_rlhf"].append(sum(len(completion.tokens) for completion in completions))

    contenders = {"megatron_rlhf": sample, "transformers": lambda: tokens["transformers"].append(other())}
    seconds = alternate(contenders, options.rounds)
    # Each round samples a different number of tokens: its time is scaled to the usual number.
    usual = statistics.mean(tokens["megatron_rlhf"])
    for name, values in seconds.items():
        seconds[name] = [value * usual / count for value, count in zip(values, tokens[name][1:], strict=True)]
    runtime.shutdown()
    return report(seconds, usual, "tokens/s")


def minimum(options: argparse.Namespace) -> int:
    """Tokens of the shortest response."""
    return 1 if options.varied else options.response


def transformers_sampling(options: argparse.Namespace, prompts: list[list[int]], stops: list[int]) -> Callable[[], int]:
    """Batch by batch; tells how many tokens were sampled up to where responses stop."""
    torch.set_num_threads(options.threads)
    model = peer(options).eval()

    def sample() -> int:
        done = 0
        for start in range(0, len(prompts), options.batch):
            batch = prompts[start : start + options.batch]
            width = max(map(len, batch))
            padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
            attends = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
            with torch.no_grad():
                output = model.generate(
                    padded,
                    attention_mask=attends,
                    do_sample=True,
                    top_k=0,
                    min_new_tokens=minimum(options),
                    max_new_tokens=options.response,
                    pad_token_id=0,
                    eos_token_id=stops,
                )
            ends = torch.isin(output[:, width:], torch.tensor(stops))
            stopped = torch.where(ends.any(1), ends.int().argmax(1) + 1, output.shape[1] - width)
            done += int(stopped.sum())
        return done

    return sample


def shape(options: argparse.Namespace) -> ModelConfig:
    """Our model, in the style of GPT-2 or Llama."""
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
