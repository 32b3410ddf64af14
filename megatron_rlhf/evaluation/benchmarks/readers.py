"""The paper's benchmarks from the files in which they are published, as rows that the task files in tasks/ read.

Each function gets the folder of `evaluate.task_data` and takes the one file in it whose name fits.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lm_eval.tasks.drop.utils import parse_answer

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.files.text_files import iterate_table, iterate_text_file

Row = dict[str, Any]


class _File:
    """A benchmark's file, which knows how far it was read: where a mistake is that is found in what it gave."""

    def __init__(self, path: Path):
        self.path, self.where = path, str(path)

    def lines(self) -> Iterator[Row]:
        """JSON lines."""
        return self._told(iterate_text_file(self.path))

    def table(self, delimiter: str = ",") -> Iterator[Row]:
        return self._told(iterate_table(self.path, delimiter=delimiter))

    def each(self, items: Iterable[Any], what: str) -> Iterator[Any]:
        """Parts of a file that is one JSON object."""
        for number, item in enumerate(items, start=1):
            self.where = f"{self.path}, {what} {number}"
            yield item

    def sentences(self) -> list[str]:
        """One a line: other characters at which Python splits lines may be inside of a sentence."""
        text = self.path.read_bytes().decode("utf-8-sig").removesuffix("\n")
        return [line.removesuffix("\r") for line in text.split("\n")] if text else []

    def content(self) -> Any:
        return json.loads(self.path.read_text(encoding="utf-8-sig"))

    def _told(self, rows: Iterable[tuple[int, Row]]) -> Iterator[Row]:
        for line, row in rows:
            self.where = f"{self.path}, line {line}"
            yield row


def _task(*patterns: str) -> Callable[[Callable[..., Iterable[Row]]], Callable[..., DatasetDict]]:
    """Makes a dataset with one split, test, of a function that reads rows from files, one for each pattern of a name."""

    def wrap(read: Callable[..., Iterable[Row]]) -> Callable[..., DatasetDict]:
        def load(data: str | None = None, **_: Any) -> DatasetDict:
            files = [_File(find(data, pattern)) for pattern in patterns]
            try:
                rows = list(read(*files))
            except (KeyError, ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
                what = f"no field {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{files[0].where}: does not read as the benchmark's file: {what}") from error
            if not rows:
                raise UserError(f"{files[0].path} has no rows")
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


def _text(row: Row, name: str) -> str:
    if not isinstance(value := row[name], str):
        raise ValueError(f"{name} must be text, not {value!r:.60}")
    return value


def _texts(row: Row, name: str) -> list[str]:
    value = row[name]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name} must be a list of texts, not {value!r:.60}")
    return value


def _place(value: Any, name: str, choices: list[str]) -> int:
    """The number of one of the choices, also where it is written as text."""
    place = int(value)
    if place not in range(len(choices)):
        raise ValueError(f"{name} must be the number of one of {len(choices)}, from 0, not {value!r:.60}")
    return place


@_task("hellaswag*.jsonl")
def hellaswag(file: _File) -> Iterator[Row]:
    """Rows of the published validation file, or with its texts already joined."""
    for row in file.lines():
        if "query" in row:
            choices = _texts(row, "choices")
            yield {"query": _text(row, "query"), "choices": choices, "gold": _place(row["gold"], "gold", choices)}
        else:
            from lm_eval.tasks.hellaswag.utils import preprocess

            context = f"{_text(row, 'activity_label')}: {_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
            choices = [preprocess(ending) for ending in _texts(row, "endings")]
            yield {"query": preprocess(context), "choices": choices, "gold": _place(row["label"], "label", choices)}


@_task("truthfulqa*.csv")
def truthfulqa(file: _File) -> Iterator[Row]:
    """Answers are separated by semicolons; the best one is the first of the correct ones."""
    for row in file.table():
        best = _sentence(row["Best Answer"])
        correct = [best, *(a for a in map(_sentence, row["Correct Answers"].split(";")) if a and a != best)]
        incorrect = [a for a in map(_sentence, row["Incorrect Answers"].split(";")) if a]
        yield {"question": row["Question"].strip(), "correct": correct, "incorrect": incorrect}


def _sentence(text: str) -> str:
    text = text.strip()
    return text if not text or text.endswith(".") else f"{text}."


