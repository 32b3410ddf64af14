"""Judging a rollout at the lengths of OpenAssistant's answers, against rows that are all padded to its longest.

Reward, value, policy and reference read the texts, as in PPO. The lengths are 64 quantiles of real prompts and responses
(GPT-2's tokenizer, responses cut at 256 tokens, 1,024 at most together).
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.side_by_side import alternate, report, sizes
from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Precision
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import runtime
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.parallel.packing import Sequences

PROMPT_AND_RESPONSE = """
5+9 10+18 18+19 15+31 13+42 15+47 43+28 52+29 16+72 13+81 15+84 12+93 15+99 59+62 11+116 34+99 11+128 13+132 121+28 66+90
9+151 161+7 82+95 130+54 38+153 161+43 10+205 206+15 101+125 78+154 17+224 124+126 108+152 8+256 11+256 15+256 124+148
20+256 45+233 25+256 28+256 52+237 37+256 96+200 49+256 270+43 253+72 194+141 287+58 98+256 135+240 206+204 162+256 205+230
194+256 393+81 460+48 318+205 310+256 374+256 460+256 501+231 605+256 759+256
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Shape and microbatch."""
    sizes(parser, layers=2, hidden=256, heads=4, vocab=8192, micro_batch_size=4, rounds=3, threads=2)
    parser.add_argument("--micro-batch-tokens", type=int, help="pack so many tokens instead")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The four passes of a rollout."""
    runtime.initialize()
    torch.set_num_threads(options.threads)
    layout = ParallelLayout.create(ParallelConfig())
    layout.seed(0)
    shape = ModelConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        vocab_size=options.vocab,
        max_sequence_length=1024,
    )
    critic = Role.build("reward", shape, layout, Precision.fp32, scalar=True).frozen()
    policy = Role.build("policy", shape, layout, Precision.fp32).frozen()
    asked = rollout(options.vocab)
    padded = Sequences(asked.tokens_ns, [asked.tokens_ns.shape[1]] * len(asked.lengths))
    size = Budget(options.micro_batch_size, None)
    by_length = Budget(None, options.micro_batch_tokens) if options.micro_batch_tokens else size

    def judge(sequences: Sequences, budget: Budget) -> list[Tensor]:
        return [critic.values(sequences, budget) for _ in range(2)] + [
            policy.logprobs(sequences, budget) for _ in range(2)
        ]

    assert asked.wanted_ns is not None
    for scored, in_full_width in zip(judge(asked, by_length), judge(padded, size), strict=True):
        wanted = asked.wanted_ns[:, : scored.shape[1]] & (
            torch.arange(scored.shape[1])
            < torch.tensor(asked.lengths).unsqueeze(-1) - (asked.tokens_ns.shape[1] - scored.shape[1])
        )
        torch.testing.assert_close(scored[wanted], in_full_width[wanted], rtol=1e-4, atol=1e-4)
    contenders = {
        "work follows tokens": lambda: judge(asked, by_length),
        "padded to the longest": lambda: judge(padded, size),
    }
    seconds = alternate(contenders, options.rounds)
    runtime.shutdown()
    return report(seconds, sum(asked.lengths), "tokens/s")


def rollout(vocab: int) -> Sequences:
    """Texts of those lengths in a shuffled order, scored from the prompt's last token on."""
    lengths = [tuple(map(int, entry.split("+"))) for entry in PROMPT_AND_RESPONSE.split()]
    random = torch.Generator().manual_seed(0)
    lengths = [lengths[i] for i in torch.randperm(len(lengths), generator=random).tolist()]
    totals = [prompt + response for prompt, response in lengths]
    tokens = torch.randint(0, vocab, (len(totals), max(totals)), generator=random)
    places = torch.arange(max(totals))
    first, ends = (torch.tensor(column).unsqueeze(-1) for column in ([p for p, _ in lengths], totals))
    return Sequences(tokens, totals, (places >= first - 1) & (places < ends))
