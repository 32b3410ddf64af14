"""The phases of an iteration that come in several parts."""

from megatron_rlhf.config.stages.ppo import PPOAlgorithmConfig
from megatron_rlhf.rollout.collect import Roles


def phase_parts(ppo: PPOAlgorithmConfig, roles: Roles, recompute: bool) -> dict[str, int]:
    """Of this rank: models that score, and updates. `recompute`: the policy scores too."""
    scoring = [roles.reference, *roles.reward.models.values()]
    scoring += [roles.value] if roles.value is not None else []
    scoring += [roles.policy] if recompute else []
    updates = ppo.inner_epochs * (ppo.batch_size // ppo.minibatch_size)
    return {"scoring": sum(role.layout.is_member for role in scoring), "policy": updates, "value": updates}
