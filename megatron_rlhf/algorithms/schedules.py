"""Learning rates by step. `step` counts the updates already made, so the first update runs at step 0."""

import math


def cosine_lr(step: int, total: int, peak: float, final_fraction: float = 0.1, warmup: int = 0) -> float:
    """Half a cosine from the peak down to a fraction of it, after a linear warmup from 0.

        step < warmup:  peak step / warmup
        step < total:   peak (f + (1 - f) (1 + cos(pi x)) / 2),    x = (step - warmup) / (total - warmup)
        then:           peak f

    After Loshchilov and Hutter 2017, arXiv 1608.03983, eq. 5, without restarts; InstructGPT's f is 0.1. With a warmup,
    step 0 has rate 0: the optimizer updates its moments for the first time and leaves the weights unchanged.

    Args:
      step: updates made so far.
      total: step at which the cosine ends.
      peak: highest rate.
      final_fraction: f above.
      warmup: step at which the peak is reached.
    """
    if step >= total:
        return peak * final_fraction
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (total - warmup)
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def constant_lr(step: int, peak: float, warmup: int, start_fraction: float = 0.1) -> float:
    """Constant at the peak, after a linear warmup from a fraction of it.

        step < warmup:  peak (f + (1 - f) step / warmup)
        then:           peak

    The schedule of PPO in InstructGPT (Ouyang et al. 2022, arXiv 2203.02155, appendix C): f = 0.1 and 10 iterations.

    Args:
      step: updates made so far.
      peak: highest rate.
      warmup: step at which the peak is reached; 0 for none.
      start_fraction: f above.
    """
    if step >= warmup:
        return peak
    return peak * (start_fraction + (1 - start_fraction) * step / warmup)
