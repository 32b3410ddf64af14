"""The command line of tools/plan.py: numbers, the page, and messages."""

import json
from pathlib import Path

import pytest
from plans import ROOT, Tool, load_tool, sized_recipes

from megatron_rlhf.planning.placement import GIB


@pytest.fixture(scope="module")
def tool() -> Tool:
    return load_tool()


def test_the_tool_prints_numbers(tool: Tool, capsys: pytest.CaptureFixture) -> None:
    arguments = ["recipe=instructgpt_175b", "cluster=h100_80gb", "cluster.nodes=64", "--json", "--layouts", "1"]
    assert tool("--stage", "ppo", *arguments) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["schema"] == 2
    (data,) = whole["plans"]
    assert data["gpus"] == 512
    layout = data["layouts"]["policy"]
    assert (layout["tensor"], layout["pipeline"], layout["data"], layout["virtual_stages"]) == (8, 8, 8, 1)
    assert data["settings"] == {
        "ppo.micro_batch_size": 1,
        "rollout.batch_size": 16,
        "ppo.ptx_micro_batch_size": 1,
    }
    assert data["memory"]["peak_bytes"] < data["memory"]["capacity_bytes"] == pytest.approx(73.6 * GIB)
    assert max(data["memory"]["phase_bytes"].values()) == data["memory"]["peak_bytes"]
    assert "save" in data["memory"]["phase_bytes"]
    assert data["host_memory"]["peak_bytes"] == pytest.approx(sum(data["host_memory"]["bytes"].values()))
    assert set(data["memory"]["bytes"]["policy"]) == {"weights", "gradients", "optimizer", "ema"}
    names = ["rollout", "scoring by policy and reference", "scoring by reward and value", "policy", "ptx", "value"]
    assert [phase["name"] for phase in data["phases"]] == names
    assert data["price"] == pytest.approx(3.0 * data["gpu_hours"])
    assert data["checkpoint"]["save_every"] >= 1
    assert len(data["cheapest"]) == 1
    assert data["would_fit"] is None


def test_a_page_shows_memory_and_time(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "plan.html"
    assert (
        tool("--stage", "ppo", "recipe=instructgpt_6b", "cluster.memory_gib=40", "--layouts", "0", "--html", str(page))
        == 3
    )
    text = page.read_text()
    assert "does not fit" in text
    assert "What would fit: <code>" in text
    for name in ("policy", "value", "rollout", "ptx", "save", "checkpoint"):
        assert f"<div>{name}</div>" in text, name
    assert "http" not in text, "it opens without a network"
    assert tool("--stage", "sft", "recipe=instructgpt_6b", "--html", str(tmp_path / "no" / "plan.html")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_tool_plans_the_whole_recipe_and_sorts_overrides_by_stage(
    tool: Tool, capsys: pytest.CaptureFixture
) -> None:
    # Only one stage knows sft.epochs, only the planner workload.*.
    overrides = ["sft.epochs=1", "workload.demonstrations=32000", "ppo.iterations=10"]
    assert tool("recipe=instructgpt_6b", "--layouts", "0", "--json", *overrides) == 0
    sft, reward, ppo = json.loads(capsys.readouterr().out)["plans"]
    assert (sft["steps"], ppo["steps"]) == (1000, 10)
    assert reward["gpus"] == 8
    assert ppo["gpus"] == 16


def test_what_does_not_fit_is_refused_with_the_arithmetic(tool: Tool, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--stage", "sft", "--layouts", "0", "recipe=instructgpt_6b"]
    assert tool(*arguments, "parallel.tensor=1", "parallel.distributed_optimizer=false", "cluster=a100_80gb") == 3
    printed = capsys.readouterr()
    assert "does not fit" in printed.out
    assert "policy weights 12.4 + policy gradients 24.8 + policy optimizer 74.4" in printed.err
    assert "is more than the 79.3 - 6 reserved = 73.3 GiB of a GPU (A100 80GB)" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["recipe=instructgpt_6b", "parallel.tensor=3"],
            "tensor 3 x pipeline 1 x context 1 = 3 does not divide the 16 ranks",
        ),
        (["recipe=instructgpt_6b", "parallel.pipeline=5", "cluster.nodes=5"], "do not divide num_layers 32"),
        (
            ["recipe=instructgpt_6b", "critic_parallel.tensor=3", "cluster.nodes=6"],
            "does not divide num_attention_heads 32",
        ),
        (["recipe=instructgpt_6b", "ppo.kl_koef=1"], "did you mean ppo.kl_coef"),
        (["recipe=instructgpt_6b", "cluster=h300"], "cluster/h300"),
        (["recipe=instructgpt_6b", "cluster.nodess=2"], "did you mean cluster.nodes"),
        (["recipe=instructgpt_7b"], "recipes for this stage: first_try, instructgpt, "),
        (["model=gpt3_1_3b"], "critic_model is not given"),
        (["policy.init_from=/no/such/folder"], "policy.init_from=/no/such/folder"),
        (["recipe"], "a setting is key=value"),
        (["recipe=instructgpt_6b", "rollout.parallel.pipeline=2"], "is more than parallel.pipeline=1"),
        (["recipe=instructgpt_6b", "ppo.minibatch_size=7"], "ppo.minibatch_size=7 does not divide"),
        (["recipe=instructgpt_6b", "ppo.advantages=rloo"], "ppo.samples_per_prompt=1: give at least 2"),
        (["recipe=instructgpt_6b", "data.max_prompt_tokens=1500"], "is more than the model's context of"),
        (["recipe=instructgpt_6b", "critic_parallel.expert=2"], "critic_parallel.expert=2 would spread"),
        (["recipe=instructgpt_6b", "--layouts", "-1"], "--layouts -1 must be"),
    ],
)
def test_mistakes(tool: Tool, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    assert tool("--stage", "ppo", "--layouts", "0", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_groups_is_found(tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text((ROOT / "conf" / "model" / "tiny.yaml").read_text())
    assert tool("--stage", "sft", "--layouts", "0", "--config-dir", str(tmp_path), "model=mine") == 0


def test_the_presets_in_the_documentation_are_the_planners(tool: Tool, capsys: pytest.CaptureFixture) -> None:
    """`python tools/plan.py --presets` prints the table."""
    assert tool("--presets") == 0
    table = capsys.readouterr().out
    assert table.count("\n") == 2 + 3 * len(sized_recipes())
    assert table in (ROOT / "docs" / "cluster.md").read_text()
