"""What the sides of a run do in a step, where they have ranks of their own: `timeline.jsonl`."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_rlhf.monitoring.files import StepFile
from megatron_rlhf.monitoring.progress import PhaseTimer
from megatron_rlhf.monitoring.timeline import NAME, merged, together
from megatron_rlhf.parallel import collectives


class Sides:
    """One rank of each side tells the first rank of the world when its phases were. All ranks call the same methods."""

    def __init__(self, folder: Path, ranks: Mapping[str, int]) -> None:
        """`ranks`: by the name of a side; the first is that of the world's first rank."""
        self._ranks = ranks
        self._file = StepFile(folder / NAME, enabled=dist.get_rank() == 0)
        self._has_written = False
        self._sent: Callable[[], None] = lambda: None

    def write(self, step: int, timer: PhaseTimer) -> dict[str, float]:
        """A line of this step, which has ended; on the first rank, what the sides did at the same time."""
        spans = timer.take_spans()
        mine = merged(spans, max((end for *_, end in spans), default=0.0))
        if dist.get_rank() != 0:
            if dist.get_rank() in self._ranks.values():
                self._sent()
                self._sent = collectives.post(mine, 0)
            return {}
        sides = {side: collectives.receive(rank) if rank else mine for side, rank in self._ranks.items()}
        if not self._has_written:  # a run that goes on from a checkpoint does these steps again
            self._file.truncate(step - 1)
            self._has_written = True
        self._file.append(step, [{"sides": sides}])
        sampling = [span for span in mine if span[0] == "rollout"]
        scoring = [span for side in list(sides)[1:] for span in sides[side] if span[0] == "scoring"]
        return {"time/scoring_while_sampling_s": together(sampling, scoring)} if len(sides) > 1 else {}

    def close(self) -> None:
        self._file.close()
