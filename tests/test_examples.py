"""Every example runs and prints the number it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
PROMISED = {
    "local_sgd.py": "mean distance to the nearest cluster",
    "sample.py": "is as close as DDIM with 20",
    "train.py": "mean distance to the nearest cluster",
}


def test_all_examples_are_known():
    assert [example.name for example in EXAMPLES] == sorted(PROMISED)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example(example):
    assert len(example.read_text().splitlines()) <= 120
    done = subprocess.run([sys.executable, example, "--smoke"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert PROMISED[example.name] in done.stdout
