"""Texts that end a response, found while it is sampled token by token."""

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders


class StopWatch:
    """Reads one response token by token, as text, and says where it ends: at the token that completes one of the texts.

    A character that consists of several tokens is read once the last of them has come.
    """

    def __init__(self, backend: tokenizers.Tokenizer, texts: Sequence[str]):
        self._backend, self._texts = backend, texts
        self._stream = decoders.DecodeStream(skip_special_tokens=False)
        self._longest = max(map(len, texts))
        self._tail = ""

    def __call__(self, token: int) -> bool:
        """Whether a text is complete with this token, and was not before it."""
        new = self._stream.step(self._backend, token) or ""
        before, self._tail = self._tail, (self._tail + new)[-self._longest :]
        return any(text in _ending(before, len(text)) + new for text in self._texts)


def _ending(text: str, length: int) -> str:
    """The end of a text that can be the beginning of a match of this length that is not yet complete."""
    return text[-(length - 1) :] if length > 1 else ""
