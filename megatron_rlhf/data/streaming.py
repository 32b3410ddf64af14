"""A response as text while it is sampled, token by token; and the texts that end it."""

from collections.abc import Sequence

import tokenizers

_INCOMPLETE = "\ufffd"
"""What decoders make of a character some of whose bytes are missing."""


class TextStream:
    """Decodes token by token; the texts together are that of the whole. A character that consists of several tokens comes with
    the last of them.

    What a tokenizer makes of a token depends on those before it: here, on those of the last text that was returned. Where bytes
    turn out to be no text at all, a decoder with byte fallback (Llama 2, Mistral) takes back what it made of those before
    them; what was returned stays.
    """

    def __init__(self, backend: tokenizers.Tokenizer, skip_special_tokens: bool):
        self._backend, self._skips = backend, skip_special_tokens
        self._before: list[int] = []
        self._waiting: list[int] = []

    def step(self, token: int) -> str:
        """The text that is complete with this token, often none."""
        self._waiting.append(token)
        text = self._decode(self._before + self._waiting)
        if text.endswith(_INCOMPLETE):
            return ""
        new = text[len(self._decode(self._before)) :]
        if new:
            self._before, self._waiting = self._waiting, []
        return new

    def _decode(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=self._skips)


class StopWatch:
    """Reads one response token by token, as text, and says where it ends: at the token that completes one of the texts."""

    def __init__(self, backend: tokenizers.Tokenizer, texts: Sequence[str]):
        self._stream, self._texts = TextStream(backend, skip_special_tokens=False), texts
        self._longest = max(map(len, texts))
        self._tail = ""

    def __call__(self, token: int) -> bool:
        """Whether a text is complete with this token, and was not before it."""
        new = self._stream.step(token)
        before, self._tail = self._tail, (self._tail + new)[-self._longest :]
        return any(text in _ending(before, len(text)) + new for text in self._texts)


def _ending(text: str, length: int) -> str:
    """The end of a text that can be the beginning of a match of this length that is not yet complete."""
    return text[-(length - 1) :] if length > 1 else ""
