r"""An early end of runs that have diverged without any number becoming infinite.

A loss is watched by its own running level $l$, the average over about the last hundred steps. A step is *far above* if its loss exceeds
$k \max(l, l_{max}/100)$, with $l_{max}$ the highest level there was, so that a loss near zero may double; such steps leave the level
alone. When the last n steps were all far above, the run has diverged: it does not come back by itself (Adam's own averages are full of
the explosion), and every further step is wasted.

The check begins after a hundred steps, and gives up for good at a loss below zero, which has no level to be a
multiple of. A run that is merely noisy, spiky or rising slowly is not ended.
"""

from __future__ import annotations

from typing import Any

__all__ = ["RunningLevel"]

FACTOR = 10.0
"""k: how many times its own level a loss must exceed."""
PATIENCE = 100
"""n: at how many steps in a row."""
FLOOR = 0.01
"""Part of the highest level below which the level does not count as lower."""
MEMORY = 100
"""Steps that the running level remembers."""
KEPT = ("seen", "level", "highest", "above", "watching")


class RunningLevel:
    """The level of one loss, and how long the loss has been far above it.

    Args:
        factor: k.

    Example:
        >>> level = RunningLevel(10.0)
        >>> any(level.far_above(1.0) for _ in range(500)), level.far_above(1000.0)
        (False, False)
        >>> [level.far_above(1000.0) for _ in range(99)][-1]
        True
    """

    def __init__(self, factor: float):
        self.factor = factor
        self.seen, self.level, self.highest, self.above, self.watching = 0, 0.0, 0.0, 0, True

    def far_above(self, loss: float) -> bool:
        """Take in the next loss; whether the run has diverged."""
        self.seen += 1
        self.watching = self.watching and loss >= 0.0
        if not self.watching:
            return False
        if self.seen > MEMORY and loss > self.factor * max(self.level, FLOOR * self.highest):
            self.above += 1
            return self.above >= PATIENCE
        self.above = 0
        self.level += (loss - self.level) / min(self.seen, MEMORY)
        self.highest = max(self.highest, self.level)
        return False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in KEPT}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for name in KEPT:
            setattr(self, name, state[name])
