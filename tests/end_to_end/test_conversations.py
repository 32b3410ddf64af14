"""Conversations from demonstrations to an exported folder, with the chat template that the run was given."""

import json

from commands import run_example
from ranks import run_ranks
from recipe import WORDS, read_metrics, run_stage, write_lines
from transformers import AutoTokenizer, GenerationConfig

from megatron_rlhf.checkpoint import sharded

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPT = "user:say {}:\nassistant:"


def turns(word, *answers):
    return [{"role": "user", "content": f"say {word}:"}, *({"role": "assistant", "content": text} for text in answers)]


def test_messages_are_trained_on_as_the_text_that_they_become(recipe, tmp_path):
    """SFT and reward model: the run on messages is the run on the same texts, its end of a response included."""
    template = f"data.chat_template={tmp_path / 'own.jinja'}"
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    forms = {
        "texts": (
            [{"prompt": PROMPT.format(w), "response": f" {w} {w}"} for w in WORDS],
            [{"prompt": PROMPT.format(w), "chosen": f" {w}", "rejected": f" {w}" * 3} for w in WORDS],
        ),
        "messages": (
            [{"messages": turns(w, f" {w} {w}")} for w in WORDS],
            [{"chosen": turns(w, f" {w}"), "rejected": turns(w, f" {w}" * 3)} for w in WORDS],
        ),
    }
    for name, (demonstrations, comparisons) in forms.items():
        data = write_lines(tmp_path / f"{name}.jsonl", demonstrations)
        settings = [template, f"data.demonstrations={data}", f"data.validation={data}", "sft.dropout=0"]
        settings += [f"policy.init_from={recipe.root / 'sft'}", "policy.optimizer.epsilon=1e-4"]
        ranks, layout = (1, []) if name == "texts" else (2, ["parallel.tensor=2", "parallel.sequence=true"])
        run_ranks(ranks, run_stage, "sft", recipe.sft(str(tmp_path / f"sft_{name}"), *settings, *layout), timeout=400)
        ranked = write_lines(tmp_path / f"{name}_ranked.jsonl", comparisons)
        settings = [template, f"data.comparisons={ranked}", "reward.optimizer.epsilon=1e-4"]
        start = recipe.root / "reward_model"
        reward = recipe.reward_model(str(tmp_path / f"rm_{name}"), start, *settings, *layout)
        run_ranks(ranks, run_stage, "reward_model", reward, timeout=400)
    for stage, figure in (("sft", "sft/loss"), ("sft", "sft/validation_loss"), ("rm", "rm/loss")):
        ours, theirs = (
            [row[figure] for row in read_metrics(tmp_path / f"{stage}_{name}") if figure in row]
            for name in ("messages", "texts")
        )
        assert ours and len(ours) == len(theirs)
        assert all(abs(a - b) < 1e-5 * abs(b) for a, b in zip(ours, theirs, strict=True)), (figure, ours, theirs)
    _policy_and_export(recipe, tmp_path)


def _policy_and_export(recipe, tmp_path):
    """PPO answers conversations through the template that came with the policy, and so does the exported folder."""
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"messages": turns(w), "user": w[0]} for w in WORDS])
    start = tmp_path / "sft_messages", tmp_path / "rm_messages"
    more = ["data.tokenizer=null", f"data.prompts={prompts}", "ppo.iterations=1", "ppo.warmup_iterations=1"]
    run_ranks(2, run_stage, "ppo", recipe.ppo(str(tmp_path / "ppo"), *start, *more, "parallel.pipeline=2"), timeout=400)
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} <= {PROMPT.format(w) for w in WORDS}
    checkpoint = sharded.find_checkpoint(tmp_path / "ppo", "test")
    finished = run_example(
        "../tools/convert_checkpoint",
        *("megatron-to-hf", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "hf"), "--role", "policy"),
    )
    assert finished.codes == [0], finished.output
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.chat_template == TEMPLATE
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == theirs.eos_token_id
    assert theirs.apply_chat_template(turns("beta"), add_generation_prompt=True, tokenize=False) == PROMPT.format(
        "beta"
    )


def test_another_template_at_resume_is_refused(recipe, tmp_path):
    data = write_lines(tmp_path / "chat.jsonl", [{"messages": turns(w, f" {w}")} for w in WORDS])
    settings = [f"data.demonstrations={data}", "data.validation=null", "run.stop_at_step=1"]
    first = recipe.sft(str(tmp_path / "run"), *settings, f"data.chat_template={TEMPLATE}")
    assert run_example("train_sft", *first).codes == [0]
    other = recipe.sft(str(tmp_path / "run"), *settings, f"data.chat_template={TEMPLATE.replace('user', 'User')}")
    assert run_example("train_sft", *first, "run.resume=true", "run.stop_at_step=2").codes == [0]
    changed = [argument.replace("{{ m['role'] }}:", "{{ m['role'] }}>") for argument in other]
    finished = run_example("train_sft", *changed, "run.resume=true", "run.stop_at_step=3")
    assert finished.codes == [2], finished.output
    assert "data.chat_template, data.tokenizer: " in finished.output
    assert "was trained with other chat template" in finished.output
