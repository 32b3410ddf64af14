"""Contenders in turn, in one process: machines are noisy, ratios are less so."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping


def sizes(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Options that are whole numbers, by name and default."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")


def alternate(contenders: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender's rounds, run in turn, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(seconds: Mapping[str, list[float]], units: int, unit: str) -> None:
    """Print each contender's rate, and how much faster the first of two is, pair by pair."""
    width = max(map(len, seconds))
    for name, values in seconds.items():
        rates = sorted(units / value for value in values)
        print(
            f"{name:{width}} {statistics.median(rates):10.1f} {unit}  (of {len(rates)}: {rates[0]:.1f} .. {rates[-1]:.1f})"
        )
    first, second = seconds.values()
    ratios = sorted(b / a for a, b in zip(first, second, strict=True))
    print(f"{'ratio':{width}} {statistics.median(ratios):10.2f}  (pair by pair: {ratios[0]:.2f} .. {ratios[-1]:.2f})")
