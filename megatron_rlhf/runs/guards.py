"""Non-finite numbers: which role, microbatch and samples they come from, kept in a file for replay."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.errors import RunFailed
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.packing import Sequences, plan
from megatron_rlhf.parallel.pipeline import Microbatch, Statistics
from megatron_rlhf.rollout.types import Rollout

log = logging.getLogger(__name__)

SHOWN = 8
"""Maximum number of sample ids in a message; the file has all."""


class NotFinite(RunFailed):
    """A rollout holds a score or log-probability that is not finite: nothing can be learned from it."""


class Guard:
    """Knows the samples of the current step, so that a bad microbatch can be traced to them."""

    def __init__(self, folder: Path):
        """`folder`: where bad samples are written."""
        self._folder = folder
        self._step = 0
        self._samples: list[tuple[str, np.ndarray]] = []
        self._updates = 0

    def begin(self, step: int) -> None:
        """The current step, counted from 1."""
        self._step, self._samples, self._updates = step, [], 0

    def name(self, kind: str, ids: Sequence[int], sequences: Sequence[Sequence[int] | np.ndarray | Tensor]) -> None:
        """Set the samples of this step: token ids of a whole sequence, or of the prompt that it begins with."""
        self._samples += [(f"{kind} {i}", np.asarray(tokens)) for i, tokens in zip(ids, sequences, strict=True)]

    def identify(self, row: Sequence[int]) -> str:
        """The sample that a microbatch's row came from: the longest match, of those equal in all tokens both have."""
        tokens, best, name = np.asarray(row), 0, "unknown sample"
        for candidate, known in self._samples:
            length = min(len(known), len(tokens))
            if length > best and np.array_equal(known[:length], tokens[:length]):
                best, name = length, candidate
        return name

    def report_update(
        self,
        role: Role,
        microbatches: Sequence[Microbatch],
        statistics: Sequence[Statistics],
        totals: Mapping[str, float],
    ) -> None:
        """After an update whose loss or gradient was not finite. Not collective: data-parallel ranks report separately.

        Args:
            statistics: of this rank's microbatches; empty except on the last stage.
            totals: over all ranks. If these are finite, so was the loss, and any microbatch may have spoiled the
            gradient.
        """
        self._updates += 1
        if role.layout.tp_rank > 0 or not role.layout.is_last_stage:
            return
        in_loss = [name for name, value in totals.items() if not math.isfinite(value)]
        if in_loss:
            bad = [i for i, entry in enumerate(statistics) if not all(math.isfinite(float(v)) for v in entry.values())]
            what = ", ".join(in_loss)
        else:
            bad, what = list(range(len(microbatches))), "gradient"
        if not bad:
            return
        entries = [
            {
                "microbatch": i,
                "samples": [self.identify(row) for row in microbatches[i].sequences()],
                "statistics": {name: repr(float(value)) for name, value in statistics[i].items()},
                "tokens": microbatches[i].sequences(),
            }
            for i in bad
        ]
        rank = dist.get_rank()
        path = self._write(f"{role.name}_update_{self._updates}_rank_{rank}", role.name, what, entries)
        if in_loss or role.layout.dp_rank == 0:
            samples = [sample for entry in entries for sample in entry["samples"]]  # type: ignore[attr-defined]
            log.critical(
                "step %d, %s: %s not finite; microbatch %s of rank %d, made of %s; written to %s",
                self._step,
                role.name,
                what,
                _few(map(str, bad)),
                rank,
                _few(samples),
                path,
            )

    def require_finite(self, rollout: Rollout, micro_batch: Budget | int, dp_sizes: Mapping[str, int]) -> None:
        """Raise NotFinite, on every rank, where a role produced a non-finite number for a rollout.

        Args:
            dp_sizes: by role, to find the microbatch that a row was in.
        """
        recomputed_bt, prompt_ids = rollout.recomputed_logprobs_bt, rollout.prompts_b.tolist()
        judged = {
            ("policy", "log-probability at sampling"): rollout.sampled_logprobs_bt,
            **({} if recomputed_bt is None else {("policy", "log-probability"): recomputed_bt}),
            ("reference", "log-probability"): rollout.ref_logprobs_bt,
            ("reward", "score"): rollout.scores_b.unsqueeze(-1),
            ("value", "value"): rollout.values_bt,
        }
        found = {key: _bad_rows(values) for key, values in judged.items()}
        if not any(found.values()):
            return
        parts, entries = [], []
        for (role, what), rows in found.items():
            if not rows:
                continue
            asked, portions_b = rollout.responses.sequences, None
            if role in ("policy", "reference"):
                asked = asked.until(-1)
            else:
                portions_b = rollout.portions_b
            places = _places(asked, micro_batch, dp_sizes[role], portions_b)
            samples = [f"prompt {prompt_ids[row]} ({places[row]})" for row in rows]
            parts.append(f"{role}: {what} of {_few(samples)}")
            for row in rows:
                length = int(rollout.responses.last_b[row]) + 1
                entries.append(
                    {
                        "role": role,
                        "what": what,
                        "samples": [f"prompt {prompt_ids[row]}"],
                        "where": places[row],
                        "values": [repr(v) for v in judged[role, what][row].tolist()],
                        "tokens": [rollout.responses.tokens_bs[row, :length].tolist()],
                    }
                )
        path = self._folder / f"step_{self._step}_rollout.json"
        if dist.get_rank() == 0:
            path = self._write("rollout", "all", "rollout", entries)
        dist.barrier()  # a rank that exits may end the first one too
        raise NotFinite(f"not finite at step {self._step}: {'; '.join(parts)}. The samples are in {path}")

    def _write(self, name: str, role: str, what: str, entries: list[dict[str, Any]]) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{self._step}_{name}.json"
        path.write_text(json.dumps({"step": self._step, "role": role, "not_finite": what, "microbatches": entries}))
        return path


def _places(asked: Sequences, micro_batch: Budget | int, dp_size: int, portions_b: Tensor | None) -> dict[int, str]:
    """Which microbatch of which rank each row was in; where they came in portions, of which one."""
    numbers = [0] * len(asked.lengths) if portions_b is None else portions_b.int().tolist()
    places: dict[int, str] = {}
    for number in sorted(set(numbers)):
        rows = [row for row, of in enumerate(numbers) if of == number]
        portion = f" of portion {number}" if len(set(numbers)) > 1 else ""
        for rank, microbatches in enumerate(plan(asked.rows(rows), micro_batch, dp_size)):
            for i, microbatch in enumerate(microbatches):
                places |= {rows[n]: f"microbatch {i}{portion} of data-parallel rank {rank}" for n in microbatch}
    return places


def _bad_rows(values: Tensor) -> list[int]:
    finite = torch.isfinite(values).flatten(1).all(dim=1)
    return (~finite).nonzero().flatten().tolist()


def _few(names: Any) -> str:
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
