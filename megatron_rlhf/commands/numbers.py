"""Numbers in options, in the range that has a meaning: anything else ends with a message that names the option."""

import argparse
from collections.abc import Callable


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """For `type=`: a whole number of at least `least`, and at most `most`."""
    meant = f"at least {least}" if most is None else f"{least} to {most}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number, {meant}")
        return value

    return read


def share(text: str) -> float:
    """For `type=`: more than 0, and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a number of more than 0, and at most 1")
    return value
