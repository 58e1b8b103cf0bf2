r"""The teacher of ``benchmarks/distill.py``: a residual network on the digits, with labels.

``python benchmarks/distill_teacher.py`` trains it in about a minute and writes ``benchmarks/results/distill_teacher.safetensors`` (half
precision, 2.2 MB).

About 1.1 million parameters: 8 x 8 pixels as a vector, four residual blocks of width 192 whose normalised input is scaled, shifted and
gated by an embedding of time and label; rectified flow, ten percent of the labels dropped.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import fewstep as fs
from fewstep.train.recipes import digits

FILE = Path(__file__).parent / "results" / "distill_teacher.safetensors"
CLASSES = 10
WIDTH, DEPTH, HIDDEN, FREQUENCIES = 192, 4, 384, 64
SHAPE = (1, 8, 8)


class Block(nn.Module):
    """h + gate * F(normalised h, scaled and shifted)."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulate = nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift, gate = self.modulate(embedding).chunk(3, 1)
        return h + gate * self.down(functional.silu(self.up(self.norm(h) * (1.0 + scale) + shift)))


class DigitsNetwork(nn.Module):
    """The flow of digits, ``network(x, time, label=None)``; label 10 is none."""

    omega: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("omega", torch.logspace(0.0, 2.0, FREQUENCIES // 2), persistent=False)
        self.time_mlp = nn.Sequential(nn.Linear(FREQUENCIES, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Embedding(CLASSES + 1, WIDTH)
        self.read = nn.Linear(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.write = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        angle = time.to(x)[:, None] * self.omega.to(x)
        embedding = self.time_mlp(torch.cat([angle.cos(), angle.sin()], 1))
        label = torch.full((len(x),), CLASSES, device=x.device) if label is None else label
        embedding = functional.silu(embedding + self.label(label))
        h = self.read(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.write(self.norm(h)).reshape(x.shape)


def wrapped(network: nn.Module) -> fs.Denoiser:
    """The denoiser of a network like this one."""
    info = fs.ModelInfo(
        name="distill teacher", shape=SHAPE, data_range=(-1.0, 1.0), conditions={"label": {"classes": 10, "null": 10}}
    )
    return fs.Denoiser(network, fs.schedules.Flow(), "flow", info=info)


def load() -> fs.Denoiser:
    """The teacher of the committed file."""
    network = DigitsNetwork()
    with safe_open(FILE, framework="pt") as file:
        network.load_state_dict({name: file.get_tensor(name).float() for name in list(file.keys())})
    return wrapped(network.eval().requires_grad_(False))


def labels_of(count: int) -> Tensor:
    """Every digit equally often."""
    return torch.arange(count) % 10


@torch.no_grad()
def sampled(denoiser: Any, plan: fs.Plan, count: int, seed: int, block: int = 500) -> Tensor:
    """Samples of every digit equally often, sample k from the noise of the seed + k."""
    parts = []
    for first in range(0, count, block):
        seeds = range(seed + first, seed + min(first + block, count))
        cond = {"label": labels_of(count)[first : first + block]}
        parts.append(fs.sample(denoiser, fs.draw_noise(SHAPE, seeds, plan), plan, cond=cond, seeds=seeds))
    return torch.cat(parts)


def write_json(out: Path, merged: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Change a file of results that several processes write: one at a time, each from what the file holds then.

    Args:
        out: the file.
        merged: from what it holds, ``{}`` if it is not there, to what it shall hold.

    Returns:
        what it holds then.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(tempfile.gettempdir()) / f"{out.resolve().as_posix().replace('/', '_')}.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        made = merged(json.loads(out.read_text()) if out.exists() else {})
        written = out.with_name(f".{out.name}.new")
        written.write_text(json.dumps(made, indent=1) + "\n")
        written.replace(out)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the teacher of the benchmark of distillation.")
    parser.add_argument("--out", type=Path, default=FILE, help="where the weights go")
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    network, began = DigitsNetwork(), time.process_time()
    loss = fs.train.DenoisingLoss(fs.schedules.Flow(), "flow", times="logit_normal", dropout=fs.train.LabelDropout(CLASSES))
    settings = {"steps": options.steps, "batch_size": 256, "learning_rate": 2e-3, "ema": 0.995, "seed": options.seed}
    result = fs.fit(loss, network, digits("train"), **settings, log_every=500)
    weights = {name: value.half().contiguous() for name, value in result.averages[0.995].items()}
    told = {"command": "python benchmarks/distill_teacher.py", **settings, "cpu_seconds": round(time.process_time() - began)}
    told |= {"parameters": sum(p.numel() for p in network.parameters()), "loss": result.log[-1]["squared_error"]}
    save_file(weights, options.out, metadata={"training": json.dumps(told)})
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
