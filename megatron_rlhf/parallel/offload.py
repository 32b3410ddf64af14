"""Tensors that are kept in host memory between uses."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


class HostMemory:
    """Releases the device memory of some tensors while they are not used.

    Works on storages, so that views of one buffer move together, and no reference to a tensor has to change. On a CPU
    the same happens between two places in the same memory.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], constant: bool = False) -> None:
        """`tensors` is called each time they go to rest; `constant`: their contents never change, so they are copied to
        the host only once."""
        self._tensors = tensors
        self._constant = constant
        self._resting: list[tuple[torch.UntypedStorage, Tensor]] = []
        # Kept while the tensors are awake: pinning memory takes longer than copying it.
        self._buffers: dict[int, Tensor] = {}

    def rest(self) -> None:
        """Copy to the host and free the device. Until `wake`, the tensors have no contents."""
        assert not self._resting, "asked to rest twice"
        storages = {storage_of(tensor): tensor.untyped_storage() for tensor in self._tensors()}
        before, self._buffers = self._buffers, {}
        for identity, storage in storages.items():
            buffer = before.get(identity)
            if buffer is None or buffer.numel() != storage.nbytes():
                buffer = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
                buffer.copy_(_bytes(storage))
            elif not self._constant:
                buffer.copy_(_bytes(storage))
            self._buffers[identity] = buffer
            self._resting.append((storage, buffer))
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Bring the contents back."""
        for storage, buffer in self._resting:
            storage.resize_(buffer.numel())
            _bytes(storage).copy_(buffer)
        self._resting = []

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Wakes the tensors within a `with` block."""
        self.wake()
        try:
            yield
        finally:
            self.rest()

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """Lets the tensors rest within a `with` block."""
        self.rest()
        try:
            yield
        finally:
            self.wake()


def storage_of(tensor: Tensor) -> int:
    """The identity of the memory that a tensor is a view of."""
    return tensor.untyped_storage()._cdata


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
