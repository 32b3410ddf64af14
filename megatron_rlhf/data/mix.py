"""How much of each batch is demonstrations and how much pretraining text, and what each counts."""

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Mix:
    """Batches of `batch_size` examples of which `share` is text: exactly so over the batches, where not in each of them."""

    batch_size: int
    share: float

    def texts(self, step: int) -> int:
        """Texts in the batch of a step; the others are demonstrations. What one batch lacks of a text, a later one gets."""
        return self.texts_before(step + 1) - self.texts_before(step)

    def weight(self, demonstrations: int, texts: int) -> float:
        """What the mean over a batch's text counts in its loss; the mean over its demonstrations counts the rest.

        It is `share` wherever every batch has room for both kinds. Where one kind comes in some of the batches only, it
        counts as one example of the batch there, which comes to the same over the batches.
        """
        if not texts or not demonstrations:
            return float(texts > 0)
        least = 1 / self.batch_size
        return min(max(self.share, least), 1 - least)

    def steps(self, demonstrations: int, epochs: int) -> int:
        """Steps of so many passes over all demonstrations; the last batch of a pass may have fewer."""
        step = 0
        for _ in range(epochs):
            left = demonstrations
            while left > 0:
                left -= self.batch_size - self.texts(step)
                step += 1
        return step

    def texts_before(self, step: int) -> int:
        """Texts in all batches before that of a step."""
        return math.floor(step * self.batch_size * Fraction(str(self.share)))
