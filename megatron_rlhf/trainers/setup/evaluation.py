"""From a configuration to an evaluator, as in setup.py: data and starting points first, then models."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rlhf.config.checking import checks
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.lengths import LONGEST, share_context
from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.config.rewards import named_rewards
from megatron_rlhf.config.stages import EvaluateConfig
from megatron_rlhf.conversion.starting_point import AVERAGE, POLICY
from megatron_rlhf.data.comparisons import Ranking, load_rankings
from megatron_rlhf.data.formats.record import Record
from megatron_rlhf.data.formats.shape import Shape
from megatron_rlhf.data.prompts import Prompt
from megatron_rlhf.data.tokenizer import Tokenizer, require_tokenizer_fits
from megatron_rlhf.evaluation.benchmarks.run import Benchmarks, load_scorer
from megatron_rlhf.evaluation.evaluator import Evaluator, Questions, output_file
from megatron_rlhf.evaluation.judging import group_of
from megatron_rlhf.evaluation.results import GREEDY
from megatron_rlhf.labeling import collecting
from megatron_rlhf.labeling.types import Task
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.rewards.reward import Reward
from megatron_rlhf.runs.session import Session
from megatron_rlhf.trainers.episodes.functions import find_functions
from megatron_rlhf.trainers.setup import parts
from megatron_rlhf.trainers.setup.tokenizer_choice import choose_tokenizer


def build_evaluate(config: EvaluateConfig, session: Session) -> Evaluator:
    """`megatron-rlhf evaluate`."""
    wanted = AVERAGE if config.evaluate.ema else POLICY
    output = output_file(Path(config.run.dir), config.evaluate.output)
    source, model = None, None
    if config.policy.init_from is not None:
        source, model = parts.find_start(config.policy.init_from, "policy.init_from", wanted, config.model, "model")
        parts.check_role("policy", model, config)
    judges = {
        part.name: parts.find_judge(config, "critic_parallel", part.config.init_from, part.key)
        for part in config.reward_models
    }
    sources = {f"{part.key}.init_from": judges[part.name] for part in config.reward_models}
    tokenizer = choose_tokenizer(config.data, {"policy.init_from": source, **sources}, session)
    known = {"policy": model} if model is not None else {}
    for name, judge in judges.items():
        known["reward model" if len(judges) == 1 else f"reward model {name}"] = judge.model
    for whose, shape in known.items():
        require_tokenizer_fits(tokenizer, shape.vocab_size, f"the {whose}'s vocab_size")
    rankings = _rankings(
        config, tokenizer, min((judge.model.max_sequence_length for judge in judges.values()), default=0)
    )
    context = min(shape.max_sequence_length for shape in known.values())
    if config.sampling.max_response_tokens is not None and config.data.max_prompt_tokens is None:
        config.data.max_prompt_tokens = min(LONGEST, context)  # prompts without room for it are named, not dropped
    share_context(config.data, config.sampling, "sampling", context)
    benchmarks = _benchmarks(config)
    questions = _questions(config, session, tokenizer, known)
    held_out, policy = None, None
    if config.data.pretraining.source is not None:
        assert model is not None
        held_out = parts.make_pretraining(config.data.pretraining, tokenizer, model, 1, session).held_out
    reward = _reward(config, session, questions)
    if model is not None:
        layout = ParallelLayout.create(config.parallel)
        layout.seed(config.run.seed)
        policy = parts.make_role("policy", model, layout, config, source).frozen()
        policy.know_only(tokenizer.known_ids)
    if reward is not None:
        if policy is None:
            reward.layout.seed(config.run.seed)
        reward.models = {
            name: parts.make_role("reward", judge.model, reward.layout, config, judge, scalar=True).frozen()
            for name, judge in judges.items()
        }
    return Evaluator(config, session, tokenizer, questions, output, held_out, benchmarks, rankings, policy, reward)


def _reward(config: EvaluateConfig, session: Session, questions: Questions | None) -> Reward | None:
    """What scores the answers, its functions tried out, its models still to be built."""
    if not named_rewards(config.reward, config.rewards):
        return None
    layout = ParallelLayout.create(config.critic_parallel)
    return find_functions(config, layout, questions.prompts if questions is not None else [], session)


def _benchmarks(config: EvaluateConfig) -> Benchmarks | None:
    asked = config.evaluate
    if not asked.tasks:
        return None
    scorer = load_scorer(asked.scorer) if asked.scorer else None
    return Benchmarks.load(
        asked.tasks, asked.task_path, asked.task_data, asked.task_limit, asked.task_shots, asked.task_chat, scorer
    )


def _rankings(config: EvaluateConfig, tokenizer: Tokenizer, max_length: int) -> Sequence[tuple[Record, Ranking]]:
    """People's comparisons, to measure the reward model on."""
    asked = config.evaluate
    if asked.comparisons is None:
        return []
    limits = config.data.max_prompt_tokens or LONGEST, max_length
    shape = Shape.of(asked.comparisons_format, chat=config.data.chat)
    rankings = load_rankings(asked.comparisons, tokenizer, *limits, shape)
    for record, _ in rankings:
        group_of(record)  # what is wrong with it is said before any model is built
    return rankings


def _questions(
    config: EvaluateConfig, session: Session, tokenizer: Tokenizer, shapes: Mapping[str, ModelConfig]
) -> Questions | None:
    """The prompts to answer, whose answers fit all models."""
    if config.data.prompts is None:
        return None
    prompts = parts.make_prompts(config.data.prompts, config.data, tokenizer, session)
    chosen = [prompts[i] for i in range(min(config.evaluate.samples, len(prompts)))]
    inputs = [prompt.tokens.tolist() for prompt in chosen]
    which = "the longest prompt"
    if config.evaluate.few_shot is not None:
        if any(prompt.messages for prompt in chosen):
            raise UserError(
                f"evaluate.few_shot={config.evaluate.few_shot} is text that goes before prompts of text, and "
                f"{config.data.prompts} holds messages: put the examples into them, as turns"
            )
        few_shot = parts.read_text(config.evaluate.few_shot, "evaluate.few_shot")
        inputs = [tokenizer.encode(few_shot + prompt.text, bos=True) for prompt in chosen]
        which += ", evaluate.few_shot included"
    for whose, shape in shapes.items():
        longest = max(map(len, inputs))
        checks.check_response_fits(longest, which, config.sampling.longest_response, shape, whose)
    assert config.policy.init_from is not None
    name = config.evaluate.name or Path(config.policy.init_from).resolve().name
    if config.evaluate.labels is not None:
        collecting.check(Path(config.evaluate.labels), _answers_to_come(config, chosen, name))
    return Questions(chosen, inputs, name)


def _answers_to_come(config: EvaluateConfig, prompts: Sequence[Prompt], policy: str) -> list[Task]:
    """What the evaluation will add to a labeling project, except for the texts."""
    asked = config.evaluate
    of_each = [policy] * asked.samples_per_prompt + [policy + GREEDY] * asked.greedy
    times, given = Counter(prompt.text for prompt in prompts), {prompt.text: prompt.given for prompt in prompts}
    return [Task.of(given[text], [""] * len(of_each) * n, of_each * n) for text, n in times.items()]
