"""The package as a library: the script of docs/library.md, word by word, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from recipe import make_data

import megatron_rlhf as mr

DOCS = Path(__file__).resolve().parents[1] / "docs" / "library.md"


@pytest.mark.timeout(300)
def test_the_script_of_the_documentation(tmp_path: Path) -> None:
    make_data(tmp_path)
    scripts = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "script.py").write_text(scripts[-1])
    command = [sys.executable, "script.py", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert f"2 iterations in {tmp_path}/ppo" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    samples = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["own/unfinished_share"] == pytest.approx(1 - line["rollout/stop_fraction"])
        mine = [s for s in samples if s["step"] == line["step"]]
        assert mine
        assert all(s["score"] == pytest.approx(-len(s["response"].split())) for s in mine)


def test_names_are_there_without_torch() -> None:
    code = (
        "import sys, megatron_rlhf as mr; mr.PPOConfig, mr.UserError, mr.__version__; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        mr.train  # noqa: B018


def test_configurations_are_the_command_lines() -> None:
    config = mr.configure("reward-model", "run.dir=x", "data.comparisons=c.jsonl", "reward_model.batch_size=8")
    assert isinstance(config, mr.RewardModelConfig)
    assert config.reward_model.batch_size == 8


@pytest.mark.parametrize(
    ("stage", "arguments", "says"),
    [
        ("pppo", {}, "there is no stage pppo; did you mean ppo"),
        ("ppo", {}, "takes a PPOConfig, and this is a SFTConfig"),
        ("sft", {"reward": len}, "only ppo and evaluate score responses"),
    ],
)
def test_mistakes_are_named(stage: str, arguments: dict, says: str) -> None:
    config = mr.configure("sft", "run.dir=x", "model=tiny")
    with pytest.raises(mr.UserError, match=re.escape(says)):
        mr.run(stage, config, **arguments)
