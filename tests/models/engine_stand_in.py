"""Transformer Engine's Python layers on a CPU: its compiled parts are replaced by stubs that compute nothing.

The layers are those of the package `transformer-engine` itself, whose wheel is plain Python and cannot be imported alone.
Needs a process of its own, as it replaces imported modules: python engine_stand_in.py RANK RANKS FOLDER prints `ok` at the end.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
from pathlib import Path

import torch

# The compiled extension, what belongs to it, and what is written in Triton.
_REPLACED = (
    "transformer_engine_torch",
    "transformer_engine.pytorch.onnx_extensions",
    "transformer_engine.pytorch.triton",
)


class _Enumeration(type):
    """Has every member that is asked for; `__members__` are those asked for so far."""

    def __getattr__(cls, name):
        asked = cls.__dict__["asked"]
        if name == "__members__":
            return dict(asked)
        if name.startswith("__"):
            raise AttributeError(name)
        return asked.setdefault(name, len(asked))


class _Compiled(types.ModuleType):
    """Has every class and function that is asked for. Classes are enumerations; functions may not be called."""

    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Enumeration(name, (), {"asked": {}}) if name[0].isupper() else _refuse(name)
        setattr(self, name, made)
        return made


def _refuse(name):
    def refuse(*args, **kwargs):
        raise RuntimeError(f"{name} is compiled code: nothing in these tests may call it")

    return refuse


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if any(name == replaced or name.startswith(f"{replaced}.") for replaced in _REPLACED):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Compiled(spec.name)

    def exec_module(self, module): ...


def install() -> None:
    """Import Megatron-Core as on a GPU with Transformer Engine, then let it build models on the CPU anyway."""
    torch.cuda.is_available = lambda: True
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # Transformer Engine loads no libraries then
    sys.meta_path.insert(0, _Importer())
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    from megatron_rlhf.parallel import cpu  # this is what imports Megatron-Core

    cpu._map_cuda_devices_to_cpu()
    cpu._answer_cuda_runtime()
    cpu._use_cpu_random_state()


if __name__ == "__main__":
    install()
    from engine_checks import check

    check(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    print("ok")
