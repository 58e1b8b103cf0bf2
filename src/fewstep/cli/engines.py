"""``--engine``: where commands run the independent pieces of their work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["check_engine", "mapper", "session"]


def check_engine(options: Any) -> None:
    """Refuse options that would do nothing.

    Raises:
        ValueError: names them.
        FewstepError: if no cluster is at the address.
    """
    given = [f"--{name}" for name in ("address", "workers") if getattr(options, name)]
    if given and options.engine != "ray":
        raise ValueError(f"{' and '.join(given)} {'does' if len(given) == 1 else 'do'} nothing without --engine ray.")
    if options.workers < 0:
        raise ValueError(f"--workers must be at least 0, got {options.workers}.")
    if options.address:
        from fewstep.scale.address import check_address

        check_address(options.address)


@contextmanager
def session(options: Any) -> Iterator[None]:
    """One session of Ray for all that `mapper` is called for within it; nothing without ``--engine ray``."""
    if options.engine != "ray":
        yield
        return
    import torch

    from fewstep.scale.actors import ray_session

    with ray_session(options.address or None, options.workers * torch.get_num_threads()):
        yield


def mapper(options: Any) -> Callable[..., Any] | None:
    """What runs a function on many arguments; None for one after the other in this process."""
    if options.engine != "ray":
        return None
    from fewstep.scale import RayMap

    return RayMap(options.workers, options.address or None)
