"""A conversation in the terminal: what is asked, what comes back, and each command."""

import json

import pytest

from megatron_rlhf.compose import compose_config
from megatron_rlhf.config.checking.chat import check_chat
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.stages import ChatConfig
from megatron_rlhf.data.demonstrations import load_demonstrations
from megatron_rlhf.evaluation.chat import ChatRoom
from megatron_rlhf.trainers.setup.chat import build_chat

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] + ' ' }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
STORY = "Once upon a time, there was a little girl named Lily."


def room(model, *settings):
    sampling = ["sampling.max_response_tokens=12", "sampling.temperature=0"]
    config, _ = compose_config("chat", ChatConfig, [f"policy.init_from={model}", *sampling, *settings])
    check_chat(config)
    return build_chat(config)


def talk(chat: ChatRoom, *lines):
    """What is written while these lines are read."""
    waiting, written = list(lines), []
    chat.read = lambda: waiting.pop(0) if waiting else None
    chat.write = written.append
    chat.run()
    return "".join(written[1:])


@pytest.fixture(scope="module")
def model(world, shared_data):
    return shared_data / "tinystories_260k"


@pytest.fixture(scope="module")
def both(model):
    return room(model, f"other.init_from={model}", f"data.chat_template={TEMPLATE}")


@pytest.fixture
def chat(both):
    both.messages, both.shown, both.seed, both.best_of = [], "a", 0, 1
    return both


def greedy(model, prompt, **settings):
    """By transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model).eval()
    done = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, **settings)
    return done[0, len(prompt) :].tolist()


def test_turns_go_through_the_template_and_are_streamed(chat, model):
    written = talk(chat, STORY, "She was happy.")
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "user", "assistant"]
    tokenizer = chat.tokenizer
    for end in (1, 3):
        prompt = tokenizer.hf.apply_chat_template(chat.messages[:end], return_dict=False, add_generation_prompt=True)
        answer = tokenizer.decode(greedy(model, prompt), continuation=True)
        assert chat.messages[end]["content"] == answer
        assert f"a: {answer}\n" in written


def test_without_a_template_a_line_is_gone_on_from(model):
    plain = room(model)
    written = talk(plain, STORY)
    assert (
        written
        == plain.tokenizer.decode(greedy(model, plain.tokenizer.encode(STORY, bos=True)), continuation=True) + "\n"
    )


def test_a_repetition_penalty_is_that_of_generate(model):
    """Over the prompt and all that was said, slot by slot."""
    plain = room(model, "sampling.repetition_penalty=1.6")
    prompt = plain.tokenizer.encode(STORY, bos=True)
    theirs = plain.tokenizer.decode(greedy(model, prompt, repetition_penalty=1.6), continuation=True)
    assert talk(plain, STORY).strip("\n") == theirs.strip("\n") != plain.tokenizer.decode(greedy(model, prompt))


def test_two_models_side_by_side(chat):
    written = talk(chat, "/model ab", STORY, "/model b", "/model c", "/quit", "never read")
    first, second, mistake = written.strip().split("\n")
    assert first.startswith("a: ") and second == first.replace("a: ", "b: ")
    assert mistake.startswith("/model c: there are /model a|b|ab")
    assert chat.shown == "b"


def test_the_seed_decides_and_undo_and_reset_forget(chat):
    chat.config.sampling.temperature = 1.0
    try:
        written = talk(chat, STORY, "/undo", STORY, "/reset", "/seed 7", STORY).strip().split("\n")
    finally:
        chat.config.sampling.temperature = 0.0
    assert written[0] == written[1] != written[2]
    assert len(chat.messages) == 2


def test_the_best_of_n_is_given_with_its_score(chat, monkeypatch):
    chat.config.sampling.temperature = 1.0
    seen = []

    def scores(prompt, completions):
        seen.append([chat.tokenizer.decode(c.tokens, continuation=True) for c in completions])
        return [float(len(text)) for text in seen[-1]]

    monkeypatch.setattr(chat, "reward", object())
    monkeypatch.setattr(chat, "_scores", scores)
    written = talk(chat, "/best 4", STORY)
    chat.config.sampling.temperature = 0.0
    best = max(seen[0], key=len)
    assert len(set(seen[0])) == 4
    assert written == f"a: {best}  [{len(best)}.000, best of 4]\n"


def test_conversations_are_saved_as_demonstrations(chat, tmp_path):
    talk(chat, STORY, f"/save {tmp_path / 'talk.jsonl'}", "/reset", f"/save {tmp_path / 'talk.jsonl'}")
    (saved,) = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
    assert [turn["role"] for turn in saved["messages"]] == ["user", "assistant"]
    assert load_demonstrations(tmp_path / "talk.jsonl", chat.tokenizer, 500, 500, 500)[0].target.any()


def test_mistakes_leave_the_conversation_as_it_is(chat):
    written = talk(chat, "word " * 600, "/best 3", "/seed x", "/nonsense")
    assert "are more than the context of 512 tokens: /undo or /reset" in written
    assert "/best N needs reward.init_from" in written
    assert "/seed x: there are" in written and "/nonsense: there are" in written
    assert chat.messages == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ([], "policy.init_from is not given"),
        (["policy.init_from=x", "chat.best_of=2"], "chat.best_of=2 needs reward.init_from"),
        (["policy.init_from=x", "chat.best_of=0"], "chat.best_of=0 must be at least 1"),
        (["policy.init_from=x", "parallel.context=2"], "a conversation samples token by token"),
    ],
)
def test_what_it_needs(settings, says):
    config, _ = compose_config("chat", ChatConfig, settings)
    with pytest.raises(UserError, match=says):
        check_chat(config)
