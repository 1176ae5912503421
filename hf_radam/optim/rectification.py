"""RAdam's rectification: the factor on the learning rate that takes the place of a warm-up."""

from __future__ import annotations


def rectification(step: int, *, beta2: float, threshold: float) -> float | None:
    """The factor at update `step` (1 for the first); None while it is undefined, in the first few updates.

    Args:
        step: number of the update.
        beta2: decay rate of the second moment.
        threshold: rho_t, the length of its moving average, above which the factor is taken: 4 in the paper and in
            `schedulefree`, 5 in `torch.optim.RAdam`.

    Source:
        Liu et al. 2020, arXiv:1908.03265, algorithm 2.
    """
    rho_inf = 2 / (1 - beta2) - 1
    beta2_t = beta2**step
    rho_t = rho_inf - 2 * step * beta2_t / (1 - beta2_t)
    if rho_t <= threshold:
        return None
    return ((rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t)) ** 0.5
