"""InstructGPT's recipe on Megatron-Core: supervised fine-tuning, reward modelling and PPO-ptx at any scale.

As a library (docs/library.md): `run(stage, config, reward=None, callbacks=())`, `configure(stage, *overrides)`, the stages'
configurations, `Callback` and `UserError`.
"""

from importlib import import_module as _import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    **dict.fromkeys(("SFTConfig", "RewardModelConfig", "PPOConfig", "EvaluateConfig"), "config.stages"),
    **dict.fromkeys(("RunConfig", "TrainedRoleConfig", "OptimizerConfig", "SamplingConfig"), "config.training"),
    **dict.fromkeys(("ModelConfig", "ParallelConfig", "Precision"), "config.model"),
    "UserError": "config.errors",
    "Callback": "callbacks",
    **dict.fromkeys(("run", "configure"), "library"),
}


def __getattr__(name: str) -> Any:
    """Names are imported when they are used: torch takes seconds."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*_WHERE, "__version__"]
