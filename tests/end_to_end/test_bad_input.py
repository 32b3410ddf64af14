"""What a user can get wrong: exit code 2, one message that names it and says what would be right, and no data lost."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from commands import ROOT, run_example
from recipe import Recipe, write_lines

SCRIPTS = {"sft": "train_sft", "reward_model": "train_reward_model", "ppo": "train_ppo", "evaluate": "evaluate"}
PROMPT = {"prompt": "say beta:"}
GOOD = {**PROMPT, "response": " beta"}
CHAT = {"messages": [{"role": "user", "content": "say beta:"}, {"role": "assistant", "content": " beta"}]}
RANKED = {**PROMPT, "responses": [" beta", " beta beta"], "ranks": [0, 1]}


@dataclass(frozen=True)
class Case:
    """A stage's good arguments, what is wrong with them, and what the message must say (regular expressions)."""

    stage: str
    wrong: list[str]
    says: list[str]
    ranks: int = 1
    lines: list | None = None
    """Records, or raw lines, of the file that `wrong` calls {file}."""
    without: list[str] = field(default_factory=list)
    """Keys left out of the good arguments."""


def demonstrations(*lines, says):
    return Case("sft", ["data.demonstrations={file}"], says, lines=list(lines))


def comparisons(*lines, says, more=()):
    return Case("reward_model", ["data.comparisons={file}", *more], says, lines=list(lines))


