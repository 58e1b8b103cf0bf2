"""The command line: ``fewstep demo | sample | tune | compare | evaluate | train | distill | prefer | control | serve``, and more.

Every command is one file with a dataclass of its options and ``run(options) -> exit status``, which calls the public functions.
Nothing heavy is imported before a command runs. Bad input ends in one line on standard error and status 2, an interrupt (Ctrl-C or
SIGTERM) in status 130.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from fewstep.cli.options import add_options, read_options
from fewstep.errors import FewstepError
from fewstep.version import __version__

__all__ = ["main"]

COMMANDS = {
    "demo": "samples of the shipped models and what few calls cost: a page with pictures, a plot and a table",
    "sample": "samples of a model",
    "compare": "rank the solvers on a model: error to the exact solution, distance of the distributions",
    "evaluate": "how far samples are from data: distances with intervals, floor and test",
    "tune": "make plans for a model that beat every untuned one, and a page that shows it",
    "train": "train a small model on pictures of your own, or a shipped model anew",
    "distill": "make a student of a model that samples in 1 to 4 calls, and a page that says whether it pays",
    "prefer": "tune a few-step model towards a reward, keeping its few calls, and a page of before and after",
    "control": "samples that meet a target (given pixels, intensity, a class), by optimising their noise through a student",
    "serve": "serve a model over HTTP, with a page to try it on",
    "plan make": "plan a run and save it to a file",
    "plan show": "print a saved plan as a table",
    "plan export": "write a saved plan as JSON, for other runtimes",
    "solvers": "list the solvers: order, cost, source",
    "check": "find out whether a model is wrapped right, on data",
}
INTERRUPTED, REFUSED = 130, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    parser = _parser()
    namespace = parser.parse_args(argv)
    if not getattr(namespace, "command", None):
        parser.print_help()
        return REFUSED
    module = _module(namespace.command)
    try:
        with _ended_like_interrupted(), _warnings_in_one_line():
            return module.run(read_options(module.OPTIONS[namespace.command], namespace))
    except KeyboardInterrupt:
        return _fail("interrupted.", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("FEWSTEP_TRACEBACK"):
            raise
        return _fail(_told(error), REFUSED)


def _told(error: Exception) -> str:
    """One line for people. Only what should not happen is called by the name of its class."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (FewstepError, ImportError, OSError, RuntimeError, TypeError, ValueError)) and text:
        return text
    return f"{type(error).__name__}: {text} (this should not happen: FEWSTEP_TRACEBACK=1 shows where)"


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Within it a warning is one line, as an error is, without the place in the code."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"fewstep: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    """Within it SIGTERM is a KeyboardInterrupt: what is half-written goes, what is finished is kept."""
    if threading.current_thread() is not threading.main_thread():  # only the main one gets signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fewstep", description="Samples from a diffusion or flow model in as few network calls as possible.")
    parser.add_argument("--version", action="version", version=f"fewstep {__version__}")
    places = {"": parser.add_subparsers(metavar="COMMAND", title="commands")}
    for command, summary in COMMANDS.items():
        *group, name = command.split()
        if group and group[0] not in places:
            inner = places[""].add_parser(group[0], help="make, show and export plans")
            places[group[0]] = inner.add_subparsers(metavar="COMMAND", title="commands", required=True)
        options = _module(command).OPTIONS[command]
        sub = places[group[0] if group else ""].add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", usage=_usage(command, options)
        )
        sub.set_defaults(command=command)
        add_options(sub, options)
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{self.prog}: {message}; `{self.prog} --help` says what there is.\n")


def _usage(command: str, options: type) -> str:
    """What a command is called with: what has no dashes first, the options in the list below it."""
    places = [field for field in dataclasses.fields(options) if field.metadata["positional"]]
    named = [field.name.upper() if field.default is None else f"[{field.name.upper()}]" for field in places]
    return " ".join(["fewstep", command, *named, "[options]"])


def _module(command: str):
    return importlib.import_module(f"fewstep.cli.{command.split()[0]}")


def _fail(message: str, status: int) -> int:
    print(f"fewstep: {message}", file=sys.stderr)
    return status
