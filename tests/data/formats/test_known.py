"""Known shapes of data, a record or two of each as published: what becomes of them is written out here by hand."""

import json

import pytest
from chat_templates import PLAIN, chat_tokenizer

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.comparisons import load_comparisons
from megatron_rlhf.data.demonstrations import load_demonstrations
from megatron_rlhf.data.formats.shape import Shape, known_formats
from megatron_rlhf.data.prompts import load_prompts
from megatron_rlhf.data.records import read_records
from megatron_rlhf.data.tokenizer import load_tokenizer

LIMITS = (500, 500, 1000)
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: Because.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: No.",
}
TREE = {
    "message_tree_id": "t",
    "prompt": {
        "text": "Hi",
        "role": "prompter",
        "replies": [
            {
                "text": "Bad",
                "role": "assistant",
                "rank": 1,
                "replies": [
                    {"text": "Why?", "role": "prompter", "replies": [{"text": "So", "role": "assistant", "rank": None}]}
                ],
            },
            {"text": "Good", "role": "assistant", "rank": 0, "replies": []},
            {"text": "Gone", "role": "assistant", "rank": 2, "deleted": True, "replies": []},
        ],
    },
}
FLAT = [
    {"message_id": i, "parent_id": p, "message_tree_id": "t", "text": text, "role": role, "rank": rank}
    for i, p, text, role, rank in [
        ("a", None, "Hi", "prompter", None),
        ("b", "a", "Bad", "assistant", 1),
        ("c", "a", "Good", "assistant", 0),
        ("d", "b", "Why?", "prompter", None),
        ("e", "d", "So", "assistant", None),
    ]
]
RANKED = {
    # format: records, and of the first: prompt, responses, ranks
    "nectar": (
        [
            {
                "prompt": "\n\nHuman: Hi\n\nAssistant: ",
                "answers": [{"answer": "a", "rank": 2.0}, {"answer": "b", "rank": 1.0}],
            }
        ],
        ("\n\nHuman: Hi\n\nAssistant: ", ["a", "b"], [1, 0]),
    ),
    "ultrafeedback": (
        [
            {
                "instruction": "Hi",
                "completions": [{"response": x, "overall_score": s} for x, s in (("a", 5), ("b", 7.5), ("c", 5))],
            }
        ],
        ("Hi\n\n", ["a", "b", "c"], [1, 0, 1]),
    ),
    "tldr": (
        [
            {
                "info": {"post": "Long.", "title": "T", "subreddit": "AskMe"},
                "summaries": [{"text": " a", "policy": "x"}, {"text": " b", "policy": "y"}],
                "choice": 1,
            }
        ],
        ("SUBREDDIT: r/AskMe\n\nTITLE: T\n\nPOST: Long.\n\nTL;DR:", [" a", " b"], [1, 0]),
    ),
    "webgpt": (
        [{"question": {"full_text": "Why?"}, "answer_0": "a", "answer_1": "b", "score_0": -0.5, "score_1": 0.5}],
        ("Why?\n\n", ["a", "b"], [1, 0]),
    ),
    "qa_feedback": (
        [
            {
                "text": "question: q",
                **{f"prediction {i}": str(i) for i in (1, 2, 3, 4)},
                "preference": [2, 1, 1, 1, 1, 0],
            }
        ],
        ("question: q\n\n", ["1", "2", "3", "4"], [1, 0, 2, 2]),
    ),
    "oasst": ([TREE], ("prompter: Hi\n\nassistant:", [" Good", " Bad"], [0, 1])),
}


def read(path, kind, format, **more):
    return list(read_records(path, Shape.of(format, **more), kind=kind))


@pytest.mark.parametrize("name", RANKED)
def test_rankings(write_records, name):
    records, expected = RANKED[name]
    path = write_records(*records)
    found = read(path, "comparisons", name)[0]
    assert (found.fields["prompt"], found.fields["responses"], found.fields["ranks"]) == expected
    best = expected[1][expected[2].index(0)]
    demonstration = read(path, "demonstrations", name)[0]
    assert (demonstration.fields["prompt"], demonstration.fields["response"]) == (expected[0], best)


