"""Messages in all kinds of data: each form of a record gives the tokens of `apply_chat_template`."""

import pytest
from chat_templates import BRACKETS, PLAIN, chat_tokenizer

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.chat.messages import readable
from megatron_rlhf.data.comparisons import load_comparisons
from megatron_rlhf.data.demonstrations import load_demonstrations
from megatron_rlhf.data.formats.shape import Shape
from megatron_rlhf.data.prompts import load_prompts

LIMITS = (99, 99, 199)


def turn(role, content):
    return {"role": role, "content": content}


ASK = [turn("system", "Be kind."), turn("user", "Hi")]
GOOD, BAD = turn("assistant", "Hello!"), turn("assistant", "What?")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return chat_tokenizer(tmp_path_factory.mktemp("chat"), PLAIN)


def ids(tokenizer, messages, **settings):
    return tokenizer.hf.apply_chat_template(messages, return_dict=False, **settings)


def text_of(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=False)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [*ASK, GOOD]},
        {"messages": [*ASK, GOOD], "prompt": "Hi", "response": None},
        {"prompt": ASK, "completion": [GOOD]},
        {"prompt": ASK, "response": [GOOD]},
        {"prompt": ASK, "response": GOOD["content"]},
        {"prompt": ASK, "response": GOOD},
        {"messages": [ASK[0], {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None}, GOOD]},
    ],
)
def test_demonstrations(chat, write_records, record):
    (item,) = load_demonstrations(write_records(record), chat, *LIMITS)
    assert item.tokens.tolist() == ids(chat, [*ASK, GOOD])
    assert text_of(chat, item.tokens[item.target]) == "Hello!<|im_end|>"
    assert text_of(chat, item.tokens[: item.prompt_length]).endswith("<|im_start|>assistant\n")
    assert text_of(chat, item.up_to_end(chat.end_id)).endswith("Hello!<|im_end|>")


def test_all_answers_or_the_last(chat, write_records):
    path = write_records({"messages": [turn("user", "a"), GOOD, turn("user", "b"), BAD]})
    ((every,), (last,)) = (load_demonstrations(path, chat, *LIMITS, last_turn_only=only) for only in (False, True))
    assert text_of(chat, every.tokens[every.target]) == "Hello!<|im_end|>What?<|im_end|>"
    assert text_of(chat, last.tokens[last.target]) == "What?<|im_end|>"
    assert every.tokens.tolist() == last.tokens.tolist()


def test_limits_of_a_conversation(chat, write_records):
    path = write_records({"messages": [turn("user", "a"), GOOD, turn("user", "long question " * 9), BAD]})
    (item,) = load_demonstrations(path, chat, *LIMITS, last_turn_only=False)
    prompt, longest = item.prompt_length, max(len(chat.encode(answer)) for answer in ("Hello!", "What?")) + 1
    assert len(load_demonstrations(path, chat, prompt, longest, len(item.tokens))) == 1
    for limits, reason in (
        ((prompt - 1, longest, 999), "prompt_too_long"),
        ((prompt, longest - 1, 999), "response_too_long"),
        ((prompt, longest, len(item.tokens) - 1), "total_too_long"),
    ):
        with pytest.raises(UserError, match=f"1 {reason}"):
            load_demonstrations(path, chat, *limits)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": ASK, "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [*ASK, GOOD], "rejected": [*ASK, BAD]},
        {"prompt": "Hi", "chosen": [*ASK, GOOD], "rejected": [*ASK, BAD], "messages": [*ASK, GOOD]},
        {"prompt": ASK, "chosen": "Hello!", "rejected": "What?"},
        {"messages": ASK, "chosen": GOOD, "rejected": BAD},
        {"messages": ASK, "responses": ["What?", "Hello!"], "ranks": [1, 0]},
        {"prompt": ASK, "responses": [[BAD], [GOOD]], "ranks": [2, 1]},
        {"messages": [*ASK, BAD], "responses": [BAD, "Hello!"], "ranks": [1, 0]},
    ],
)
def test_comparisons(chat, write_records, record):
    (item,) = load_comparisons(write_records(record), chat, *LIMITS)
    assert item.prompt_tokens.tolist() == ids(chat, ASK, add_generation_prompt=True)
    ((better, worse, of),) = item.pairs.tolist()
    assert of == 2
    for place, answer in ((better, GOOD), (worse, BAD)):
        whole = [*item.prompt_tokens.tolist(), *item.responses_tokens[place].tolist()]
        assert [*whole, *chat.encode("\n")] == ids(chat, [*ASK, answer])
    assert [response[-1] for response in item.responses_tokens] == [chat.end_id] * 2


def test_comparisons_of_one_prompt_are_one_item_in_whatever_form(chat, write_records):
    path = write_records(
        {"chosen": [*ASK, GOOD], "rejected": [*ASK, BAD]},
        {"messages": ASK, "responses": ["What?", "Go away."], "ranks": [0, 1]},
        {"chosen": [*ASK, GOOD], "rejected": ASK},  # no answer at all
        {"chosen": [*ASK, GOOD], "rejected": [*ASK, GOOD]},
    )
    examples = load_comparisons(path, chat, *LIMITS)
    assert [len(item.responses_tokens) for item in examples] == [3]
    assert examples.dropped == {"empty_response": 1, "equal_responses": 1}


