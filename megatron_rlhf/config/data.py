"""What every stage reads: text for the pretraining mix, demonstrations, comparisons, prompts."""

import re
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any


def _template() -> Any:
    """A key that holds a format template: its braces name columns, also after a $."""
    return field(default=None, metadata={"template": True})


class Templates:
    """How to make the columns that are read from the columns that a record has."""

    def given(self) -> dict[str, str] | None:
        """The templates that were given, `written_out`; None if there are none."""
        pairs = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        return {name: written_out(text) for name, text in pairs.items() if text is not None} or None


@dataclass(kw_only=True)
class TextColumns(Templates):
    """How to make a text from a record's own columns."""

    text: str | None = _template()
    """A format template, e.g. "{title}\\n\\n{body}"; not given: the column `text`."""


@dataclass(kw_only=True)
class PretrainingDataConfig:
    """Text for the pretraining mix."""

    source: str | None = None
    """A .bin/.idx prefix made by megatron-rlhf prepare, or a .txt / .jsonl file or `datasets` name with a `text` column."""
    columns: TextColumns = field(default_factory=TextColumns)
    """Where records have other column names."""
    sequence_length: int = 512
    """Tokens of one pretraining example (InstructGPT: 2048)."""
    held_out: float = 0.05
    """Share of the documents kept for the held-out loss, the alignment tax."""
    held_out_samples: int = 64
    """Sequences in each held-out measurement."""


@dataclass(kw_only=True)
class MessageColumns(Templates):
    """Where the messages of a record are."""

    messages: str | None = _template()
    """The column with the list of messages, e.g. "{conversation}"; not given: the column `messages`, if there is one."""


@dataclass(kw_only=True)
class DemonstrationColumns(MessageColumns):
    """How to make a prompt and a response from a record's own columns."""

    prompt: str | None = _template()
    """A format template, e.g. "{instruction}\\n{input}\\n"; not given: the column `prompt`."""
    response: str | None = _template()
    """A format template, e.g. "{output}"; not given: the column `response`."""


@dataclass(kw_only=True)
class ComparisonColumns(MessageColumns):
    """How to make a ranking from a record's own columns. A template that is just one column keeps its value as it is,
    lists included."""

    prompt: str | None = _template()
    """A format template, e.g. "{question}"; not given: the column `prompt`."""
    responses: str | None = _template()
    """The column with the list of responses, e.g. "{completions}"; not given: `responses`."""
    ranks: str | None = _template()
    """The column with the list of ranks, e.g. "{order}"; not given: `ranks`."""
    chosen: str | None = _template()
    """A format template, e.g. "{better}"; not given: the column `chosen`."""
    rejected: str | None = _template()
    """A format template, e.g. "{worse}"; not given: the column `rejected`."""
    user: str | None = _template()
    """Who wrote the prompt, e.g. "{annotator}"; not given: the column `user`, if there is one."""


@dataclass(kw_only=True)
class PromptColumns(MessageColumns):
    """How to make a prompt from a record's own columns."""

    prompt: str | None = _template()
    """A format template, e.g. "{instruction}\\n"; not given: the column `prompt`."""
    user: str | None = _template()
    """Who wrote the prompt, e.g. "{annotator}"; not given: the column `user`, if there is one."""


def written_out(text: str) -> str:
    """A written \\n becomes a new line, \\t a tab, \\\\ a backslash: shells do not pass such characters easily."""
    meant = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda found: meant[found.group()], text)


@dataclass(kw_only=True)
class TokenizerConfig:
    """The tokenizer, and what ends a response."""

    tokenizer: str | None = None
    """A Hugging Face tokenizer folder, or one made by `megatron-rlhf prepare tokenizer`; not given: the one that came with
    the model that the run starts from."""
    chat_template: str | None = None
    """A Jinja file through which `messages` become text, or the template itself; not given: the one that came with the
    tokenizer. Checkpoints and exported folders carry the template that was used."""
    allow_other_tokenizer: bool = False
    """Continue although a model was trained with another tokenizer; only if you know that the ids agree."""
    stop: list[str] = field(default_factory=list)
    """What else ends a sampled response, in addition to the end tokens of the tokenizer's folder (all that
    generation_config.json and config.json name): special tokens by their text, which checkpoints save as end tokens, and
    strings, however they are split into tokens: `data.stop=["<|eot|>","\\nUser:"]`, where a written \\n means a new line."""


@dataclass(kw_only=True)
class RecordsConfig(TokenizerConfig):
    """Whose records are read, and as what."""

    format: str | None = None
    """The shape of the records, where it is not ours: alpaca, hh_rlhf, nectar, oasst, qa_feedback, sharegpt, tldr,
    ultrafeedback, ultrafeedback_binarized, webgpt, or a YAML file of your own (docs/data.md); `data.columns` goes on top."""
    chat: bool = False
    """Read texts as turns of a conversation, prompts as the user's and responses as the assistant's, through the chat
    template. `messages` are read so in any case."""


