"""The planner's seconds against runs that others have published: every row within 15%, and the table of docs/planner.md."""

import re
from pathlib import Path

import pytest

from megatron_rlhf.compose import compose_config
from megatron_rlhf.config.cluster import ClusterConfig, PlanConfig
from megatron_rlhf.planning.published.rows import RUNS
from megatron_rlhf.planning.published.run import Unit

ROOT = Path(__file__).resolve().parents[2]
# Source, model, GPUs, tensor x pipeline x virtual, global batch, what was published.
PUBLISHED = [
    ("Korthikanti 2022", "GPT 22B", 8, (8, 1, 1), 4, 1.10, "s"),
    ("Korthikanti 2022", "GPT 175B", 64, (8, 8, 3), 64, 13.75, "s"),
    ("Korthikanti 2022", "GPT 175B, recomputed", 64, (8, 8, 3), 64, 18.13, "s"),
    ("Korthikanti 2022", "GPT 530B", 280, (8, 35, 3), 280, 37.83, "s"),
    ("Korthikanti 2022", "GPT 1T", 512, (8, 64, 1), 512, 71.5, "s"),
    ("Narayanan 2021", "GPT 1.7B", 32, (1, 1, 1), 512, 137, "TFLOP/s"),
    ("Narayanan 2021", "GPT 145B", 1536, (8, 8, 2), 2304, 148, "TFLOP/s"),
    ("NeMo 24.07", "GPT-3 175B", 128, (4, 8, 6), 256, 782, "TFLOP/s"),
    ("NeMo 24.07", "GPT-3 175B", 512, (4, 8, 6), 2048, 842, "TFLOP/s"),
    ("NeMo 24.07", "Llama 2 70B", 64, (4, 4, 20), 128, 759, "TFLOP/s"),
    ("NeMo 24.07", "Llama 2 7B", 8, (1, 1, 1), 128, 776, "TFLOP/s"),
    ("NeMo 24.07", "GPT-3 20B", 64, (2, 1, 1), 256, 750, "TFLOP/s"),
    ("Megatron-Bridge 25.11", "Llama 3 8B", 8, (1, 1, 1), 128, 744, "TFLOP/s"),
    ("Megatron-Bridge 25.11", "Llama 3 70B", 64, (4, 8, 5), 128, 719, "TFLOP/s"),
    ("Megatron-LM README", "GPT-3 175B", 96, (8, 12, 8), 1152, 47, "% MFU"),
    ("Megatron-LM README", "GPT-3 175B", 4608, (8, 12, 8), 1152, 42, "% MFU"),
]


@pytest.fixture(scope="module")
def clusters() -> dict[str, ClusterConfig]:
    return {
        name: compose_config("plan", PlanConfig, [f"cluster={name}"])[0].cluster for name in ("a100_80gb", "h100_80gb")
    }


def test_the_rows_are_the_published_ones() -> None:
    rows = []
    for run in RUNS:
        layout = run.parallel
        unit = run.unit.value.split(",")[0]
        shape = (layout.tensor, layout.pipeline, layout.virtual_stages)
        rows.append((run.source, run.name, run.gpus, shape, run.batch_size, run.value, unit))
    assert rows == PUBLISHED


@pytest.mark.parametrize("i", range(len(PUBLISHED)), ids=[f"{row[1]} on {row[2]}, {row[0]}" for row in PUBLISHED])
def test_a_published_run_is_planned_within_15_percent(i: int, clusters: dict[str, ClusterConfig]) -> None:
    assert RUNS[i].planned(clusters[RUNS[i].cluster]) == pytest.approx(PUBLISHED[i][5], rel=0.15)


@pytest.mark.parametrize(
    ("name", "gpus", "tokens_per_s_and_gpu"),
    [("GPT-3 175B", 128, 726), ("Llama 2 7B", 8, 16847), ("GPT-3 20B", 64, 5851), ("Llama 3 70B", 64, 1602)],
)
def test_flops_are_counted_as_the_source_counts_them(
    name: str, gpus: int, tokens_per_s_and_gpu: float, clusters: dict[str, ClusterConfig]
) -> None:
    """The same tables state tokens a second: seconds that follow from them give their TFLOP/s."""
    run = next(run for run in RUNS if (run.name, run.gpus) == (name, gpus) and run.unit is not Unit.mfu)
    cluster = clusters[run.cluster]
    seconds = run.batch_size * run.length / tokens_per_s_and_gpu / gpus
    assert run.planned(cluster) * run.planned_seconds(cluster) / seconds == pytest.approx(run.value, rel=0.005)


def test_scaling_out_costs_what_was_published(clusters: dict[str, ClusterConfig]) -> None:
    """From 96 to 4,608 GPUs at the same batch, Megatron-LM's MFU falls from 47% to 42%."""
    few, many = (run.planned(clusters["h100_80gb"]) for run in RUNS if run.unit is Unit.mfu)
    assert many / few == pytest.approx(42 / 47, rel=0.05)


def test_the_table_of_the_documentation_is_the_planners(capsys: pytest.CaptureFixture) -> None:
    """`python tools/plan.py --published` prints it."""
    from plans import load_tool

    assert load_tool()("--published") == 0
    table = capsys.readouterr().out
    assert len(re.findall(r"^\| (?!run|---)", table, re.M)) == len(PUBLISHED)
    assert table in (ROOT / "docs" / "planner.md").read_text()
