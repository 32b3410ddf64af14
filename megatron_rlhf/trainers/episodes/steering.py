"""What weighs the parts of the objective in the course of a run: the KL penalty's coefficient, and that of the text."""

from megatron_rlhf.algorithms.kl import AdaptiveKLController, FixedKLController
from megatron_rlhf.algorithms.mixing import BalancedTextWeight, FixedTextWeight, TextWeight
from megatron_rlhf.config.stages.ppo import PPOAlgorithmConfig
from megatron_rlhf.config.training import KLControl


def kl_control(ppo: PPOAlgorithmConfig) -> AdaptiveKLController | FixedKLController:
    """`ppo.kl_control`."""
    if ppo.kl_control is KLControl.fixed:
        return FixedKLController(ppo.kl_coef)
    return AdaptiveKLController(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)


def text_weight(ppo: PPOAlgorithmConfig) -> TextWeight:
    """`ppo.ptx_coef`."""
    return BalancedTextWeight(ppo.ptx_gradient_ratio) if ppo.steers_text else FixedTextWeight(float(ppo.ptx_coef))