@pytest.mark.parametrize("rows", [[TREE], FLAT])
def test_trees_give_every_turn_of_the_user(write_records, rows):
    path = write_records(*rows, {**rows[0], "message_tree_id": "u", "message_id": "z"})
    later = "prompter: Hi\n\nassistant: Bad\n\nprompter: Why?\n\nassistant:"
    found = [(r.fields["prompt"], r.fields["response"]) for r in read(path, "demonstrations", "oasst")]
    assert found[:2] == [("prompter: Hi\n\nassistant:", " Good"), (later, " So")]
    assert [r.fields["prompt"] for r in read(path, "prompts", "oasst")][:2] == [found[0][0], later]
    assert len(read(path, "comparisons", "oasst")) == (2 if rows is not FLAT else 1)  # one answer is no comparison
    turns = read(path, "demonstrations", "oasst", chat=True)[1].fields
    assert [(turn["role"], turn["content"]) for turn in turns["prompt"]] == [
        ("user", "Hi"),
        ("assistant", "Bad"),
        ("user", "Why?"),
    ]
    assert turns["response"] == "So"


def test_hh_is_text_or_turns(write_records, tokenizer):
    path = write_records(HH, {"chosen": "\n\nHuman: Hi\n\nAssistant: ", "rejected": "\n\nHuman: Hi\n\nAssistant: a"})
    prompt = HH["chosen"].removesuffix(" Because.")
    first = read(path, "comparisons", "hh_rlhf")[0].fields
    assert (first["prompt"], first["chosen"], first["rejected"]) == (prompt, " Because.", " No.")
    examples = load_comparisons(path, tokenizer, *LIMITS, Shape.of("hh_rlhf"))
    assert examples.dropped == {"empty_response": 1}
    without = load_comparisons(path, tokenizer, *LIMITS)  # the form is known without its name
    assert [c.prompt_tokens.tolist() for c in examples] == [c.prompt_tokens.tolist() for c in without]
    demonstrations = load_demonstrations(path, tokenizer, *LIMITS, Shape.of("hh_rlhf"))
    assert demonstrations.describe() == "1 of 2 records kept; dropped: 1 empty_response"
    assert tokenizer.decode(demonstrations[0].tokens) == HH["chosen"]
    assert load_prompts(path, tokenizer, 500, columns=Shape.of("hh_rlhf"))[0].text == prompt


def test_hh_as_a_conversation(tmp_path, write_records):
    chat = chat_tokenizer(tmp_path / "chat", PLAIN)
    path = write_records(HH)
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "Hi"), ("assistant", "Hello."), ("user", "Why?"), ("assistant", "Because."))
    ]
    whole = chat.hf.apply_chat_template(turns, return_dict=False)
    asked = chat.hf.apply_chat_template(turns[:3], add_generation_prompt=True, return_dict=False)
    for format in (None, "hh_rlhf"):
        (item,) = load_comparisons(path, chat, *LIMITS, Shape.of(format, chat=True))
        assert item.prompt_tokens.tolist() == asked
        assert [*asked, *item.responses_tokens[0], *chat.encode("\n")] == whole
    (demonstration,) = load_demonstrations(path, chat, *LIMITS, Shape.of("hh_rlhf", chat=True))
    assert demonstration.tokens.tolist() == whole
    (prompt,) = load_prompts(path, chat, 500, columns=Shape.of("hh_rlhf", chat=True))
    assert prompt.tokens.tolist() == asked


def test_text_as_a_conversation(tmp_path, write_records):
    chat = chat_tokenizer(tmp_path / "chat", PLAIN)
    path = write_records(
        {"instruction": "Add", "input": "1 1", "output": "2"}, {"instruction": "Hi", "input": None, "output": "a"}
    )
    turns = [{"role": "user", "content": "Add\n\n1 1"}, {"role": "assistant", "content": "2"}]
    items = load_demonstrations(path, chat, *LIMITS, Shape.of("alpaca", chat=True))
    assert items[0].tokens.tolist() == chat.hf.apply_chat_template(turns, return_dict=False)
    texts = [record.fields["prompt"] for record in read(path, "demonstrations", "alpaca")]
    assert texts == ["Add\n\n1 1\n\n", "Hi\n\n"]


