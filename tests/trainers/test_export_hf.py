"""`run.export_hf`: the folder that a run leaves is the model that its figures are of, for transformers too."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from recipe import read_metrics, run_stage
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from megatron_rlhf.config.errors import RunFailed, UserError
from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.config.training import ExportChoice, RunConfig
from megatron_rlhf.conversion import convert
from megatron_rlhf.conversion.check.outputs import CheckFailed
from megatron_rlhf.trainers.export import export, require_exportable


def test_the_best_epoch_has_the_validation_loss_that_chose_it(recipe):
    name = "export_best"
    more = ["sft.epochs=3", "policy.optimizer.lr=2e-2", "run.export_hf=best", "run.save_every=0"]
    run_ranks(1, run_stage, "sft", recipe.sft(name, *more), timeout=300)
    losses = [row["sft/validation_loss"] for row in read_metrics(recipe.root / name) if "sft/validation_loss" in row]
    folder = recipe.root / name / "huggingface"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for line in (recipe.root / "demonstrations.jsonl").read_text().splitlines():
        record = json.loads(line)
        prompt = tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
        response = tokenizer(record["response"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[len(prompt) - 1 + t, token]) for t, token in enumerate(response))
        count += len(response)
    assert total / count == pytest.approx(min(losses), rel=1e-5)


def test_what_was_there_before_the_run_is_not_replaced(recipe):
    """Such as the model that the run is to start from."""
    folder = recipe.root / "export_over" / "huggingface"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    message = refusal(recipe.sft("export_over", "run.export_hf=last"))
    assert re.fullmatch(r"run\.export_hf=last: .*huggingface is there already, .* choose another run\.dir", message)
    assert (folder / "config.json").read_text() == "{}"


def add_checkpoint(run):
    """Something that looks like one."""
    (run / "checkpoints" / "step_1").mkdir(parents=True, exist_ok=True)
    for name in ("meta.json", "checksums.sha256"):
        (run / "checkpoints" / "step_1" / name).write_text("{}")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), UserError("step_1 is damaged"), CheckFailed("a tensor differs")]
)
def test_an_export_that_fails_does_not_lose_the_run(error, world, tmp_path, monkeypatch):
    def fail(*arguments):
        raise error

    add_checkpoint(tmp_path)
    monkeypatch.setattr(convert, "export_huggingface", fail)
    tokenizer = SimpleNamespace(bos_id=0, eos_id=0, encode=lambda text, bos: [1])
    message = rf"run\.export_hf=last: the run is saved, its export is not: {re.escape(str(error))}"
    with pytest.raises(RunFailed, match=message):
        export(RunConfig(dir=str(tmp_path), export_hf=ExportChoice.last), "policy", tokenizer)


@pytest.mark.parametrize("spelling", ["{run}/huggingface", "{run}/../export_self/huggingface", "{link}"])
def test_a_resumed_run_does_not_replace_what_it_starts_from(recipe, tmp_path, spelling):
    run = recipe.root / "export_self"
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=9)
    add_checkpoint(run)
    (run / "huggingface").mkdir(exist_ok=True)
    (tmp_path / "link").symlink_to(run / "huggingface")
    settings = RunConfig(dir=str(run), export_hf=ExportChoice.last)
    require_exportable(settings, model, {"policy.init_from": str(recipe.root / "sft"), "value.init_from": None})
    start = spelling.format(run=run, link=tmp_path / "link")
    with pytest.raises(
        UserError, match=r"run\.export_hf=last would replace .*huggingface, which reward\.init_from=.* starts"
    ):
        require_exportable(settings, model, {"reward.init_from": start})
    require_exportable(replace(settings, export_hf=None), model, {"reward.init_from": start})


def refusal(overrides):
    """What a run of fine-tuning on one rank is refused with."""
    return run_ranks(1, _refusal, overrides)[0]


def _refusal(overrides):
    from megatron_rlhf import cli
    from megatron_rlhf.config.errors import UserError

    with pytest.raises(UserError) as refused:
        cli.run_stage("sft", overrides)
    return str(refused.value)


def test_the_last_reward_model_is_a_classifier(recipe):
    arguments = recipe.reward_model("export_reward", recipe.root / "sft", "run.export_hf=last")
    run_ranks(1, run_stage, "reward_model", arguments, timeout=300)
    model = AutoModelForSequenceClassification.from_pretrained(
        recipe.root / "export_reward" / "huggingface", trust_remote_code=True
    )
    assert model.config.num_labels == 1


def test_ranks_of_a_run_write_one_folder_and_a_longer_run_another(recipe):
    base = [recipe.root / "sft", recipe.root / "reward_model", "run.export_hf=last", "ppo.ptx_coef=0"]
    layout = ["parallel.tensor=2", "placement=disaggregated", "placement.critic_ranks=1"]
    weights = []
    for iterations, resume in ((2, "false"), (3, "true")):
        more = [f"ppo.iterations={iterations}", f"run.resume={resume}", "policy.optimizer.lr=1e-2", *layout]
        run_ranks(3, run_stage, "ppo", recipe.ppo("export_ranks", *base, *more), timeout=300)
        folder = recipe.root / "export_ranks" / "huggingface"
        weights.append(AutoModelForCausalLM.from_pretrained(folder).state_dict()["transformer.h.0.mlp.c_fc.weight"])
    assert not torch.equal(*weights)
    assert "policy of step_3 as a Hugging Face folder" in (recipe.root / "export_ranks" / "log.txt").read_text()
