"""What a run tells while it trains: a record in memory, a line of JSON in ``log.jsonl``, TensorBoard if wanted, and a bar."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from fewstep.artefacts import write_atomically
from fewstep.errors import MissingExtraError

__all__ = ["LOG", "Log", "make_bar", "say"]

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"


class Log:
    """The records of one run, oldest first.

    Args:
        folder: where ``log.jsonl`` goes; None: nowhere.
        writes: whether this process writes, or only remembers.
        tensorboard: whether to write event files for TensorBoard, into ``folder/tensorboard``.
    """

    def __init__(self, folder: Path | None, *, writes: bool = True, tensorboard: bool = False):
        self.folder, self.writes = folder, writes
        self.records: list[dict[str, Any]] = []
        self.board: Any = None
        self.tensorboard = tensorboard
        if tensorboard and folder is None:
            raise ValueError("tensorboard=True needs a folder to write into: fit(..., folder=...).")

    def rewind(self, step: int) -> None:
        """Take up the records of an earlier run up to a step; drop later ones and a torn last line."""
        if self.folder is None:
            return
        path = self.folder / LOG
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = json.loads(line)
                if record["step"] <= step:
                    self.records.append(record)
        if self.writes:
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in self.records).encode())
            if self.tensorboard:
                self.board = _summary_writer()(str(self.folder / TENSORBOARD), purge_step=step + 1)

    def record(self, record: dict[str, Any]) -> None:
        """Add a record: ``"step"`` and numbers."""
        self.records.append(record)
        if self.folder is None or not self.writes:
            return
        with open(self.folder / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.board is not None:
            for name, value in record.items():
                if name != "step":
                    self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write what TensorBoard's writer still holds."""
        if self.board is not None:
            self.board.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "train", "Logging for TensorBoard") from error
    return SummaryWriter


def say(text: str) -> None:
    """One line for whoever watches the bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def make_bar(done: int, steps: int, shown: bool) -> Any:
    """A progress bar that begins where a run is taken up."""
    from tqdm import tqdm

    return tqdm(total=steps, initial=done, disable=not shown, unit="step")
