"""What an evaluation is asked for belongs together."""

import pytest

from megatron_rlhf.config.checking.evaluation import check_evaluate
from megatron_rlhf.config.data import EvaluationDataConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.rewards import RewardConfig
from megatron_rlhf.config.stages import EvaluateConfig
from megatron_rlhf.config.stages.evaluate import EvaluateAlgorithmConfig
from megatron_rlhf.config.training import RoleConfig, RunConfig

ANSWERS = {"data": EvaluationDataConfig(prompts="-"), "policy": RoleConfig(init_from="-")}
COMPARISONS = {"reward": RewardConfig(init_from="-")}


@pytest.mark.parametrize(
    ("name", "value", "whole"),
    [
        ("labels", "l.sqlite", "data.prompts"),
        ("few_shot", "examples.txt", "data.prompts"),
        ("comparisons_format", "hh_rlhf", "evaluate.comparisons"),
        ("task_path", "tasks", "evaluate.tasks"),
        ("task_data", "data", "evaluate.tasks"),
        ("task_limit", 3, "evaluate.tasks"),
        ("task_shots", 0, "evaluate.tasks"),
        ("task_chat", True, "evaluate.tasks"),
        ("scorer", "file.py:f", "evaluate.tasks"),
    ],
)
def test_a_setting_needs_what_it_is_about(name, value, whole):
    of_comparisons = whole == "data.prompts"
    asked = EvaluateAlgorithmConfig(comparisons="-" if of_comparisons else None, **{name: value})
    given = COMPARISONS if of_comparisons else ANSWERS
    with pytest.raises(UserError, match=rf"evaluate\.{name}={value} is about {whole}, which is not given"):
        check_evaluate(EvaluateConfig(run=RunConfig(dir="-"), evaluate=asked, **given))
    there = {"data.prompts": {}, "evaluate.comparisons": {"comparisons": "-"}, "evaluate.tasks": {"tasks": ["t"]}}[
        whole
    ]
    everything = EvaluateAlgorithmConfig(**{name: value}, **there)
    check_evaluate(EvaluateConfig(run=RunConfig(dir="-"), evaluate=everything, **ANSWERS, **COMPARISONS))
