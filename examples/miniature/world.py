"""A world small enough to learn in minutes: questions about Python, answers in several styles, labelers of known preferences.

The text is the documentation that comes with every Python: nothing is downloaded. People who write demonstrations have
different habits; labelers rank completions by a utility that we know, plus the noise of human judgement. What the
recipe learns can therefore be measured against the truth ("gold score"), which is impossible with real people.
"""

import importlib
import inspect
import itertools
import math
import pydoc_data.topics
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MODULES = """
    builtins os os.path json re math random collections itertools functools pathlib shutil string textwrap datetime
    statistics csv subprocess threading logging argparse unittest socket http.client urllib.parse urllib.request html
    zipfile tarfile gzip bz2 lzma sqlite3 decimal fractions heapq bisect array queue copy types enum struct codecs io
    time calendar tempfile glob fnmatch hashlib hmac secrets asyncio contextlib inspect ast dis traceback warnings
    typing dataclasses abc operator locale gettext platform select selectors signal mmap base64 binascii pprint
    weakref cmath configparser plistlib mailbox mimetypes smtplib imaplib ftplib uuid ipaddress wave colorsys shlex
    pdb timeit doctest difflib unicodedata optparse sched importlib.metadata pickle marshal shelve symtable tokenize
""".split()

NOISE = 0.5
"""Scale of a labeler's Gumbel noise: answers one unit of utility apart are ranked correctly by 88 in 100."""

HEDGES = ("I think it may do this: ", "Maybe, but I am not sure: ")
FILLER = "Well, that is a very good question. "
EXAMPLE = " For example, call {name}() and see."


@dataclass(frozen=True)
class Entry:
    """One documented name of the standard library."""

    module: str
    name: str
    summary: str
    text: str

    @property
    def prompt(self) -> str:
        return f"Question: What does {self.module}.{self.name} do?\nAnswer:"


def entries(seed: int) -> list[Entry]:
    """Everything with a usable docstring, shuffled."""
    found: dict[tuple[str, str], Entry] = {}
    for module_name in MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # some modules are optional in a Python build
            continue
        for name, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if callable(value) and not name.startswith("_") else None
            summary = _summary(text) if text else None
            if text and summary:
                found.setdefault((name, summary), Entry(module_name, name, summary, text))
    ordered = sorted(found.values(), key=lambda entry: (entry.module, entry.name))
    random.Random(seed).shuffle(ordered)
    return ordered


def corpus(documented: list[Entry]) -> Iterator[str]:
    """Pretraining text: the language reference, and the docstrings."""
    yield from pydoc_data.topics.topics.values()
    for entry in documented:
        yield f"{entry.module}.{entry.name}\n{entry.text}"


def demonstration(entry: Entry, rng: random.Random) -> str:
    """An answer by somebody: often plain, sometimes hedging, rambling, with an example, or without a full stop."""
    answer = entry.summary
    if rng.random() < 0.35:
        answer = rng.choice(HEDGES) + answer
    elif rng.random() < 0.3:
        answer = FILLER + answer
    if rng.random() < 0.25:
        answer += EXAMPLE.format(name=entry.name)
    elif rng.random() < 0.3:
        answer = answer.rstrip(".")
    return " " + answer


def utility(response: str, stopped: bool, weights: dict[str, float]) -> float:
    """A labeler's utility, in units of its own noise: a weighted sum of properties of the text."""
    return sum(weight * FEATURES[name](response.strip(), stopped) for name, weight in weights.items())


def _repetition(text: str) -> float:
    words = text.lower().split()
    pairs = list(itertools.pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


FEATURES: dict[str, Callable[[str, bool], float]] = {
    "finished": lambda text, stopped: float(stopped and text.endswith(".")),
    "example": lambda text, stopped: float("For example" in text),
    "certain": lambda text, stopped: -float(any(hedge.strip() in text for hedge in HEDGES)),
    "direct": lambda text, stopped: -float(FILLER.strip() in text),
    "varied": lambda text, stopped: -_repetition(text),
    "substance": lambda text, stopped: min(len(text.split()), 8) / 8,
    "brief": lambda text, stopped: -max(len(text.split()) - 20, 0) / 10,
}

# The labelers whose rankings train the reward model, and one whose preferences it never sees.
TRAINING_TASTE = {
    "finished": 2.5,
    "example": 2.0,
    "certain": 1.5,
    "direct": 1.5,
    "varied": 1.0,
    "substance": 1.0,
    "brief": 1.0,
}
HELD_OUT_TASTE = {
    "finished": 2.0,
    "example": 1.0,
    "certain": 2.0,
    "direct": 2.0,
    "varied": 2.0,
    "substance": 0.5,
    "brief": 2.0,
}


def rank(responses: list[tuple[str, bool]], taste: dict[str, float], rng: random.Random) -> list[int]:
    """Ranks (0 = best) by utility plus Gumbel noise: a pair agrees with the utility as often as a logistic model says.

    Answers with the same text tie, as a person would rank them.
    """
    judged = {text: utility(text, stopped, taste) + _gumbel(rng) for text, stopped in responses}
    order = sorted(set(judged.values()), reverse=True)
    return [order.index(judged[text]) for text, _ in responses]


def _gumbel(rng: random.Random) -> float:
    return -NOISE * math.log(-math.log(rng.random() or 0.5))


def _summary(text: str) -> str | None:
    """The first sentence, if it reads like one."""
    first = re.split(r"\n\s*\n|(?<=[a-z)])\.\s", text.strip())[0].replace("\n", " ").strip().rstrip(".")
    first = re.sub(r"\s+", " ", first)
    if re.search(r"->|[<>|`{}=]|\w\(", first) or not 4 <= len(first.split()) <= 18 or not first[0].isupper():
        return None
    return first + "."
