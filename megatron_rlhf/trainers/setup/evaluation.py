"""From a configuration to an evaluator, as in setup.py: data and starting points first, then models."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rlhf.config.checking import checks
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.lengths import LONGEST, share_context
from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.config.stages import EvaluateConfig
from megatron_rlhf.conversion.starting_point import AVERAGE, POLICY
from megatron_rlhf.data.comparisons import Ranking, load_rankings
from megatron_rlhf.data.formats.record import Record
from megatron_rlhf.data.formats.shape import Shape
from megatron_rlhf.data.prompts import Prompt
from megatron_rlhf.data.tokenizer import Tokenizer, require_tokenizer_fits
from megatron_rlhf.evaluation.benchmarks.run import Benchmarks, load_scorer
from megatron_rlhf.evaluation.evaluator import Evaluator, Questions, output_file
from megatron_rlhf.evaluation.results import GREEDY
from megatron_rlhf.labeling import collecting
from megatron_rlhf.labeling.types import Task
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.runs.session import Session
from megatron_rlhf.trainers.setup import parts
from megatron_rlhf.trainers.setup.tokenizer_choice import choose_tokenizer


def build_evaluate(config: EvaluateConfig, session: Session) -> Evaluator:
    """`megatron-rlhf evaluate`."""
    wanted = AVERAGE if config.evaluate.ema else POLICY
    output = output_file(Path(config.run.dir), config.evaluate.output)
    source, model, judge = None, None, None
    if config.policy.init_from is not None:
        source, model = parts.find_start(config.policy.init_from, "policy.init_from", wanted, config.model, "model")
        parts.check_role("policy", model, config)
    if config.reward.init_from is not None:
        judge = parts.find_judge(config, "critic_parallel")
    tokenizer = choose_tokenizer(config.data, {"policy.init_from": source, "reward.init_from": judge}, session)
    shapes = {"policy": model, "reward model": judge.model if judge else None}
    known = {whose: shape for whose, shape in shapes.items() if shape is not None}
    for whose, shape in known.items():
        require_tokenizer_fits(tokenizer, shape.vocab_size, f"the {whose}'s vocab_size")
    rankings = _rankings(config, tokenizer, judge.model.max_sequence_length) if judge is not None else []
    context = min(shape.max_sequence_length for shape in known.values())
    if config.sampling.max_response_tokens is not None and config.data.max_prompt_tokens is None:
        config.data.max_prompt_tokens = min(LONGEST, context)  # prompts without room for it are named, not dropped
    share_context(config.data, config.sampling, "sampling", context)
    benchmarks = _benchmarks(config)
    questions = _questions(config, session, tokenizer, known)
    held_out, policy, reward = None, None, None
    if config.data.pretraining.source is not None:
        assert model is not None
        held_out = parts.make_pretraining(config.data.pretraining, tokenizer, model, 1, session).held_out
    if model is not None:
        layout = ParallelLayout.create(config.parallel)
        layout.seed(config.run.seed)
        policy = parts.make_role("policy", model, layout, config, source).frozen()
        policy.know_only(tokenizer.known_ids)
    if judge is not None:
        critic_layout = ParallelLayout.create(config.critic_parallel)
        if policy is None:
            critic_layout.seed(config.run.seed)
        reward = parts.make_role("reward", judge.model, critic_layout, config, judge, scalar=True).frozen()
    return Evaluator(config, session, tokenizer, questions, output, held_out, benchmarks, rankings, policy, reward)


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
    return load_rankings(asked.comparisons, tokenizer, *limits, Shape.of(asked.comparisons_format))


def _questions(
    config: EvaluateConfig, session: Session, tokenizer: Tokenizer, shapes: Mapping[str, ModelConfig]
) -> Questions | None:
    """The prompts to answer, whose answers fit all models."""
    if config.data.prompts is None:
        return None
    prompts = parts.make_prompts(config.data.prompts, config.data, tokenizer, str(session.folder))
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
    """What the evaluation will add to a labeling project, but for the texts."""
    asked = config.evaluate
    of_each = [policy] * asked.samples_per_prompt + [policy + GREEDY] * asked.greedy
    times = Counter(prompt.text for prompt in prompts)
    return [Task(text, ("",) * len(of_each) * n, tuple(of_each * n)) for text, n in times.items()]
