"""What an evaluation reads before any model is built."""

import pytest
from chat_templates import PLAIN, chat_tokenizer
from recipe import write_lines

from megatron_rlhf.config.data import EvaluationDataConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.stages import EvaluateConfig
from megatron_rlhf.config.stages.evaluate import EvaluateAlgorithmConfig
from megatron_rlhf.config.training import RunConfig
from megatron_rlhf.trainers.setup.evaluation import _rankings

PAIR = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}


def rankings_of(tmp_path, record: dict, chat: bool = False):
    source = write_lines(tmp_path / "pairs.jsonl", [record])
    config = EvaluateConfig(
        run=RunConfig(dir="-"),
        data=EvaluationDataConfig(chat=chat),
        evaluate=EvaluateAlgorithmConfig(comparisons=str(source)),
    )
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", PLAIN)
    return tokenizer, _rankings(config, tokenizer, 99)


@pytest.mark.parametrize("chat", [False, True])
def test_comparisons_are_read_as_training_reads_them(tmp_path, chat):
    tokenizer, [(_, ranking)] = rankings_of(tmp_path, PAIR, chat)
    turn = [{"role": "user", "content": "Hi"}]
    as_turn = tokenizer.hf.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert ranking.prompt.tolist() == (as_turn if chat else tokenizer.encode("Hi", bos=True))


def test_a_group_that_is_no_name(tmp_path):
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 1: column 'subset' must hold the name of a group"):
        rankings_of(tmp_path, {**PAIR, "subset": ["x", 0]})
