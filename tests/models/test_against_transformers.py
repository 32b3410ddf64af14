"""Log-probabilities of GPT-2-style and Llama-style roles against `transformers`, the weights carried over by hand."""

import dataclasses

import pytest
import torch
from ranks import run_ranks
from torch.testing import assert_close
from toys import GPT2_LIKE, LLAMA_LIKE, make_role
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from megatron_rlhf.config.model import ParallelConfig

MODELS = {"gpt2": GPT2_LIKE, "llama": LLAMA_LIKE}
LAYOUTS = {
    "one_rank": (1, ParallelConfig()),
    "tp2_sp": (2, ParallelConfig(tensor=2, sequence=True)),
    "tp2_pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "pp2_virtual2": (2, ParallelConfig(pipeline=2, virtual_stages=2)),
    "dp2": (2, ParallelConfig()),
}


def tokens():
    return torch.randint(0, 67, (5, 17), generator=torch.Generator().manual_seed(0))


def split_qkv(fused, model):
    """Query, key and value of [groups x (heads of a group, key, value) x width, ...]."""
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    width = model.hidden_size // heads
    by_group = fused.reshape(groups, heads // groups + 2, width, *fused.shape[1:])
    parts = by_group[:, :-2], by_group[:, -2], by_group[:, -1]
    return tuple(part.reshape(-1, *fused.shape[1:]) for part in parts)


def as_gpt2(state, model):
    theirs = {
        "transformer.wte.weight": state["embedding.word_embeddings.weight"],
        "transformer.wpe.weight": state["embedding.position_embeddings.weight"],
        "transformer.ln_f.weight": state["decoder.final_layernorm.weight"],
        "transformer.ln_f.bias": state["decoder.final_layernorm.bias"],
        "lm_head.weight": state["embedding.word_embeddings.weight"],
    }
    for i in range(model.num_layers):
        ours, layer = f"decoder.layers.{i}", f"transformer.h.{i}"
        for part in ("weight", "bias"):
            fused = torch.cat(split_qkv(state[f"{ours}.self_attention.linear_qkv.{part}"], model))
            theirs[f"{layer}.attn.c_attn.{part}"] = fused.T
            theirs[f"{layer}.attn.c_proj.{part}"] = state[f"{ours}.self_attention.linear_proj.{part}"].T
            theirs[f"{layer}.mlp.c_fc.{part}"] = state[f"{ours}.mlp.linear_fc1.{part}"].T
            theirs[f"{layer}.mlp.c_proj.{part}"] = state[f"{ours}.mlp.linear_fc2.{part}"].T
            theirs[f"{layer}.ln_1.{part}"] = state[f"{ours}.input_layernorm.{part}"]
            theirs[f"{layer}.ln_2.{part}"] = state[f"{ours}.pre_mlp_layernorm.{part}"]
    hf = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=model.max_sequence_length,
            n_embd=model.hidden_size,
            n_layer=model.num_layers,
            n_head=model.num_attention_heads,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    return hf, theirs


def as_llama(state, model):
    theirs = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"],
        "model.norm.weight": state["decoder.final_layernorm.weight"],
        "lm_head.weight": state["output_layer.weight"],
    }
    for i in range(model.num_layers):
        ours, layer = f"decoder.layers.{i}", f"model.layers.{i}"
        qkv = split_qkv(state[f"{ours}.self_attention.linear_qkv.weight"], model)
        for name, part in zip("qkv", qkv, strict=True):
            theirs[f"{layer}.self_attn.{name}_proj.weight"] = part
        theirs[f"{layer}.self_attn.o_proj.weight"] = state[f"{ours}.self_attention.linear_proj.weight"]
        gate, up = state[f"{ours}.mlp.linear_fc1.weight"].chunk(2)
        theirs[f"{layer}.mlp.gate_proj.weight"], theirs[f"{layer}.mlp.up_proj.weight"] = gate, up
        theirs[f"{layer}.mlp.down_proj.weight"] = state[f"{ours}.mlp.linear_fc2.weight"]
        theirs[f"{layer}.input_layernorm.weight"] = state[f"{ours}.input_layernorm.weight"]
        theirs[f"{layer}.post_attention_layernorm.weight"] = state[f"{ours}.pre_mlp_layernorm.weight"]
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_sequence_length,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
            rms_norm_eps=model.norm_epsilon,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    return hf, theirs


@pytest.fixture(scope="module")
def expected(world):
    """Logits of `transformers` for both models."""
    result = {}
    for name, convert in (("gpt2", as_gpt2), ("llama", as_llama)):
        role = make_role(MODELS[name])
        hf, weights = convert(role.modules[0].state_dict(), MODELS[name])
        missing, unexpected = hf.load_state_dict(weights, strict=False)
        assert not unexpected
        assert all(key.endswith((".attn.bias", ".masked_bias", "inv_freq")) for key in missing), missing
        with torch.no_grad():
            result[name] = hf.eval()(tokens()).logits
    return result


def test_logits(expected):
    for name, model in MODELS.items():
        role = make_role(model)
        positions = torch.arange(17).expand(5, -1)
        with role.layout, role.evaluating():
            logits = role.modules[0](tokens(), positions, None)
        assert_close(logits, expected[name], rtol=1e-5, atol=1e-5)


def logprobs_at(model, parallel):
    padded = dataclasses.replace(MODELS[model], vocab_multiple=16)  # 67 -> 80 on one rank, 96 on two
    return make_role(padded, parallel).logprobs(tokens(), micro_batch_size=2)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_at_every_layout_on_every_rank_and_padding_takes_no_probability(layout, model, expected):
    logprobs = expected[model][:, :-1].log_softmax(-1).gather(-1, tokens()[:, 1:].unsqueeze(-1)).squeeze(-1)
    ranks, parallel = LAYOUTS[layout]
    for result in run_ranks(ranks, logprobs_at, model, parallel):
        assert_close(result, logprobs, rtol=1e-5, atol=1e-5)
