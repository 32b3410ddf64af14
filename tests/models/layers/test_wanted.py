"""The last layer computes its output only for the requested tokens, and nothing else changes. (What a whole update's gradients
are at every layout: tests/trainers/episodes.)"""

import dataclasses

import pytest
import torch
from ranks import run_ranks
from test_decoding import MODELS, PROMPTS
from toys import GPT2_LIKE, make_role

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.lora import Adapter
from megatron_rlhf.config.model import FusedKernels, ParallelConfig, Recompute
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.models.packed import PackedModel
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.packing import Sequences
from megatron_rlhf.parallel.pipeline import Microbatch, forward_backward
from megatron_rlhf.rollout.generate import generate
from megatron_rlhf.rollout.sampling import row_keys

LENGTHS = [7, 5, 7]
WANTED = [[2, 3, 6], [4], [3, 5]]
SIZES = {"rows": Budget(sequences=3), "packed": Budget(tokens=64)}


def sequences(shared: bool = False) -> Sequences:
    """`shared`: the first and the last begin with one prompt."""
    tokens = torch.arange(1, 22).view(3, 7)
    tokens[2, :3] = tokens[0, :3]
    wanted = torch.zeros(3, 7, dtype=torch.bool)
    for row, columns in enumerate(WANTED):
        wanted[row, columns] = True
    return Sequences(tokens, LENGTHS, wanted, [3, 3, 3], [0, 1, 0] if shared else [0, 1, 2])


def numbers_and_gradients(role: Role, asked: Sequences, size: Budget) -> list[torch.Tensor]:
    """What it says without gradients and with them, and the gradient of each parameter."""
    rows, said = range(3), []

    def loss(output) -> tuple[torch.Tensor, dict]:
        numbers_n = output.squeeze(-1) if role.scalar else output.logprobs(torch.arange(len(output.hidden_nh)))
        said.append(numbers_n.detach())
        return (numbers_n * torch.arange(1.0, 1 + len(numbers_n))).sum(), {}

    role.chunks[0].zero_grad()
    microbatch = Microbatch.of(role.arrange(asked, rows, size), asked.wanted(rows), loss)
    forward_backward(role.chunks, [microbatch], role.layout)
    said.append(role.values(asked, size) if role.scalar else role.logprobs(asked, size))
    return said + [p.grad.clone() for p in role.chunks[0].parameters() if p.grad is not None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scalar", [False, True], ids=["logits", "scalars"])
@pytest.mark.parametrize("model", MODELS)
def test_numbers_and_gradients_are_those_of_a_pass_over_all_tokens(model, scalar, size, world, monkeypatch):
    recompute = Recompute.full if model == "gpt2" else Recompute.selective if model == "llama" else Recompute.none
    parallel = ParallelConfig(recompute=recompute, fused_kernels=FusedKernels.on if scalar else FusedKernels.off)
    role = make_role(MODELS[model], parallel, scalar=scalar)
    for shared in (False, True):
        asked = sequences(shared)
        narrow = numbers_and_gradients(role, asked, SIZES[size])
        with monkeypatch.context() as patch:
            patch.setattr(PackedModel, "_narrows", property(lambda self: False))
            whole = numbers_and_gradients(role, asked, SIZES[size])
        assert len(narrow) == len(whole) > 10
        torch.testing.assert_close(narrow, whole, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("scalar", [False, True], ids=["logits", "scalars"])
def test_texts_of_which_nothing_is_wanted(scalar, world):
    """A microbatch may consist of texts without targets."""
    role = make_role(GPT2_LIKE, scalar=scalar)
    nothing = dataclasses.replace(sequences(), wanted_ns=torch.zeros(3, 7, dtype=torch.bool))
    said, alone, *gradients = numbers_and_gradients(role, nothing, SIZES["packed"])
    assert len(said) == 0
    assert not alone.any()
    assert gradients
    assert not any(gradient.any() for gradient in gradients), "nor NaN, which counts as true"


def test_adapters_of_the_last_layer(world, monkeypatch):
    adapter = Adapter(4, 8.0, ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
    role = make_role(GPT2_LIKE, adapter=adapter)
    narrow = numbers_and_gradients(role, sequences(), SIZES["packed"])
    monkeypatch.setattr(PackedModel, "_narrows", property(lambda self: False))
    torch.testing.assert_close(narrow, numbers_and_gradients(role, sequences(), SIZES["packed"]), rtol=2e-5, atol=1e-5)


def tokens_of_layers(parallel: ParallelConfig, scalar: bool, work: str) -> list:
    """How many tokens the MLP of each of this rank's layers read, in every pass."""
    role = make_role(GPT2_LIKE, parallel, scalar=scalar)
    read: dict[int, list[int]] = {}
    for chunk in role.unwrapped:
        for layer in chunk.decoder.layers:
            counts = read.setdefault(layer.layer_number, [])
            layer.mlp.linear_fc2.register_forward_hook(lambda *call, n=counts: n.append(call[1][0][..., 0].numel()))
    if work == "read":
        role.values(sequences(), 3) if scalar else role.logprobs(sequences(), 3)
    elif work == "score":
        role.scores(sequences(), 3)
    else:
        keys = row_keys(0, 0, torch.arange(3), torch.zeros(3, dtype=torch.long))
        generate(role, PROMPTS, keys, SamplingConfig(max_response_tokens=2, batch_size=3), ())
    return sorted(read.items())


def test_what_each_layer_computes(world):
    """3 rows of 7 tokens, of which 6 are wanted; the last token is only predicted, so that log-probabilities read 6 of each
    row, of which 4 are wanted. Then prompts of 9, 4 and 1 tokens, and a pass over one token of each."""
    one = ParallelConfig()
    assert tokens_of_layers(one, True, "read") == [(1, [21]), (2, [21]), (3, [21]), (4, [6])]
    assert tokens_of_layers(one, False, "read") == [(1, [18]), (2, [18]), (3, [18]), (4, [4])]
    assert tokens_of_layers(one, True, "score") == [(1, [21]), (2, [21]), (3, [21]), (4, [3])]
    assert tokens_of_layers(one, False, "sample") == [(1, [27, 3]), (2, [27, 3]), (3, [27, 3]), (4, [3, 3])]


def test_at_layouts():
    """Each rank has a part of the tokens under sequence and context parallelism, and of the layers in a pipeline."""
    of_two = run_ranks(2, tokens_of_layers, ParallelConfig(tensor=2), True, "read")
    assert of_two == [[(1, [21]), (2, [21]), (3, [21]), (4, [6])]] * 2
    first, last = run_ranks(2, tokens_of_layers, ParallelConfig(pipeline=2), True, "score")
    assert (first, last) == ([(1, [21]), (2, [21])], [(3, [21]), (4, [3])])
    sampling = run_ranks(2, tokens_of_layers, ParallelConfig(tensor=2, sequence=True), False, "sample")
    assert sampling == [[(1, [27, 3]), (2, [27, 3]), (3, [27, 3]), (4, [3, 3])]] * 2, "one token cannot be split"
    for split in (ParallelConfig(tensor=2, sequence=True), ParallelConfig(context=2)):
        for rank in run_ranks(2, tokens_of_layers, split, True, "read"):
            assert len({tuple(counts) for _, counts in rank}) == 1, "the last layer computes as many as the others"
