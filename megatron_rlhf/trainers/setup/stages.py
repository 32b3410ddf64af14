"""From a configuration to a trainer: data and starting points are checked first, then models are built."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rlhf.config.budgets import require_room
from megatron_rlhf.config.checking import checks
from megatron_rlhf.config.data import AssistantTurns, DemonstrationDataConfig
from megatron_rlhf.config.lengths import LONGEST, settle_response
from megatron_rlhf.config.stages import RewardModelConfig, SFTConfig
from megatron_rlhf.conversion.starting_point import POLICY, TRAINED_REWARD
from megatron_rlhf.data.comparisons import Comparison, load_comparisons
from megatron_rlhf.data.demonstrations import Demonstration, load_demonstrations
from megatron_rlhf.data.examples import Examples
from megatron_rlhf.data.files.item_store import InMemory, Mapped, choose
from megatron_rlhf.data.formats.shape import Shape
from megatron_rlhf.data.mix import Mix
from megatron_rlhf.data.splits import held_out
from megatron_rlhf.data.tokenizer import Tokenizer, require_tokenizer_fits
from megatron_rlhf.parallel.collectives import on_first_rank
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.runs.session import Session
from megatron_rlhf.trainers import partial_training
from megatron_rlhf.trainers.export import require_exportable
from megatron_rlhf.trainers.reward_model import RewardModelTrainer
from megatron_rlhf.trainers.setup import parts
from megatron_rlhf.trainers.setup.evaluation import build_evaluate
from megatron_rlhf.trainers.setup.ppo import build_ppo
from megatron_rlhf.trainers.setup.records import found_once, load_once, watched
from megatron_rlhf.trainers.setup.tokenizer_choice import choose_tokenizer
from megatron_rlhf.trainers.sft import SFTTrainer, selection_prompts
from megatron_rlhf.trainers.step import TrainedRole

log = logging.getLogger(__name__)

LIMITS = ("data.max_prompt_tokens", "data.max_response_tokens", "data.tokenizer")
"""Keys that decide, together with the file, which examples there are."""


def build_sft(config: SFTConfig, session: Session) -> SFTTrainer:
    """`megatron-rlhf sft`."""
    data = config.data
    source, model = parts.find_start(config.policy.init_from, "policy.init_from", POLICY, config.model, "model")
    parts.check_role("policy", model, config)
    partial_training.check("policy", config, model, source, scalar=False)
    starts = {"policy.init_from": config.policy.init_from, "reward.init_from": config.reward.init_from}
    require_exportable(config.run, model, starts)
    parts.keep_start(session, "policy", source, model, "policy.init_from")
    judge = None
    if config.reward.init_from is not None:
        judge = parts.find_judge(config, "parallel", config.reward.init_from)
        parts.keep_start(session, "reward model", judge, judge.model, "reward.init_from")
    tokenizer = choose_tokenizer(data, {"policy.init_from": source, "reward.init_from": judge}, session)
    require_tokenizer_fits(tokenizer, model.vocab_size, "model.vocab_size")
    limits = (data.max_prompt_tokens, data.max_response_tokens, model.max_sequence_length)
    load = partial(_load_demonstrations, data, tokenizer, limits, session)
    demonstrations = validation = None
    if data.demonstrations is not None and data.pretraining_mix < 1:
        demonstrations = load(data.demonstrations)
        demonstrations.report()
        parts.keep_data(session, "demonstrations", ["data.demonstrations", *LIMITS], demonstrations.items, _pieces)
        if data.validation is not None:
            validation = load(data.validation)
            prompts = ((d.tokens[: d.prompt_length] for d in part) for part in (demonstrations, validation))
            parts.warn_of_shared_prompts(session, *prompts)
        parts.keep_data(
            session, "validation data", ["data.validation", *LIMITS], validation.items if validation else [], _pieces
        )
    mix = Mix(config.sft.batch_size, data.pretraining_mix)
    steps = config.sft.max_steps or mix.steps(len(demonstrations or []), config.sft.epochs)
    checks.check_warmup(config.sft.warmup_steps, steps, "sft.warmup_steps")
    checks.check_profile(config.run, steps)
    pretraining = None
    if data.pretraining_mix > 0:
        pretraining = parts.make_pretraining(data.pretraining, tokenizer, model, mix.texts_before(steps), session)
    longest = max((_longest(session, part.items) for part in (demonstrations, validation) if part), default=0)
    if pretraining is not None:
        longest = max(longest, data.pretraining.sequence_length)
    require_room("sft.micro_batch_tokens", config.sft.micro_batch_tokens, longest, "the longest sequence")
    room = LONGEST  # of what nobody judges; the model's context cuts it after each prompt
    if judge is not None:
        assert demonstrations is not None, "check_sft: responses are sampled to their prompts"
        longest = max(d.prompt_length for d in selection_prompts(config, demonstrations, validation))
        room = min(model.max_sequence_length, judge.model.max_sequence_length) - longest
    settle_response(config.sampling, "sampling", room)
    session.settle(config)
    if judge is not None:
        for model_of, whose in ((model, "policy"), (judge.model, "reward model")):
            response = config.sampling.longest_response
            checks.check_response_fits(longest, "the longest validation prompt", response, model_of, whose)
            require_tokenizer_fits(tokenizer, model_of.vocab_size, f"the {whose}'s vocab_size")
    layout = ParallelLayout.create(config.parallel)
    layout.seed(config.run.seed)
    policy = parts.make_role("policy", model, layout, config, source, dropout=config.sft.dropout)
    policy.know_only(tokenizer.known_ids)
    trained = TrainedRole.create(policy, config.policy.optimizer, config.precision, config.run.max_skipped_steps)
    reward = None
    if judge is not None:
        reward = parts.make_role("reward", judge.model, layout, config, judge, scalar=True).frozen()
    return SFTTrainer(config, session, tokenizer, trained, demonstrations, validation, pretraining, reward)


def build_reward_model(config: RewardModelConfig, session: Session) -> RewardModelTrainer:
    """`megatron-rlhf reward-model`."""
    data = config.data
    source, model = parts.find_start(config.reward.init_from, "reward.init_from", TRAINED_REWARD, config.model, "model")
    parts.check_role("reward", model, config)
    partial_training.check("reward", config, model, source, scalar=True)
    require_exportable(config.run, model, {"reward.init_from": config.reward.init_from})
    parts.keep_start(session, "reward model", source, model, "reward.init_from")
    tokenizer = choose_tokenizer(data, {"reward.init_from": source}, session)
    require_tokenizer_fits(tokenizer, model.vocab_size, "model.vocab_size")
    limits = (data.max_prompt_tokens, data.max_response_tokens, model.max_sequence_length)
    columns = Shape.of(data.format, data.columns.given(), data.chat)

    def load(source: str) -> Examples[Comparison]:
        def read(into: InMemory) -> Examples[Comparison]:
            return load_comparisons(source, tokenizer, *limits, columns, into)

        return load_once("comparisons", source, data, tokenizer, limits, session, Comparison, read)

    loaded = load(data.comparisons)
    loaded.report()
    training: Sequence[Comparison] = loaded.items
    if data.validation is not None:
        validation: Sequence[Comparison] = load(data.validation).items
        parts.warn_of_shared_prompts(session, *((c.prompt_tokens for c in part) for part in (training, validation)))
    else:
        fraction, seed = data.validation_fraction, config.run.seed

        def choose_held() -> list[int]:
            return held_out(
                watched(session, training, "comparisons", "split"), fraction, seed, lambda c: c.users
            ).tolist()

        held = found_once(training, f"{fraction} held out by seed {seed}", choose_held)
        training, validation = choose(training, np.setdiff1d(np.arange(len(training)), held)), choose(training, held)
    log.info("%d prompts to train on, %d held out", len(training), len(validation))
    algorithm = config.reward_model
    steps = algorithm.max_steps or algorithm.epochs * -(-len(training) // algorithm.batch_size)
    checks.check_warmup(algorithm.warmup_steps, steps, "reward_model.warmup_steps")
    checks.check_profile(config.run, steps)
    parts.keep_data(session, "comparisons", ["data.comparisons", *LIMITS], training, _ranked_pieces)
    parts.keep_data(session, "validation data", ["data.validation", *LIMITS], validation, _ranked_pieces)
    demonstrations, follow_from = _answers(config, session, tokenizer, limits, training)
    keys = ["data.demonstrations", *LIMITS]
    parts.keep_data(session, "demonstrations", keys, demonstrations, lambda answers: answers, follow_from)
    longest = max(_longest(session, part) for part in (training, validation, follow_from))
    room = config.reward_model.micro_batch_tokens
    require_room("reward_model.micro_batch_tokens", room, longest, "the longest prompt and response")
    layout = ParallelLayout.create(config.parallel)
    layout.seed(config.run.seed)
    role = parts.make_role("reward", model, layout, config, source, scalar=True)
    role.freeze_head_bias()  # no comparison depends on it, and Adam would amplify rounding errors
    trained = TrainedRole.create(role, config.reward.optimizer, config.precision, config.run.max_skipped_steps)
    return RewardModelTrainer(config, session, tokenizer, trained, training, validation, demonstrations)


def _load_demonstrations(
    data: DemonstrationDataConfig, tokenizer: Tokenizer, limits: tuple[int, int, int], session: Session, source: str
) -> Examples[Demonstration]:
    last = data.assistant_turns is AssistantTurns.last
    shape = Shape.of(data.format, data.columns.given(), data.chat)

    def read(into: InMemory) -> Examples[Demonstration]:
        return load_demonstrations(source, tokenizer, *limits, shape, last, into)

    return load_once("demonstrations", source, data, tokenizer, limits, session, Demonstration, read)


def _answers(
    config: RewardModelConfig,
    session: Session,
    tokenizer: Tokenizer,
    limits: tuple[int, int, int],
    training: Sequence[Comparison],
) -> tuple[Sequence[list[int]], Sequence[Any]]:
    """The texts whose mean score becomes 0, and the items that they follow from: demonstrations, or else the best responses."""
    data, source = config.data, config.data.demonstrations
    if source is None:
        best = on_first_rank(partial(_best, session, training))
        return Mapped(best, lambda pair: _text(training[int(pair[0])], int(pair[1]))), training
    shape = Shape.of(None, data.demonstration_columns.given(), data.chat)

    def read(into: InMemory) -> Examples[Demonstration]:
        return load_demonstrations(source, tokenizer, *limits, shape, into=into)

    items = load_once("demonstrations", source, data, tokenizer, limits, session, Demonstration, read).items
    answers = Mapped[list[int]](items, lambda d: d.up_to_end(tokenizer.end_id).tolist())
    return answers, answers


def _best(session: Session, comparisons: Sequence[Comparison]) -> npt.NDArray[np.int64]:
    """[n, 2]: each comparison and one of its best responses."""
    pairs = (
        number
        for place, comparison in enumerate(watched(session, comparisons, "comparisons", "searched for their best"))
        for response in comparison.best
        for number in (place, response)
    )
    return np.fromiter(pairs, np.int64).reshape(-1, 2)


def _text(comparison: Comparison, response: int) -> list[int]:
    """A prompt and one of its responses."""
    return [*comparison.prompt_tokens.tolist(), *comparison.responses_tokens[response].tolist()]


def _longest(session: Session, items: Sequence[Demonstration | Comparison | list[int]]) -> int:
    """Tokens of the longest sequence among these. Collective."""
    return found_once(
        items, "longest", lambda: max(map(_length, watched(session, items, "sequences", "measured")), default=0)
    )


def _length(item: Demonstration | Comparison | list[int]) -> int:
    """Tokens; of a comparison those of the prompt and its longest response."""
    if isinstance(item, Comparison):
        return len(item.prompt_tokens) + max(map(len, item.responses_tokens))
    return len(item.tokens if isinstance(item, Demonstration) else item)


def _pieces(demonstrations: Iterable[Demonstration]) -> Iterator[np.ndarray]:
    return (
        np.append(d.tokens, d.prompt_length if d.turns is None else np.flatnonzero(d.turns)) for d in demonstrations
    )


def _ranked_pieces(comparisons: Iterable[Comparison]) -> Iterator[np.ndarray]:
    for c in comparisons:
        yield c.pairs.ravel()
        yield c.prompt_tokens
        yield from c.responses_tokens


# Stage -> function that builds its trainer.
BUILD: Mapping[str, Callable[[Any, Session], Any]] = {
    "sft": build_sft,
    "reward_model": build_reward_model,
    "ppo": build_ppo,
    "evaluate": build_evaluate,
}
