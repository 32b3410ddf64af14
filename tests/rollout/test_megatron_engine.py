"""Megatron-Core's engine samples what our own samples, whatever its cache, its blocks and its company are."""

import gc
from dataclasses import replace

import dynamic_engine_stand_in as stand_in
import pytest
import torch
from ranks import run_ranks
from toys import GPT2_LIKE, LLAMA_LIKE, make_role, train

from megatron_rlhf.config.lora import LoraConfig
from megatron_rlhf.config.model import Norm, ParallelConfig, Precision, RopeScaling
from megatron_rlhf.config.rollout import RolloutConfig, SamplingEngine
from megatron_rlhf.models.microbatches import TokenBatch, language_model_microbatches
from megatron_rlhf.parallel import compat
from megatron_rlhf.rollout.collect import sample_responses
from megatron_rlhf.rollout.generate import generate
from megatron_rlhf.rollout.sampling import row_keys
from megatron_rlhf.rollout.types import Responses

pytestmark = pytest.mark.skipif(not compat.DYNAMIC_ENGINE, reason="Megatron-Core before 0.19 has no such engine")
MODELS = {"gpt2": GPT2_LIKE, "llama": LLAMA_LIKE}
STOPS = (3, 40)
LENGTHS = [4, 11, 2, 7, 7, 2, 9, 11, 5]
SMALL_BLOCK = 4


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 67, (n,), generator=generator).tolist() for n in LENGTHS]


def keys(count):
    ids = torch.arange(count)
    return row_keys(5, 0, ids, torch.zeros_like(ids))


def sampling(**settings):
    return RolloutConfig(**{"max_response_tokens": 20, "batch_size": 4, "engine": SamplingEngine.megatron, **settings})


def same(done, expected):
    for one, other in zip(done, expected, strict=True):
        assert (one.tokens, one.stopped) == (other.tokens, other.stopped)
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)


@pytest.fixture(scope="module")
def engine_module():
    """Not importable without the version of Megatron-Core that has it."""
    from megatron_rlhf.rollout import megatron_engine

    return megatron_engine


@pytest.fixture
def engine(world, engine_module, monkeypatch):
    """The module; a sequence of a test fills several of its blocks."""
    stand_in.install(monkeypatch)
    monkeypatch.setattr(engine_module, "BLOCK", SMALL_BLOCK)
    return engine_module


@pytest.fixture
def seen(engine, monkeypatch):
    """Engines that were made, in order."""
    made = []

    class Seen(engine.DynamicInferenceEngine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(engine, "DynamicInferenceEngine", Seen)
    return made


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.8},
        {"min_response_tokens": 8},
        {"repetition_penalty": 1.4},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
@pytest.mark.parametrize("model", MODELS)
def test_text_and_log_probabilities_are_those_of_our_own_engine(engine, model, settings):
    role, config = make_role(MODELS[model]), sampling(**settings)
    expected = generate(role, prompts(), keys(len(LENGTHS)), config, STOPS)
    same(engine.generate(role, prompts(), keys(len(LENGTHS)), config, STOPS), expected)
    assert stand_in.Graph.replayed > 10


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_the_number_of_slots_changes_nothing(engine, slots):
    role = make_role(LLAMA_LIKE)
    expected = generate(role, prompts(), keys(len(LENGTHS)), sampling(), STOPS)
    assert len({len(completion.tokens) for completion in expected}) > 3
    same(engine.generate(role, prompts(), keys(len(LENGTHS)), sampling(batch_size=slots), STOPS), expected)


