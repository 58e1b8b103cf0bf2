"""The examples of the page on training run, one after another, and the file on it is a configuration."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.train.configuration import read_configuration

PAGE = (Path(__file__).parents[2] / "docs" / "train.md").read_text()


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    names = {"fs": fs, "torch": torch}
    for block in blocks:
        exec(compile(block, "train.md", "exec"), names)
    assert names["samples"].std(0)[0] > 3 * names["samples"].std(0)[1]  # of data ten times as wide as high
    assert capsys.readouterr().out.startswith("ok: ")
    assert names["weights"].keys() == names["network"].state_dict().keys()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the standard library reads TOML from Python 3.11 on")
def test_the_file_is_a_configuration(tmp_path):
    (tmp_path / "run.toml").write_text(re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)[1])
    (tmp_path / "pictures").mkdir()
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir()
        for i in range(2):
            Image.fromarray(np.full((40, 40, 3), 50 * i, np.uint8)).save(tmp_path / "pictures" / name / f"{i}.png")
    recipe = read_configuration(tmp_path / "run.toml").recipe()
    assert (recipe.steps, recipe.network.classes, recipe.loss.predicts) == (5000, 2, "flow")
