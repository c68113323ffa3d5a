"""Which gradient norms stand out from those before them."""

from __future__ import annotations

import math
import statistics
from collections import deque

_REMEMBERED = 100  # norms
_WARM_UP = 20  # norms before the first judgement


class Spikes:
    """The running median of the norms of the last steps, and which norms are far above it.

    Args:
        above: So many times the median is a spike.
    """

    def __init__(self, above: float) -> None:
        if not isinstance(above, int | float) or not above > 1:
            raise ValueError(
                f"NonFiniteGuard: expected spike_above to be a number above 1, got {above!r}; a "
                "step whose norm is more than so many times the median of recent norms is refused"
            )
        self._above = above
        self._norms: deque[float] = deque(maxlen=_REMEMBERED)

    def judge(self, norm: float) -> str:
        """Say why `norm` is a spike, if it is one, and remember it if it is finite.

        An infinite one is that of finite gradients whose squares overflow, or of gradients that
        are not finite; the caller finds out which.
        """
        spike = ""
        if len(self._norms) >= _WARM_UP:
            median = statistics.median(self._norms)
            if norm > self._above * median > 0:
                times = f"{norm / median:.3g} times the median {median:.3g} of the last"
                spike = f"the norm {norm:.3g} of the gradient is {times} {len(self._norms)} steps"
        if math.isfinite(norm):
            self._norms.append(norm)
        return spike
