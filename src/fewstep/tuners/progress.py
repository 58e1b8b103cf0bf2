"""A progress bar over network evaluations, and the lines that a caller wants to hear."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fewstep.tuners.task import Counted

__all__ = ["Bar"]


class Bar:
    """A bar on standard error, and a function that hears every line.

    Args:
        counted: counts the evaluations.
        total: how many there will be, about.
        shown: whether there is a bar.
        report: called with every line, if given.
        name: what stands before the bar.
    """

    def __init__(
        self, counted: Counted, total: int, *, shown: bool, report: Callable[[str], None] | None = None, name: str = "tuning"
    ):
        from tqdm import tqdm

        pause = 0.1 if sys.stderr.isatty() else 10.0
        self.counted, self.report = counted, report
        self.bar = tqdm(total=total, disable=not shown, desc=name, unit="evaluation", unit_scale=True, mininterval=pause)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:  # the total was an estimate
            self.bar.total = self.counted.evaluations
            self._move()
            self.bar.refresh()
        self.bar.close()

    def say(self, line: str) -> None:
        """Show a line beside the bar, which moves to where the count is, and tell the caller."""
        self.bar.total = max(self.bar.total, self.counted.evaluations)
        self.bar.set_postfix_str(line, refresh=False)
        self._move()
        if self.report:
            self.report(line)

    def _move(self) -> None:
        self.bar.update(self.counted.evaluations - self.bar.n)
