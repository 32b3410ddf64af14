"""How much one forward pass takes: pairs of keys, a number of sequences or a number of tokens."""

from dataclasses import dataclass

from megatron_rlhf.config.errors import UserError


@dataclass(frozen=True)
class Budget:
    """How much one forward pass takes: a number of sequences, each padded to the longest of them, or a number of tokens,
    packed without padding."""

    sequences: int | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, size: "Budget | int") -> "Budget":
        """A whole number counts sequences."""
        return cls(sequences=size) if isinstance(size, int) else size

    @classmethod
    def given(cls, sequences: int | None, tokens: int | None, otherwise: int) -> "Budget":
        """From two keys of which at most one is given."""
        return cls(sequences=otherwise) if sequences is None and tokens is None else cls(sequences, tokens)

    def __mul__(self, times: int) -> "Budget":
        return Budget(*(None if n is None else n * times for n in (self.sequences, self.tokens)))

    def __str__(self) -> str:
        return f"{self.tokens} tokens" if self.tokens is not None else str(self.sequences)


def check_micro_batch(group: str, sequences: int | None, tokens: int | None, prefix: str = "") -> None:
    """At most one of the two keys."""
    if sequences is not None and tokens is not None:
        raise UserError(
            f"{group}.{prefix}micro_batch_tokens={tokens} and {group}.{prefix}micro_batch_size={sequences} both say how much "
            "passes forward at once: set one of them to null"
        )


def require_room(key: str, tokens: int | None, longest: int, what: str) -> None:
    """A budget in tokens must have room for the longest item that is passed forward whole."""
    if tokens is not None and tokens < longest:
        raise UserError(f"{key}={tokens} is smaller than {what} of {longest} tokens; give at least {longest}")
