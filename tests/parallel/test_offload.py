"""Tensors in host memory: their device memory is really given back, and they come back bit for bit."""

import torch

from megatron_rlhf.parallel.offload import HostMemory


def test_views_of_one_buffer_go_and_come_back_together():
    buffer = torch.arange(10.0)
    views = [buffer[:4].view(2, 2), buffer[4:]]
    memory = HostMemory(lambda: views)
    memory.rest()
    assert buffer.untyped_storage().nbytes() == 0
    memory.wake()
    assert torch.equal(buffer, torch.arange(10.0))
    assert views[0].data_ptr() == buffer.data_ptr() and views[0][1, 1] == 3


def test_what_changed_while_awake_is_kept():
    tensor = torch.zeros(3)
    memory = HostMemory(lambda: [tensor])
    for value in (1.0, 2.0):
        tensor.fill_(value)
        with memory.asleep():
            assert tensor.untyped_storage().nbytes() == 0
        assert tensor.tolist() == [value] * 3


def test_constant_contents_are_copied_out_once():
    tensor = torch.ones(3)
    memory = HostMemory(lambda: [tensor], constant=True)
    memory.rest()
    with memory.awake():
        assert tensor.tolist() == [1.0] * 3
        tensor.fill_(5)  # not constant after all: shows that no second copy is made
    memory.wake()
    assert tensor.tolist() == [1.0] * 3


def test_tensors_are_asked_for_each_time():
    tensors = [torch.ones(2)]
    memory = HostMemory(lambda: tensors)
    with memory.asleep():
        pass
    tensors.append(torch.full((2,), 3.0))
    with memory.asleep():
        assert tensors[1].untyped_storage().nbytes() == 0
    assert tensors[1].tolist() == [3.0, 3.0]


def test_host_memory_is_allocated_once():
    """Pinning takes longer than copying."""
    kept, grown = torch.ones(3), torch.ones(3)
    memory = HostMemory(lambda: [kept, grown])
    places = []
    for value in (1.0, 2.0):
        kept.fill_(value)
        memory.rest()
        places.append([buffer.data_ptr() for buffer in memory._buffers.values()])
        memory.wake()
    assert places[0] == places[1]
    grown.untyped_storage().resize_(80)
    with memory.asleep():
        pass
    assert grown.untyped_storage().nbytes() == 80 and kept.tolist() == [2.0] * 3
