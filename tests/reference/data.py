"""Records as token ids, which are dropped, and the order in which they are read."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

Settings = dict[str, object]
"""A run's settings by their full names, as on its command line."""


@dataclass(frozen=True)
class Demonstration:
    """`tokens[prompt_length:]` is learned from."""

    tokens: list[int]
    prompt_length: int


@dataclass
class Ranked:
    """A prompt and all its comparisons, from any number of records."""

    texts: list[list[int]]
    """Prompt, response, end of text; each text once."""
    pairs: list[tuple[int, int, int]]
    """The better text, the worse one, and how many were ranked together."""
    best: list[int]
    """One of the best texts of each record."""
    users: set[str]


@dataclass(frozen=True)
class Prompt:
    """`number` is its line in the file, from 0."""

    number: int
    tokens: list[int]


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(settings["data.tokenizer"])


def read_lines(path: object) -> list[dict]:
    return [json.loads(line) for line in Path(str(path)).read_text().splitlines()]


def demonstrations(path: object, settings: Settings) -> list[Demonstration]:
    """The demonstrations within both limits, in the file's order. The end of text counts as a token of the response."""
    tokenizer = load_tokenizer(settings)
    kept = []
    for record in read_lines(path):
        prompt, response = _start(tokenizer, record["ask"]), _end(tokenizer, record["answer"])
        if len(prompt) <= settings["data.max_prompt_tokens"] and len(response) <= settings["data.max_response_tokens"]:
            kept.append(Demonstration(prompt + response, len(prompt)))
    return kept


def rankings(path: object, settings: Settings) -> list[Ranked]:
    """Responses over the limit are dropped; so are whole records whose prompt is over it, or that have no preference left.

    Records of one prompt are one item. Equal ranks, and a text compared with itself, are not preferences.
    """
    tokenizer = load_tokenizer(settings)
    items: dict[tuple[int, ...], Ranked] = {}
    for record in read_lines(path):
        responses, ranks = record.get("responses"), record.get("ranks")
        if responses is None:
            responses, ranks = [record["chosen"], record["rejected"]], [0, 1]
        prompt = _start(tokenizer, record["prompt"])
        ended = [_end(tokenizer, response) for response in responses]
        kept = [(i, x) for i, x in zip(ranks, ended, strict=True) if len(x) <= settings["data.max_response_tokens"]]
        together = [(a, b) for (i, a), (j, b) in itertools.permutations(kept, 2) if i < j and a != b]
        if len(prompt) > settings["data.max_prompt_tokens"] or not together:
            continue
        item = items.setdefault(tuple(prompt), Ranked([], [], [], set()))
        for _, response in kept:
            if prompt + response not in item.texts:
                item.texts.append(prompt + response)
        place = {tuple(text): i for i, text in enumerate(item.texts)}
        item.pairs += [(place[tuple(prompt + a)], place[tuple(prompt + b)], len(kept)) for a, b in together]
        item.best.append(place[tuple(prompt + min(kept, key=lambda entry: entry[0])[1])])
        item.users |= {record["user"]} if record.get("user") else set()
    return list(items.values())


def prompts(settings: Settings) -> list[Prompt]:
    """Prompts within the limit of tokens, up to a maximum per user; no maximum without a user, or with an empty one."""
    tokenizer = load_tokenizer(settings)
    kept, of_user = [], Counter()
    for number, record in enumerate(read_lines(settings["data.prompts"])):
        tokens, user = _start(tokenizer, record["ask"]), record["who"] or None
        if len(tokens) > settings["data.max_prompt_tokens"]:
            continue
        of_user[user] += 1
        if user is None or of_user[user] <= settings["data.max_per_user"]:
            kept.append(Prompt(number, tokens))
    return kept


def shuffled_batches(size: int, batch_size: int, seed: int, whole: bool = False) -> Iterator[list[int]]:
    """Epoch e follows numpy's permutation seeded by (seed, e); its last batch holds the remainder.

    With `whole`, that batch is filled up from the next epoch.
    """
    left: list[int] = []
    for epoch in itertools.count():
        left += np.random.default_rng((seed, epoch)).permutation(size).tolist()
        while len(left) >= batch_size or (left and not whole):
            yield left[:batch_size]
            left = left[batch_size:]


def hold_out(items: list[Ranked], fraction: float, seed: int) -> tuple[list[Ranked], list[Ranked]]:
    """(training, validation), both in the file's order: prompts with a user in common stay together.

    Groups are tried in the order of numpy's permutation; one is held out if it fits into what is still wanted.
    """
    groups: list[list[int]] = []
    for i, item in enumerate(items):
        related = [group for group in groups if any(items[j].users & item.users for j in group)]
        merged = sorted([j for group in related for j in group] + [i])
        groups = sorted([group for group in groups if group not in related] + [merged])
    wanted, held = round(len(items) * fraction), set()
    for place in np.random.default_rng(seed).permutation(len(groups)).tolist():
        if len(held) + len(groups[place]) <= wanted:
            held |= set(groups[place])
    return [x for i, x in enumerate(items) if i not in held], [x for i, x in enumerate(items) if i in held]


@dataclass(frozen=True)
class PretrainingText:
    """Sequences of sequence_length + 1 tokens; the last of each is the first of its neighbour in the stream."""

    train: list[list[int]]
    held_out: list[list[int]]


def pretraining_text(settings: Settings, wanted: int) -> PretrainingText:
    """Documents, with the beginning and end that the tokenizer gives a text; the last ones, by share of tokens, are held out.

    Megatron-Core's GPTDataset: whole epochs until there are `wanted` sequences; documents in shuffled order make one
    stream, which is cut; the pieces are shuffled. Where less than 80% of the last epoch is needed, it is shuffled on its
    own, documents and pieces.
    """
    tokenizer = load_tokenizer(settings)
    length = settings["data.pretraining.sequence_length"]
    texts = [record["text"] for record in read_lines(settings["data.pretraining.source"]) if record["text"].strip()]
    documents = [[*_start(tokenizer, text), tokenizer.eos_token_id] for text in texts]
    share = max(settings["data.pretraining.held_out"] * sum(map(len, documents)), length + 1)
    held = next(n for n in range(1, len(documents) + 1) if sum(map(len, documents[-n:])) >= share)
    seed = settings["run.seed"]
    return PretrainingText(_cut(documents[:-held], length, wanted, seed), _cut(documents[-held:], length, None, seed))


def _cut(documents: list[list[int]], length: int, wanted: int | None, seed: int) -> list[list[int]]:
    noise, tokens = np.random.RandomState(seed), sum(map(len, documents))
    epochs = 1 if wanted is None else max(1, -(-(wanted * length + 1) // tokens))
    whole = (epochs - 1) * tokens  # before the last epoch
    before = (whole - 1) // length
    last_alone = epochs > 1 and wanted - before < int(0.8 * ((tokens - 1) // length))
    order: list[int] = []
    for part in (epochs - 1, 1) if last_alone else (epochs,):
        numbers = np.tile(np.arange(len(documents), dtype=np.int32), part)
        noise.shuffle(numbers)
        order += numbers.tolist()
    stream = [token for number in order for token in documents[number]]
    pieces = [stream[i : i + length + 1] for i in range(0, len(stream) - length, length)]
    places: list[int] = []
    for part in (range(before), range(before, len(pieces))) if last_alone else (range(len(pieces)),):
        numbers = np.array(part, dtype=np.uint32)
        noise.shuffle(numbers)
        places += numbers.tolist()
    return [pieces[place] for place in places]


def _start(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text).input_ids


def _end(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
