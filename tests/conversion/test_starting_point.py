"""A role loads only a model of its kind: an error names what was found and what was expected before a model is built."""

import json

import pytest
from hf_models import save
from toys import GPT2_LIKE, make_role

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.conversion.starting_point import (
    AVERAGE,
    POLICY,
    REWARD,
    TRAINED_REWARD,
    VALUE,
    StartingPoint,
)

LANGUAGE, SCORE, TOKEN = "language", "score", "token"
# Kind of model -> the roles that accept it.
HUGGING_FACE = {
    LANGUAGE: [POLICY, TRAINED_REWARD, VALUE],
    SCORE: [REWARD, TRAINED_REWARD, VALUE],
    TOKEN: [REWARD, TRAINED_REWARD, VALUE],
}
OURS = {
    ("policy",): [POLICY, TRAINED_REWARD, VALUE],
    ("reward",): [REWARD, TRAINED_REWARD, VALUE],
    ("policy", "policy_ema", "value"): [POLICY, AVERAGE, TRAINED_REWARD, VALUE],
}
ALL = {"policy": POLICY, "average": AVERAGE, "reward": REWARD, "trained reward": TRAINED_REWARD, "value": VALUE}


def takes(folder, wanted) -> bool:
    refusal = None
    try:
        found = StartingPoint.find(str(folder), "key.init_from", wanted)
    except UserError as error:
        refusal = str(error)
    if refusal is not None:
        for named in ("key.init_from", str(folder), "needed is"):
            assert named in refusal
        return False
    assert found.scalar == wanted.scalar or wanted.fresh_head
    return True


@pytest.mark.parametrize("head", HUGGING_FACE)
def test_hugging_face_folders(world, tmp_path, head):
    save(tmp_path, "gpt2", head)
    assert {name for name, wanted in ALL.items() if takes(tmp_path, wanted)} == {
        name for name, wanted in ALL.items() if wanted in HUGGING_FACE[head]
    }


@pytest.mark.parametrize("roles", OURS, ids="_".join)
def test_checkpoints_of_ours(world, tmp_path, roles):
    made = {name: make_role(GPT2_LIKE, name=name, scalar=name in ("reward", "value")) for name in roles}
    with sharded.writing(tmp_path / "step_1") as aside:
        for role in made.values():
            sharded.save_role(aside, SavedRole(role))
        sharded.write_meta(aside, made, {})
    assert {name for name, wanted in ALL.items() if takes(tmp_path / "step_1", wanted)} == {
        name for name, wanted in ALL.items() if wanted in OURS[roles]
    }


def test_what_is_found_is_named(world, tmp_path):
    save(tmp_path, "gpt2", LANGUAGE)
    with pytest.raises(UserError, match=r"holds a language model, .*; needed is a model with a scalar head"):
        StartingPoint.find(str(tmp_path), "reward.init_from", REWARD)
    save(tmp_path, "gpt2", SCORE)
    with pytest.raises(UserError, match=r"holds a model with a scalar head; needed is a language model"):
        StartingPoint.find(str(tmp_path), "policy.init_from", POLICY)


def test_files_that_hold_another_model_than_config_json(world, tmp_path):
    """Found from the files' headers, before a model of these sizes is built."""
    save(tmp_path, "gpt2", LANGUAGE)
    config = tmp_path / "config.json"
    StartingPoint.find(str(tmp_path), "policy.init_from", POLICY).require_undamaged("policy.init_from", scalar=False)
    sound = json.loads(config.read_text())
    for changed, says in (({"n_layer": 9999}, "is missing, which config.json calls for"), ({"n_embd": 2**16}, "65536")):
        config.write_text(json.dumps(sound | changed))
        found = StartingPoint.find(str(tmp_path), "policy.init_from", POLICY)
        with pytest.raises(UserError, match=says):
            found.require_undamaged("policy.init_from", scalar=False)
