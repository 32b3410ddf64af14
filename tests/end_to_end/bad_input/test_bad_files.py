"""Files and conversations that are not as they should be: the message names the file and the line."""

import pytest
from bad_cases import CHAT, GOOD, PROMPT, RANKED, Case, comparisons, demonstrations

CASES: dict[str, Case] = {
    "missing_file": Case("sft", ["data.demonstrations={folder}/nothing.jsonl"], ["nothing.jsonl: no such file"]),
    "missing_tokenizer": Case("sft", ["data.tokenizer={folder}/nothing"], ["nothing: no such tokenizer folder"]),
    "empty_stop": Case("sft", ['data.stop=[""]'], [r"data\.stop= is empty"]),
    "missing_text": Case("sft", ["data.pretraining.source={folder}/nothing.txt"], ["nothing.txt: no such file"]),
    "empty_file": demonstrations(says=[r"bad\.jsonl: empty"]),
    "broken_json": demonstrations(GOOD, '{"prompt": "say', says=[r"bad\.jsonl, line 2: not JSON"]),
    "not_an_object": demonstrations(GOOD, GOOD, "[1, 2]", says=[r"bad\.jsonl, line 3: a record must be an object"]),
    "missing_column": demonstrations(
        {**PROMPT, "answer": "x"}, says=[r"line 1: no column 'response'", "prompt, answer"]
    ),
    "near_column": demonstrations({**PROMPT, "responce": "x"}, says=["line 1", "did you mean 'responce'"]),
    "number_for_text": demonstrations(
        GOOD, {**PROMPT, "response": 3}, says=["line 2: column 'response' must hold text"]
    ),
    "empty_response": demonstrations(GOOD, {**PROMPT, "response": " "}, says=["line 2", "empty response"]),
    "empty_prompt": demonstrations({"prompt": "", "response": "x"}, says=["line 1: the prompt is empty"]),
    "every_response_too_long": demonstrations(
        {**PROMPT, "response": " beta" * 200}, says=["nothing left to train on", "1 total_too_long|1 response_too_long"]
    ),
    "one_response": comparisons(RANKED, {**RANKED, "responses": [" beta"]}, says=["line 2", "two texts or more"]),
    "other_number_of_ranks": comparisons(
        RANKED, {**RANKED, "ranks": [0, 1, 2]}, says=["line 2: column 'ranks' has 3 numbers for 2 responses"]
    ),
    "negative_rank": comparisons({**RANKED, "ranks": [0, -1]}, says=["line 1: column 'ranks'", "from 0"]),
    "all_ties": comparisons({**RANKED, "ranks": [1, 1]}, says=["nothing left to train on", "1 all_tied"]),
    "no_dialogue_turn": comparisons({"chosen": "a", "rejected": "b"}, says=["line 1", "add a column 'prompt'"]),
    "every_prompt_too_long": Case(
        "ppo",
        ["data.prompts={file}", "data.max_prompt_tokens=2"],
        ["nothing left", "1 prompt_too_long"],
        lines=[PROMPT],
    ),
    "too_little_text": Case(
        "sft", ["data.pretraining.source={file}"], ["less than one sequence"], lines=[{"text": "beta"}]
    ),
    # Conversations.
    "messages_without_template": demonstrations(
        CHAT, says=["bad.jsonl, line 1: holds messages", "no chat template", r"data\.chat_template=FILE"]
    ),
    "no_template_file": Case(
        "sft", ["data.chat_template={folder}/x.jinja"], [r"data\.chat_template=.*x\.jinja", "No such"]
    ),
    "broken_template": Case("sft", ["data.chat_template={{% for"], [r"data\.chat_template", "no template", "line 1"]),
    "template_that_refuses": Case(
        "sft",
        ["data.chat_template={{{{ raise_exception('not today') }}}}", "data.demonstrations={file}"],
        ["bad.jsonl, line 1: the chat template refuses this conversation: not today"],
        lines=[CHAT],
    ),
    "template_that_drops_a_turn": Case(
        "sft",
        ["data.chat_template={{{{ messages[-1].content + eos_token }}}}", "data.demonstrations={file}"],
        ["bad.jsonl, line 1: the chat template leaves out turn 1, 'user': 'say beta:'"],
        lines=[CHAT],
    ),
    "few_shot_text_before_messages": Case(
        "evaluate",
        ["data.chat_template={{{{ messages[0].content }}}}", "data.prompts={file}", "evaluate.few_shot={file}"],
        [r"evaluate\.few_shot=.*bad\.jsonl", "holds messages"],
        lines=[CHAT],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named_and_nothing_is_lost(name, mistake):
    mistake(CASES[name])
