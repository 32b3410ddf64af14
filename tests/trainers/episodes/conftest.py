"""Losses and gradients by plain autograd, each computed once."""

import pytest
from update_losses import plain_gradients


@pytest.fixture(scope="module")
def plain(world):
    cache = {}

    def result(*case):
        if case not in cache:
            cache[case] = plain_gradients(*case)
        return cache[case]

    return result
