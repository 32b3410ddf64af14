"""Roles on ranks of their own work at the same time, and what is offloaded to host memory is really gone from the device.

Placements change no figure: this is tested in tests/distributed/test_layout_matrix.py.
"""

import time

import pytest
from ranks import run_ranks
from recipe import read_metrics

DISAGGREGATED = ["placement=disaggregated", "placement.critic_ranks=1"]
NAP = 0.3


def arguments(recipe, name, *more):
    return recipe.ppo(name, recipe.root / "sft", recipe.root / "reward_model", "ppo.iterations=2", *more)


def intervals(stage, overrides):
    """When this rank scored, pretrained ahead and updated each role, each made to take a while, in the first iteration."""
    from megatron_rlhf import cli
    from megatron_rlhf.models.roles import Role
    from megatron_rlhf.trainers.step import TrainedRole

    seen = []

    def slow(kind, method):
        original = getattr(kind, method)

        def watched(self, *given, **named):
            role = self if isinstance(self, Role) else self.role
            began = time.monotonic()
            if role.layout.is_member:
                time.sleep(NAP)
            result = original(self, *given, **named)
            seen.append((method, role.name, role.layout.is_member, began, time.monotonic()))
            return result

        setattr(kind, method, watched)

    for kind, method in ((Role, "values"), (TrainedRole, "accumulate"), (TrainedRole, "update")):
        slow(kind, method)
    cli.run_stage(stage, overrides)
    return seen


def test_both_sides_work_at_the_same_time(recipe):
    policy_side, critic_side = run_ranks(
        2, intervals, "ppo", arguments(recipe, "overlap", *DISAGGREGATED, "placement.portions=1"), timeout=200
    )

    def work(side, method, role):
        return [entry[3:] for entry in side if entry[:3] == (method, role, True)]

    scoring = work(critic_side, "values", "reward"), work(policy_side, "accumulate", "policy")
    updates = work(critic_side, "update", "value"), work(policy_side, "update", "policy")
    for critic, policy in (scoring, updates):
        assert len(critic) == len(policy) > 0
        for one, other in zip(critic, policy, strict=True):
            assert max(one[0], other[0]) < min(one[1], other[1]), "one waited for the other"
    assert work(policy_side, "update", "value") == work(critic_side, "update", "policy") == []
    rows = read_metrics(recipe.root / "overlap")
    assert all(row["value/grad_norm"] > 0 and row["policy/grad_norm"] > 0 for row in rows)


def bytes_on_device(stage, overrides):
    """Bytes of weights and optimizer state while sampling, and while the policy is updated."""
    from megatron_rlhf import cli
    from megatron_rlhf.rollout import collect
    from megatron_rlhf.trainers import ppo

    trainers, sampling, updating = [], [], []

    def held():
        trainer = trainers[0]
        frozen = (trainer.roles.reference, trainer.roles.reward.models["model"])
        roles = {role.name: list(role.chunks[0].parameters()) for role in frozen}
        tensors = roles | {"optimizer": trainer.optimizer_memory._tensors()}
        return {name: sum(t.untyped_storage().nbytes() for t in parts) for name, parts in tensors.items()}

    sample, update, start = collect.sample_responses, ppo.PPOTrainer._update_policy, ppo.PPOTrainer.__post_init__
    collect.sample_responses = lambda *a, **k: (sampling.append(held()), sample(*a, **k))[1]
    ppo.PPOTrainer._update_policy = lambda self, minibatch: (updating.append(held()), update(self, minibatch))[1]
    ppo.PPOTrainer.__post_init__ = lambda self: (trainers.append(self), start(self))[1]
    cli.run_stage(stage, overrides)
    return sampling[-1], updating[-1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_rests_is_gone_from_the_device(recipe, precision):
    offload = [f"offload.{what}=true" for what in ("reference", "reward", "optimizer")]
    plain = arguments(recipe, f"held_{precision}", f"precision={precision}", "ppo.max_logprob_gap=1")
    ((sampling, updating),) = run_ranks(1, bytes_on_device, "ppo", plain, timeout=200)
    assert all(sampling.values()) and all(updating.values())
    resting = arguments(recipe, f"rested_{precision}", f"precision={precision}", "ppo.max_logprob_gap=1", *offload)
    ((sampling, updating),) = run_ranks(1, bytes_on_device, "ppo", resting, timeout=200)
    assert sampling == {"reference": 0, "reward": 0, "optimizer": 0}
    assert updating["reference"] == updating["reward"] == 0 < updating["optimizer"]
    assert read_metrics(recipe.root / f"held_{precision}") == read_metrics(recipe.root / f"rested_{precision}")
