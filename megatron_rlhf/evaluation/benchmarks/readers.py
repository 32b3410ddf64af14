"""The paper's benchmarks from the files in which they are published, as rows that the task files in tasks/ read.

Each function gets the folder of `evaluate.task_data` and takes the one file in it whose name fits.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lm_eval.tasks.drop.utils import parse_answer

from megatron_rlhf.config.errors import UserError

Row = dict[str, Any]


def _task(*patterns: str) -> Callable[[Callable[..., Iterable[Row]]], Callable[..., DatasetDict]]:
    """Makes a dataset with one split, test, of a function that reads rows from files, one for each pattern of a name."""

    def wrap(read: Callable[..., Iterable[Row]]) -> Callable[..., DatasetDict]:
        def load(data: str | None = None, **_: Any) -> DatasetDict:
            files = [find(data, pattern) for pattern in patterns]
            try:
                rows = list(read(*files))
            except (KeyError, ValueError, TypeError, SyntaxError, OSError, UnicodeDecodeError) as error:
                what = f"no field {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{files[0]} does not read as the benchmark's file: {what}") from error
            if not rows:
                raise UserError(f"{files[0]} has no rows")
            return DatasetDict(test=Dataset.from_list(rows))

        return load

    return wrap


def find(data: str | None, pattern: str) -> Path:
    """The file in the folder whose name fits the pattern, in upper or lower case.

    Raises:
        UserError: none does, or several do.
    """
    if data is None:
        raise UserError(f"evaluate.task_data is not given: name the folder that holds {pattern}")
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UserError(f"evaluate.task_data={data}: no such folder")
    found = [path for path in sorted(folder.iterdir()) if Path(path.name.lower()).match(pattern)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"evaluate.task_data={data}: one file {pattern} is needed there, found {names}")
    return found[0]


def _lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _table(path: Path, delimiter: str = ",") -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, delimiter=delimiter)


@_task("hellaswag*.jsonl")
def hellaswag(path: Path) -> Iterator[Row]:
    """Rows of the published validation file, or with its texts already joined."""
    for row in _lines(path):
        if "query" in row:
            yield {"query": row["query"], "choices": row["choices"], "gold": int(row["gold"])}
        else:
            from lm_eval.tasks.hellaswag.utils import preprocess

            context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
            choices = [preprocess(ending) for ending in row["endings"]]
            yield {"query": preprocess(context), "choices": choices, "gold": int(row["label"])}


@_task("truthfulqa*.csv")
def truthfulqa(path: Path) -> Iterator[Row]:
    """Answers are separated by semicolons; the best one is the first of the correct ones."""
    for row in _table(path):
        best = _sentence(row["Best Answer"])
        correct = [best, *(a for a in map(_sentence, row["Correct Answers"].split(";")) if a and a != best)]
        incorrect = [a for a in map(_sentence, row["Incorrect Answers"].split(";")) if a]
        yield {"question": row["Question"].strip(), "correct": correct, "incorrect": incorrect}


def _sentence(text: str) -> str:
    text = text.strip()
    return text if not text or text.endswith(".") else f"{text}."


@_task("crows_pairs*.csv")
def crows_pairs(path: Path) -> Iterator[Row]:
    """Pairs of sentences that differ in the group they are about."""
    for row in _table(path):
        kind = row["bias_type"]
        yield {"sent_more": row["sent_more"], "sent_less": row["sent_less"], "bias_type": kind}


@_task("*all_sentences.tsv")
def winogender(path: Path) -> Iterator[Row]:
    """Each sentence with its pronoun, and the two that it may refer to."""
    for row in _table(path, "\t"):
        occupation, participant, answer, gender, _ = row["sentid"].split(".")
        yield {
            "sentence": row["sentence"],
            "pronoun": _pronoun(row["sentence"], gender),
            "choices": [occupation, participant],
            "label": int(answer),
            "gender": gender,
        }


PRONOUNS = {
    "male": ("he", "him", "his"),
    "female": ("she", "her", "hers"),
    "neutral": ("they", "them", "their"),
}


def _pronoun(sentence: str, gender: str) -> str:
    words = [word.strip(".,").lower() for word in sentence.split()]
    return next(word for word in words if word in PRONOUNS[gender])


@_task("*all_sentences.tsv")
def winogender_pairs(path: Path) -> Iterator[Row]:
    """Sentences that differ only in whether their pronoun is male or female."""
    pairs: dict[tuple[str, ...], dict[str, str]] = {}
    for row in _table(path, "\t"):
        *sentence, gender, _ = row["sentid"].split(".")
        pairs.setdefault(tuple(sentence), {})[gender] = row["sentence"]
    for pair in pairs.values():
        yield {"choices": [pair["male"], pair["female"]]}


@_task("*real*toxicity*.jsonl")
def real_toxicity(path: Path) -> Iterator[Row]:
    """The prompt alone, as a text or as an object that holds it."""
    for row in _lines(path):
        prompt = row["prompt"]
        yield {"prompt": prompt["text"] if isinstance(prompt, dict) else prompt}


@_task("*squad*.json")
def squad_v2(path: Path) -> Iterator[Row]:
    """A question to a paragraph; a question that it does not answer has no answers."""
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = [] if question["is_impossible"] else [a["text"] for a in question["answers"]]
                yield {
                    "title": article["title"].replace("_", " "),
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": sorted(set(answers)),
                }


@_task("drop*.json")
def drop(path: Path) -> Iterator[Row]:
    """A question to a passage, with all answers that annotators gave: each a list of spans."""
    for passage in json.loads(path.read_text(encoding="utf-8")).values():
        for pair in passage["qa_pairs"]:
            given = [pair["answer"], *pair.get("validated_answers", [])]
            answers = dict.fromkeys(parse_answer(answer) for answer in given)
            yield {
                "passage": passage["passage"],
                "question": pair["question"],
                "answers": [list(answer) for answer in answers],
            }


@_task("*.fr", "*.en")
def wmt_fr_en(french: Path, english: Path) -> Iterator[Row]:
    """Two files of sentences, line by line."""
    pairs = zip(french.read_text("utf-8").splitlines(), english.read_text("utf-8").splitlines(), strict=True)
    for source, target in pairs:
        yield {"french": source, "english": target}


@_task("*cnn*.jsonl")
def cnn_dm(path: Path) -> Iterator[Row]:
    """An article and its highlights."""
    for row in _lines(path):
        yield {"article": row["article"], "summary": row["highlights"]}


@_task("*tldr*.jsonl")
def tldr(path: Path) -> Iterator[Row]:
    """A post and its author's summary."""
    for row in _lines(path):
        yield {key: row[key] for key in ("subreddit", "title", "post", "summary")}
