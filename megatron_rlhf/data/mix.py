"""How much of each batch is demonstrations and how much pretraining text, and their weights in the loss."""

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Mix:
    """Batches of `batch_size` examples of which `share` is text: exactly so on average over the batches, if not in each
    of them."""

    batch_size: int
    share: float

    def texts(self, step: int) -> int:
        """Texts in the batch of a step; the others are demonstrations. Fractions of a text carry over to later batches."""
        return self.texts_before(step + 1) - self.texts_before(step)

    def weight(self, demonstrations: int, texts: int) -> float:
        """Weight of the mean over a batch's text in its loss; the mean over its demonstrations gets the rest.

        It is `share` if every batch has room for both kinds. If one kind is in only some of the batches, it counts as
        one example of those batches, which comes to the same on average.
        """
        if not texts or not demonstrations:
            return float(texts > 0)
        least = 1 / self.batch_size
        return min(max(self.share, least), 1 - least)

    def steps(self, demonstrations: int, epochs: int) -> int:
        """Steps of this many passes over all demonstrations; the last batch of a pass may have fewer."""
        step = 0
        for _ in range(epochs):
            left = demonstrations
            while left > 0:
                left -= self.batch_size - self.texts(step)
                step += 1
        return step

    def texts_before(self, step: int) -> int:
        """Texts in all batches before a step's."""
        return math.floor(step * self.batch_size * Fraction(str(self.share)))
