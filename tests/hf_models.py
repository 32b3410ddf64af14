"""Small models of every architecture, made by `transformers`: the reference that conversions are checked against."""

from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 99
_GPT2 = {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
_COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_LLAMA = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 96}
_LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # one of the eight periods lies between the two borders
}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

# Name of the case -> model type and what differs from its defaults.
CASES = {
    "gpt2": ("gpt2", _GPT2),
    "opt": ("opt", {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "pythia": ("gpt_neox", {**_COMMON, "intermediate_size": 96}),
    "gpt_neox_serial": ("gpt_neox", {**_COMMON, "intermediate_size": 96, "use_parallel_residual": False}),
    "llama": ("llama", _LLAMA),
    "llama_tied_with_biases": (
        "llama",
        {**_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "llama_3.1": ("llama", {**_LLAMA, "rope_theta": 500000.0, "rope_scaling": _LLAMA31}),
    "llama_linear_rope": ("llama", {**_LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 32}),
}
# One case per architecture, for what need not be tested on every variant.
ARCHITECTURES = ("gpt2", "opt", "pythia", "llama_3.1", "mistral", "qwen2", "qwen3")

CLASSES = {
    "language": "AutoModelForCausalLM",
    "score": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
}


def build(case: str, head: str = "language", **changes: object) -> transformers.PreTrainedModel:
    """A model in fp32 with random weights, large enough that a wrong one shows in the logits."""
    model_type, settings = CASES[case]
    labels = {} if head == "language" else {"num_labels": 1}
    config = CONFIG_MAPPING[model_type](**{**NO_TOKENS, **settings, **labels, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[head]).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if parameter.dim() == 1 and name.endswith("weight"):  # a norm's
                parameter.add_(1.0)
    return model.eval()


def save(folder: Path, case: str, head: str = "language", dtype: torch.dtype = torch.float32, **settings) -> Path:
    """Write such a model as a Hugging Face folder; further settings are passed to `save_pretrained`."""
    build(case, head).to(dtype).save_pretrained(folder, **settings)
    return folder


def load(folder: Path, head: str = "language", **settings) -> transformers.PreTrainedModel:
    """The model in a folder, in fp32, as a user of transformers loads it."""
    loader = getattr(transformers, CLASSES[head])
    return loader.from_pretrained(folder, dtype=torch.float32, **settings).eval()
