"""How far a run has got, how long it will take, and where its time is spent."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from types import TracebackType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_REDRAWS = 2.0
LINES_IN_A_RUN = 10


class Progress:
    """A bar on a terminal; elsewhere (Slurm, CI, a file) plain log lines, so that the log stays readable.

    A line is written when ten seconds have passed or a tenth of the run is done since the last one, and at the end. Inside
    a step that lasts longer than ten seconds the bar says how far it is; so do lines, after 10, 30, 70, ... seconds.
    """

    def __init__(self, total: int, initial: int = 0, description: str = "", enabled: bool = True):
        self.step = initial
        self._total = total
        self._initial = initial
        self._description = description
        self.enabled = enabled
        self._bar: tqdm | None = None
        self._cleanup = ExitStack()
        self._began = self._line_time = time.monotonic()
        self._line_step = initial
        self.begin_step({})

    def __enter__(self) -> "Progress":
        self._began = self._line_time = time.monotonic()
        if self.enabled and sys.stderr.isatty():
            # Log lines would break up the bar: while it is shown they are printed above it.
            self._cleanup.enter_context(logging_redirect_tqdm())
            self._bar = self._cleanup.enter_context(
                tqdm(total=self._total, initial=self._initial, desc=self._description, unit="step", dynamic_ncols=True)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()
        self._bar = None

    def begin_step(self, parts: Mapping[str, int]) -> None:
        """A step begins; `parts` are those that its phases have (`Phases`)."""
        self._phases = Phases(parts)
        self._wait = SECONDS_BETWEEN_LINES
        self._inside_due = time.monotonic() + self._wait

    def inside(self, phase: str, done: int, total: int) -> None:
        """A part of the phase is so far; said where the step is a long one."""
        if not self.enabled:
            return
        self._phases.reached(phase, done, total)
        if time.monotonic() < self._inside_due:
            return
        if self._bar is not None:
            self._wait = SECONDS_BETWEEN_REDRAWS
            self._bar.set_postfix_str(self._phases.describe(" "))
        else:
            self._wait *= 2
            logger.info(f"{self._description} step {self.step + 1}: {self._phases.describe(' | ')}".lstrip())
        self._inside_due = time.monotonic() + self._wait

    def advance(self, n: int = 1, **figures: float) -> None:
        """Count `n` more steps done, and show the figures beside the count."""
        self.step += n
        if not self.enabled:
            return
        shown = {name: f"{value:.4g}" for name, value in figures.items()}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(n)
        elif self._line_is_due():
            self._write_line(shown)

    def _line_is_due(self) -> bool:
        return (
            self.step >= self._total
            or self.step - self._line_step >= self._total / LINES_IN_A_RUN
            or time.monotonic() - self._line_time >= SECONDS_BETWEEN_LINES
        )

    def _write_line(self, shown: dict[str, str]) -> None:
        self._line_time, self._line_step = time.monotonic(), self.step
        elapsed = self._line_time - self._began
        # A resumed run did its first steps in another process: they say nothing about the pace of this one.
        pace = elapsed / max(1, self.step - self._initial)
        parts = [
            f"{self._description} {self.step}/{self._total} ({self.step / max(1, self._total):.0%})".lstrip(),
            f"{_clock(elapsed)} elapsed",
            f"{_clock(pace * max(0, self._total - self.step))} left",
            f"{pace:.3g} s/step",
            *(f"{name} {value}" for name, value in shown.items()),
        ]
        logger.info(" | ".join(parts))


class Reading:
    """Lines about many records that are read before a run begins: after ten seconds, and then every ten.

    Args:
        size: Bytes of the file, where it is known; else `count` may be, the number of records.
    """

    def __init__(self, description: str, size: int | None = None, count: int | None = None):
        self._description, self._size, self._count = description, size, count
        self._read = self._made = 0
        self._began = self._line_time = time.monotonic()

    def read(self, count: int) -> None:
        """So many more bytes of the file."""
        self._read += count

    def made(self) -> None:
        """One more record is done."""
        self._made += 1
        now = time.monotonic()
        if now - self._line_time < SECONDS_BETWEEN_LINES:
            return
        self._line_time, elapsed = now, now - self._began
        share = self._read / self._size if self._size else self._made / self._count if self._count else 0
        parts = [f"{self._description}: {self._made:,}", f"{_clock(elapsed)} elapsed"]
        if share:
            parts.insert(1, f"{share:.0%}")
            parts.append(f"{_clock(elapsed * max(1 / share - 1, 0))} left")
        logger.info(" | ".join(parts))


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Phases:
    """How far a step is in its phases. A phase comes in parts, such as updates, or models that read one after the other.

    `parts` gives their numbers, where it is not one. Its remaining time is judged by what it has taken so far.
    """

    def __init__(self, parts: Mapping[str, int]) -> None:
        self._parts = parts
        self._began = self._last = time.monotonic()
        self._phase, self._share = "", 0.0
        self._finished: dict[str, int] = {}
        self._spent: dict[str, float] = {}

    def reached(self, phase: str, done: int, total: int) -> None:
        """A part of the phase is so far; 0 begins the next part."""
        now = time.monotonic()
        if phase == self._phase:
            self._spent[phase] = self._spent.get(phase, 0.0) + now - self._last
        self._phase, self._last = phase, now
        if done == 0:
            self._finished[phase] = self._finished.get(phase, -1) + 1
        finished = self._finished.get(phase, 0)
        self._share = (finished + done / total) / max(self._parts.get(phase, 1), finished + 1)

    def describe(self, separator: str) -> str:
        """The phase, its share that is done, the time since the step began, and what is left of the phase."""
        spent, share = self._spent.get(self._phase, 0.0), self._share
        parts = [f"{self._phase} {share:.0%}", f"{_clock(self._last - self._began)} elapsed"]
        if share > 0:
            parts.append(f"{_clock(spent * (1 - share) / share)} left of it")
        return separator.join(parts)


Span = tuple[str, float, float]
"""A phase, and the seconds from the beginning of its step to its own, and to its end."""
STEP = "step"
"""The phase around the others."""


class PhaseTimer:
    """Adds up the seconds of a step by phase, and its peak memory: `with timer("rollout"): ...`, `timer.take()`.

    `synchronize` (such as `torch.cuda.synchronize`) is called before the clock is read, as kernels run asynchronously.
    `peak_bytes` gives the most bytes held since its last call. `mark` is entered with a phase's name, for profilers.
    """

    def __init__(
        self,
        synchronize: Callable[[], object] | None = None,
        peak_bytes: Callable[[], float] | None = None,
        mark: Callable[[str], AbstractContextManager[object]] | None = None,
    ) -> None:
        self._synchronize = synchronize or (lambda: None)
        self._peak_bytes = peak_bytes
        self._mark = mark or nullcontext
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        self._open: list[str] = []
        self._began: list[float] = []
        self._spans: list[Span] = []
        self._failed: str | None = None

    @property
    def current(self) -> str:
        """The innermost phase being timed now; after an exception, the one that it came from."""
        return self._failed or (self._open[-1] if self._open else "between steps")

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Charge the time spent in the block to `phase`. Blocks may nest; each counts its whole duration."""
        began = self._now()
        self._note_peak()
        self._open.append(phase)
        self._began.append(began)
        try:
            with self._mark(phase):
                yield
        except BaseException:
            self._failed = self._failed or phase
            raise
        finally:
            self._note_peak()
            self._open.pop()
            self._began.pop()
            ended = self._now()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + ended - began
            if self._open == [STEP]:
                self._spans.append((phase, began - self._began[0], ended - self._began[0]))

    def _note_peak(self) -> None:
        """What was held since the last boundary counts for every phase that was open in between."""
        if self._peak_bytes is not None:
            peak = self._peak_bytes()
            for phase in self._open:
                self._peaks[phase] = max(self._peaks.get(phase, 0.0), peak)

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def take_spans(self) -> "list[Span]":
        """The phases of a step, in the order of their ends, since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def take(self) -> dict[str, float]:
        """The metrics `time/<phase>_s` and `memory/<phase>_peak_bytes` since the last call."""
        seconds, self._seconds = self._seconds, {}
        peaks, self._peaks = self._peaks, {}
        return {
            **{f"time/{phase}_s": value for phase, value in seconds.items()},
            **{f"memory/{phase}_peak_bytes": value for phase, value in peaks.items()},
        }