@pytest.mark.parametrize("record", [{"messages": ASK}, {"prompt": ASK}, {"messages": [*ASK, GOOD], "prompt": "other"}])
def test_prompts(chat, write_records, record):
    plain = {"prompt": "Hi", "user": "ann"}
    first, second = load_prompts(write_records({**record, "user": "bob"}, plain), chat, 99)
    assert first.tokens.tolist() == ids(chat, ASK, add_generation_prompt=True)
    assert (first.user, list(first.messages)) == ("bob", ASK)
    assert first.text == text_of(chat, first.tokens)
    assert second.tokens.tolist() == chat.encode("Hi", bos=True)
    assert second.messages is None


@pytest.mark.parametrize(
    ("load", "record", "says"),
    [
        ("demonstrations", {"messages": []}, "column 'messages' must be a list of messages"),
        ("demonstrations", {"messages": "Hi"}, "column 'messages' must be a list of messages"),
        ("demonstrations", {"messages": [GOOD, "x"]}, "column 'messages', turn 2: a message must be an object"),
        ("demonstrations", {"messages": [{"from": "human", "value": "x"}]}, "data.format=sharegpt"),
        ("demonstrations", {"messages": [{"role": "user", "content": 5}]}, "turn 1: content must be text, not int 5"),
        ("demonstrations", {"messages": [turn("user", [{"type": "image"}])]}, "a list of parts of type 'text'"),
        ("demonstrations", {"messages": [*ASK, turn("assistant", " ")]}, "turn 3 is an empty response"),
        ("demonstrations", {"messages": [*ASK, turn("gpt", "x")]}, "to learn; the roles are: system, user, gpt"),
        (
            "demonstrations",
            {"messages": [*ASK, turn("Assistant", "x")]},
            "the role of who answers is 'assistant', not 'Assist",
        ),
        (
            "prompts",
            {"messages": [*ASK, turn("ASSISTANT", "x")]},
            "turn 3: the role of who answers is 'assistant', not 'ASSIST",
        ),
        (
            "demonstrations",
            {"messages": [*ASK, GOOD], "chat_template_kwargs": 5},
            "'chat_template_kwargs' must be an object",
        ),
        ("comparisons", {"chosen": [*ASK, GOOD], "rejected": [turn("user", "Ho"), BAD]}, "add a column 'prompt'"),
        ("comparisons", {"prompt": [GOOD], "chosen": [GOOD], "rejected": [BAD]}, "begins with the assistant's turn"),
        ("prompts", {"messages": [GOOD]}, "there are no messages before the assistant's"),
    ],
)
def test_mistakes_are_named_with_the_line(chat, write_records, load, record, says):
    good = {"messages": [*ASK, GOOD], "chosen": [*ASK, GOOD], "rejected": [*ASK, BAD]}
    path = write_records(good, record)
    loaders = {
        "demonstrations": lambda: load_demonstrations(path, chat, *LIMITS),
        "comparisons": lambda: load_comparisons(path, chat, *LIMITS),
        "prompts": lambda: load_prompts(path, chat, 99),
    }
    with pytest.raises(UserError) as error:
        loaders[load]()
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert says in str(error.value)


TOOLS = "{{ tools[0]['name'] if tools else '' }}{{ mood }}"


@pytest.mark.parametrize("template", [PLAIN, BRACKETS, TOOLS + PLAIN], ids=["plain", "with bos", "with tools"])
@pytest.mark.parametrize(
    ("record", "in_chat"),
    [
        ({"prompt": "Hi"}, False),
        ({"prompt": "Hi\n"}, True),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Well?\n\nAssistant:"}, True),
        ({"messages": [turn("user", "Hi"), GOOD, turn("user", "Well?"), BAD]}, False),
        ({"prompt": [turn("user", "Hi")], "tools": [{"name": "clock"}], "chat_template_kwargs": {"mood": "!"}}, True),
    ],
)
def test_what_is_made_of_a_prompt_reads_its_tokens_again(tmp_path, write_records, template, record, in_chat):
    """Answers to it become comparisons and demonstrations for the same policy."""
    tokenizer = chat_tokenizer(tmp_path / "chat", template)
    shape = Shape.of(chat=in_chat)
    (prompt,) = load_prompts(write_records(record), tokenizer, 99, columns=shape)
    ranked = {**prompt.given, "responses": ["yes", "no"], "ranks": [1, 0]}
    (comparison,) = load_comparisons(write_records(ranked), tokenizer, *LIMITS, columns=shape)
    (shown,) = load_demonstrations(
        write_records({**prompt.given, "response": "yes"}), tokenizer, *LIMITS, columns=shape, last_turn_only=True
    )
    assert comparison.prompt_tokens.tolist() == prompt.tokens.tolist()
    assert shown.tokens[: shown.prompt_length].tolist() == prompt.tokens.tolist()


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([turn("user", "Hi\nyou")], "Hi\nyou"),
        ([*ASK, GOOD], "system: Be kind.\n\nuser: Hi\n\nassistant: Hello!"),
        ([{"role": "assistant", "tool_calls": [{"name": "ü"}]}], 'assistant: {"tool_calls": [{"name": "ü"}]}'),
    ],
)
def test_turns_for_people(messages, text):
    assert readable(messages) == text
