"""Reward and value models as classes of transformers: the scores are the same, and so is the bias."""

import hf_models
import pytest
import torch
from conversions import assert_same_tensors, export, round_trip, save_checkpoint, tensors
from safetensors.torch import load_file
from toys import GPT2_LIKE, LLAMA_LIKE, make_role

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.conversion import key_maps
from megatron_rlhf.conversion.architecture import Head


@pytest.mark.parametrize(
    ("head", "role"), [("score", "reward"), ("token", "value")], ids=["reward model", "value model"]
)
@pytest.mark.parametrize("case", hf_models.ARCHITECTURES)
def test_heads_make_the_round_trip(world, tmp_path, case, head, role):
    model_type = hf_models.CASES[case][0]
    if head == "token" and key_maps.load(model_type).token_head is None:
        pytest.skip(f"transformers has no token classifier of {model_type}")
    source = hf_models.save(tmp_path / "source", case, head)
    imported, _ = round_trip(source, tmp_path, role)
    assert imported.head is Head[head]
    assert_same_tensors(source, tmp_path / "theirs")


def test_opt_has_no_class_for_a_value_model(world, tmp_path):
    round_trip(hf_models.save(tmp_path / "source", "opt", "score"), tmp_path, "reward")
    model = sharded.model_from_json(sharded.read_meta(tmp_path / "ours")["roles"]["reward"]["model"])
    ours = tmp_path / "value_model"
    save_checkpoint(ours, ParallelConfig(), {"value": (model, True, 0.0)})
    with pytest.raises(UserError, match="transformers has no OPTForTokenClassification"):
        export(ours, tmp_path / "value", "value", "opt")
    assert not (tmp_path / "value").exists()


@pytest.mark.parametrize(("model", "needs_code"), [(GPT2_LIKE, False), (LLAMA_LIKE, True)], ids=["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_reward_model_scores_texts_as_ours_does(world, tmp_path, model, needs_code, dtype):
    """The bias that makes demonstrations score 0 is kept, although transformers' classes have no parameter for it."""
    save_checkpoint(tmp_path / "ours", ParallelConfig(), {"reward": (model, True, 1.75)})
    report = export(tmp_path / "ours", tmp_path / "theirs", "reward", dtype=dtype)
    role = make_role(model, name="reward", scalar=True)
    sharded.load_weights(tmp_path / "ours", role, "reward")
    if dtype is not None:
        for parameter in role.modules[0].parameters():
            parameter.data = parameter.data.to(dtype).float()
    tokens = torch.randint(model.vocab_size, (4, 11), generator=torch.Generator().manual_seed(3))
    theirs = hf_models.load(tmp_path / "theirs", "score", trust_remote_code=needs_code)
    with torch.no_grad():
        scores = torch.stack([theirs(row.unsqueeze(0)).logits[0, 0] for row in tokens])
    torch.testing.assert_close(scores, role.values(tokens, 4)[:, -1], atol=1e-5, rtol=1e-5)
    assert (tmp_path / "theirs" / "modeling_reward.py").exists() == needs_code
    assert ("load the model with trust_remote_code=True" in str(report)) == needs_code
    if needs_code:  # the bias is the only thing that transformers' own class leaves out
        plain = hf_models.load(tmp_path / "theirs", "score")
        with torch.no_grad():
            without = (
                plain(tokens[:1]).logits[0, 0]
                + load_file(tmp_path / "theirs" / "model.safetensors")["score.bias"].float()
            )
        torch.testing.assert_close(without[0], scores[0])


def test_a_score_is_never_read_at_padding(world, tmp_path):
    """Where the end of text is also the padding, transformers would read the score one token early."""
    source = hf_models.build("gpt2", "score", eos_token_id=98, pad_token_id=98)
    source.save_pretrained(tmp_path / "source")
    round_trip(tmp_path / "source", tmp_path, "reward")
    theirs = hf_models.load(tmp_path / "theirs", "score")
    text = torch.tensor([[4, 5, 6, 98]])
    with torch.no_grad():
        hidden = theirs.base_model(text).last_hidden_state
        torch.testing.assert_close(theirs(text).logits[0], theirs.score(hidden)[0, -1])
        with pytest.raises(ValueError, match="padding"):
            theirs(text.expand(2, -1))


def test_roles_of_one_checkpoint(world, tmp_path):
    roles = {"policy": (LLAMA_LIKE, False, 0), "policy_ema": (LLAMA_LIKE, False, 0), "value": (LLAMA_LIKE, True, 0.5)}
    save_checkpoint(tmp_path / "ours", ParallelConfig(), roles)
    for role in roles:
        export(tmp_path / "ours", tmp_path / role, role)
    policy, average = tensors(tmp_path / "policy"), tensors(tmp_path / "policy_ema")
    assert policy.keys() == average.keys()
    assert not torch.equal(policy["lm_head.weight"], average["lm_head.weight"])
    value = hf_models.load(tmp_path / "value", "token")
    assert float(value.score.bias) == 0.5
    with pytest.raises(UserError, match=r"--role reward: .* holds policy, ema, value"):
        export(tmp_path / "ours", tmp_path / "reward", "reward")
