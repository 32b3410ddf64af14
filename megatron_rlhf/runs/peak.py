"""The rates of a step, and the peak of the machine that a run is on, from conf/cluster/, which throughput/mfu is a share of."""

from collections.abc import Mapping

import torch
import yaml

from megatron_rlhf.config.checking.files import CONF
from megatron_rlhf.config.cluster import ClusterConfig, file_of_gpu
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import Precision

CLUSTERS = CONF / "cluster"


def cluster_of(chosen: str | None) -> str | None:
    """The file that is meant; without a choice, that of this machine, None if there is none.

    Raises:
        UserError: there is no such file.
    """
    if chosen is not None:
        if not (CLUSTERS / f"{chosen}.yaml").is_file():
            known = ", ".join(sorted(path.stem for path in CLUSTERS.glob("*.yaml")))
            raise UserError(f"run.cluster={chosen}: there is no conf/cluster/{chosen}.yaml; there are {known}")
        return chosen
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return file_of_gpu((path.stem for path in CLUSTERS.glob("*.yaml")), gpu)


def peak_flops_per_s(chosen: str | None, precision: Precision) -> float | None:
    """Of one rank, in the precision of the models that train. A CPU's file is rough about it: only by choice."""
    if chosen is None and not torch.cuda.is_available():
        return None
    cluster = cluster_of(chosen)
    if cluster is None or not (CLUSTERS / f"{cluster}.yaml").is_file():  # an installation without conf/
        return None
    with (CLUSTERS / f"{cluster}.yaml").open() as file:
        return ClusterConfig(**yaml.safe_load(file)).peak_flops_per_s(precision)


def with_rates(metrics: Mapping[str, float], peak: float | None, ranks: int) -> dict[str, float]:
    """A step's metrics, in which `step_tokens` and `step_flops` have been divided by its time; `peak`: FLOP/s of one rank."""
    line = dict(metrics)
    if "time/step_s" not in line:
        return line
    seconds = max(line["time/step_s"], 1e-9)
    if "time/resharding_s" in line:
        line["time/resharding_share"] = line["time/resharding_s"] / seconds
    for name, rate in (("step_tokens", "throughput/tokens_per_s"), ("step_flops", "throughput/model_flops_per_s")):
        if name in line:
            line[rate] = line.pop(name) / seconds
    if peak and "throughput/model_flops_per_s" in line:
        line["throughput/mfu"] = line["throughput/model_flops_per_s"] / (peak * ranks)
    return line
