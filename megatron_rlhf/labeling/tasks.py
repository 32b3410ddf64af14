"""Prompts and outputs to label, from files: what `megatron-rlhf evaluate` writes, or records of the comparison format."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.examples import read_user
from megatron_rlhf.data.records import Record, read_records
from megatron_rlhf.labeling.questions import LETTERS
from megatron_rlhf.labeling.types import RANKINGS, Task


def read_tasks(files: Iterable[str], kind: str, columns: Mapping[str, str] | None = None) -> list[Task]:
    """Tasks for a project of this kind.

    Args:
        files: Sources as in `read_records`, each also as NAME=SOURCE: NAME is then the source of its responses, otherwise
            it is their field `source`, or the file's name. For demonstrations: records {"prompt"}. For rankings:
            {"prompt", "responses": [...], "sources": [...] (optional)}, or {"prompt", "response"}, of which all records of a
            prompt, over all files, become one task.

    Raises:
        UserError: A mistake in a file, with its line, or a prompt with fewer than 2 or more than 9 responses.
    """
    whole: list[Task] = []
    by_prompt: dict[str, list[tuple[str, str | None, str]]] = {}
    users: dict[str, str | None] = {}
    for name, source in map(_split_name, files):
        for record in read_records(source, columns):
            prompt = record.text("prompt")
            if not prompt.strip():
                raise record.mistake("column 'prompt' is blank")
            if kind != RANKINGS:
                whole.append(Task(prompt, user=read_user(record)))
            elif "responses" in record:
                whole.append(_ranked_together(record, prompt, name))
            else:
                writer = name or (record.text("source") if "source" in record else Path(source).name)
                by_prompt.setdefault(prompt, []).append((record.response("response"), writer, record.where))
                users.setdefault(prompt, read_user(record))
    return whole + list(_gathered(by_prompt, users))


def _split_name(file: str) -> tuple[str | None, str]:
    name, equals, source = file.partition("=")
    return (name, source) if equals and not Path(file).exists() else (None, file)


def _ranked_together(record: Record, prompt: str, name: str | None) -> Task:
    responses = record.value("responses")
    if not isinstance(responses, list) or not 2 <= len(responses) <= len(LETTERS):
        raise record.mistake(f"column 'responses' must be a list of 2 to {len(LETTERS)} texts, not {responses!r:.60}")
    texts = tuple(record.as_response("responses", response) for response in responses)
    sources = record.value("sources") if "sources" in record else [name] * len(texts)
    if not isinstance(sources, list) or len(sources) != len(texts):
        raise record.mistake(
            f"column 'sources' must be a list of {len(texts)} names, one a response, not {sources!r:.60}"
        )
    named = tuple(None if source is None else record.as_text("sources", source) for source in sources)
    return Task(prompt, texts, named, read_user(record))


def _gathered(
    by_prompt: Mapping[str, list[tuple[str, str | None, str]]], users: Mapping[str, str | None]
) -> Iterator[Task]:
    for prompt, found in by_prompt.items():
        if not 2 <= len(found) <= len(LETTERS):
            raise UserError(
                f"{found[0][2]}: prompt {prompt!r:.60} has {len(found)} responses in all files; 2 to {len(LETTERS)} can be ranked"
            )
        yield Task(prompt, tuple(text for text, _, _ in found), tuple(writer for _, writer, _ in found), users[prompt])
