"""``--engine``: where commands run the independent pieces of their work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["check_engine", "mapper"]


def check_engine(options: Any) -> None:
    """Refuse options that would do nothing.

    Raises:
        ValueError: names them.
    """
    given = [f"--{name}" for name in ("address", "workers") if getattr(options, name)]
    if given and options.engine != "ray":
        raise ValueError(f"{' and '.join(given)} {'does' if len(given) == 1 else 'do'} nothing without --engine ray.")
    if options.workers < 0:
        raise ValueError(f"--workers must be at least 0, got {options.workers}.")


def mapper(options: Any) -> Callable[..., Any] | None:
    """What runs a function on many arguments; None for one after the other in this process."""
    if options.engine != "ray":
        return None
    from fewstep.scale import RayMap

    return RayMap(options.workers, options.address or None)
