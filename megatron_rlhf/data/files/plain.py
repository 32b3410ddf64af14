"""Values of records as JSON has them: they are written, stored and given to other processes, wherever they come from."""

import datetime
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any


def plain(value: Any) -> Any:
    """The value as JSON: not a number and infinite become null, dates and times ISO text, decimals numbers, and half of a
    surrogate pair, which no encoding has, U+FFFD. What JSON has no form for, such as bytes, becomes text."""
    match value:
        case None | bool() | int():
            return value
        case str():
            return value if value.isascii() else _whole(value)
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {plain(str(name)): plain(item) for name, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
        case Decimal():
            whole = value.is_finite() and value == value.to_integral_value()
            return int(value) if whole else plain(float(value))  # a long identifier keeps its digits
        case datetime.date() | datetime.time():
            return value.isoformat()
    return plain(value.tolist()) if hasattr(value, "tolist") else _whole(str(value))


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
