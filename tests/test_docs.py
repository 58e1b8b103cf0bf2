"""The examples of the documentation run: every block of Python in README and docs, in a namespace that has what readers bring."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep as fs

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
ELSEWHERE = {
    "diffusers.md": "tests/diffusers",
    "loading.md": "tests/diffusers/test_loading.py",
    "migration.md": "tests/test_migration.py",
    "train.md": "tests/train",
    "distill.md": "tests/distill",
    "lcm.md": "tests/distill",
    "evaluate.md": "tests/evaluate",
    "tdm.md": "tests/distill",
    "freeflow.md": "tests/distill",
    "prefer.md": "tests/steer",
    "edit.md": "minutes",
    "tune.md": "minutes",
    "recipe.md": "minutes",
    "dpm_v3.md": "minutes",
    "compensated.md": "minutes",
    "layer_skips.md": "minutes",
    "timesteps.md": "minutes",
    "int4.md": "tests/train/test_int4.py",
    "sparse.md": "tests/train/test_sparse.py",
}
"""Pages whose examples need more than this namespace, and where the same is tested; or that tune a network for minutes."""
COMPLETE = ("scale.md", "serve.md", "serve_http.md")
"""Pages whose examples bring everything that they use."""
SLOW = ("fs.tune(", "pipe.scheduler", "kdiffusion_sampler(", "path/to/", "cuda", "teleport_skip", "raw,")
"""What a block holds that is left out."""


class Network(torch.nn.Module):
    """Any network."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, time, label=None):
        return 0.5 * self.weight * x


def brought(page):
    """What the reader of a page has: a network, its denoiser and schedule, data, noise; nothing where the examples are complete."""
    if page in COMPLETE:
        return {}
    schedule = fs.schedules.EDM() if page == "teleport.md" else fs.schedules.VPLinear()
    network, data = Network(), torch.randn(32, 3, 32, 32)
    den = fs.Denoiser(network, schedule, "noise", info=fs.denoisers.ModelInfo(shape=(3, 32, 32)))
    plan = fs.make_plan("auto", schedule, 8)
    own = {"network": network, "net": network, "model": network, "den": den, "schedule": schedule, "plan": plan}
    own |= {"data": data, "samples": data, "variance": 0.5, "shape": (3, 32, 32), "seeds": range(16), "x": data[:16]}
    own |= {"noise": fs.draw_noise((3, 32, 32), range(16)), "labels": torch.arange(16) % 10, "solver": fs.solvers.DPMSolverPP()}
    return {"fs": fs, "torch": torch, "np": np, "copy": copy, "betas": np.linspace(1e-4, 0.02, 1000).tolist(), **own}


PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "methods").glob("*.md")))
    if path.name not in ELSEWHERE and BLOCK.search(path.read_text())
]


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # examples leave files open
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_examples_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made: dict[str, object] = {}
    for match in BLOCK.finditer(path.read_text()):
        if not any(mark in match[1] for mark in SLOW):
            made |= brought(path.name)
            exec(compile(match[1], path.name, "exec"), made)


def test_pages_left_out_exist():
    names = {path.name for path in (ROOT / "docs").rglob("*.md")}
    assert set(ELSEWHERE) | set(COMPLETE) <= names
