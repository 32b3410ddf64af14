"""Prompts and outputs to label, from files: what `megatron-rlhf evaluate` writes, or records of the comparison format."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.chat.messages import read_conversation
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
    by_prompt: dict[tuple[str, str | None], tuple[Task, list[tuple[str, str | None, str]]]] = {}
    for name, source in map(_split_name, files):
        for record in read_records(source, columns):
            task = _prompt(record)
            if kind != RANKINGS:
                whole.append(task)
            elif "responses" in record:
                whole.append(_ranked_together(record, task, name))
            else:
                writer = name or (record.text("source") if "source" in record else Path(source).name)
                _, found = by_prompt.setdefault(task.key, (task, []))
                found.append((record.response("response"), writer, record.where))
    return whole + [_gathered(task, found) for task, found in by_prompt.values()]


def _prompt(record: Record) -> Task:
    """Without outputs: the prompt as text, or as messages, which evaluate writes as `given`."""
    from_evaluation = record.fields.get("given")
    found = Record(record.where, from_evaluation) if isinstance(from_evaluation, Mapping) else record
    conversation = read_conversation(found)
    given = {"prompt": found.text("prompt")} if conversation is None else conversation.given
    task = Task.of(given, (), (), read_user(record))
    if not task.prompt.strip():
        raise record.mistake("column 'prompt' is blank")
    return task


def _split_name(file: str) -> tuple[str | None, str]:
    name, equals, source = file.partition("=")
    return (name, source) if equals and not Path(file).exists() else (None, file)


def _ranked_together(record: Record, task: Task, name: str | None) -> Task:
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
    return replace(task, outputs=texts, sources=named)


def _gathered(task: Task, found: Sequence[tuple[str, str | None, str]]) -> Task:
    if not 2 <= len(found) <= len(LETTERS):
        raise UserError(
            f"{found[0][2]}: prompt {task.prompt!r:.60} has {len(found)} responses in all files; 2 to {len(LETTERS)} can be "
            "ranked"
        )
    return replace(task, outputs=tuple(text for text, _, _ in found), sources=tuple(writer for _, writer, _ in found))
