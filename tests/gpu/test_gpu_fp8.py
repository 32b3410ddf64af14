"""Transformer Engine's fp8 in our models: that it is on, off where it has to be, accurate enough, and that the gate sees it."""

import pytest
import torch
from toys import make_role

from megatron_rlhf.config.model import Fp8Recipe, ModelConfig, ParallelConfig, Precision
from megatron_rlhf.config.training import Fp8Config, OptimizerConfig, SamplingConfig
from megatron_rlhf.models.microbatches import TokenBatch, language_model_microbatches
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.rollout.generate import generate
from megatron_rlhf.rollout.sampling import row_keys
from megatron_rlhf.runs.fp8_gate import Fp8Gate
from megatron_rlhf.trainers.step import TrainedRole

pytestmark = pytest.mark.usefixtures("fp8_gpu", "world")

MODEL = ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=4, vocab_size=1000, max_sequence_length=256)
TEXTS = [torch.randint(1000, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (100, 61, 128)]


def role(precision: Precision = Precision.fp8_hybrid, recipe: Fp8Recipe = Fp8Recipe.tensorwise) -> Role:
    layout = ParallelLayout.create(ParallelConfig())
    layout.seed(1)
    return Role.build("policy", MODEL, layout, precision, fp8_recipe=recipe)


@pytest.fixture(params=list(Fp8Recipe), ids=lambda recipe: recipe.name)
def recipe(request: pytest.FixtureRequest) -> Fp8Recipe:
    """Each recipe that this Transformer Engine, CUDA and GPU support."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    asked = {
        Fp8Recipe.blockwise: FP8GlobalStateManager.is_fp8_block_scaling_available,
        Fp8Recipe.mxfp8: FP8GlobalStateManager.is_mxfp8_available,
    }
    if request.param in asked:
        available, reason = asked[request.param]()
        if not available:
            pytest.skip(reason)
    return request.param


def read(model: Role) -> torch.Tensor:
    tokens = torch.tensor(TEXTS[0], device=collectives.device()).unsqueeze(0)
    return model.logprobs(tokens, 1)


def test_the_switch_is_transformer_engines() -> None:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    model = role()
    seen: list[tuple[str, bool]] = []

    def note(name: str):
        return lambda *_: seen.append((name, FP8GlobalStateManager.is_fp8_enabled()))

    (module,) = model.modules
    module.decoder.layers[0].mlp.linear_fc1.register_forward_pre_hook(note("layer"))
    module.output_layer.register_forward_pre_hook(note("head"))
    read(model)
    with model.without_fp8():
        read(model)
    assert seen == [("layer", True), ("head", False), ("layer", False), ("head", False)]


def test_without_fp8_is_bf16_to_the_bit() -> None:
    model = role()
    quantized = read(model)
    with model.without_fp8():
        exact = read(model)
    plain = role(Precision.bf16)
    plain.modules[0].load_state_dict(model.modules[0].state_dict(), strict=False)
    assert torch.equal(exact, read(plain))
    assert not torch.equal(exact, quantized)


def test_training_follows_bf16(recipe: Fp8Recipe) -> None:
    losses = []
    for model in (role(recipe=recipe), role(Precision.bf16)):
        trained = TrainedRole.create(model, OptimizerConfig(lr=1e-3), Precision.fp8_hybrid)
        gate = Fp8Gate.over(Fp8Config(recipe=recipe, gate_max_gap=0.5), model, TEXTS, 2)
        if gate is not None:
            assert gate.check(0)["fp8/active"] == 1.0
        batch = TokenBatch.pack(TEXTS, [1] * len(TEXTS))
        microbatches = [language_model_microbatches(batch, model, 2, "loss") for _ in range(20)]
        losses.append([trained.update(part, 1e-3).statistics["loss"] for part in microbatches])
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[0][-1] == pytest.approx(losses[1][-1], rel=0.1)


def test_the_gate_measures_a_real_gap_and_ends_fp8(recipe: Fp8Recipe) -> None:
    model = role(recipe=recipe)
    gate = Fp8Gate.over(Fp8Config(recipe=recipe, gate_max_gap=1e-6, gate_every=1), model, TEXTS, 2)
    assert gate is not None
    metrics = gate.check(1)
    assert 1e-6 < metrics["fp8/logprob_gap_mean"] <= metrics["fp8/logprob_gap_max"]
    assert metrics["fp8/active"] == 0.0
    assert gate.gap() == (0.0, 0.0), "both sides are bf16 now"


def test_sampling_in_fp8_takes_any_number_of_rows() -> None:
    model = role()
    prompts = [text[:n] for text, n in zip(TEXTS, (7, 5, 9), strict=True)]
    keys = row_keys(0, 0, torch.arange(3), torch.zeros(3, dtype=torch.long))

    def sample(precision: Precision) -> list:
        config = SamplingConfig(max_response_tokens=8, precision=precision)
        return generate(model, prompts, keys, config, stop_ids=[])

    fp8, bf16 = sample(Precision.fp8_hybrid), sample(Precision.bf16)
    assert [len(completion.tokens) for completion in fp8] == [8, 8, 8]
    first = [(a.logprobs[0], b.logprobs[0]) for a, b in zip(fp8, bf16, strict=True) if a.tokens[0] == b.tokens[0]]
    assert all(abs(a - b) < 0.3 for a, b in first)


def test_values_are_fp32() -> None:
    value = make_role(MODEL, name="value", scalar=True, precision=Precision.fp8_hybrid)
    tokens = torch.tensor([TEXTS[0]], device=collectives.device())
    assert value.values(tokens, 1).dtype == torch.float32