@_task("crows_pairs*.csv")
def crows_pairs(file: _File) -> Iterator[Row]:
    """Pairs of sentences that differ in the group they are about."""
    for row in file.table():
        kind = row["bias_type"]
        yield {"sent_more": row["sent_more"], "sent_less": row["sent_less"], "bias_type": kind}


@_task("*all_sentences.tsv")
def winogender(file: _File) -> Iterator[Row]:
    """Each sentence with its pronoun, and the two that it may refer to."""
    for row in file.table("\t"):
        occupation, participant, answer, gender, _ = row["sentid"].split(".")
        choices = [occupation, participant]
        yield {
            "sentence": row["sentence"],
            "pronoun": _pronoun(row["sentence"], gender),
            "choices": choices,
            "label": _place(answer, "the answer in sentid", choices),
            "gender": gender,
        }


PRONOUNS = {
    "male": ("he", "him", "his"),
    "female": ("she", "her", "hers"),
    "neutral": ("they", "them", "their"),
}


def _pronoun(sentence: str, gender: str) -> str:
    words = [word.strip(".,").lower() for word in sentence.split()]
    found = next((word for word in words if word in PRONOUNS[gender]), None)
    if found is None:
        raise ValueError(
            f"the sentence has none of the {gender} pronouns {', '.join(PRONOUNS[gender])}: {sentence!r:.60}"
        )
    return found


@_task("*all_sentences.tsv")
def winogender_pairs(file: _File) -> Iterator[Row]:
    """Sentences that differ only in whether their pronoun is male or female."""
    pairs: dict[tuple[str, ...], dict[str, str]] = {}
    for row in file.table("\t"):
        *sentence, gender, _ = row["sentid"].split(".")
        pairs.setdefault(tuple(sentence), {})[gender] = row["sentence"]
    file.where = str(file.path)
    for name, pair in pairs.items():
        if not {"male", "female"} <= pair.keys():
            raise ValueError(f"{'.'.join(name)} has no sentence of both genders, only {', '.join(pair)}")
        yield {"choices": [pair["male"], pair["female"]]}


@_task("*real*toxicity*.jsonl")
def real_toxicity(file: _File) -> Iterator[Row]:
    """The prompt alone, as a text or as an object that holds it."""
    for row in file.lines():
        yield {"prompt": _text(row["prompt"], "text") if isinstance(row["prompt"], dict) else _text(row, "prompt")}


@_task("*squad*.json")
def squad_v2(file: _File) -> Iterator[Row]:
    """A question to a paragraph; a question that it does not answer has no answers."""
    for article in file.each(file.content()["data"], "article"):
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = [] if question["is_impossible"] else [_text(a, "text") for a in question["answers"]]
                yield {
                    "title": _text(article, "title").replace("_", " "),
                    "context": _text(paragraph, "context"),
                    "question": _text(question, "question"),
                    "answers": sorted(set(answers)),
                }


@_task("drop*.json")
def drop(file: _File) -> Iterator[Row]:
    """A question to a passage, with all answers that annotators gave: each a list of spans."""
    for passage in file.each(file.content().values(), "passage"):
        for pair in passage["qa_pairs"]:
            given = [pair["answer"], *pair.get("validated_answers", [])]
            answers = dict.fromkeys(parse_answer(answer) for answer in given)
            yield {
                "passage": _text(passage, "passage"),
                "question": _text(pair, "question"),
                "answers": [list(answer) for answer in answers],
            }


@_task("*.fr", "*.en")
def wmt_fr_en(french: _File, english: _File) -> Iterator[Row]:
    """Two files of sentences, line by line."""
    sources, targets = french.sentences(), english.sentences()
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} sentences, and {len(targets)} in {english.path.name}")
    for source, target in zip(sources, targets, strict=True):
        yield {"french": source, "english": target}


@_task("*cnn*.jsonl")
def cnn_dm(file: _File) -> Iterator[Row]:
    """An article and its highlights."""
    for row in file.lines():
        yield {"article": _text(row, "article"), "summary": _text(row, "highlights")}


@_task("*tldr*.jsonl")
def tldr(file: _File) -> Iterator[Row]:
    """A post and its author's summary."""
    for row in file.lines():
        yield {key: _text(row, key) for key in ("subreddit", "title", "post", "summary")}