VARIANTS = {
    "parallel_residual": replace(LLAMA_LIKE, parallel_residual=True, rope_fraction=0.5, norm=Norm.layernorm),
    "qk_norm": replace(LLAMA_LIKE, qk_norm=True, head_dim=16),
    "rope_scaling": replace(LLAMA_LIKE, rope_scaling=RopeScaling.linear, rope_scaling_factor=2.0),
    "position_offset": replace(GPT2_LIKE, position_offset=2),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_models_have_beside_that(engine, variant):
    role = make_role(VARIANTS[variant])
    expected = generate(role, prompts(), keys(len(LENGTHS)), sampling(), STOPS)
    same(engine.generate(role, prompts(), keys(len(LENGTHS)), sampling(), STOPS), expected)


def test_adapters_are_part_of_the_model(engine):
    settings = LoraConfig(rank=4, alpha=32.0)
    role = make_role(LLAMA_LIKE, adapter=settings.adapter(LLAMA_LIKE, "policy.lora"))
    expected = generate(role, prompts(), keys(len(LENGTHS)), sampling(), STOPS)
    same(engine.generate(role, prompts(), keys(len(LENGTHS)), sampling(), STOPS), expected)
    without = generate(make_role(LLAMA_LIKE), prompts(), keys(len(LENGTHS)), sampling(), STOPS)
    assert [each.tokens for each in without] != [each.tokens for each in expected]


def test_blocks_of_the_real_size(engine, monkeypatch):
    monkeypatch.undo()
    stand_in.install(monkeypatch)
    role = make_role(LLAMA_LIKE)
    assert engine.BLOCK == 256
    done = engine.generate(role, prompts(), keys(len(LENGTHS)), sampling(), STOPS)
    same(done, generate(role, prompts(), keys(len(LENGTHS)), sampling(), STOPS))


@pytest.mark.parametrize("model", MODELS)
def test_log_probabilities_are_those_of_a_pass_over_the_whole_text(engine, model):
    role = make_role(MODELS[model])
    done = engine.generate(role, prompts(), keys(len(LENGTHS)), sampling(temperature=0.8), STOPS)
    responses = Responses.pack(prompts(), done, 0, torch.device("cpu"))
    recomputed = responses.at_response(role.logprobs(responses.sequences, 4, 0.8, as_response=True))
    reported = [logprob for completion in done for logprob in completion.logprobs]
    assert reported == pytest.approx(recomputed[responses.mask_bt].tolist(), abs=2e-5)


def test_tokens_that_the_tokenizer_does_not_have_are_never_drawn(engine):
    role = make_role(GPT2_LIKE)
    role.know_only(range(30))
    done = engine.generate(role, prompts(), keys(len(LENGTHS)), sampling(), STOPS)
    same(done, generate(role, prompts(), keys(len(LENGTHS)), sampling(), STOPS))
    assert max(max(completion.tokens) for completion in done) < 30


def test_a_text_that_is_complete_ends_there(engine):
    role, told, ended = make_role(LLAMA_LIKE), [], []

    def watch():
        counted = iter(range(1, 99))
        return lambda token: next(counted) == 5

    def end(sequence):
        ended.append((sequence.index, len(sequence.tokens)))

    done = engine.generate(
        role, prompts(), keys(len(LENGTHS)), sampling(), (), watch, lambda *token: told.append(token), end
    )
    assert [(len(completion.tokens), completion.stopped) for completion in done] == [(5, True)] * len(LENGTHS)
    assert sorted(ended) == [(i, 5) for i in range(len(LENGTHS))]
    assert sorted(told) == sorted((i, token) for i, each in enumerate(done) for token in each.tokens)


def test_samples_of_a_prompt_share_its_blocks(seen, engine):
    """All but the first read only what does not fill a block."""
    role, prompt, samples = make_role(LLAMA_LIKE), prompts()[1], 6
    assert len(prompt) == 11
    config = sampling(batch_size=3)
    done = engine.generate(role, [prompt] * samples, keys(samples), config, STOPS)
    same(done, generate(role, [prompt] * samples, keys(samples), config, STOPS))
    assert len({tuple(completion.tokens) for completion in done}) == samples
    (made,) = seen
    whole_blocks = len(prompt) // SMALL_BLOCK * SMALL_BLOCK
    assert made._prefill_tokens_skipped == (samples - 1) * whole_blocks


def test_in_a_small_cache_responses_wait_or_are_read_again(seen, engine):
    role = make_role(LLAMA_LIKE)
    per_block = SMALL_BLOCK * engine._bytes_of_a_token(role.modules[0])
    config = sampling(batch_size=9)
    done = engine.generate(role, prompts(), keys(len(LENGTHS)), config, STOPS, cache_gb=(14 + 1) * per_block / 2**30)
    assert seen[0].evicted_request_count > 0
    same(done, generate(role, prompts(), keys(len(LENGTHS)), config, STOPS))


def test_new_weights_are_sampled_from_and_training_goes_on(engine):
    role = make_role(LLAMA_LIKE)
    trained = train(role, lr=1e-2)
    whole = LLAMA_LIKE.max_sequence_length
    config = sampling(max_response_tokens=whole - 1 - max(LENGTHS))
    before = engine.generate(role, prompts(), keys(len(LENGTHS)), config, STOPS)
    # Training reads all but the last token: a row as long as the engine's longest sequence, with the rotary table that it has
    # used. Transformer Engine's fused rotation keeps the table for its backward pass, which an inference tensor refuses.
    table = role.modules[0].rotary_pos_emb(whole - 1, packed_seq=False, cp_group=None)
    assert not table.is_inference()
    text = torch.randint(0, 67, (2, whole), generator=torch.Generator().manual_seed(2)).tolist()
    batch = TokenBatch.pack(text, [1] * len(text))
    trained.update(language_model_microbatches(batch, role, 2, "loss"), 1e-2)
    after = engine.generate(role, prompts(), keys(len(LENGTHS)), config, STOPS)
    same(after, generate(role, prompts(), keys(len(LENGTHS)), config, STOPS))
    assert [completion.tokens for completion in after] != [completion.tokens for completion in before]


def test_nothing_stays_behind(engine):
    from megatron.core.inference.utils import InferenceMode

    gc.collect()
    gc.disable()
    try:
        engine.generate(make_role(GPT2_LIKE), prompts(), keys(len(LENGTHS)), sampling(), STOPS)
        kinds = (engine.DynamicInferenceContext, engine.DynamicInferenceEngine, stand_in.Graph)
        assert not any(isinstance(each, kinds) for each in gc.get_objects())
    finally:
        gc.enable()
    assert not InferenceMode.is_active()


def shared_work(model, parallel):
    """As in training, on a rank of several."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in.install(patch)
        from megatron_rlhf.rollout import megatron_engine

        patch.setattr(megatron_engine, "BLOCK", SMALL_BLOCK)
        role = make_role(MODELS[model], parallel)
        done = sample_responses(role, prompts(), list(range(len(LENGTHS))), sampling(batch_size=3), STOPS, (5, 0))
        return done, stand_in.Graph.replayed


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ("llama", ParallelConfig(tensor=2, sequence=True)),
        ("gpt2", ParallelConfig(pipeline=2)),
        ("gpt2", ParallelConfig()),
    ],
    ids=["tensor", "pipeline", "data"],
)
def test_two_ranks_sample_what_one_samples(engine, model, parallel):
    expected = generate(make_role(MODELS[model]), prompts(), keys(len(LENGTHS)), sampling(), STOPS)
    for done, replayed in run_ranks(2, shared_work, model, parallel):
        same(done, expected)
        assert (replayed > 0) == (parallel.pipeline == 1)


def test_in_bf16_the_gap_is_that_of_rounding(engine):
    role = make_role(LLAMA_LIKE, precision=Precision.bf16)
    done = engine.generate(role, prompts(), keys(len(LENGTHS)), sampling(), STOPS)
    responses = Responses.pack(prompts(), done, 0, torch.device("cpu"))
    recomputed = responses.at_response(role.logprobs(responses.sequences, 4, as_response=True))
    reported = [logprob for completion in done for logprob in completion.logprobs]
    assert reported == pytest.approx(recomputed[responses.mask_bt].tolist(), abs=0.1)
