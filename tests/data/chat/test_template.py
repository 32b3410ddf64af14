"""Conversations to tokens: ids and marked masks are transformers' own, the others worked out by hand, turn by turn."""

import datetime

import chat_templates
import numpy as np
import pytest
from chat_templates import chat_tokenizer

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.chat.messages import Conversation
from megatron_rlhf.data.chat.template import Chat
from megatron_rlhf.data.records import Record

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": " the answer"},
    {"role": "user", "content": "And\n"},
    {"role": "assistant", "content": "\nhere 世界"},
]
TEMPLATES = {name: value for name, value in vars(chat_templates).items() if name.isupper() and isinstance(value, str)}
GOOD = ["PLAIN", "MARKED", "THINKS", "INJECTS", "STRIPS", "OTHER_END", "TAIL", "BRACKETS", "ASKS_TO_THINK"]


def of(messages, learned_from=0):
    return Conversation(Record("talk.jsonl, line 3", {"messages": messages}), tuple(messages), learned_from)


@pytest.fixture
def make(tmp_path):
    def tokenizer(name):
        return chat_tokenizer(tmp_path / name, TEMPLATES[name])

    return tokenizer


def learned_texts(tokenizer, rendered):
    """The text of each run of learned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], rendered.targets, [0]])))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [tokenizer.decode(rendered.tokens[a:b], skip_special_tokens=False) for a, b in runs]


@pytest.mark.parametrize("name", GOOD)
def test_ids_are_those_of_apply_chat_template(make, name):
    tokenizer = make(name)
    chat = Chat(tokenizer)
    whole = tokenizer.hf.apply_chat_template(TALK, return_dict=False)
    assert chat.learned(of(TALK))[-1].tokens.tolist() == whole
    asked = tokenizer.hf.apply_chat_template(TALK[:3], add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(chat.prompt_text(of(TALK))) == asked
    prompt, responses = chat.answers(of(TALK[:3]), [(TALK[3],), (TALK[1],)])
    assert [*prompt, *responses[0]] == whole[: len(prompt) + len(responses[0])]
    if name != "ASKS_TO_THINK":
        assert prompt.tolist() == asked


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("PLAIN", [[" the answer<|im_end|>", "\nhere 世界<|im_end|>"]]),
        ("INJECTS", [[" the answer<|im_end|>", "\nhere 世界<|im_end|>"]]),
        ("STRIPS", [["the answer<|im_end|>", "here 世界<|im_end|>"]]),
        ("TAIL", [[" the answer<|inner|><|end|>", "\nhere 世界<|inner|><|end|>"]]),
        ("BRACKETS", [["  the answer<eos>", " \nhere 世界<eos>"]]),
        ("ASKS_TO_THINK", [[" the answer<|im_end|>", "\nhere 世界<|im_end|>"]]),
        # Two examples: an answer is learned as it is when it is given, not as it is remembered.
        ("OTHER_END", [[" the answer<|return|>"], ["\nhere 世界<|return|>"]]),
    ],
)
def test_the_answers_and_their_ends_are_learned(make, name, texts):
    tokenizer = make(name)
    assert [learned_texts(tokenizer, part) for part in Chat(tokenizer).learned(of(TALK))] == texts
    last = Chat(tokenizer).learned(of(TALK), last_only=True)
    assert [learned_texts(tokenizer, part) for part in last] == [texts[-1][-1:]]
    given = Chat(tokenizer).learned(of(TALK, learned_from=2))  # the first turns are a prompt
    assert [learned_texts(tokenizer, part) for part in given] == [texts[-1][-1:]]


def test_thoughts_that_later_turns_forget_are_learned_where_they_are_thought(make):
    tokenizer = make("THINKS")
    talk = [TALK[0], {"role": "assistant", "content": "hm</think>yes"}, TALK[2], TALK[3]]
    examples = Chat(tokenizer).learned(of(talk))
    assert [learned_texts(tokenizer, part) for part in examples] == [
        ["hm</think>yes<|im_end|>"],
        ["\nhere 世界<|im_end|>"],
    ]
    assert examples[0].tokens.tolist() == tokenizer.hf.apply_chat_template(talk[:2], return_dict=False)
    assert "hm" not in tokenizer.decode(examples[1].tokens)
    # Nothing changes where nothing was thought: one example.
    assert len(Chat(tokenizer).learned(of(TALK))) == 1


def test_marked_answers_are_those_that_transformers_marks(make):
    tokenizer = make("MARKED")
    (found,) = Chat(tokenizer).learned(of(TALK))
    theirs = tokenizer.hf.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert found.targets.tolist() == [bool(mark) for mark in theirs["assistant_masks"]]
    for only_last in (Chat(tokenizer).learned(of(TALK), last_only=True), Chat(tokenizer).learned(of(TALK, 2))):
        assert [learned_texts(tokenizer, part) for part in only_last] == [["\nhere 世界<|im_end|>\n"]]
    # A comparison is read up to the end of the turn, as a sampled response is.
    _, (response,) = Chat(tokenizer).answers(of(TALK[:1]), [(TALK[1],)])
    assert tokenizer.decode(response, skip_special_tokens=False) == " the answer<|im_end|>"


@pytest.mark.parametrize("name", GOOD)
def test_what_is_learned_follows_what_a_policy_is_asked_with(make, name):
    """Each learned run ends with the token that ends a response, and continues the prompt of the turns before it."""
    tokenizer = make(name)
    chat, seen = Chat(tokenizer), []
    for part in chat.learned(of(TALK)):
        for turn in (1, 3):
            asked = tokenizer.encode(chat.prompt_text(of(TALK[: turn + 1])))
            start = next((i for i, (a, b) in enumerate(zip(asked, part.tokens, strict=False)) if a != b), len(asked))
            if start < len(part.tokens) and part.targets[start] and not part.targets[start - 1]:
                seen.append((turn, start == len(asked)))
        last = np.flatnonzero(part.targets)[-1]
        assert tokenizer.end_id in part.tokens[last - 1 : last + 1]  # marked ones hold the new line behind it
    assert seen == [(turn, name != "ASKS_TO_THINK") for turn in (1, 3)]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("PLAIN", "<|im_end|>"),
        ("OTHER_END", "<|return|>"),
        ("TAIL", "<|end|>"),
        ("BRACKETS", "<eos>"),
        ("NO_END", "<eos>"),
    ],
)
def test_the_end_of_a_turn_is_the_end_of_a_response(make, name, end):
    tokenizer = make(name)
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.end_id) == end
    assert tokenizer.end_id in tokenizer.stop_ids


@pytest.mark.parametrize(
    ("name", "messages", "says"),
    [
        ("RAISES", [SYSTEM, *TALK], "the chat template refuses this conversation: no system turns here"),
        ("PLAIN", [{"role": "user"}, TALK[1]], "the chat template refuses this conversation: "),
        ("DROPS", [SYSTEM, *TALK], "the chat template leaves out turn 1, 'system': 'Be brief.'"),
        ("DROPS", [TALK[0], TALK[1], {**SYSTEM, "content": "o"}, *TALK[2:]], "leaves out turn 3, 'system': 'o'"),
        ("NO_END", TALK, "does not end the assistant's turn with the token that ends a response, <eos>"),
        ("REWRITES", TALK, "the chat template changes what is before the assistant's turn when it is added"),
        ("PLAIN", TALK[:1], "no turn of the role 'assistant' to learn; the roles are: user"),
        ("PLAIN", TALK[1:2], "the conversation begins with the assistant's turn"),
    ],
)
def test_what_cannot_be_learned_is_refused_with_its_place(make, name, messages, says):
    with pytest.raises(UserError) as error:
        Chat(make(name)).learned(of(messages))
    assert str(error.value).startswith("talk.jsonl, line 3: ")
    assert says in str(error.value)


def test_a_tokenizer_without_a_template(tmp_path):
    with pytest.raises(UserError, match=r"line 3: holds messages, .* no chat template .*data\.chat_template="):
        Chat(chat_tokenizer(tmp_path / "none", None)).learned(of(TALK))


def test_an_answer_that_is_asked_for_otherwise_is_told(make, caplog):
    Chat(make("ASKS_TO_THINK")).learned(of(TALK))
    assert "prompts for an answer with '<|im_start|>assistant\\n<think>' but renders answers" in caplog.text
    assert len(caplog.records) == 1


def test_tools_and_variables_of_a_record_reach_the_template(tmp_path):
    template = "{{ tools[0]['name'] if tools else 'none' }} {{ mood }}" + chat_templates.PLAIN
    tokenizer = chat_tokenizer(tmp_path / "t", template)
    record = Record("line 1", {"tools": [{"name": "clock"}], "chat_template_kwargs": {"mood": "gay"}})
    assert Chat(tokenizer).prompt_text(Conversation(record, tuple(TALK[:1]))).startswith("clock gay")
    assert Chat(tokenizer).prompt_text(of(TALK[:1])).startswith("none <|im")


def test_a_template_that_asks_for_the_date_is_told_that_of_the_run(tmp_path):
    template = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %} " + chat_templates.PLAIN
    tokenizer = chat_tokenizer(tmp_path / "t", template)
    today = tokenizer.hf.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    assert Chat(tokenizer).prompt_text(of(TALK[:1])) == today
    tokenizer.today = datetime.date(1999, 12, 31)
    assert Chat(tokenizer).prompt_text(of(TALK[:1])) == "31 Dec 1999" + today[11:]
    assert tokenizer.hf.chat_template == template