CASES: dict[str, Case] = {
    # Keys, types and values.
    "unknown_key": Case("sft", ["sft.epoch=3"], [r"sft\.epoch=3", r"did you mean sft\.epochs\?"]),
    "unknown_key_far_from_all": Case("sft", ["+xyzzy=red"], ["no key xyzzy", "--help"]),
    "unknown_nested_key": Case(
        "ppo", ["policy.optimizer.learning_rate=1"], [r"policy\.optimizer\.learning_rate", "lr"]
    ),
    "wrong_type": Case("sft", ["sft.batch_size=many"], [r"sft\.batch_size=many", "Integer", "Sequences per update"]),
    "float_for_int": Case("sft", ["sft.epochs=1.5"], [r"sft\.epochs=1\.5", "Integer"]),
    "wrong_choice": Case("sft", ["precision=fp31"], ["precision=fp31", "fp32", "bf16"]),
    "wrong_boolean": Case("sft", ["parallel.sequence=maybe"], [r"parallel\.sequence=maybe", "bool"]),
    "missing_value": Case("sft", [], [r"data\.tokenizer is not given", "tokenizer folder"], without=["data.tokenizer"]),
    "missing_model_file": Case("sft", ["model=huge"], ["huge", "tiny"], without=["model"]),
    "missing_recipe": Case("sft", ["recipe=instruct_gpt"], ["recipe=instruct_gpt", "recipes for this stage"]),
    "broken_override": Case("sft", ["sft.epochs"], [r"sft\.epochs"]),
    "save_every_in_words": Case(
        "sft", ["run.save_every=often"], [r"run\.save_every=often", "number of steps", "or auto"]
    ),
    "save_every_negative": Case("sft", ["run.save_every=-1"], [r"run\.save_every=-1", "at least 0"]),
    "cluster_unknown": Case("sft", ["run.save_every=auto", "run.cluster=h300"], ["cluster/h300"]),
    # Layouts and shapes.
    "world_too_small": Case("sft", ["parallel.tensor=2"], ["tensor 2 x pipeline 1 x context 1 = 2", "the 1 ranks"]),
    "world_not_divided": Case("sft", ["parallel.pipeline=2"], ["= 2 does not divide the 3 ranks"], ranks=3),
    "critic_world": Case("ppo", ["critic_parallel.tensor=2"], ["critic_parallel: tensor 2", "the 1 ranks"]),
    "tensor_of_zero": Case("sft", ["parallel.tensor=0"], [r"parallel\.tensor=0 must be at least 1"]),
    "virtual_without_pipeline": Case("sft", ["parallel.virtual_stages=2"], ["virtual_stages=2 needs", "pipeline"]),
    "heads": Case("sft", ["model.num_attention_heads=5"], ["hidden_size 32", "num_attention_heads 5"]),
    "heads_over_tensor": Case(
        "sft",
        ["model.num_attention_heads=1", "parallel.tensor=2"],
        [r"parallel\.tensor=2 does not divide num_attention_heads 1"],
        ranks=2,
    ),
    "query_groups": Case("sft", ["model.num_query_groups=3"], ["num_attention_heads 4", "num_query_groups 3"]),
    "layers": Case(
        "sft", ["model.num_layers=3", "parallel.pipeline=2"], ["2 stages do not divide num_layers 3"], ranks=2
    ),
    "virtual_layers": Case(
        "sft",
        ["model.num_layers=6", "parallel.pipeline=2", "parallel.virtual_stages=2"],
        ["pipeline 2 x virtual_stages 2 = 4 stages", "num_layers 6"],
        ranks=2,
    ),
    "fp8": Case("sft", ["precision=fp8_hybrid"], ["precision=fp8_hybrid", "Transformer Engine", "bf16"]),
    "fp16": Case("sft", ["precision=fp16"], ["precision=fp16 needs a GPU", "bf16"]),
    "fp8_gate_never_open": Case("ppo", ["fp8.gate_max_gap=0"], [r"fp8\.gate_max_gap=0\.0 must be more than 0"]),
    "sampling_in_fp8_alone": Case(
        "ppo", ["rollout.precision=fp8_hybrid"], [r"rollout\.precision=fp8_hybrid", "precision=fp32", "sample in fp32"]
    ),
    "fp8_recipe": Case("sft", ["fp8.recipe=nvfp8"], [r"fp8\.recipe=nvfp8", "tensorwise"]),
    "context": Case(
        "evaluate", ["parallel.context=2"], [r"parallel\.context=2: evaluation samples", "context=1"], ranks=2
    ),
    "experts": Case(
        "sft", ["parallel.expert=2"], [r"parallel\.expert=2", "models here have none", r"parallel\.tensor"], ranks=2
    ),
    "tokenizer_larger_than_vocabulary": Case(
        "sft", ["model.vocab_size=100"], [r"model\.vocab_size=100", r"has 29\d ids", r"at least 29\d"]
    ),
    "no_model": Case("sft", [], [r"policy\.init_from", "model="], without=["model"]),
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
    # Contradictions.
    "minibatch": Case("ppo", ["ppo.minibatch_size=4"], [r"ppo\.minibatch_size=4 does not divide ppo\.batch_size=10"]),
    "gamma_without_text": Case(
        "ppo", [], [r"ppo\.ptx_coef=27\.8 needs data\.pretraining\.source"], without=["data.pretraining.source"]
    ),
    "auto_without_text": Case(
        "ppo",
        ["ppo.ptx_coef=auto"],
        [r"ppo\.ptx_coef=auto needs data\.pretraining\.source"],
        without=["data.pretraining.source"],
    ),
    "gamma_neither_number_nor_auto": Case("ppo", ["ppo.ptx_coef=automatic"], [r"ppo\.ptx_coef=automatic", "or auto"]),
    "gamma_below_zero": Case("ppo", ["ppo.ptx_coef=-1"], [r"ppo\.ptx_coef=-1 must be at least 0"]),
    "gamma_not_a_number": Case("ppo", ["ppo.ptx_coef=nan"], [r"ppo\.ptx_coef=nan must be a number"]),
    "gamma_true": Case("ppo", ["ppo.ptx_coef=true"], [r"ppo\.ptx_coef=true", "bool"]),
    "gradient_ratio_of_zero": Case(
        "ppo",
        ["ppo.ptx_coef=auto", "ppo.ptx_gradient_ratio=0"],
        [r"ppo\.ptx_gradient_ratio=0\.0 must be more than 0"],
    ),
    "gradient_ratio_infinite": Case("ppo", ["ppo.ptx_gradient_ratio=inf"], [r"ppo\.ptx_gradient_ratio=inf"]),
    "negative_gradient_report": Case(
        "ppo", ["ppo.gradient_report_every=-1"], [r"ppo\.gradient_report_every=-1 must be at least 0"]
    ),
    "old_logprobs_from_nowhere": Case(
        "ppo", ["ppo.old_logprobs=guessed"], [r"ppo\.old_logprobs", "guessed", "recomputed, sampled"]
    ),
    "recheck_never": Case("ppo", ["ppo.recheck_every=0"], [r"ppo\.recheck_every=0 must be at least 1"]),
    "mix_without_text": Case(
        "sft", [], [r"data\.pretraining_mix=0\.25 needs", "source"], without=["data.pretraining.source"]
    ),
    "text_alone_has_no_epochs": Case("sft", ["data.pretraining_mix=1"], [r"pretraining_mix=1", r"sft\.max_steps"]),
    "context_too_short": Case(
        "ppo", ["data.max_prompt_tokens=60"], [r"max_prompt_tokens=60", r"max_response_tokens=12", "context of 64"]
    ),
    "prompts_fill_the_context": Case(
        "ppo",
        ["data.max_prompt_tokens=64"],
        [r"data\.max_prompt_tokens=64 leaves no room for a response", "context of 64"],
        without=["rollout.max_response_tokens"],
    ),
    "text_longer_than_context": Case(
        "sft", ["data.pretraining.sequence_length=65"], [r"sequence_length=65", "context of 64"]
    ),
    "both_micro_batches": Case(
        "sft",
        ["sft.micro_batch_tokens=60"],
        [r"sft\.micro_batch_tokens=60 and sft\.micro_batch_size=2 both", "set one of them to null"],
    ),
    "both_text_micro_batches": Case(
        "ppo",
        ["ppo.ptx_micro_batch_tokens=60", "ppo.ptx_micro_batch_size=2"],
        [r"ppo\.ptx_micro_batch_tokens=60 and ppo\.ptx_micro_batch_size=2 both"],
    ),
    "micro_batch_of_no_tokens": Case(
        "reward_model", ["reward_model.micro_batch_tokens=0"], [r"micro_batch_tokens=0 must be at least 1"]
    ),
    "micro_batch_shorter_than_a_text": Case(
        "sft",
        ["sft.micro_batch_size=null", "sft.micro_batch_tokens=23"],
        [r"sft\.micro_batch_tokens=23 is smaller than the longest sequence of 24 tokens; give at least 24"],
    ),
    "micro_batch_shorter_than_a_completion": Case(
        "reward_model",
        ["reward_model.micro_batch_tokens=4"],
        [r"reward_model\.micro_batch_tokens=4 is smaller than the longest prompt and response of \d+ tokens"],
    ),
    "micro_batch_shorter_than_an_episode": Case(
        "ppo",
        ["ppo.micro_batch_size=null", "ppo.micro_batch_tokens=14"],
        [r"ppo\.micro_batch_tokens=14 is smaller than the longest prompt and response of \d\d tokens"],
    ),
    "micro_batch_shorter_than_pretraining_text": Case(
        "ppo", ["ppo.ptx_micro_batch_tokens=23"], [r"ppo\.ptx_micro_batch_tokens=23", "a pretraining sequence of 24"]
    ),
    "no_other_samples": Case(
        "ppo", ["ppo.advantages=rloo"], [r"ppo\.advantages=rloo compares", r"samples_per_prompt=1: give at least 2"]
    ),
    "samples_per_prompt": Case(
        "ppo", ["ppo.samples_per_prompt=3"], [r"samples_per_prompt=3 does not divide ppo\.batch_size=10"]
    ),
    "unknown_advantages": Case("ppo", ["ppo.advantages=vtrace"], [r"ppo\.advantages=vtrace", "grpo"]),
    "value_model_that_nothing_needs": Case(
        "ppo",
        ["ppo.advantages=grpo", "ppo.samples_per_prompt=2", "value.init_from={recipe}/reward_model"],
        [r"value\.init_from=.*ppo\.advantages=grpo has no value model"],
    ),
    "warmup_of_no_critic": Case(
        "ppo",
        ["ppo.advantages=rloo", "ppo.samples_per_prompt=2", "ppo.critic_warmup_iterations=1"],
        [r"critic_warmup_iterations=1: ppo\.advantages=rloo has no value model"],
    ),
    "greedy_ppo": Case("ppo", ["rollout.temperature=0"], [r"rollout\.temperature=0", "positive"]),
    "virtual_ppo": Case(
        "ppo", ["parallel.pipeline=2", "parallel.virtual_stages=2"], [r"parallel\.virtual_stages=2"], ranks=2
    ),
    "no_critic_ranks": Case(
        "ppo", ["placement=disaggregated"], [r"placement\.critic_ranks=0", "splits the 2 ranks", "1 to 1"], ranks=2
    ),
    "one_rank_cannot_be_split": Case(
        "ppo", ["placement=disaggregated", "placement.critic_ranks=1"], ["splits the 1 ranks", "one rank cannot give"]
    ),
    "critic_ranks_colocated": Case("ppo", ["placement.critic_ranks=1"], ["is for placement=disaggregated"], ranks=2),
    "critic_side_not_divided": Case(
        "ppo",
        ["placement=disaggregated", "placement.critic_ranks=1", "critic_parallel.tensor=2"],
        ["critic_parallel: tensor 2", "the 1 ranks that placement=disaggregated gives it"],
        ranks=2,
    ),
    "generation_world": Case("ppo", ["rollout.parallel.tensor=2"], [r"rollout\.parallel: tensor 2", "the 1 ranks"]),
    "generation_of_zero": Case(
        "ppo", ["rollout.parallel.tensor=0"], [r"rollout\.parallel\.tensor=0 must be at least 1"]
    ),
    "context_pieces": Case(
        "sft",
        ["model.max_sequence_length=62", "parallel.context=2"],
        [r"parallel\.context=2 cuts sequences into 4 parts", "max_sequence_length 62"],
        ranks=2,
    ),
    "generation_stages": Case(
        "ppo", ["rollout.parallel.pipeline=2"], [r"rollout\.parallel\.pipeline=2 is more than"], ranks=2
    ),
    "minimum_above_maximum": Case(
        "ppo", ["rollout.min_response_tokens=13"], ["min_response_tokens=13", "max_response_tokens=12"]
    ),
    "top_p": Case("evaluate", ["sampling.top_p=0"], [r"sampling\.top_p=0", "at most 1"]),
    "sampling_beyond_the_context": Case(
        "sft",
        ["sft.select_by=reward_model", "reward.init_from={recipe}/reward_model", "sampling.max_response_tokens=60"],
        [
            r"sampling\.max_response_tokens=60 after the longest validation prompt \(\d+ tokens\)",
            "policy's context of 64",
        ],
    ),
    "evaluation_beyond_the_context": Case(
        "evaluate", ["sampling.max_response_tokens=60"], [r"max_response_tokens=60 after the longest prompt", "of 64"]
    ),
    "few_shot_beyond_the_context": Case(
        "evaluate",
        ["sampling.max_response_tokens=8", "evaluate.few_shot={recipe}/text.txt"],
        ["after the longest prompt, evaluate.few_shot included", "context of 64"],
    ),
    "judged_text_alone": Case(
        "sft",
        ["data.pretraining_mix=1", "sft.max_steps=2", "reward.init_from={recipe}/reward_model"],
        [r"reward\.init_from=.* judges responses", r"pretraining_mix=1 reads none"],
    ),
    "virtual_evaluation": Case(
        "evaluate",
        ["parallel.pipeline=2", "parallel.virtual_stages=2"],
        [r"parallel\.virtual_stages=2: evaluation decodes through plain stages"],
        ranks=2,
    ),
    "output_over_the_configuration": Case(
        "evaluate", ["evaluate.output=config.yaml"], [r"evaluate\.output=config\.yaml", "kept for the run itself"]
    ),
    "output_over_data": Case(
        "evaluate",
        ["evaluate.output={recipe}/prompts.jsonl"],
        [r"evaluate\.output=.*prompts.jsonl .*holds no responses"],
    ),
    "output_into_a_file": Case(
        "evaluate", ["evaluate.output={recipe}/text.txt/x.jsonl"], [r"evaluate\.output=.* cannot be written"]
    ),
    "evaluation_is_not_resumed": Case("evaluate", ["run.resume=true"], [r"run\.resume=true: an evaluation is not"]),
    "nothing_to_measure": Case("evaluate", [], ["nothing to measure: give data.prompts"], without=["data.prompts"]),
    "judged_prompts_missing": Case(
        "evaluate",
        ["reward.init_from={recipe}/reward_model", "evaluate.tasks=[instructgpt]"],
        [r"reward\.init_from scores answers and comparisons: give data\.prompts"],
        without=["data.prompts"],
    ),
    "unknown_task": Case("evaluate", ["evaluate.tasks=[instructgpt_helaswag]"], [r"no task instructgpt_helaswag"]),
    "nothing_held_out": Case(
        "evaluate",
        ["data.pretraining.source={recipe}/text.txt", "data.pretraining.held_out=0"],
        [r"data\.pretraining\.held_out=0 leaves no text"],
    ),
    "select_without_reward_model": Case("sft", ["sft.select_by=reward_model"], [r"needs reward\.init_from"]),
    # Meaningless numbers, and schedules that do not fit (each range on its own: tests/config/test_ranges.py).
    "no_epochs": Case("sft", ["sft.epochs=0"], [r"sft\.epochs=0 must be at least 1"]),
    "dropout": Case("sft", ["sft.dropout=1.5"], [r"sft\.dropout=1\.5 must be at least 0 and less than 1"]),
    "negative_decay": Case(
        "ppo", ["value.optimizer.weight_decay=-0.1"], [r"value\.optimizer\.weight_decay=-0\.1 must be at least 0"]
    ),
    "warmup_longer_than_the_steps": Case(
        "sft", ["sft.max_steps=4", "sft.warmup_steps=5"], [r"sft\.warmup_steps=5 is longer than the run's 4 steps"]
    ),
    "warmup_longer_than_the_epochs": Case("sft", ["sft.warmup_steps=4"], [r"warmup_steps=4 .* the run's 3 steps"]),
    "reward_warmup_longer_than_the_epochs": Case(
        "reward_model", ["reward_model.warmup_steps=5"], [r"reward_model\.warmup_steps=5 .* the run's 4 steps"]
    ),
    "policy_warmup_longer_than_its_iterations": Case(
        "ppo", ["ppo.critic_warmup_iterations=2"], [r"ppo\.warmup_iterations=2 .* the run's 1 iterations in which"]
    ),
    "critic_warmup_longer_than_the_run": Case(
        "ppo", ["ppo.critic_warmup_iterations=4"], [r"ppo\.critic_warmup_iterations=4 .* the run's 3 iterations"]
    ),
    "cluster_that_is_none": Case("sft", ["run.cluster=h100"], [r"run\.cluster=h100: there is no", "h100_80gb"]),
    "profile_backwards": Case("sft", ["run.profile=12:10"], [r"run\.profile=12:10: the first and the last step"]),
    "empty_text": Case("sft", ["run.wandb_project="], [r"run\.wandb_project= is empty"]),
    # Files.
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
    "empty_prompt": demonstrations({"prompt": "", "response": "x"}, says=["line 1: column 'prompt' is empty"]),
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
    # Checkpoints and run folders.
    "no_such_checkpoint": Case("ppo", ["policy.init_from={folder}/nothing"], [r"policy\.init_from=.*nothing: no such"]),
    "no_checkpoint": Case("ppo", ["reward.init_from={folder}"], [r"reward\.init_from=.* neither a checkpoint"]),
    "reward_model_for_policy": Case(
        "ppo", ["policy.init_from={recipe}/reward_model"], [r"policy\.init_from", "holds reward; needed is policy"]
    ),
    "language_model_for_reward_model": Case(
        "ppo", ["reward.init_from={recipe}/sft"], [r"reward\.init_from=.*sft: .*holds policy; needed is reward"]
    ),
    "language_model_judges_an_evaluation": Case(
        "evaluate", ["reward.init_from={recipe}/sft"], [r"reward\.init_from=.*holds policy; needed is reward"]
    ),
    "language_model_chooses_the_best": Case(
        "sft",
        ["sft.select_by=reward_model", "reward.init_from={recipe}/sft", "sampling.max_response_tokens=8"],
        [r"reward\.init_from=.*holds policy; needed is reward"],
    ),
    "reward_model_to_evaluate": Case(
        "evaluate", ["policy.init_from={recipe}/reward_model"], [r"policy\.init_from=.*holds reward; needed is policy"]
    ),
    "checkpoint_of_another_shape": Case(
        "sft",
        ["policy.init_from={recipe}/sft", "model.hidden_size=64"],
        ["hidden_size 64 against 32", "Leave model out"],
    ),
    "no_average_to_evaluate": Case("evaluate", ["evaluate.ema=true"], ["policy_ema", r"policy\.init_from"]),
    "unwritable_folder": Case(
        "sft", ["run.dir={recipe}/text.txt/run"], [r"run\.dir=.*text\.txt/run cannot be written"]
    ),
    "folder_of_another_run": Case(
        "sft", ["run.dir={recipe}/sft"], [r"run\.dir=.*sft holds another run", r"run\.resume"]
    ),
    "folder_of_another_stage": Case(
        "ppo",
        ["run.dir={recipe}/sft"],
        [r"run\.dir=.*sft holds supervised fine-tuning, and this is PPO: choose another"],
    ),
    "resume_of_another_stage": Case(
        "reward_model",
        ["run.dir={recipe}/sft", "run.resume=true"],
        ["sft holds supervised fine-tuning, and this is the training of a reward model: choose another folder"],
    ),
    "nothing_to_resume": Case("sft", ["run.resume=true"], [r"run\.resume=true", "no checkpoint to go on from"]),
}


