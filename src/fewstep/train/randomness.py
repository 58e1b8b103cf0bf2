"""Everything random in a training run, from the seed: no state is kept, so none can be lost.

What is random at step s for some purpose (the rows, the noise, dropout) comes from a generator seeded by a hash of (seed, purpose, s).
A step is worked out in one or several *pieces* of its batch, one after another (accumulation) or beside each other (processes); piece p
has a purpose of its own. So the numbers depend on how many pieces there are, and not on which process works them out.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch

__all__ = ["derive", "make_generator", "purpose_of", "seeded"]


def derive(seed: int, purpose: str, number: int) -> int:
    """A 63-bit seed for one purpose and step; different purposes and steps have unrelated ones.

    Example:
        >>> derive(0, "objective", 1) == derive(0, "objective", 1), derive(0, "objective", 1) == derive(0, "objective", 2)
        (True, False)
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()[:8], "big") >> 1


def make_generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator of its own for one purpose and step."""
    return torch.Generator().manual_seed(derive(seed, purpose, number))


def purpose_of(what: str, stage: int, piece: int) -> str:
    """The name of a purpose in one stage of a step and one piece of its batch.

    Example:
        >>> purpose_of("objective", 0, 0), purpose_of("objective", 1, 3)
        ('objective', 'objective of stage 1, piece 3')
    """
    return what + (f" of stage {stage}" if stage else "") + (f", piece {piece}" if piece else "")


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """PyTorch's ambient generator, which dropout layers use, is seeded inside and untouched outside."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _seed(seed, device)
        yield


def _seed(seed: int, device: torch.device) -> None:
    """As ``torch.manual_seed``, which also keeps a record of every call for each kind of device that is not in use yet."""
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
