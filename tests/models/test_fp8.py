"""fp8's switch, its padding and what may use it; the arithmetic itself is Transformer Engine's (tests/gpu)."""

from types import SimpleNamespace

import pytest
import torch
from toys import GPT2_LIKE, LLAMA_LIKE, make_role

from megatron_rlhf.config.model import Fp8Recipe, ParallelConfig, Precision
from megatron_rlhf.models import fp8
from megatron_rlhf.models.gpt import transformer_config
from megatron_rlhf.parallel.layout import ParallelLayout


class CastingLinear(torch.nn.Linear):
    """Like Transformer Engine's layer under Megatron-Core: [s, b, h] -> (output, bias); remembers when it cast its weight."""

    def __init__(self, width: int, multiple: int) -> None:
        super().__init__(width, width, bias=False)
        self.multiple, self.is_first_microbatch, self.casts = multiple, True, 0

    def forward(self, input_sbh):
        assert input_sbh[..., 0].numel() % self.multiple == 0, "fp8 products take whole multiples of tokens"
        self.casts += self.is_first_microbatch
        self.is_first_microbatch = False
        return super().forward(input_sbh), None


class Chunk(torch.nn.Module):
    """The part of a model that `fp8.decoding` uses."""

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.first, self.second = CastingLinear(8, multiple), CastingLinear(8, multiple)

    def forward(self, x):
        return self.second(self.first(x)[0])[0]

    def set_is_first_microbatch(self) -> None:
        """Megatron-Core's method, abridged: the schedules call it before their first microbatch."""
        if not hasattr(self, "modules_with_is_first_microbatch"):
            self.modules_with_is_first_microbatch = [m for m in self.modules() if hasattr(m, "is_first_microbatch")]
        for module in self.modules_with_is_first_microbatch:
            module.is_first_microbatch = True


@torch.no_grad()
def test_decoding_pads_any_number_of_tokens_and_casts_weights_once() -> None:
    chunk, plain = Chunk(16), Chunk(1)
    plain.load_state_dict(chunk.state_dict())
    chunk.set_is_first_microbatch()
    with fp8.decoding([chunk], 16):
        for s, b in ((5, 3), (1, 3), (1, 2), (1, 16)):
            chunk.set_is_first_microbatch()
            x = torch.randn(s, b, 8)
            # Matrix products of other shapes may sum in another order.
            torch.testing.assert_close(chunk(x), plain(x))
    assert [layer.casts for layer in (chunk.first, chunk.second)] == [1, 1]
    with pytest.raises(AssertionError, match="whole multiples"):
        chunk(torch.randn(1, 3, 8))
    chunk.set_is_first_microbatch()  # training casts again
    assert chunk.first.is_first_microbatch


def test_a_role_leaves_fp8_and_comes_back(world) -> None:
    role = make_role(GPT2_LIKE, precision=Precision.fp8_hybrid)
    configs = {id(m.config) for chunk in role.modules for m in chunk.modules() if hasattr(m, "config")}
    assert len(configs) == 1, "the layers' blocks ask another configuration than the one that is switched"
    assert role.modules[0].decoder.config.fp8 == "hybrid"
    with role.without_fp8():
        assert role.modules[0].decoder.config.fp8 is None
        assert role.pad_length(17) == 17
    assert role.in_fp8
    assert role.pad_length(17) == 32
    role.switch_fp8(on=False)
    with role.without_fp8():
        pass
    assert not role.in_fp8, "what was off stays off"


def test_decoding_leaves_fp8_unless_it_is_asked_to_stay(world) -> None:
    role = make_role(GPT2_LIKE, precision=Precision.fp8_hybrid)
    with role.decoding():
        assert not role.in_fp8
    with role.decoding(in_fp8=True):
        assert role.in_fp8
    role.switch_fp8(on=False)  # as the gate does
    with role.decoding(in_fp8=True):
        assert not role.in_fp8


def test_sequences_are_whole_blocks_on_every_rank(world) -> None:
    modules = [SimpleNamespace(config=SimpleNamespace(fp8="hybrid", fp8_recipe="blockwise"))]
    assert fp8.token_multiple(modules) == 128
    fp8.switch(modules, on=False)
    assert fp8.token_multiple(modules) == 1


def test_nvfp4_is_megatron_cores_other_mode(world) -> None:
    from megatron.core.enums import Fp4Recipe as MegatronRecipe

    layout = ParallelLayout.create(ParallelConfig())
    role = make_role(LLAMA_LIKE, layout=layout, precision=Precision.fp8_hybrid, fp8_recipe=Fp8Recipe.nvfp4)
    config = role.modules[0].decoder.config
    assert (config.fp4, config.fp8, config.bf16, config.fp4_param) == ("e2m1", None, True, False)
    assert MegatronRecipe(config.fp4_recipe).name == "nvfp4"
    assert role.pad_length(17) == 128
    with role.without_fp8():
        assert (config.fp4, config.fp8, role.in_fp8) == (None, None, False)
        assert role.pad_length(17) == 17
    assert (config.fp4, config.fp8, role.in_fp8) == ("e2m1", None, True)


@pytest.mark.parametrize("recipe", [recipe for recipe in Fp8Recipe if recipe is not Fp8Recipe.nvfp4])
def test_recipes_reach_megatron_core(world, recipe: Fp8Recipe) -> None:
    from megatron.core.enums import Fp8Recipe as MegatronRecipe

    layout = ParallelLayout.create(ParallelConfig())
    config = transformer_config(LLAMA_LIKE, layout, Precision.fp8_hybrid, fp8_recipe=recipe)
    assert MegatronRecipe(config.fp8_recipe).name == recipe.name
    assert (config.fp8, config.bf16, config.fp8_param) == ("hybrid", True, False)
    assert not config.fp8_dot_product_attention
    assert transformer_config(LLAMA_LIKE, layout, Precision.bf16).fp8 is None


def test_heads_are_no_layers_of_transformer_engine(world) -> None:
    """Megatron-Core's fp8 context covers only the transformer block: unembedding and scalar head are outside."""
    for scalar in (False, True):
        (module,) = make_role(GPT2_LIKE, precision=Precision.fp8_hybrid, scalar=scalar).modules
        assert module.output_layer not in list(module.decoder.modules())
        assert type(module.output_layer).__module__.split(".")[0] != "transformer_engine"
