"""Megatron-Core's optional accelerators: used where they work, hidden where they cannot, reported once."""

import importlib
import logging
import sys
import warnings

import torch

_OPTIONAL = {"Transformer Engine": "transformer_engine.pytorch", "Apex": "apex", "flash-attn": "flash_attn"}
# What Megatron-Core uses whenever it can be imported, GPU or not.
_NEED_A_GPU = """
    transformer_engine transformer_engine_torch apex amp_C flash_attn flash_attn_3 flashinfer mamba_ssm causal_conv1d
    grouped_gemm
""".split()
# 0.19's loggers that repeat a message at every build or load: that GPTModel is deprecated (it is frozen, and stays),
# how gradient buffers are laid out, and that checkpoints have a `common.pt`, which 0.16.1 needs.
_REPEATING = (
    "models.gpt.gpt_model",
    "distributed.distributed_data_parallel",
    "dist_checkpointing.strategies.common",
)
# Beginnings of warnings about what Megatron-Core does itself, however it is called.
_ABOUT_ITSELF = (
    "full scope is deprecated",
    "MimoModelConfig is experimental",
    r"The \.grad attribute of a Tensor that is not a leaf",
    r"`torch\.distributed\.\w+` is deprecated",
)
FLASH_ATTENTION = "2.7.3"
"""Oldest version that Megatron-Core's dynamic inference engine takes."""
_broken: dict[str, str] = {}


def import_megatron_quietly() -> None:
    """Import what uses accelerators, without its warnings about missing ones, which come on every rank and once per module.

    Accelerators that cannot work are hidden from it: all of them where there is no GPU (NVIDIA's container on a login node),
    and those whose import fails with anything but the ImportError that Megatron-Core expects.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            hide_broken()
        else:
            for package in _NEED_A_GPU:
                _hide(package)
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer  # noqa: F401
    for name in _REPEATING:
        logging.getLogger(f"megatron.core.{name}").addFilter(_Once())
    for message in _ABOUT_ITSELF:
        warnings.filterwarnings("ignore", message)


class _Once(logging.Filter):
    """Lets each message of a logger through once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.getMessage() not in self._said
        self._said.add(record.getMessage())
        return new


def hide_broken() -> None:
    """Import the accelerators; one that fails in its own code (no compiled part, no such driver) counts as missing."""
    for name, module in _OPTIONAL.items():
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        except Exception as error:  # RuntimeError, AssertionError, OSError have been seen; the log says which
            _broken[name] = f"{type(error).__name__}: {error}"
            _hide(module.partition(".")[0])


def describe_accelerators() -> str:
    """For the log: 'accelerators: Transformer Engine no, Apex no, flash-attn broken (OSError: ...)'."""
    return "accelerators: " + ", ".join(f"{name} {_state(name, module)}" for name, module in _OPTIONAL.items())


def transformer_engine_serves() -> bool:
    """Transformer Engine can be imported and there is a GPU for it."""
    return torch.cuda.is_available() and _is_importable(_OPTIONAL["Transformer Engine"])


def dynamic_engine_lacks() -> str | None:
    """Why Megatron-Core's dynamic inference engine cannot sample here; None if it can."""
    from megatron.core import package_info, utils
    from megatron.core.transformer import attention

    from megatron_rlhf.parallel import compat

    if not compat.DYNAMIC_ENGINE:
        return f"it needs Megatron-Core 0.19 (Python 3.12), and this is {package_info.__version__}"
    if not torch.cuda.is_available():
        return "it needs a GPU, and torch sees none"
    if attention.HAVE_FA4 or attention.HAVE_FA3:
        return None
    if attention.flash_attn_varlen_func is None:
        return f"it needs flash-attn {FLASH_ATTENTION} or newer, and none can be imported"
    if not utils.is_fa_min_version(FLASH_ATTENTION):
        return f"it needs flash-attn {FLASH_ATTENTION} or newer, and this is {utils.get_fa_version()}"
    return None


def _state(name: str, module: str) -> str:
    if name in _broken:
        return f"broken ({_broken[name]})"
    return "yes" if torch.cuda.is_available() and _is_importable(module) else "no"


def _is_importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _hide(package: str) -> None:
    """From now on importing it raises ModuleNotFoundError, even if it is already imported."""
    inside = [name for name in sys.modules if name.startswith(f"{package}.")]
    for name in (package, *inside):
        sys.modules[name] = None  # type: ignore[assignment]
