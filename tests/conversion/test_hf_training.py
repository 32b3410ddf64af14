"""From the same folder: one SFT step's loss and gradients, and greedy text, are those of `transformers`."""

import json
import subprocess
import sys
from pathlib import Path

import hf_models
import pytest
import torch
import transformers
from ranks import run_ranks
from toys import assemble, gradient_blocks, make_role, train

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.conversion import convert
from megatron_rlhf.conversion.architecture import is_layer
from megatron_rlhf.conversion.convert import CheckOptions
from megatron_rlhf.conversion.hf import load as hf_load
from megatron_rlhf.conversion.hf.extra_files import ExtraFiles
from megatron_rlhf.conversion.hf.weights import Described
from megatron_rlhf.conversion.whole_tensors import places
from megatron_rlhf.data.tokenizer import load_tokenizer
from megatron_rlhf.models.microbatches import TokenBatch, language_model_microbatches
from megatron_rlhf.rollout.generate import generate

ROOT = Path(__file__).resolve().parents[2]
# fp32 gradients summed in another order, as a share of a tensor's largest: measured up to 4e-6 over all cases.
RELATIVE = 5e-5
LAYOUTS = {
    "one_rank": (1, ParallelConfig()),
    "tp2_pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "tp2_sp_pp2_virtual2": (4, ParallelConfig(tensor=2, sequence=True, pipeline=2, virtual_stages=2)),
}
LENGTHS = (20, 12, 16, 9)
PROMPTS = (3, 5, 1, 4)


def sequences():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(hf_models.VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def our_step(folder, parallel):
    """Loss and this rank's gradient blocks of one SFT batch."""
    model, _ = hf_load.read_model_config(folder)
    role = make_role(model, parallel)
    hf_load.load_into(role, folder)
    trained = train(role)
    microbatches = language_model_microbatches(TokenBatch.pack(sequences(), PROMPTS), role, 2, "loss")
    blocks = gradient_blocks(trained, microbatches)
    return trained.update(microbatches, lr=0.0).statistics["loss"], blocks


def their_step(folder):
    model = hf_models.load(folder)
    total = torch.zeros(())
    for tokens, prompt in zip(sequences(), PROMPTS, strict=True):
        logits = model(torch.tensor([tokens])).logits[0, prompt - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[prompt:]), reduction="sum")
    loss = total / sum(n - p for n, p in zip(LENGTHS, PROMPTS, strict=True))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def in_their_names(arrays, folder):
    described = Described.read(folder)
    gradients = {}
    for place in places(described.shapes, described.model.num_layers):
        array = torch.from_numpy(arrays[place.key])
        gradients |= described.to_hf(place, array[place.layer] if is_layer(place.key) else array)
    return gradients


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        *[(case, "one_rank") for case in hf_models.CASES],
        *[("gpt2", "tp2_pp2"), ("llama_3.1", "tp2_pp2")],
        *[
            pytest.param(case, layout, marks=pytest.mark.slow)
            for case in hf_models.CASES
            for layout in ("tp2_pp2", "tp2_sp_pp2_virtual2")
        ],
    ],
)
def test_loss_and_gradients_of_an_sft_step(world, tmp_path, case, layout):
    folder = hf_models.save(tmp_path, case)
    size, parallel = LAYOUTS[layout]
    results = run_ranks(size, our_step, folder, parallel) if size > 1 else [our_step(folder, parallel)]
    loss, gradients = their_step(folder)
    described = Described.read(folder)
    ours = in_their_names(assemble([blocks for _, blocks in results], described.model.vocab_size), folder)
    for our_loss, _ in results:
        assert our_loss == pytest.approx(loss, rel=1e-5)
    head = described.hf_tensor("output_layer.weight").names[0]
    gradients = {head if name == "lm_head.weight" else name: g for name, g in gradients.items()}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        gap, scale = (ours[name] - gradient).abs().max(), gradient.abs().max()
        # A key's bias shifts all scores of a query alike: its gradient is 0 except for rounding.
        assert gap <= RELATIVE * scale or gap < 1e-6, f"{name}: {gap:.3g} of {scale:.3g}"


