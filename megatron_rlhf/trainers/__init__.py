"""The stages: supervised fine-tuning, reward model, PPO-ptx, and the update step that they share."""
