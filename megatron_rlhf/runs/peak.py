"""The peak FLOP/s of the machine that a run is on, from conf/cluster/: what throughput/mfu is a share of."""

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
    """Of one rank, in the precision of the models that train."""
    cluster = cluster_of(chosen)
    if cluster is None or not (CLUSTERS / f"{cluster}.yaml").is_file():  # an installation without conf/
        return None
    with (CLUSTERS / f"{cluster}.yaml").open() as file:
        return ClusterConfig(**yaml.safe_load(file)).peak_flops_per_s(precision)
