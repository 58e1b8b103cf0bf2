"""The few exceptions fewstep raises on purpose.

Every one derives from `FewstepError` *and* from the built-in a caller would expect (`ValueError`, `RuntimeError`, ...), so both
``except FewstepError`` and ``except ValueError`` work. A message says what arrived, what was wanted, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtefactError",
    "FewstepError",
    "GridError",
    "MissingExtraError",
    "NetworkError",
    "PlanError",
    "UnknownNameError",
]

LONG, NEAR = 15, 5
"""A table with more names than this is not printed whole if there is a place that lists it; and how many near ones are."""


class FewstepError(Exception):
    """Base of every error that fewstep raises on purpose."""


class GridError(FewstepError, ValueError):
    """A time grid that does not decrease, repeats a node, or does not fit the schedule or the number of calls."""


class PlanError(FewstepError, ValueError):
    """A plan that is malformed, or that does not fit the denoiser, the noise or the options it is run with."""


class ArtefactError(FewstepError, ValueError):
    """A file that is truncated, damaged, foreign, of a newer format, or made for something else."""


class NetworkError(FewstepError, RuntimeError):
    """A network that returned the wrong shape or values that are not finite."""


class MissingExtraError(FewstepError, ImportError):
    """An optional library is not installed; the message names the extra that brings it."""

    def __init__(self, library: str, extra: str, purpose: str):
        super().__init__(f'{purpose} needs {library}, which is not installed. Install it with: pip install "fewstep[{extra}]"')


class UnknownNameError(FewstepError, ValueError):
    """A name that is not in a table; the message gives the nearest match, and the table: the near part of it if it is long."""

    def __init__(self, what: str, name: object, known: Iterable[str], hint: str | None = None, *, listed: str | None = None):
        names = sorted(known)
        near = difflib.get_close_matches(str(name).lower().replace("++", "pp_"), names, n=NEAR, cutoff=0.5)
        table = f"Known: {', '.join(names)}."
        if listed is not None and len(names) > LONG:
            others = f"Also near: {', '.join(near[1:])}. " if hint is None and len(near) > 1 else ""
            table = f"{others}All {len(names)}: {listed}."
        if hint is None:
            hint = f"Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {what} {name!r}. {hint}{' ' if hint else ''}{table}")