class AssistantTurns(Enum):
    """The turns of a conversation that are learned."""

    all = "all"
    last = "last"


@dataclass(kw_only=True)
class DemonstrationDataConfig(RecordsConfig):
    """Prompts with responses to imitate."""

    demonstrations: str | None = None
    """JSON lines (or any `datasets` name) with `prompt` and `response`, or `messages`."""
    assistant_turns: AssistantTurns = AssistantTurns.all
    """Of `messages`, the turns of the assistant's that the loss is on: all, or the last."""
    validation: str | None = None
    """The same for validation; when not given, no validation loss is measured."""
    columns: DemonstrationColumns = field(default_factory=DemonstrationColumns)
    """Where records have other column names."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted (InstructGPT: 1k)."""
    max_response_tokens: int = 1024
    """Longer responses are dropped and counted."""
    pretraining: PretrainingDataConfig = field(default_factory=PretrainingDataConfig)
    """Text mixed in when pretraining_mix > 0."""
    pretraining_mix: float = 0.0
    """Share of the examples that is pretraining text, and the weight of its mean loss per token: the loss is mix x (mean over
    text) + (1 - mix) x (mean over response tokens), however long texts are. 0.1 for PPO's initialisation run (the paper gives
    the 10%, not how they are weighted); 1 trains a language model on text alone. Where a batch is too small for that
    share, such as 0.1 of 4, only some batches contain a text, and it counts as one example there: on average over the
    batches, the share is the same."""


@dataclass(kw_only=True)
class ComparisonDataConfig(RecordsConfig):
    """Responses that people have ranked."""

    comparisons: str
    """JSON lines (or any `datasets` name): `prompt, responses, ranks` or `prompt, chosen, rejected` or `chosen, rejected`, each
    text or messages, and optionally `user`. All records of a prompt are one example."""
    validation: str | None = None
    """The same, held out for validation; when not given, `validation_fraction` of the comparisons is held out."""
    validation_fraction: float = 0.1
    """Share of the prompts held out when no validation file is given, with all their comparisons and, where records
    name a user, all prompts of that user; 0 for none. InstructGPT does not state its share."""
    demonstrations: str | None = None
    """Demonstrations whose mean score the final bias sets to 0; when not given, the best-ranked responses are used."""
    columns: ComparisonColumns = field(default_factory=ComparisonColumns)
    """Where comparisons have other column names."""
    demonstration_columns: DemonstrationColumns = field(default_factory=DemonstrationColumns)
    """Where demonstrations have other column names."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted."""
    max_response_tokens: int = 1024
    """Longer responses are dropped and counted."""


class PromptPart(Enum):
    """A part of the prompts; no user is in more than one part."""

    all = "all"
    train = "train"
    validation = "validation"
    test = "test"


@dataclass(kw_only=True)
class PromptRulesConfig(RecordsConfig):
    """Which prompts are answered, and text to keep the policy from forgetting."""

    columns: PromptColumns = field(default_factory=PromptColumns)
    """Where records have other column names."""
    max_prompt_tokens: int | None = None
    """Longer prompts are dropped and counted. Not given: what the longest response leaves of the model's context (an
    evaluation refuses longer ones instead), half of it where none is given either, at most InstructGPT's 1k tokens."""
    max_per_user: int | None = 200
    """At most this many prompts of one user (InstructGPT, section 3.2); those without a user have no limit."""
    deduplicate_prefix_tokens: int | None = None
    """Of prompts that agree in their first N tokens (shorter ones: in all tokens), only the first is kept. InstructGPT
    did this, but does not state N."""
    part: PromptPart = PromptPart.all
    """Only this part of the prompts: train for PPO and test for an evaluation on prompts that it was not trained on.
    The split is by user (InstructGPT, section 3.2), or by prompt where there is none, and the same in every run."""
    part_shares: tuple[float, float, float] = (0.9, 0.05, 0.05)
    """Shares of the users in train, validation and test, relative to their sum; InstructGPT does not state its shares."""
    pretraining: PretrainingDataConfig = field(default_factory=PretrainingDataConfig)
    """Text for the pretraining gradients."""

    @property
    def longest_prompt(self) -> int:
        """`max_prompt_tokens`, once it is known (`lengths`)."""
        assert self.max_prompt_tokens is not None
        return self.max_prompt_tokens


@dataclass(kw_only=True)
class PromptDataConfig(PromptRulesConfig):
    """Prompts of PPO."""

    prompts: str
    """JSON lines (or any `datasets` name) with `prompt` or `messages` and, optionally, `user`."""


@dataclass(kw_only=True)
class EvaluationDataConfig(PromptRulesConfig):
    """What an evaluation reads: prompts, held-out text, or only benchmarks' files."""

    prompts: str | None = None
    """As in PPO; may be left out."""
