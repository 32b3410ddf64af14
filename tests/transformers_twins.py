"""The models of toys.py as classes of `transformers`, the weights carried over by hand."""

import torch
from toys import GPT2_LIKE, LLAMA_LIKE
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def twin(state, model):
    """`state`: of the whole model on one rank."""
    hf, weights = {GPT2_LIKE.positions: as_gpt2, LLAMA_LIKE.positions: as_llama}[model.positions](state, model)
    missing, unexpected = hf.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(key.endswith((".attn.bias", ".masked_bias", "inv_freq")) for key in missing), missing
    return hf.eval()


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
