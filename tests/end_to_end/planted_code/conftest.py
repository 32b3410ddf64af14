"""Planted code never runs."""

import pytest


@pytest.fixture
def trace(tmp_path):
    """Where planted code would create a folder if it ran; checked after every test."""
    path = tmp_path / "code_was_run"
    yield path
    assert not path.exists(), "the planted code was run"
