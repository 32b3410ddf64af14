"""Is this machine fit to train on? Versions, GPUs, and a self-test of collectives and one training step (20 seconds).

    megatron-rlhf doctor [--no-self-test]
    DOCTOR=1 sbatch slurm/ppo_175b.sh ...      on every node of a job, before it starts; nodes are compared

Exit code 1, and what to do, if something is broken; what is merely absent is listed with its benefit.
"""

import argparse
import importlib.util
import platform
import sys
from collections.abc import Sequence

from megatron_rlhf import doctor, nodes
from megatron_rlhf.config.errors import RunFailed, UserError
from megatron_rlhf.config.launch import detect_launch


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-self-test", action="store_true", help="look at versions only")
    options = parser.parse_args(arguments)
    launch = detect_launch()
    if launch.world_size > 1 and importlib.util.find_spec("torch"):
        try:
            return nodes.check(launch, self_test=not options.no_self_test)
        except (RunFailed, UserError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    findings = doctor.examine()
    if not options.no_self_test and not doctor.broken(findings):
        findings.append(doctor.self_test())
    print(f"{platform.node()}\n{doctor.report(findings)}")
    return 1 if doctor.broken(findings) else 0
