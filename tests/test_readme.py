"""Quotes in the README match the files."""

import inspect
import re
from pathlib import Path

from megatron_rlhf.trainers.ppo import PPOTrainer

README = Path(__file__).parents[1] / "README.md"


def test_the_training_step_is_quoted_from_its_file():
    """The quote is shortened and has its own comments, but each line is in the file, in this order."""
    (block,) = re.findall(r"## The training step.*?```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    quoted = [line.partition("  # ")[0].strip() for line in block.splitlines()]
    assert len(quoted) >= 10
    source = iter(inspect.getsource(PPOTrainer.train_step).splitlines())
    for line in quoted:
        assert any(line in found for found in source), f"not in train_step, or not in this order: {line}"