def test_sharegpt(tmp_path, write_records):
    chat = chat_tokenizer(tmp_path / "chat", PLAIN)
    talk = [{"from": "system", "value": "Be."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    (item,) = load_demonstrations(write_records({"conversations": talk}), chat, *LIMITS, Shape.of("sharegpt"))
    turns = [{"role": r, "content": c} for r, c in (("system", "Be."), ("user", "Hi"), ("assistant", "Ho"))]
    assert item.tokens.tolist() == chat.hf.apply_chat_template(turns, return_dict=False)
    with pytest.raises(UserError, match=r"line 1, turn 1: role 'dog' is none of human"):
        read(write_records({"conversations": [{"from": "dog", "value": "Wau"}]}), "prompts", "sharegpt")


def test_ultrafeedback_binarized(tmp_path, write_records):
    chat = chat_tokenizer(tmp_path / "chat", PLAIN)
    talks = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}] for text in ("a", "b")]
    path = write_records({"prompt": "Hi", "chosen": talks[0], "rejected": talks[1], "messages": talks[0]})
    shape = Shape.of("ultrafeedback_binarized")
    asked = chat.hf.apply_chat_template(talks[0][:1], add_generation_prompt=True, return_dict=False)
    assert load_comparisons(path, chat, *LIMITS, shape)[0].prompt_tokens.tolist() == asked
    assert load_prompts(path, chat, 500, columns=shape)[0].tokens.tolist() == asked
    whole = chat.hf.apply_chat_template(talks[0], return_dict=False)
    assert load_demonstrations(path, chat, *LIMITS, shape)[0].tokens.tolist() == whole


def test_votes_that_go_in_a_circle_are_counted(write_records, tokenizer):
    (record,), _ = RANKED["qa_feedback"]
    path = write_records(record, {**record, "preference": [1, 2, 0, 1, 0, 0]})
    examples = load_comparisons(path, tokenizer, *LIMITS, Shape.of("qa_feedback"))
    assert examples.describe() == "1 of 2 records kept; dropped: 1 cyclic_votes"


def test_a_file_of_ones_own(tmp_path, write_records, tokenizer):
    (tmp_path / "own.yaml").write_text('columns: {prompt: "{q.text}:", response: "{a}", user: "{who}"}')
    path = write_records(
        {"q": {"text": "Why"}, "a": "So", "who": None}, {"q": {"text": "How"}, "a": "Ah", "who": "eva"}
    )
    shape = Shape.of(str(tmp_path / "own.yaml"), {"response": "{a}!"})
    assert [tokenizer.decode(d.tokens) for d in load_demonstrations(path, tokenizer, *LIMITS, shape)] == [
        "Why:So!",
        "How:Ah!",
    ]
    assert [p.user for p in load_prompts(path, tokenizer, 500, columns=shape)] == [None, "eva"]


@pytest.mark.parametrize("name", ["oasst_ranked_212.jsonl", "qa_feedback_k4_400.jsonl", "hh_harmless_1800.jsonl.gz"])
def test_real_files_with_the_name_of_their_format_or_without(shared_data, name):
    tokenizer = load_tokenizer(shared_data / "gpt2_tokenizer")
    format = next(known for known in known_formats() if name.startswith(known.split("_")[0]))
    named, plain = (
        load_comparisons(shared_data / name, tokenizer, 1024, 1024, 2048, c) for c in (Shape.of(format), None)
    )
    assert named.describe() == plain.describe()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no known format (did you mean 'alpaca'?); there are: alpaca, hh_rlhf"),
        ("colums: {}", "must hold some of about, columns"),
        ("columns: {prompt: {worst: x}}", "columns.prompt: {'worst': 'x'} is no template"),
        ("tree: {leaf: x}", "tree must hold root, text"),
        ("columns: [", "cannot be read"),
        pytest.param("columns: " + "[" * 20_000, "cannot be read: maximum recursion depth", id="many brackets"),
        ('columns: {prompt: "{a.b}"}', "line 1: column 'a.b': no 'b' (did you mean 'bb'?); there are: bb"),
        ('columns: {prompt: "{a[].b}"}', "line 1: column 'a[].b': a list is expected before '[]'"),
        ('columns: {ranks: {scores: "{a}"}}', "line 1: {a} must hold numbers, not {'bb': 1}"),
        ('columns: {ranks: {best: "{n}", of: 2}}', "line 1: {n} is 5; it must be the number of one of 2, from 0"),
        ('columns: {ranks: {votes: ["{n}"]}}', "line 1: ['{n}'] must hold 0, 1 or 2 for each pair"),
        ('columns: {messages: {each: "{n}", role: "{r}", content: "{c}"}}', "line 1: {n} must be a list of messages"),
    ],
)
def test_mistakes(tmp_path, write_records, content, says):
    path = write_records({"a": {"bb": 1}, "n": 5})
    format = "alpacca"
    if content is not None:
        format = tmp_path / "own.yaml"
        format.write_text(content)
    with pytest.raises(UserError) as error:
        read(path, "prompts", str(format))
    assert says in str(error.value)
    json.dumps(str(error.value))
