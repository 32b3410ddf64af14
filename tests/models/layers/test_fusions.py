"""Fused kernels compute what the separate operations do, in every architecture that has them."""

import dataclasses

import pytest
import torch
from toys import GPT2_LIKE, LLAMA_LIKE, assemble, assert_close, gradient_blocks, make_role, train, weight_blocks

from megatron_rlhf.config.model import Activation, FusedKernels, ParallelConfig
from megatron_rlhf.models.layers import fusions
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.parallel.vocab import token_logprobs

MODELS = {
    "gelu": GPT2_LIKE,
    "gelu_exact": dataclasses.replace(GPT2_LIKE, activation=Activation.gelu_exact),
    "gelu_without_bias": dataclasses.replace(GPT2_LIKE, linear_bias=False),
    "relu": dataclasses.replace(GPT2_LIKE, activation=Activation.relu),
    "parallel_residual": dataclasses.replace(GPT2_LIKE, parallel_residual=True),
    "swiglu": LLAMA_LIKE,
}
FUSED = {"gelu", "parallel_residual", "swiglu"}


def gradients(model, choice):
    role = make_role(model, ParallelConfig(fused_kernels=choice))
    config = role.modules[0].config
    tokens = torch.randint(0, 67, (2, 12), generator=torch.Generator().manual_seed(3))

    def loss_of(logits):
        loss = -token_logprobs(logits[:, :-1], tokens[:, 1:], None).sum()
        return loss, {"loss": loss.detach()}

    logprobs = role.logprobs(tokens, 2)
    return config, logprobs, assemble([gradient_blocks(train(role), [Microbatch(tokens, loss_of)])], 67)


@pytest.mark.parametrize("name", MODELS)
def test_fused_kernels_change_no_number(name, world):
    fused, fused_logprobs, fused_gradients = gradients(MODELS[name], FusedKernels.on)
    plain, plain_logprobs, plain_gradients = gradients(MODELS[name], FusedKernels.off)
    assert fused.bias_dropout_fusion and not plain.bias_dropout_fusion
    assert fused.bias_activation_fusion == (name in FUSED) and not plain.bias_activation_fusion
    torch.testing.assert_close(fused_logprobs, plain_logprobs, rtol=2e-6, atol=2e-6)
    assert_close(fused_gradients, plain_gradients, relative=5e-6)


@pytest.mark.parametrize(("gpu", "engine", "apex"), [(False, False, False), (True, False, True), (True, True, False)])
def test_on_a_gpu_those_that_are_there_are_on(gpu, engine, apex, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(fusions, "transformer_engine_serves", lambda: engine)
    monkeypatch.setattr(fusions.rope_utils, "fused_apply_rotary_pos_emb", print)
    monkeypatch.setattr(fusions.layers, "_grad_accum_fusion_available", apex)
    for model in (GPT2_LIKE, LLAMA_LIKE):
        found = fusions.fusions(model, FusedKernels.auto)
        assert found["bias_activation_fusion"] is found["bias_dropout_fusion"] is gpu
        assert found["apply_rope_fusion"] is (engine and model is LLAMA_LIKE)
        assert found["gradient_accumulation_fusion"] is (gpu and apex)
        off = fusions.fusions(model, FusedKernels.off)
        assert not any(off.values())


def test_weights_do_not_depend_on_it(world):
    blocks = [weight_blocks(make_role(GPT2_LIKE, ParallelConfig(fused_kernels=c))) for c in FusedKernels]
    assert_close(assemble([blocks[0]], 67), assemble([blocks[1]], 67), relative=0)
