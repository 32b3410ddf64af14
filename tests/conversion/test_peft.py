"""Adapters against the `peft` library: logits, gradients and a training step, and folders in both directions."""

from pathlib import Path

import hf_models
import peft
import pytest
import torch
import transformers
from ranks import run_ranks
from test_hf_training import LENGTHS, PROMPTS
from toys import assemble, gradient_blocks, make_role, train, weight_blocks

from megatron_rlhf.config.lora import projections
from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.conversion.adapted import factor
from megatron_rlhf.conversion.starting_point import POLICY, StartingPoint
from megatron_rlhf.models.microbatches import TokenBatch, language_model_microbatches

LR = 0.01
LLAMA_NAMES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
TARGETS = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "pythia": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


def adapted(base: Path, folder: Path, targets, rank=4, **settings):
    """A peft model with random adapters, saved."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=6, target_modules=targets, **settings)
    torch.manual_seed(3)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model.eval()


def sequences(vocabulary):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]


def load_role(folder, parallel=None):
    source = StartingPoint.find(str(folder), "policy.init_from", POLICY)
    role = make_role(source.model, parallel, adapter=source.adapter)
    source.load_into(role)
    return role


def our_step(folder, parallel):
    """Loss, gradients, and the weights after one step of Adam."""
    role = load_role(folder, parallel)
    trained = train(role, lr=LR, epsilon=1e-4)
    microbatches = language_model_microbatches(
        TokenBatch.pack(sequences(role.model.vocab_size), PROMPTS), role, 2, "loss"
    )
    gradients = gradient_blocks(trained, microbatches)
    loss = trained.update(microbatches, LR).statistics["loss"]
    return loss, gradients, weight_blocks(role)


def their_step(model):
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0
    )
    total = torch.zeros(())
    for tokens, prompt in zip(sequences(model.config.vocab_size), PROMPTS, strict=True):
        logits = model(torch.tensor([tokens])).logits[0, prompt - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[prompt:]), reduction="sum")
    loss = total / sum(n - p for n, p in zip(LENGTHS, PROMPTS, strict=True))
    loss.backward()
    optimizer.step()
    return loss.item()


LAYOUTS = {
    "one_rank": (1, ParallelConfig()),
    "tp2_sp": (2, ParallelConfig(tensor=2, sequence=True)),
    "tp2_pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "cp2_dp2": (4, ParallelConfig(context=2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_training_step_is_that_of_peft(world, tmp_path, layout):
    """On Llama, where each of our projections is a module of its own."""
    base = hf_models.save(tmp_path / "base", "llama")
    model = adapted(base, tmp_path / "adapter", list(LLAMA_NAMES))
    size, parallel = LAYOUTS[layout]
    arguments = our_step, tmp_path / "adapter", parallel
    results = run_ranks(size, *arguments) if size > 1 else [our_step(*arguments[1:])]
    loss = their_step(model)
    gradients, weights = (assemble([result[i] for result in results], hf_models.VOCABULARY) for i in (1, 2))
    assert [result[0] for result in results] == pytest.approx([loss] * size, rel=1e-5)
    theirs = dict(model.named_parameters())
    ours = StartingPoint.find(str(tmp_path / "adapter"), "policy.init_from", POLICY)
    for linear, parts in projections(ours.model).items():
        for part in parts:
            for which in "ab":
                for layer in range(4):
                    module = f"base_model.model.model.layers.{layer}.{LLAMA_NAMES[part]}"
                    parameter = theirs[f"{module}.lora_{which.upper()}.default.weight"]
                    key = factor(linear, part, which)
                    for array, expected in ((gradients, parameter.grad), (weights, parameter.detach())):
                        gap = (torch.from_numpy(array[key][layer]) - expected).abs().max()
                        assert gap <= 1e-4 * expected.abs().max(), f"{key} of layer {layer}: {gap:.3g}"
