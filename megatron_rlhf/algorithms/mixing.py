"""How much pretraining text counts relative to PPO: the paper's gamma, fixed or steered."""

from typing import Protocol


class TextWeight(Protocol):
    """The coefficient of the text's loss when it is added to PPO's."""

    coef: float

    def update(self, ppo_norm: float, text_norm: float) -> None:
        """Takes in the norms of the two gradients of one update; the text's as it entered the sum, coefficient included."""

    def state_dict(self) -> dict[str, float]:
        """Returns what a resumed run needs."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores what `state_dict` returned."""


class FixedTextWeight:
    """Keeps the coefficient as it is: InstructGPT's choice."""

    def __init__(self, coef: float):
        self.coef = coef

    def update(self, ppo_norm: float, text_norm: float) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, float]:
        """Returns nothing to restore: the coefficient is the configuration's."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Does nothing."""


class BalancedTextWeight:
    """Keeps the text's gradient at a multiple of PPO's.

        coef = ratio a / b,    a <- d a + (1 - d) |g_ppo|,    b <- d b + (1 - d) |g_text|

    where g_text is the gradient of the text's mean loss without the coefficient, and a and b start at 0: both exponential
    averages are biased towards 0 at first by the same factor, so their quotient is right from the first measurement on.

    Attributes:
      coef: the current coefficient; 1 before the first measurement.
      ratio: wanted norm of the text's gradient, over that of PPO's.
      decay: d above.
    """

    def __init__(self, ratio: float, decay: float = 0.9):
        assert ratio > 0, f"ratio must be positive, got {ratio}"
        self.coef = 1.0
        self.ratio = ratio
        self.decay = decay
        self._ppo = self._text = 0.0

    def update(self, ppo_norm: float, text_norm: float) -> None:
        """Takes in the norms of the two gradients of one update. Updates in which either is 0 say nothing about the
        ratio and are left out."""
        if ppo_norm > 0 and text_norm > 0:
            self._ppo += (1 - self.decay) * (ppo_norm - self._ppo)
            self._text += (1 - self.decay) * (text_norm / self.coef - self._text)
            self.coef = self.ratio * self._ppo / self._text

    def state_dict(self) -> dict[str, float]:
        """Returns what a resumed run needs."""
        return {"coef": self.coef, "ppo": self._ppo, "text": self._text}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores what `state_dict` returned; ratio and decay stay the configuration's. A run with a fixed coefficient
        has no state."""
        if state:
            self.coef, self._ppo, self._text = state["coef"], state["ppo"], state["text"]
