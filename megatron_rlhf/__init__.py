"""InstructGPT's recipe on Megatron-Core: supervised fine-tuning, reward modelling and PPO-ptx at any scale."""

__version__ = "0.1.0"
