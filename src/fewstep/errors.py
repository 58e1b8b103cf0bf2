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
    """A name that is not in a table; the message gives the nearest match and the whole table."""

    def __init__(self, what: str, name: object, known: Iterable[str], hint: str | None = None):
        names = sorted(known)
        near = difflib.get_close_matches(str(name).lower().replace("++", "pp_"), names, n=1, cutoff=0.5)
        if hint is None:
            hint = f"Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {what} {name!r}. {hint}{' ' if hint else ''}Known: {', '.join(names)}.")
