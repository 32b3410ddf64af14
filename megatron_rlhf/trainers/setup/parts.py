"""The parts that stages are built of: where weights come from, roles, tokenizer, pretraining text."""

import dataclasses
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.config.checking import checks, layout_checks
from megatron_rlhf.config.data import PretrainingDataConfig, PromptPart, PromptRulesConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import NO_SHAPE, ModelConfig, ParallelConfig, Precision, without_implied
from megatron_rlhf.config.stages import BaseConfig, PPOConfig
from megatron_rlhf.conversion.starting_point import REWARD, StartingPoint, Wanted
from megatron_rlhf.data.examples import Examples
from megatron_rlhf.data.files.item_store import IN_MEMORY, InMemory, choose
from megatron_rlhf.data.formats.shape import Shape
from megatron_rlhf.data.pretraining import PretrainingData, load_pretraining
from megatron_rlhf.data.prompts import Prompt, load_prompts
from megatron_rlhf.data.splits import parts_by_user
from megatron_rlhf.data.tokenizer import Tokenizer, Tokens
from megatron_rlhf.models.roles import Role
from megatron_rlhf.monitoring.progress import Reading
from megatron_rlhf.parallel.collectives import on_first_rank
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.runs.agreement import fingerprint
from megatron_rlhf.runs.session import Session
from megatron_rlhf.trainers import partial_training
from megatron_rlhf.trainers.setup.machine import check_memory, memory_of_rank
from megatron_rlhf.trainers.setup.records import found_once, load_once, watched

log = logging.getLogger(__name__)

Item = TypeVar("Item")


def find_start(
    init_from: str | None, key: str, wanted: Wanted, shape: ModelConfig | None, shape_key: str
) -> tuple[StartingPoint | None, ModelConfig]:
    """Where weights come from, and the shape of the model: from the checkpoint, else from the configuration."""
    if init_from is None:
        if shape is None:
            raise UserError(f"give {key} (a checkpoint or Hugging Face folder)")
        return None, shape
    source = StartingPoint.find(init_from, key, wanted)
    source.require_shape(shape, shape_key)
    source.require_undamaged(key, wanted.scalar)
    return source, source.model


def find_judge(config: BaseConfig, parallel_key: str, init_from: str | None, key: str = "reward") -> StartingPoint:
    """A reward model that scores a run's sampled responses."""
    source, model = find_start(init_from, f"{key}.init_from", REWARD, None, "model")
    assert source is not None
    check_role("reward", model, config, parallel_key)
    return source


def check_role(name: str, model: ModelConfig, config: BaseConfig, key: str = "parallel") -> None:
    """Check the shape of a role against its layout, the configuration's `key`, and what of it trains; before any role is
    built."""
    parallel: ParallelConfig = getattr(config, key)
    layout_checks.check_model(model, parallel, key)
    check_memory(name, model, parallel, config.precision_of(name), memory_of_rank())
    if config.precision_of(name) is Precision.fp8_hybrid:
        checks.check_fp8_shape(model, parallel, config.fp8.recipe, key)


def keep_start(
    session: Session, role: str, source: StartingPoint | None, model: ModelConfig, key: str, shape_key: str = "model"
) -> None:
    """A resumed run must start from the same weights, wherever they are now, and with the same shape."""
    session.require_same(f"weights to start the {role} from", [key], source.digest if source else "random")
    shape = sharded.model_to_json(without_implied(model))
    for name in NO_SHAPE:
        del shape[name]
    session.require_same(f"shape of the {role}", [shape_key, key], shape)


def keep_data(
    session: Session,
    what: str,
    keys: Sequence[str],
    items: Sequence[Item],
    pieces: Callable[[Iterable[Item]], Iterable[Sequence[int] | np.ndarray]],
    source: Sequence[Any] | None = None,
) -> None:
    """A resumed run must read the same items, wherever they are. `pieces`: what items are made of, as integers; `source`: what
    they follow from, if it is not themselves."""

    def describe() -> dict[str, Any]:
        count = itertools.count()
        made_of = pieces(watched(session, items, what, "checked"))
        checksum = fingerprint(piece for piece, _ in zip(made_of, count, strict=False))
        return {"pieces": next(count), "checksum": f"{checksum:08x}"}

    session.require_same(what, keys, found_once(items if source is None else source, f"checksum of {what}", describe))


def make_role(
    name: str,
    model: ModelConfig,
    layout: ParallelLayout,
    config: BaseConfig,
    source: StartingPoint | None,
    scalar: bool = False,
    dropout: float = 0.0,
) -> Role:
    """Build a role, with a new head where it is scalar, and load it from `source`; freeze what does not train.

    Adapters of a role that does not train with adapters are added to its weights.
    """
    precision, lora = config.precision_of(name), partial_training.lora_of(config, name)
    own = lora.adapter(model, f"{name}.lora")
    adapter = own or (source.adapter if source else None)
    role = Role.build(name, model, layout, precision, scalar, dropout, config.fp8.recipe, adapter, lora.dropout)
    role.reset_adapters(config.run.seed)
    if scalar:
        role.reset_head(config.run.seed)
    if source is not None:
        source.load_into(role)
    if own is None and adapter is not None:
        role.merge_adapters()
    if patterns := partial_training.patterns_of(config, name, scalar):
        role.train_only(patterns)
    origin = f", from {source.path}" if source else ", random weights"
    log.info("%s: %s parameters, %s%s", name, f"{role.num_parameters:,}", layout.describes, origin)
    return role


