"""Contradictions in what an evaluation is asked for."""

from megatron_rlhf.config.checking.checks import check_one_token
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.lengths import check_sampling
from megatron_rlhf.config.rewards import check_rewards, named_rewards
from megatron_rlhf.config.stages import EvaluateConfig


def check_evaluate(config: EvaluateConfig) -> None:
    """A model to evaluate and a way to sample."""
    asked, data = config.evaluate, config.data
    answers = data.prompts is not None
    uses_policy = answers or data.pretraining.source is not None or asked.tasks
    if not (uses_policy or asked.comparisons):
        raise UserError(
            "nothing to measure: give data.prompts, data.pretraining.source, evaluate.tasks or evaluate.comparisons"
        )
    if uses_policy and config.policy.init_from is None:
        raise UserError("policy.init_from is not given: name the checkpoint or Hugging Face folder to evaluate")
    if not uses_policy and config.policy.init_from is not None:
        raise UserError(
            "policy.init_from: evaluate.comparisons need reward.init_from alone; leave it out, or give data.prompts"
        )
    check_rewards(config.reward, config.rewards)
    if asked.comparisons and len(config.reward_models) != 1:
        models = ", ".join(f"{part.key}.init_from" for part in config.reward_models)
        but = f", and {models} are several: leave all but one out" if models else ": give reward.init_from"
        raise UserError(f"evaluate.comparisons measure a reward model{but}")
    if config.run.resume:
        raise UserError("run.resume=true: an evaluation is not resumed; leave it out, and it is made anew")
    for key, value in (("export_hf", config.run.export_hf), ("profile", config.run.profile)):
        if value is not None:
            raise UserError(f"run.{key}={getattr(value, 'value', value)} is for training: an evaluation has no steps")
    if config.data.pretraining.source is not None and config.data.pretraining.held_out == 0:
        raise UserError("data.pretraining.held_out=0 leaves no text of data.pretraining.source to measure the loss on")
    for part in named_rewards(config.reward, config.rewards):
        if part.is_function and not answers:
            raise UserError(f"{part.key}.function scores answers: give data.prompts, or leave it out")
        if not (answers or asked.comparisons):
            raise UserError(
                f"{part.key}.init_from scores answers and comparisons: give data.prompts or evaluate.comparisons, or leave it "
                "out"
            )
    _check_parts(config)
    if asked.samples_per_prompt > 1 and config.sampling.temperature == 0:
        raise UserError(
            f"evaluate.samples_per_prompt={asked.samples_per_prompt} with sampling.temperature=0 is the same answer again and "
            "again: give a temperature, or evaluate.samples_per_prompt=1"
        )
    if asked.samples_per_prompt > 1 and config.sampling.beams > 1:
        raise UserError(
            f"evaluate.samples_per_prompt={asked.samples_per_prompt} with sampling.beams={config.sampling.beams} is the same "
            "answer again and again: leave one of them out"
        )
    check_sampling(config.sampling, "sampling")
    check_one_token(config.parallel, "evaluation")


def _check_parts(config: EvaluateConfig) -> None:
    """What is said of a part of the evaluation needs that part."""
    asked = config.evaluate
    needs = {
        "data.prompts": (config.data.prompts is not None, ("labels", "few_shot")),
        "evaluate.comparisons": (asked.comparisons is not None, ("comparisons_format",)),
        "evaluate.tasks": (
            bool(asked.tasks),
            ("task_path", "task_data", "task_limit", "task_shots", "task_chat", "scorer"),
        ),
    }
    for whole, (is_there, names) in needs.items():
        for name in names:
            value = getattr(asked, name)
            if value is not None and value is not False and not is_there:
                raise UserError(
                    f"evaluate.{name}={value} is about {whole}, which is not given: give it, or leave this out"
                )