def greedy(folder: Path, prompts, length, parallel=None):
    model, _ = hf_load.read_model_config(folder)
    role = make_role(model, parallel)
    hf_load.load_into(role, folder)
    return greedy_of(role, prompts, length)


def greedy_of(role, prompts, length):
    config = SamplingConfig(temperature=0.0, max_response_tokens=length, batch_size=8)
    completions = generate(role.frozen(), prompts, torch.zeros(len(prompts), dtype=torch.long), config, stop_ids=())
    return [completion.tokens for completion in completions]


def their_greedy(folder, prompts, length):
    """One padded batch, the way users of transformers generate."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = hf_models.load(folder).generate(
        tokens, attention_mask=mask, max_new_tokens=length, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    return output[:, width:].tolist()


@pytest.mark.parametrize("case", hf_models.CASES)
def test_greedy_text_of_every_architecture(world, tmp_path, case):
    folder = hf_models.save(tmp_path, case)
    prompts = [sequence[:n] for sequence, n in zip(sequences(), (6, 2, 11, 4), strict=True)]
    assert greedy(folder, prompts, 24) == their_greedy(folder, prompts, 24)


def test_greedy_text_over_ranks(tmp_path):
    folder = hf_models.save(tmp_path, "pythia")
    prompts = [sequence[:n] for sequence, n in zip(sequences(), (6, 2, 11, 4), strict=True)]
    expected = their_greedy(folder, prompts, 24)
    for result in run_ranks(4, greedy, folder, prompts, 24, ParallelConfig(tensor=2, pipeline=2, sequence=True)):
        assert result == expected


def test_greedy_text_of_a_trained_model_before_and_after_ppo(world, tmp_path, shared_data):
    """Two iterations of PPO on a real model; then its export, by every path, generates the same text as our sampler."""
    model, run = shared_data / "tinystories_260k", tmp_path / "run"
    openings = ["Once upon a time, there was a", "Tom and his dog went to the", "The sun"]
    prompts = [load_tokenizer(model).encode(opening, bos=True) for opening in openings]
    before = greedy(model, prompts, 40)
    assert before == their_greedy(model, prompts, 40)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": opening}) + "\n" for opening in openings * 6))
    settings = ["run.dir=run", "data.prompts=prompts.jsonl", "ppo.iterations=2", "ppo.warmup_iterations=0"]
    settings += ["policy.optimizer.lr=5e-3"]  # so that two updates change the text
    settings += ["ppo.batch_size=16", "ppo.minibatch_size=16", "ppo.ptx_coef=0", "ppo.tax_every=0"]
    reward = tmp_path / "reward"  # the same model with a head that scores at random
    transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(reward)
    settings += [f"data.tokenizer={model}", f"policy.init_from={model}", f"reward.init_from={reward}"]
    command = [sys.executable, ROOT / "examples" / "train_ppo.py", "recipe=tinystories", *settings]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300, capture_output=True)
    checkpoint = sharded.find_checkpoint(run, "test")
    texts = {"before": before}
    for role in ("policy", "policy_ema"):
        extra, check = ExtraFiles.find(checkpoint, None), CheckOptions()
        convert.export_huggingface(checkpoint, tmp_path / role, role, None, None, extra, check)
        ours = make_role(hf_load.read_model_config(model)[0])
        sharded.load_weights(checkpoint, ours, role)
        texts[role] = greedy_of(ours, prompts, 40)
        assert texts[role] == their_greedy(tmp_path / role, prompts, 40)
        assert texts[role] == greedy(tmp_path / role, prompts, 40)
    assert texts["policy"] != texts["before"]
    assert load_tokenizer(tmp_path / "policy").encode(openings[0], bos=True) == prompts[0]