def read_text(path: str, key: str) -> str:
    """Contents of a text file given by the configuration key `key`."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{key}={path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={path} is not UTF-8 text ({error.reason}); convert the file to UTF-8") from error


def make_prompts(
    source: str, config: PromptRulesConfig, tokenizer: Tokenizer, session: Session | None = None
) -> Examples[Prompt]:
    """The prompts that remain of the file (or `datasets` name) `source`, from the requested part: on the disk where there is a
    run. Collective."""
    limits = config.longest_prompt, config.max_per_user, config.deduplicate_prefix_tokens
    shape = Shape.of(config.format, config.columns.given(), config.chat)

    def load(into: InMemory) -> Examples[Prompt]:
        return load_prompts(source, tokenizer, *limits, shape, into)

    if session is None:
        prompts = load(IN_MEMORY)
    else:
        prompts = load_once("prompts", source, config, tokenizer, limits, session, Prompt, load)
    prompts.report()
    if config.part is not PromptPart.all:
        place = [PromptPart.train, PromptPart.validation, PromptPart.test].index(config.part)

        def find() -> npt.NDArray[np.int64]:
            return parts_by_user(prompts, config.part_shares, seed=0)[place]

        part = choose(prompts.items, find() if session is None else on_first_rank(find))
        others = {f"outside data.part={config.part.value}": len(prompts) - len(part)}
        prompts = Examples(prompts.source, part, prompts.dropped | others)
        log.info(prompts.describe())
    return prompts


def warn_of_shared_prompts(
    session: Session, training: Iterable[Tokens], validation: Iterable[Tokens], *, key: str = "data.validation"
) -> None:
    """A separate validation file, of the key, is used as it is, but with a warning where it repeats training examples, when a
    run begins."""
    if session.resume_from is not None:
        return

    def count() -> tuple[int, int]:
        asked = Counter(prompt.tobytes() for prompt in validation)
        if not asked:
            return 0, 0
        compared = watched(session, training, "prompts", f"compared with {key}")
        seen = {text for prompt in compared if (text := prompt.tobytes()) in asked}
        return sum(asked[text] for text in seen), asked.total()

    shared, asked = on_first_rank(count)
    if shared:
        log.warning(
            "%s: %d of its %d prompts are trained on too; on those, figures say little about new prompts",
            key,
            shared,
            asked,
        )


def make_pretraining(
    config: PretrainingDataConfig, tokenizer: Tokenizer, model: ModelConfig, samples: int, session: Session
) -> PretrainingData:
    """Pretraining text as sequences, enough for `samples`, and its held-out part."""
    assert config.source is not None
    if config.sequence_length > model.max_sequence_length:
        raise UserError(
            f"data.pretraining.sequence_length={config.sequence_length} is more than the model's context of "
            f"{model.max_sequence_length} tokens"
        )
    source = Path(config.source or "").expanduser()
    reading = Reading("pretraining text tokenised", source.stat().st_size if source.is_file() else None)

    def read(count: int) -> None:
        reading.read(count)
        reading.made()
        session.interruption.leave_if_asked("pretraining text was tokenised")

    loaded = load_pretraining(
        config.source,
        tokenizer,
        config.sequence_length,
        samples=max(samples, 1),
        seed=session.config.seed,
        cache_dir=Path(session.config.dir) / "cache",
        held_out_fraction=config.held_out,
        columns=config.columns.given(),
        on_one_rank=on_first_rank,
        progress=read,
    )
    session.require_same("pretraining text", ["data.pretraining.source"], loaded.describes)
    return loaded


def padded_for_both(model: ModelConfig, training: int, sampling: int) -> ModelConfig:
    """The same model, its embedding padded so that both numbers of tensor-parallel ranks divide the rows."""
    multiple = math.lcm(model.vocab_multiple * training, sampling)
    return dataclasses.replace(model, vocab_multiple=multiple // training)


def make_sampler(policy: Role, config: PPOConfig) -> Role:
    """The policy, or an empty copy of it at the layout to sample at."""
    layout = config.rollout.parallel.of(config.parallel)
    if layout is None:
        return policy
    rows = policy.model.padded_vocab_size(config.parallel.tensor)  # the copy has the same number
    model = dataclasses.replace(policy.model, vocab_multiple=rows // layout.tensor)
    precision, ranks = config.precision_of("sampler"), policy.layout.ranks
    sampling = ParallelLayout.create(layout, ranks)
    return Role.build("sampler", model, sampling, precision, adapter=policy.adapter).frozen()


def make_reference(
    policy: Role, model: ModelConfig, layout: ParallelLayout, config: PPOConfig, source: StartingPoint | None
) -> Role:
    """The policy as it starts: its own frozen weights where only adapters train, else a second model."""
    if policy.adapter is None:
        return make_role("reference", model, layout, config, source).frozen()
    log.info("reference: the policy's weights, without what its adapters learn")
    return policy.as_it_started("reference", keep=source is not None and source.adapter is not None)
