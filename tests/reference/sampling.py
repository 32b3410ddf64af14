"""What the policy answers: one sequence at a time, one whole forward pass per token.

A token is drawn by the Gumbel trick from numbers that hash what is drawn: run, iteration, prompt, which of its samples,
position and token. So the text can be computed here, whatever batch or rank it was drawn in.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from reference.data import Settings, load_tokenizer
from reference.models import logprobs
from transformers import PreTrainedTokenizerFast

MASK = 2**32 - 1


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens can be sampled, and what ends a response: the policy's own end tokens, and data.stop's tokens and texts."""

    tokenizer: PreTrainedTokenizerFast
    stops: set[int]
    texts: list[str]

    @classmethod
    def of(cls, settings: Settings) -> "Vocabulary":
        tokenizer = load_tokenizer(settings)
        ends = json.loads((Path(settings["policy.init_from"]) / "generation_config.json").read_text())["eos_token_id"]
        special = [text for text in settings["data.stop"] if text in tokenizer.all_special_tokens]
        stops = {tokenizer.eos_token_id, *ends, *tokenizer.convert_tokens_to_ids(special)}
        return cls(tokenizer, stops, [text for text in settings["data.stop"] if text not in special])

    @property
    def known(self) -> int:
        return len(self.tokenizer)

    def ends(self, response: list[int]) -> bool:
        """Whether the response ends with its last token, and not before."""
        now, before = (self.tokenizer.decode(tokens) for tokens in (response, response[:-1]))
        return response[-1] in self.stops or any(now.count(text) > before.count(text) for text in self.texts)


@dataclass(frozen=True)
class Response:
    tokens: list[int]
    stopped: bool
    """Whether it ended by itself, not at the limit."""


def row_key(run_seed: int, iteration: int, prompt: int, sample: int) -> int:
    return _mix(_mix(_mix(run_seed, iteration), prompt), sample)


@torch.no_grad()
def respond(
    model: torch.nn.Module, prompt: list[int], key: int, settings: Settings, group: str, vocabulary: Vocabulary
) -> Response:
    """`group` names the settings: rollout or sampling."""
    top_k, top_p, shortest, longest = (
        settings[f"{group}.{name}"] for name in ("top_k", "top_p", "min_response_tokens", "max_response_tokens")
    )
    response: list[int] = []
    while len(response) < longest:
        text = [*prompt, *response, 0]  # the last token is not read
        likely = logprobs(model, text, settings[f"{group}.temperature"], vocabulary.known)[-1].tolist()
        banned = vocabulary.stops if len(response) + 1 < shortest else ()
        candidates = sorted((-p, token) for token, p in enumerate(likely) if token not in banned)[:top_k]
        total = sum(math.exp(-p) for p, _ in candidates)
        before, best = 0.0, (-math.inf, -1)
        for negative, token in candidates:
            if before >= top_p:
                break
            before += math.exp(-negative) / total
            number = (_scramble((_mix(key, len(response)) + (token + 1) * 0x9E3779B1) & MASK) + 0.5) / 2**32
            best = max(best, (-negative - math.log(-math.log1p(-number)), token))
        response.append(best[1])
        if len(response) >= shortest and vocabulary.ends(response):
            return Response(response, True)
    return Response(response, False)


def _mix(key: int, value: int) -> int:
    return _scramble((_scramble(key ^ 0x9E3779B9) + value * 0x85EBCA6B) & MASK)


def _scramble(x: int) -> int:
    x = ((x ^ x >> 16) * 0x7FEB352D) & MASK
    x = ((x ^ x >> 15) * 0x846CA68B) & MASK
    return x ^ x >> 16
