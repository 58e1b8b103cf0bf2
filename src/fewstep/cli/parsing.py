"""What the options of commands say, read and checked without a model and without torch, so that what cannot be is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.cli.options import Prompted
from fewstep.errors import FewstepError

__all__ = ["COUNT", "check_prompted", "parse_numbers", "parse_seeds", "parse_size", "prompts_of", "told_prompts"]

COUNT = 16
"""Samples, where nothing says how many."""
MOST_SEEDS = 1_000_000


def parse_seeds(text: str, count: int | None) -> list[int]:
    """Seeds from ``"7"`` (7, 8, ... as many as `count`), ``"0-63"`` or ``"3,5,8"``.

    Args:
        text: of ``--seed``.
        count: of ``--count``; None: not given, so as many as the range or the list has, or `COUNT`.

    Raises:
        ValueError: for anything else, and for a number of samples that is not that of the range or the list.
    """
    if count is not None and count < 1:
        raise ValueError(f"--count must be at least 1, got {count}.")
    try:
        if "," in text:
            seeds = [int(part) for part in text.split(",")]
        elif "-" in text:
            first, last = (int(part) for part in text.split("-"))
            if last - first >= MOST_SEEDS:
                raise FewstepError(f"--seed {text} asks for {last - first + 1} samples; at most {MOST_SEEDS} at once.")
            seeds = list(range(first, last + 1))
        else:
            seeds = list(range(int(text), int(text) + (count or COUNT)))
    except FewstepError:
        raise
    except ValueError:
        raise ValueError(f"--seed takes a number, a range like 0-63 or a list like 3,5,8, not {text!r}.") from None
    if not seeds or min(seeds) < 0:
        raise ValueError(f"--seed {text} gives no samples, or negative seeds.")
    if count not in (None, len(seeds)):
        raise ValueError(
            f"--seed {text} asks for {len(seeds)} samples and --count for {count}: leave --count out, or give --seed the first seed alone."
        )
    return seeds


def parse_size(text: str) -> tuple[int, ...]:
    """Height and width from ``"64"`` or ``"512x768"``, with the frames of a video from ``"480x832x81"``."""
    try:
        sides = [int(part) for part in text.lower().split("x")]
    except ValueError:
        sides = []
    if not 1 <= len(sides) <= 3 or min(sides) < 1:
        raise ValueError(
            f"--size takes a side like 64, height and width like 512x768, or frames as well, 480x832x81, not {text!r}."
        )
    return (sides[0], sides[0]) if len(sides) == 1 else tuple(sides)


def parse_numbers(name: str, text: str) -> list[int]:
    """Increasing numbers of at least 1 from ``"4,6,10"``."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"{name} takes numbers separated by commas, not {text!r}.") from None
    if numbers[0] < 1:
        raise ValueError(f"{name} takes numbers of at least 1, got {numbers[0]}.")
    return numbers


def prompts_of(options: Prompted) -> list[str]:
    """The prompts that were given, to be used in turn.

    Raises:
        ValueError: for a prompt and a file, or a file without one.
    """
    if not options.prompt_file:
        return [] if options.prompt is None else [options.prompt]
    if options.prompt is not None:
        raise ValueError("give one of --prompt and --prompt-file.")
    try:
        lines = Path(options.prompt_file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.prompt_file} is no text in UTF-8.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{options.prompt_file} holds no prompts; it needs one a line.")
    return prompts


def check_prompted(options: Prompted) -> None:
    """Read the prompts and the size, so that what is wrong with them is told before a model is loaded.

    Raises:
        ValueError: as of `prompts_of` and `parse_size`.
    """
    prompts_of(options)
    if options.size:
        parse_size(options.size)


def told_prompts(options: Prompted) -> dict[str, Any]:
    """What was asked for, for the record; nothing without prompts."""
    prompts = prompts_of(options)
    return {"prompts": prompts, "negative": options.negative} if prompts else {}