def good_arguments(recipe: Recipe, stage: str, run: Path) -> list[str]:
    """Arguments that would run, into the folder `run`."""
    sft, reward_model = recipe.root / "sft", recipe.root / "reward_model"
    if stage == "sft":
        return recipe.sft(str(run))
    if stage == "reward_model":
        return recipe.reward_model(str(run), sft)
    if stage == "ppo":
        return recipe.ppo(str(run), sft, reward_model)
    return [f"run.dir={run}", *recipe.data, f"policy.init_from={sft}", f"data.prompts={recipe.root / 'prompts.jsonl'}"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def files(recipe, tmp_path) -> Callable[[Case], list[str]]:
    """Makes a case's arguments, and the file that is wrong."""

    def make(case: Case) -> list[str]:
        (tmp_path / "folder").mkdir()
        bad = tmp_path / "bad.jsonl"
        if case.lines is not None:
            bad.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in case.lines))
        names = {"file": bad, "folder": tmp_path / "folder", "recipe": recipe.root}
        good = [
            argument
            for argument in good_arguments(recipe, case.stage, tmp_path / "run")
            if not argument.startswith(tuple(f"{key}=" for key in case.without))
            and not ("model" in case.without and argument.startswith("model."))
        ]
        return good + [argument.format(**names) for argument in case.wrong]

    return make


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named_and_nothing_is_lost(name, files, recipe, tmp_path):
    case = CASES[name]
    arguments = files(case)
    before = contents(recipe.root)
    finished = run_example(SCRIPTS[case.stage], *arguments, ranks=case.ranks, timeout=200)
    assert finished.codes == [2] * case.ranks, finished.output
    messages = [line for line in finished.output.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, finished.output
    for expected in case.says:
        assert re.search(expected, messages[0]), messages[0]
    assert "Traceback" not in finished.output
    assert not list(tmp_path.rglob("checkpoints"))
    assert contents(recipe.root) == before


def test_what_is_dropped_is_counted_and_the_rest_is_used(recipe, tmp_path):
    """Ties, and texts over a limit: not errors, but never cut or dropped silently."""
    long = {**RANKED, "responses": [" beta", " beta" * 40], "ranks": [0, 1]}
    good = [{**RANKED, "prompt": f"say {i}"} for i in range(6)]
    mixed = write_lines(tmp_path / "mixed.jsonl", [*good, *[{**RANKED, "ranks": [0, 0]}] * 2, long])
    arguments = recipe.reward_model(str(tmp_path / "run"), recipe.root / "sft", f"data.comparisons={mixed}")
    finished = run_example("train_reward_model", *arguments, "data.max_response_tokens=20")
    assert finished.codes == [0], finished.output
    assert "6 of 9 records kept; dropped: 2 all_tied, 1 response_too_long" in finished.output


def test_divergence_stops_with_its_cause_and_keeps_the_checkpoints(recipe, tmp_path):
    arguments = recipe.sft(str(tmp_path / "run"), "sft.epochs=8", "run.save_every=1", "policy.optimizer.lr=1e30")
    finished = run_example("train_sft", *arguments, "run.max_skipped_steps=2", "policy.optimizer.clip_norm=0")
    assert finished.codes == [1]
    assert re.search(r"2 updates in a row were skipped \(run\.max_skipped_steps=2\); policy: .*nan", finished.output)
    assert "update skipped" in finished.output
    assert (tmp_path / "run" / "checkpoints" / "latest").is_file()


def test_resume_with_other_data_is_refused(recipe, tmp_path):
    arguments = recipe.sft(str(tmp_path / "run"), "run.stop_at_step=1")
    assert run_example("train_sft", *arguments).codes == [0]
    fewer = write_lines(tmp_path / "fewer.jsonl", [GOOD] * 5)
    before = contents(tmp_path / "run" / "checkpoints")
    finished = run_example("train_sft", *arguments, f"data.demonstrations={fewer}", "run.resume=true")
    assert finished.codes == [2]
    assert re.search(r"data\.demonstrations, .*with other demonstrations \(pieces 5, was 27;", finished.output)
    assert contents(tmp_path / "run" / "checkpoints") == before


def test_torchrun_shows_the_message_once_and_ends_with_it(recipe, tmp_path):
    arguments = recipe.sft(str(tmp_path / "run"), f"data.demonstrations={tmp_path / 'nothing.jsonl'}")
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "examples/train_sft.py", *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode != 0
    shown, _, torchruns = finished.stderr.partition("Root Cause")
    assert shown.count("nothing.jsonl: no such file or folder") == 1, finished.stderr
    assert re.search(r"exitcode *: 2", torchruns), finished.stderr
    *_, last, line = torchruns.strip().splitlines()
    assert "error: " in last and "nothing.jsonl: no such file or folder" in last and set(line) == {"="}, finished.stderr


def test_help_lists_every_key_with_its_meaning():
    finished = run_example("train_ppo", "--help")
    assert finished.codes == [0]
    assert "ppo.ptx_coef = 27.8" in finished.output
    assert "The paper's gamma" in finished.output


def test_cfg_prints_the_resolved_configuration_and_runs_nothing(recipe, tmp_path):
    finished = run_example("train_ppo", *good_arguments(recipe, "ppo", tmp_path / "run"), "--cfg")
    assert finished.codes == [0]
    assert "ptx_coef: 27.8" in finished.output
    assert not (tmp_path / "run").exists()
