"""Settings that contradict one another."""

import pytest
from bad_cases import Case

CASES: dict[str, Case] = {
    "beams_in_ppo": Case("ppo", ["rollout.beams=4"], [r"rollout\.beams=4: PPO learns from samples"]),
    "beams_and_top_p": Case(
        "ppo", ["rollout.beams=4", "rollout.top_p=0.9"], [r"rollout\.top_p=0\.9 with rollout\.beams=4", "leave one"]
    ),
    "no_beams": Case("ppo", ["rollout.beams=0"], [r"rollout\.beams=0 must be at least 1"]),
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
    "horizon_of_less_than_a_step": Case(
        "ppo",
        ["ppo.kl_control=adaptive", "ppo.kl_horizon=2"],
        [r"ppo\.kl_horizon=2 with ppo\.batch_size=10", "give more than 2"],
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
    "engine_without_its_machine": Case(
        "ppo",
        ["rollout.engine=megatron"],
        [r"rollout\.engine=megatron: it needs (a GPU|Megatron-Core 0\.19)", r"rollout\.engine=native"],
    ),
    "cache_of_another_engine": Case(
        "ppo", ["rollout.cache_gb=4"], [r"rollout\.cache_gb=4 is for rollout\.engine=megatron"]
    ),
    "no_cache": Case("ppo", ["rollout.cache_gb=0"], [r"rollout\.cache_gb=0\.0 must be more than 0"]),
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
    "penalty_for_repetition_while_learning": Case(
        "ppo",
        ["rollout.repetition_penalty=1.2"],
        [r"rollout\.repetition_penalty=1\.2", "another distribution", "use 1"],
    ),
    "home_that_no_shell_finds": Case("sft", ["run.dir=~/runs/a"], [r"run\.dir=~/runs/a: ", r"write \$HOME/runs/a"]),
    "trace_after_the_end": Case("sft", ["run.profile=4:5"], [r"run\.profile=4:5 begins after the run's 3 steps"]),
    "trace_after_the_end_of_the_reward_model": Case(
        "reward_model", ["run.profile=9"], [r"run\.profile=9 begins after the run's 4 steps"]
    ),
    "trace_after_the_end_of_ppo": Case(
        "ppo", ["run.profile=4"], [r"run\.profile=4 begins after the run's 3 iterations"]
    ),
    "trace_of_an_evaluation": Case("evaluate", ["run.profile=1"], [r"run\.profile=1 is for training"]),
    "export_of_an_evaluation": Case("evaluate", ["run.export_hf=last"], [r"run\.export_hf=last is for training"]),
    "export_of_nothing_best": Case(
        "sft",
        ["run.export_hf=best"],
        [r"run\.export_hf=best: nothing decides", r"data\.validation"],
        without=["data.validation"],
    ),
    "export_of_the_best_reward_model": Case(
        "reward_model", ["run.export_hf=best"], [r"run\.export_hf=best: a reward model", r"run\.export_hf=last"]
    ),
    "export_of_the_best_policy_that_nothing_measures": Case(
        "ppo", ["run.export_hf=best"], [r"run\.export_hf=best: give evaluation\.every"]
    ),
    "export_of_neither": Case("sft", ["run.export_hf=newest"], [r"run\.export_hf=newest", "best, last"]),
    "export_of_a_shape_that_has_no_class": Case(
        "sft",
        ["run.export_hf=last", "model.positions=rope", "model.norm=rmsnorm", "model.rope_fraction=0.5"],
        [r"run\.export_hf=last: no Hugging Face architecture has this model's shape"],
    ),
    "wandb_entity_of_no_project": Case("sft", ["run.wandb_entity=us"], [r"run\.wandb_entity=us is for W&B"]),
    "wandb_tags_of_no_project": Case("ppo", ["run.wandb_tags=[a]"], [r"run\.wandb_tags is for W&B"]),
    "labels_that_are_too_many": Case(
        "evaluate",
        ["evaluate.labels={folder}/labels.sqlite", "evaluate.samples_per_prompt=9", "evaluate.greedy=true"],
        ["would have 10 outputs; 9 at most"],
    ),
    "select_without_reward_model": Case("sft", ["sft.select_by=reward_model"], [r"needs reward\.init_from"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named_and_nothing_is_lost(name, mistake):
    mistake(CASES[name])
