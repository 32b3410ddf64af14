"""A policy, a reward model and prompts on disk, as transformers has them: what both sides of a PPO benchmark start from."""

import argparse
import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

PAD, END = 0, 1
STOP_ONE_IN = 64
"""Of the tokens of a varied response, one in so many ends it."""


def make_world(folder: Path, options: argparse.Namespace) -> None:
    """Random weights, and four batches of prompts of `--prompt` tokens, or from 8 to that many if `--varied`."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=options.vocab,
        n_positions=options.prompt + options.response,
        n_embd=options.hidden,
        n_layer=options.layers,
        n_head=options.heads,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    config.num_labels = 1
    policy, reward = GPT2LMHeadModel(config), GPT2ForSequenceClassification(config)
    if options.varied:
        _stop_now_and_then(policy)
    words = {"[PAD]": PAD, "[END]": END, **{f"w{i}": i for i in range(2, options.vocab)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[END]", padding_side="left"
    )
    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    random = torch.Generator().manual_seed(1)
    with open(folder / "prompts.jsonl", "w", encoding="utf-8") as file:
        for _ in range(4 * options.batch):
            shortest = 8 if options.varied else options.prompt
            length = int(torch.randint(shortest, options.prompt + 1, (), generator=random))
            tokens = torch.randint(2, options.vocab, (length,), generator=random).tolist()
            file.write(json.dumps({"prompt": " ".join(f"w{token}" for token in tokens)}) + "\n")


@torch.no_grad()
def _stop_now_and_then(policy: GPT2LMHeadModel) -> None:
    """Random weights give all tokens about the same probability: raise the end's, by the last norm's bias."""
    end = policy.transformer.wte.weight[END]
    odds = (policy.config.vocab_size - 1) / (STOP_ONE_IN - 1)
    policy.transformer.ln_f.bias.copy_(math.log(odds) / end.dot(end) * end)
