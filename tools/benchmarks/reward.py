"""Training on rankings: a prompt read once for its K responses, against K copies of it, and against a row for each side of each
pair, as in trainers of pairwise comparisons. All three have the same loss and gradient.
"""

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.side_by_side import alternate, report, sizes
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.data.comparisons import Comparison
from megatron_rlhf.data.tokenizer import load_tokenizer
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import runtime
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.trainers.reward_model import ranking_microbatches, texts_to_score
from megatron_rlhf.trainers.step import TrainedRole


def arguments(parser: argparse.ArgumentParser) -> None:
    """Shape, and lengths or a file of rankings."""
    sizes(
        parser, layers=4, hidden=256, heads=4, vocab=8192, prompts=2, k=9, prompt=256, response=64, rounds=3, threads=2
    )
    parser.add_argument(
        "--pairs-at-once", type=int, default=4, help="pairs a forward pass of the pairwise trainer, default 4"
    )
    parser.add_argument("--data", help="JSON lines with prompt, responses, ranks, instead of random tokens")
    parser.add_argument("--tokenizer", help="its folder")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Updates on the same rankings, in three ways."""
    runtime.initialize()
    torch.set_num_threads(options.threads)
    rankings = from_file(options) if options.data else made_up(options)
    longest = max(len(c.prompt_tokens) + max(map(len, c.responses_tokens)) for c in rankings)
    layout = ParallelLayout.create(ParallelConfig())
    layout.seed(0)
    shape = ModelConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        vocab_size=max(
            options.vocab, 1 + max(int(t.max()) for c in rankings for t in (c.prompt_tokens, *c.responses_tokens))
        ),
        max_sequence_length=longest,
    )
    role = Role.build("reward", shape, layout, Precision.fp32, scalar=True)
    reward = TrainedRole.create(role, OptimizerConfig(lr=0.0, clip_norm=0.0), Precision.fp32)

    def update(microbatches: Callable[[], list[Microbatch]]) -> tuple[float, float]:
        done = reward.update(microbatches(), lr=0.0)
        return done.statistics["rm/loss"], done.grad_norm

    ways = {
        "prompt once": lambda: update(lambda: ranking_microbatches(rankings, reward, 1, options.k)),
        "pairwise": lambda: update(lambda: in_pairs(rankings, role, options.pairs_at_once)),
        "K copies": lambda: update(lambda: with_copies(rankings, role)),
    }
    expected = ways["prompt once"]()
    for name, way in ways.items():
        assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(way(), expected, strict=True)), name
    seconds = alternate(ways, options.rounds)
    runtime.shutdown()
    return report(seconds, sum(len(c.pairs) for c in rankings), "comparisons/s")


def with_copies(rankings: list[Comparison], role: Role) -> list[Microbatch]:
    """A row for each response, its prompt before it: one prompt per microbatch, padded to its longest response."""

    def microbatch(one: Comparison) -> Microbatch:
        texts = texts_to_score([[*one.prompt_tokens, *response] for response in one.responses_tokens])
        rows = range(len(texts.lengths))
        better_q, worse_q, _ = torch.from_numpy(one.pairs).unbind(dim=1)

        def loss_of(scores_n1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            scores_n = scores_n1.squeeze(-1)
            loss = -F.logsigmoid(scores_n[better_q] - scores_n[worse_q]).mean() / len(rankings)
            return loss, {"rm/loss": loss.detach()}

        return Microbatch.of(role.arrange(texts, rows, 1), texts.wanted(rows), loss_of)

    return [microbatch(one) for one in rankings]


def in_pairs(rankings: list[Comparison], role: Role, at_once: int) -> list[Microbatch]:
    """A row for each side of each pair: what a trainer of pairwise comparisons reads."""
    sides, weights = [], []
    for one in rankings:
        sides += [[[*one.prompt_tokens, *one.responses_tokens[i]] for i in pair] for pair in one.pairs[:, :2]]
        weights += [1 / len(one.pairs) / len(rankings)] * len(one.pairs)

    def microbatch(pairs: slice) -> Microbatch:
        texts = texts_to_score([side for pair in sides[pairs] for side in pair])
        rows, weight = range(len(texts.lengths)), torch.tensor(weights[pairs])

        def loss_of(scores_n1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            better, worse = scores_n1.view(-1, 2).unbind(1)
            loss = -(F.logsigmoid(better - worse) * weight).sum()
            return loss, {"rm/loss": loss.detach()}

        return Microbatch.of(role.arrange(texts, rows, 1), texts.wanted(rows), loss_of)

    return [microbatch(slice(start, start + at_once)) for start in range(0, len(sides), at_once)]


def made_up(options: argparse.Namespace) -> list[Comparison]:
    """Random tokens, no ties."""
    random = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return random.integers(0, options.vocab, length, dtype=np.int32)

    return [
        Comparison.of(
            tokens(options.prompt),
            [([tokens(options.response) for _ in range(options.k)], random.permutation(options.k).tolist())],
        )
        for _ in range(options.prompts)
    ]


def from_file(options: argparse.Namespace) -> list[Comparison]:
    """The first prompts of a file that have a strict pair."""
    tokenizer = load_tokenizer(options.tokenizer)
    found: list[Comparison] = []
    with open(options.data, encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if len(found) < options.prompts and len(set(record["ranks"])) > 1:
                prompt, *responses = (
                    np.array(tokenizer.encode(text), dtype=np.int32)
                    for text in (record["prompt"], *record["responses"])
                )
                found.append(Comparison.of(prompt, [(responses, record["ranks"])]))
    return found
