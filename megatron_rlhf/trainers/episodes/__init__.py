"""What PPO makes of its episodes: advantages, checks."""
