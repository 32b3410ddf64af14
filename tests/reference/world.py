"""Input of both the reference and the runs: a tokenizer, data with every oddity that has a rule, models by `transformers`.

It is made without any of our code.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

WORDS = "red green blue round square small large old new warm cold fast slow near far high low dark light soft".split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
ROWS = len(SPECIAL) + len(WORDS) + 1  # of the embeddings: odd, so that two ranks cannot share them without padding
CONTEXT = 32


@dataclass(frozen=True)
class World:
    """Files below one folder."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    def data(self, name: str) -> Path:
        return self.root / f"{name}.jsonl"


def make_world(root: Path) -> World:
    """Everything, from fixed seeds."""
    world, noise = World(root), random.Random(5)

    def text(low: int, high: int) -> str:
        return " ".join(noise.choices(WORDS, k=noise.randint(low, high)))

    _save_tokenizer(world.tokenizer)
    torch.manual_seed(6)
    _save(GPT2LMHeadModel(_gpt2()), world.policy)
    _save(LlamaForSequenceClassification(_llama(num_labels=1)), world.reward)
    _save(LlamaForTokenClassification(_llama(num_labels=1)), world.value)
    _save(LlamaForCausalLM(_llama()), world.language)

    demonstrations = [{"ask": text(1, 7), "answer": text(1, 6)} for _ in range(10)]
    demonstrations[0] = {"ask": text(8, 8), "answer": text(7, 7)}  # as long as may be
    demonstrations[3]["ask"] = text(9, 9)  # too long a prompt
    demonstrations[6]["answer"] = text(9, 9)  # too long a response
    _write(world.data("demonstrations"), demonstrations)
    _write(world.data("held_out"), [{"ask": text(2, 6), "answer": text(1, 6)} for _ in range(4)])
    _write(world.data("targets"), [{"ask": text(2, 6), "answer": text(1, 6)} for _ in range(3)])
    _write(world.data("comparisons"), _comparisons(text))
    _write(world.data("more_comparisons"), _comparisons(text))
    users = [
        "ann",
        "ann",
        "ann",
        None,
        None,
        None,
        "bob",
        None,
        "bob",
        "cy",
        "cy",
        "dee",
    ]  # ann is over the limit of two
    prompts = [{"ask": text(1, 7), "who": user} for user in users]
    prompts[3]["ask"] = text(8, 8)  # as long as may be
    prompts[7]["ask"] = text(9, 9)  # too long
    _write(world.data("prompts"), prompts)
    _write(world.data("text"), [{"text": text(4, 30)} for _ in range(12)] + [{"text": "  "}, {"text": text(9, 9)}])
    return world


def _comparisons(text) -> list[dict]:
    """K = 2 to 5, ties, pairs, several records of a prompt, users with several prompts, and what is dropped."""
    ranks = [[0, 1], [2, 0, 1], [0, 0, 1, 2], [1, 0, 1, 0, 2], [1, 0], [0, 1, 1], [3, 1, 2, 0], [0, 2, 1, 1, 2]]
    ranked = [{"prompt": text(1, 6), "responses": [text(1, 5) for _ in row], "ranks": row} for row in ranks]
    ranked[6]["prompt"], ranked[6]["responses"][0] = text(8, 8), text(7, 7)  # as long as may be
    ranked.insert(2, {"prompt": text(2, 2), "responses": [text(1, 3), text(1, 3)], "ranks": [1, 1]})  # all tied
    ranked.insert(4, {"prompt": text(9, 9), "responses": [text(1, 3), text(1, 3)], "ranks": [0, 1]})  # too long
    ranked[5]["responses"][1] = text(9, 9)  # one response too long, the others stay
    pairs = [{"prompt": text(1, 6), "chosen": text(1, 5), "rejected": text(1, 5)} for _ in range(3)]
    # Of a prompt that occurs already: one response again, and one compared with itself as well.
    again = {"prompt": ranked[1]["prompt"], "chosen": text(1, 5), "rejected": ranked[1]["responses"][0]}
    pairs += [again, {**again, "rejected": again["chosen"]}]
    for record, user in zip(ranked, ["ann", "bob", "", "bob", "ann", "cy"], strict=False):
        record["user"] = user
    return [*ranked, *pairs]


def _save_tokenizer(folder: Path) -> None:
    """One token per word; a text begins with <s>, as the post-processor says."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


# transformers gives the padding's row of an embedding no gradient, although the policy may sample it: no padding is named.
_IDS = {"bos_token_id": 1, "eos_token_id": [2, 9], "pad_token_id": None}


def _gpt2() -> GPT2Config:
    """Learned positions, biases, tied embeddings."""
    return GPT2Config(vocab_size=ROWS, n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=4, **_IDS)


def _llama(**more: int) -> LlamaConfig:
    """Rotary positions, grouped queries, no biases."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=ROWS, max_position_embeddings=CONTEXT, intermediate_size=40, **sizes, **_IDS, **more)


def _save(model: torch.nn.Module, folder: Path) -> None:
    """Weights large enough that a wrong one shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if parameter.dim() == 1 and name.endswith("weight"):  # a norm's
                parameter.add_(1.0)
        model.get_input_embeddings().weight[_IDS["eos_token_id"]] *= (
            3  # tied: likely after some words, and unlikely after others
        )
    model.save_pretrained(folder)


def _write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
