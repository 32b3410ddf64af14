"""Megatron-Core's optional accelerators: used where they can be imported, reported once, never warned of on every rank."""

import importlib.util
import warnings

import torch

_OPTIONAL = {"Transformer Engine": "transformer_engine", "Apex": "apex", "flash-attn": "flash_attn"}


def import_megatron_quietly() -> None:
    """Import what warns of missing accelerators, on every rank and once a module, without the warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer  # noqa: F401


def describe_accelerators() -> str:
    """For the log: 'accelerators: Transformer Engine no, Apex no, flash-attn no'."""
    found = {name: importlib.util.find_spec(module) is not None for name, module in _OPTIONAL.items()}
    return "accelerators: " + ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in found.items())


def transformer_engine_serves() -> bool:
    """Transformer Engine can be imported and there is a GPU for it."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError):  # the bare wheel without its core raises RuntimeError
        return False
    return True
