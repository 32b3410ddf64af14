"""The linear layers' own product, compared with autograd; the buffer of gradients is Megatron-Core's."""

import pytest
import torch
from torch.nn import functional as F
from toys import GPT2_LIKE, LLAMA_LIKE, make_role

from megatron_rlhf.config.model import Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.models.layers import linear
from megatron_rlhf.models.layers.linear import ColumnLinear, RowLinear, _Product
from megatron_rlhf.trainers.step import TrainedRole


def tensors(dtype=torch.float32, rows=3, inputs=5, outputs=4):
    random = torch.Generator().manual_seed(0)
    shapes = ((rows, 2, inputs), (outputs, inputs), (outputs,), (rows, 2, outputs))
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("sizes", [(3, 5, 4), (101, 640, 512)], ids=["small", "large"])
@pytest.mark.parametrize("frozen", ["nothing", "weight", "input"])
def test_gradients_are_autograds(frozen, sizes, onednn, monkeypatch):
    monkeypatch.setattr(linear, "_ONEDNN_IS_FASTER", onednn)  # the other choice is another processor's
    input_, weight, bias, grad = tensors(torch.float32, *sizes)
    found, expected = [], []
    for function, results in ((_Product.apply, found), (F.linear, expected)):
        leaves = [x.clone().requires_grad_() for x in (input_, weight, bias)]
        if frozen != "nothing":
            leaves[["input", "weight"].index(frozen)].requires_grad_(False)
        output = function(*leaves)
        output.backward(grad)
        results += [output.detach(), *(leaf.grad for leaf in leaves)]
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_buffer_of_the_weights_type_gets_the_sum(dtype):
    input_, weight, bias, grad = tensors(dtype)
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.ones(4, 5)
    for _ in range(2):
        _Product.apply(input_, weight, bias).backward(grad)
    product = grad.float().flatten(0, 1).t() @ input_.float().flatten(0, 1)
    if dtype is torch.float32:
        assert weight.grad_added_to_main_grad  # Megatron-Core's hook looks at this, and adds nothing
        torch.testing.assert_close(weight.main_grad, 1 + 2 * product)
    else:  # left to Megatron-Core's hook
        assert weight.main_grad.eq(1).all() and not hasattr(weight, "grad_added_to_main_grad")
        torch.testing.assert_close(weight.grad.float(), 2 * product, rtol=0.05, atol=0.05)


def test_each_weight_reaches_its_buffer_once(world):
    """Of weights of layers the product adds the gradient; of the embedding, which has no such product, the hook."""
    role = make_role(GPT2_LIKE)
    TrainedRole.create(role, OptimizerConfig(lr=1e-3), Precision.fp32)
    (chunk,) = role.chunks
    tokens = torch.arange(12).view(2, 6)
    with role.layout:
        chunk(tokens, torch.arange(6).expand(2, 6), None).square().mean().backward()
    for name, parameter in role.modules[0].named_parameters():
        by_product = "linear" in name and name.endswith(".weight")
        assert getattr(parameter, "grad_added_to_main_grad", False) == by_product, name
        assert parameter.main_grad.ne(0).any(), name


@pytest.mark.parametrize("model", [GPT2_LIKE, LLAMA_LIKE], ids=["gpt2", "llama"])
def test_packed_weights_give_the_same_products_and_are_gone_afterwards(model, world):
    role = make_role(model)
    layers = [layer for layer in role.modules[0].modules() if isinstance(layer, (ColumnLinear, RowLinear))]
    assert len(layers) == 4 * model.num_layers
    for _ in range(2):
        with role.decoding():
            for rows in (1, 3, 40):
                for layer in layers:
                    input_ = torch.randn(1, rows, layer.weight.shape[1], generator=torch.Generator().manual_seed(rows))
                    assert layer.packed is not None
                    torch.testing.assert_close(layer(input_)[0], F.linear(input_, layer.weight, layer.bias))
        assert all(layer.packed is None for layer in layers)
        with torch.no_grad():  # the next rollout reads new weights
            for layer in layers:
                layer.weight.add_(1)


def test_weights_are_packed_when_other_ranks_have_sent_them(world):
    """With overlapped gathering, weights arrive before the layer is called: packing comes earlier, and must ask for them."""
    role = make_role(GPT2_LIKE)
    layer = next(layer for layer in role.modules[0].modules() if isinstance(layer, RowLinear))
    arrive = layer.register_forward_pre_hook(lambda module, arguments: module.weight.data.fill_(2))
    input_ = torch.ones(1, 1, layer.weight.shape[1])
    with role.decoding():
        arrive.remove()
        product = layer(input_)[0] - layer.bias
    torch.testing.assert_close(product, torch.full_like(product, 2.0 * layer.weight.shape[1]))
