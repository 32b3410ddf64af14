"""Packed sequences have the gradients of the formulas, one sequence after the other, at every layout."""

import pytest
from ranks import run_ranks
from update_losses import PLAIN, check, trained_gradients

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.model import ParallelConfig, Recompute

PACKED_LAYOUTS = {
    "llama": (1, "llama", ParallelConfig()),
    "tp2_sp": (2, "llama", ParallelConfig(tensor=2, sequence=True)),
    "pp2": (2, "llama", ParallelConfig(pipeline=2)),
    "pp2_virtual2": (2, "gpt2", ParallelConfig(pipeline=2, virtual_stages=2, recompute=Recompute.full)),
    "cp2": (2, "llama", ParallelConfig(context=2)),
    "dp2": (2, "gpt2", ParallelConfig(recompute=Recompute.selective)),
    "cp2_tp2_sp": (4, "gpt2", ParallelConfig(context=2, tensor=2, sequence=True)),
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("tokens", [14, 25, 999])
def test_packed_sequences_have_the_gradient_of_the_formula(tokens, kind, plain):
    rows = 3
    check([trained_gradients(kind, ParallelConfig(), rows, Budget(tokens=tokens))], *plain(kind, rows))


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
def test_packed_sequences_at_every_layout(layout, kind, plain):
    ranks, model, parallel = PACKED_LAYOUTS[layout]
    results = run_ranks(ranks, trained_gradients, kind, parallel, 3, Budget(tokens=25), model)
    # The policy's loss is a sum of terms of size 1 that nearly cancel.
    check(results, *plain(kind, 3, model), absolute=1e-6 if kind == "policy" else 1e-7)


@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
def test_rows_of_equal_length_beside_packed_ones(layout, plain):
    """Two texts of 12 tokens stay rows, those of 12 and 9 are packed: stages exchange both shapes in one schedule."""
    ranks, model, parallel = PACKED_LAYOUTS[layout]
    results = run_ranks(ranks, trained_gradients, "text", parallel, 4, Budget(tokens=24), model)
    check(results, *plain("text", 4, model))
