"""Prompt hygiene by keys: PPO's prompts and an evaluation's prompts share no user."""

import pytest
from recipe import write_lines

from megatron_rlhf.config.data import PromptDataConfig, PromptPart
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.tokenizer import load_tokenizer
from megatron_rlhf.trainers.setup.parts import make_prompts


@pytest.fixture
def choose(recipe, tmp_path):
    """Prompts of 40 users, three each, by the keys."""
    records = [{"prompt": f"say {i}:", "user": f"u{i % 40}"} for i in range(120)]
    source = write_lines(tmp_path / "prompts.jsonl", records)
    tokenizer = load_tokenizer(recipe.root / "tokenizer")
    return lambda **keys: make_prompts(
        str(source), PromptDataConfig(tokenizer="", prompts=str(source), max_prompt_tokens=64, **keys), tokenizer
    )


def test_parts_share_no_user_and_are_all(choose):
    shares = {"part_shares": (0.5, 0.25, 0.25)}
    parts = [choose(part=part, **shares) for part in (PromptPart.train, PromptPart.validation, PromptPart.test)]
    assert sorted(prompt.id for part in parts for prompt in part) == list(range(120))
    assert sum(len({prompt.user for prompt in part}) for part in parts) == 40
    assert len(parts[0]) > max(len(parts[1]), len(parts[2])) > 0
    assert parts[0].describe().endswith(f"dropped: {120 - len(parts[0])} outside data.part=train")
    assert len(choose()) == 120


def test_limits_come_before_the_split(choose):
    few = choose(max_per_user=1, part=PromptPart.train)
    assert {prompt.id for prompt in few} < set(range(40))
    assert [prompt.id for prompt in choose(deduplicate_prefix_tokens=1)] == [0]


def test_a_part_without_prompts_is_named(choose):
    with pytest.raises(UserError, match=r"nothing left.*outside data\.part=test"):
        choose(part=PromptPart.test, part_shares=(1.0, 1e-9, 1e-9))
