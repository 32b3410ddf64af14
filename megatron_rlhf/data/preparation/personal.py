"""Personal data in texts: where it is and of what kind. Candidates are found by their form, and tested by what they must be.

Not a guarantee: names and addresses have no form.
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import phonenumbers
from stdnum import iban, luhn


@dataclass(frozen=True)
class Found:
    """Personal data at text[start:end]."""

    kind: str
    start: int
    end: int


_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])")
_CARD = re.compile(r"(?<![\d-])\d(?:[ -]?\d){12,18}(?![\d-])")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{2,4}){2,8}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<![\w-])(?:sk-[\w-]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,}|AKIA[0-9A-Z]{16}"
    r"|AIza[\w-]{35}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)(?![\w-])"
)
_SECRET = re.compile(r"(?i)\b(?:api[_-]?key|secret|token|password|passwd)\b[\"']?\s*[:=]\s*[\"']?([^\s\"',;]{12,})")


def find_personal(text: str, region: str | None = "US") -> list[Found]:
    """Personal data of a text, in its order; where two kinds overlap, the one that is tested more strictly.

    Args:
        region: Where phone numbers without a country code are from; None: only numbers with one count.
    """
    kept: list[Found] = []
    for found in (*_keys(text), *_emails(text), *_accounts(text), *_addresses(text), *_phones(text, region)):
        if all(found.end <= other.start or found.start >= other.end for other in kept):
            kept.append(found)
    return sorted(kept, key=lambda found: found.start)


def masked(text: str, found: list[Found]) -> str:
    """The text with the kind in the place of each, as in `<email>`."""
    parts, position = [], 0
    for each in found:
        parts += [text[position : each.start], f"<{each.kind}>"]
        position = each.end
    return "".join([*parts, text[position:]])


def form_of(text: str) -> str:
    """What it looks like, without what it is: letters become x, digits 0."""
    form = re.sub(r"[^\W\d_]", "x", re.sub(r"\d", "0", text))
    return form if len(form) <= 40 else f"{form[:40]}..."


def _keys(text: str) -> Iterator[Found]:
    for match in _KEY.finditer(text):
        yield Found("key", *match.span())
    for match in _SECRET.finditer(text):
        if _bits(match.group(1)) > 3:  # not a word
            yield Found("key", *match.span(1))


def _bits(text: str) -> float:
    counts = Counter(text).values()
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts)


def _emails(text: str) -> Iterator[Found]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield Found("email", *match.span())


def _accounts(text: str) -> Iterator[Found]:
    for match in _IBAN.finditer(text):
        # The form is greedy: words in capitals may follow.
        ends = [
            match.end(),
            *(match.start() + space.start() for space in reversed(list(re.finditer(" ", match.group())))),
        ]
        end = next((end for end in ends if iban.is_valid(text[match.start() : end])), None)
        if end is not None:
            yield Found("iban", match.start(), end)
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match.group())
        if digits[0] in "23456" and luhn.is_valid(digits) and len(set(digits)) > 1:
            yield Found("card", *match.span())


def _addresses(text: str) -> Iterator[Found]:
    for pattern in (_IPV4, _IPV6):
        for match in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(match.group())
            except ValueError:
                continue
            if address.is_global:  # not 127.0.0.1, 192.168.0.1 and the like, which name nobody
                yield Found("ip", *match.span())


def _phones(text: str, region: str | None) -> Iterator[Found]:
    if sum(character.isdigit() for character in text) < 7:
        return
    for match in phonenumbers.PhoneNumberMatcher(text, region, leniency=phonenumbers.Leniency.VALID):
        yield Found("phone", match.start, match.end)
