"""The planner's bytes of models of which a part trains, against what real roles allocate; a plan of PPO with adapters."""

import pytest
import torch
from measuring import layout, state_bytes, text_batch
from ranks import run_ranks
from test_memory import GPT, LLAMA, name

from megatron_rlhf.config.lora import LoraConfig
from megatron_rlhf.config.model import Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.planning.placement import PlacedModel
from megatron_rlhf.planning.state import trained_bytes
from megatron_rlhf.trainers.step import TrainedRole

LORA = LoraConfig(rank=8)
PARTS = [
    (1, LLAMA, layout(), "bf16", LORA, ()),
    (2, LLAMA, layout(tensor=2, sequence=True), "fp32", LORA, ()),
    (2, GPT, layout(pipeline=2), "bf16", LoraConfig(rank=8, targets=["q_proj", "down_proj"]), ()),
    (1, GPT, layout(), "bf16", LoraConfig(), ("layers.2-", "decoder.final_layernorm")),
    (2, LLAMA, layout(pipeline=2, virtual_stages=2), "fp32", LoraConfig(), ("layers.1-2", "output_layer")),
    (2, GPT, layout(tensor=2), "fp32", LoraConfig(), ("*.bias", "embedding.word_embeddings")),
]


def measure(model, parallel, precision, lora, patterns):
    built = ParallelLayout.create(parallel)
    built.seed(1)
    role = Role.build("policy", model, built, Precision(precision), adapter=lora.adapter(model, "policy.lora"))
    if patterns:
        role.train_only(patterns)
    trained = TrainedRole.create(role, OptimizerConfig(), Precision(precision), ema_decay=0.9)
    torch.manual_seed(0)
    trained.update(text_batch(trained, 2 * parallel.pipeline, 8, 1), 1e-4)
    return state_bytes(trained)


@pytest.mark.parametrize(("ranks", "model", "parallel", "precision", "lora", "patterns"), PARTS, ids=name)
def test_state_is_what_real_ranks_hold(ranks, model, parallel, precision, lora, patterns):
    adapter = lora.adapter(model, "policy.lora")
    placed = PlacedModel(model, parallel, Precision(precision), ranks, adapter=adapter, trainable=patterns)
    for rank, real in enumerate(run_ranks(ranks, measure, model, parallel, precision, lora, patterns)):
        planned = trained_bytes(placed, placed.stage_of(rank), average=True)
        assert planned == pytest.approx(real, rel=0.05), f"rank {rank}"


def test_the_planner_knows_how_many_logits_there_are_at_a_time():
    from megatron_rlhf.models.logits import AT_ONCE
    from megatron_rlhf.planning import activations

    assert AT_ONCE["cuda"] == activations.MOST_LOGITS
