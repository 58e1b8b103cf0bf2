"""What commands that train share: options of methods, the files of a student, what samples are compared in, and how to go on."""

from __future__ import annotations

import ast
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["STUDENT_FILES", "drawable", "features_of", "parse_options", "resumable", "student_sheets"]

STUDENT_FILES = (
    r"plan-\d+\.safetensors|student\.(json|safetensors)|pytorch_lora_weights\.safetensors|probe\.safetensors|README\.md|scheduler"
    r"|scheduler_config\.json|plan\.safetensors|index\.html|results\.json|samples-.*\.png"
)
"""Names of the files and folders that commands write which make a student."""


def parse_options(text: str) -> dict[str, Any]:
    """Options of a method from ``"loss=l2,guidance=(1,5)"``: Python's literals, and words.

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_options("loss=l2,guidance=(1,5),embedded=True")
        {'loss': 'l2', 'guidance': (1, 5), 'embedded': True}
    """
    if not text:
        return {}
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        given = {word.arg: _literal(word.value) for word in call.keywords}
        if call.args or None in given:
            raise ValueError
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"--options takes name=value, separated by commas, not {text!r}.") from error
    return {str(name): value for name, value in given.items()}


def _literal(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def features_of(model: Any) -> Any:
    """What samples are compared in: those of the classifier of digits where they fit."""
    from fewstep.evaluate.features import make_features, resolved_features

    if hasattr(model, "decode"):
        return None
    return make_features(resolved_features("auto", tuple(model.info.shape)), tuple(model.info.shape))


def drawable(model: Any) -> bool:
    """Whether samples can be shown."""
    shape = model.info.shape
    return len(shape) == 3 and (hasattr(model, "decode") or shape[0] in (1, 3))


def student_sheets(unfinished: Path, unit: str = "step") -> list[tuple[str, str, bytes]]:
    """The pictures that a training left in its folder, for a page: file name, caption, content."""
    found = sorted(unfinished.glob("samples-*.png"))
    return [(sheet.name, f"{unit} {int(sheet.stem.split('-')[1])}", sheet.read_bytes()) for sheet in found]


@contextmanager
def resumable(options: Any, own_files: str) -> Iterator[tuple[Path, Path]]:
    """The folder of a command's results, and that of its checkpoints, which goes when all is written, or before with ``--fresh``."""
    from fewstep.cli.setup import new_folder

    unfinished = Path(f"{options.out}.unfinished")
    if options.fresh:
        shutil.rmtree(unfinished, ignore_errors=True)
    with new_folder(options.out, own_files) as folder, _told_how_to_go_on(unfinished):
        yield folder, unfinished
    shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _told_how_to_go_on(unfinished: Path) -> Iterator[None]:
    """When the run is stopped within."""
    try:
        yield
    except KeyboardInterrupt:
        if unfinished.is_dir():
            print(f"\nstopped: the training is kept in {unfinished}, and the same command goes on from there.", file=sys.stderr)
        raise
