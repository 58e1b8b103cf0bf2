"""Options of commands as dataclasses: every field says its default and its help text once."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Common",
    "Prompted",
    "add_options",
    "address_option",
    "engine_option",
    "final_option",
    "option",
    "read_options",
    "workers_option",
]


def option(
    default: Any, text: str, *, positional: bool = False, choices: tuple[str, ...] | None = None, kind: type[Any] | None = None
) -> Any:
    """A field of an options dataclass. The type of the default is the type of the option; of None it is `kind`, or text."""
    found = kind if default is None else type(default)
    return dataclasses.field(default=default, metadata={"help": text, "positional": positional, "choices": choices, "kind": found})


def final_option() -> Any:
    """Where a run ends, for every command that plans one."""
    return option("zero", "where to end: zero (sigma = 0) or t_end (where the schedule ends)", choices=("zero", "t_end"))


def engine_option(text: str) -> Any:
    """Where independent pieces of a command's work are done."""
    return option("local", text, choices=("local", "ray"))


def address_option() -> Any:
    """Of the cluster that `engine_option` may name."""
    return option(
        "", "of --engine ray: a cluster (host:port, ray://host:port, or auto for the one of this machine); left out: a new one here"
    )


def workers_option() -> Any:
    """How many workers `engine_option` may have."""
    return option(0, "of --engine ray: how many; 0: one for every processor core, or every --threads of them")


@dataclass(frozen=True)
class Common:
    """Options of every command that runs a network."""

    device: str = option("cpu", "where the network runs: cpu, cuda, cuda:1, mps")
    dtype: str = option(
        "float32",
        "precision of the state; bfloat16 runs the network in it under a float32 state",
        choices=("float32", "float64", "bfloat16"),
    )
    threads: int = option(0, "processor threads; 0: one for small networks, else what PyTorch chooses")
    json: bool = option(False, "print results as JSON on standard output")
    quiet: bool = option(False, "no progress bars and no messages")


@dataclass(frozen=True)
class Prompted(Common):
    """Options of commands that sample from diffusers' pipelines as well."""

    prompt: str = option(None, "text, for a pipeline that takes it")
    prompt_file: str = option("", "a file with one prompt a line, which are used in turn")
    negative: str = option(None, "text that guidance leads away from")
    size: str = option("", "of a pipeline's pictures in pixels: 512x512 (height, width), 64; of videos with frames, 480x832x81")


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Add the fields of a dataclass to a parser."""
    for field in dataclasses.fields(options):
        name, meta = field.name.replace("_", "-"), field.metadata
        shown = "" if field.default in (None, "", False) or meta["positional"] else f" (default: {field.default})"
        details: dict[str, Any] = {"help": (meta["help"] + shown).replace("%", "%%")}
        if isinstance(field.default, bool):
            details["action"] = "store_true"
        elif meta["kind"] is not None:
            details["type"] = meta["kind"]
        if not isinstance(field.default, bool):
            details["choices"] = meta["choices"]
        if meta["positional"]:
            details["metavar"] = field.name.upper()
            if field.default is not None:
                details |= {"nargs": "?", "default": field.default}
            parser.add_argument(field.name, **details)
        else:
            parser.add_argument(f"--{name}", dest=field.name, default=field.default, **details)


def read_options(options: type, namespace: argparse.Namespace) -> Any:
    """The dataclass with what was given."""
    return options(**{field.name: getattr(namespace, field.name) for field in dataclasses.fields(options)})
