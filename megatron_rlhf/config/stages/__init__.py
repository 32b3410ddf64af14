"""One schema per stage. Defaults are InstructGPT's where the paper states them."""

from megatron_rlhf.config.rollout import RolloutConfig
from megatron_rlhf.config.stages.chat import ChatConfig
from megatron_rlhf.config.stages.common import BaseConfig
from megatron_rlhf.config.stages.evaluate import EvaluateConfig
from megatron_rlhf.config.stages.ppo import PPOConfig
from megatron_rlhf.config.stages.reward_model import RewardModelConfig
from megatron_rlhf.config.stages.sft import SFTConfig

__all__ = ["BaseConfig", "ChatConfig", "EvaluateConfig", "PPOConfig", "RewardModelConfig", "RolloutConfig", "SFTConfig"]
