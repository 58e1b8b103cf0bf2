"""What do 4-bit products cost in accuracy, and save in operations? ``python benchmarks/int4.py`` writes ``benchmarks/results/int4.json``.

*vision*: a transformer of 2 layers and width 48 on the 8 x 8 digits (16 pieces of 2 x 2 pixels), accuracy on the 360 held-out ones.
*outlier*: the same with a channel thirty times as large as the others before the second layer. *characters*: the character model of width
64 and depth 2 on Python's documentation, loss on held-out text. All linear layers but the first of *vision* and the head have 4-bit
products, with and without the Hadamard rotation. Same data, first weights and optimizer as float32, whose learning rate is the best of
three; the 4-bit runs use the same, and learn their steps at 0.002, ten times the authors' rate, as the runs are short. The bars: at most
2.0 points below float32 on *vision*, and without the rotation more than 5 points below on *outlier*. Time is that of the emulation: there
is no speed in it.

*moments*: bias and spread of the two gradients over 4,000 draws, over the exact gradient's norm; in the gradient of the weight with the
probabilities of the paper and with powers of two.

``--parts vision`` measures a part and leaves the others in the file as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import character_model as characters
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.train import convert_to_int4_training, fit, int4
from fewstep.train.recipes import digits

RESULTS = Path(__file__).parent / "results" / "int4.json"
RATES = (1e-3, 2e-3, 4e-3)
STEP_RATE = 2e-3
WAYS: dict[str, dict[str, Any] | None] = {"float32": None, "int4": {}, "no rotation": {"block": 1}}
OUTLIER = 30.0


class Vision(nn.Module):
    """Logits of ten classes from images ``"batch 1 8 8"``; one entry of every piece may be far larger than the others."""

    def __init__(self, outlier: float = 1.0, width: int = 48, depth: int = 2):
        super().__init__()
        self.register_buffer("scale", torch.ones(width))
        self.scale[3] = outlier
        self.pieces, self.places = nn.Linear(4, width), nn.Parameter(0.02 * torch.randn(16, width))
        self.mix = nn.Linear(width, width)
        self.blocks = nn.ModuleList(VisionBlock(width, 4) for _ in range(depth))
        self.normalisation, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.unfold(images, 2, stride=2).transpose(1, 2)
        x = self.mix(self.scale * (self.pieces(x) + self.places))
        for block in self.blocks:
            x = block(x)
        return self.head(self.normalisation(x).mean(1))


class VisionBlock(characters.Block):
    """The block of the character model, without the causal mask."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.queries_keys_values(self.before_attention(x)).chunk(3, -1)
        query, key, value = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        x = x + self.out(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.before_mixing(x))))


def classify(model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    return functional.cross_entropy(model(batch["x"]), batch["label"]), {}


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """In points, on the held-out digits."""
    held_out = digits("held_out")
    return 100.0 * float((model.eval()(held_out["x"]).argmax(1) == held_out["label"]).float().mean())


def trained(
    make: Callable[[], nn.Module],
    objective: Any,
    data: Any,
    judge: Callable[[nn.Module], float],
    way: str,
    seed: int,
    *,
    skip: Sequence[str] = ("head",),
    **options: Any,
) -> dict[str, Any]:
    """One run: its figure, seconds a step, and counted operations."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        settings = WAYS[way]
        conversion = None if settings is None else convert_to_int4_training(model, skip=skip, **settings)
        optimizer = torch.optim.AdamW if conversion is None else conversion.optimizer(torch.optim.AdamW, step_rate=STEP_RATE)
        began = time.process_time()
        fit(objective, model, data, optimizer=optimizer, warmup=20, ema=(), seed=seed, **options)
        seconds = (time.process_time() - began) / options["steps"]
        done = None if conversion is None else conversion.operations()
        row: dict[str, Any] = {"way": way, "seed": seed, "figure": judge(model), "milliseconds_a_step": round(1e3 * seconds, 1)}
        if conversion is not None and done is not None:
            row |= {"integer_over_dense": done.integer / done.dense, "rotations_over_dense": done.rotation / done.dense}
            row["blocks"] = [int(layer.hadamard_block) for layer in conversion.layers.values()]
            row |= afterwards(conversion, judge)
    return row


def afterwards(conversion: Any, judge: Callable[[nn.Module], float]) -> dict[str, float]:
    """The figure as an ordinary model, with the weights that the products saw, and with those that were trained."""
    weights = {name: layer.weight.detach().clone() for name, layer in conversion.layers.items()}
    model = conversion.revert(quantised=True)
    found = {"with_quantised_weights_afterwards": judge(model)}
    for name, weight in weights.items():
        model.get_submodule(name).weight.data.copy_(weight)
    return found | {"in_float32_afterwards": judge(model)}


def study(name: str, ways: Sequence[str], seeds: int, run: Callable[..., dict[str, Any]], better: int) -> dict[str, Any]:
    """Float32 at its best learning rate (seed 100, which no run has), then every way with it."""
    found = {rate: run("float32", 100, learning_rate=rate)["figure"] for rate in RATES}
    rate = max(found, key=lambda each: better * found[each])
    rows = []
    for way in ways:
        rows += [run(way, seed, learning_rate=rate) for seed in range(seeds)]
        mine = [row["figure"] for row in rows if row["way"] == way]
        reference = [row["figure"] for row in rows if row["way"] == "float32"]
        gaps = [ours - theirs for ours, theirs in zip(mine, reference, strict=True)]
        told = rows[-1]
        counts = f", integer/dense {told['integer_over_dense']:.3f}" if "integer_over_dense" in told else ""
        each = ", ".join(f"{gap:+.2f}" for gap in gaps)
        figures = f"{statistics.mean(mine):8.3f} gap {statistics.mean(gaps):+.3f} (each {each})"
        print(f"{name:10} {way:12} {figures} {told['milliseconds_a_step']} ms a step{counts}", flush=True)
    return {"learning_rate": rate, "learning_rates": {str(k): v for k, v in found.items()}, "rows": rows}


def moments(draws: int = 4000) -> dict[str, float]:
    """Bias and spread of the gradients of one layer, of 256 rows, 64 in and 32 out, over the norm of the exact ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gradient = (torch.randn(256, 32) * torch.rand(256, 1) ** 3).double()
        x, weight = (torch.randint(-8, 8, shape) for shape in ((256, 64), (32, 64)))
        exact = {"input": gradient @ weight.double(), "weight": gradient.T @ x.double()}
        found: dict[str, list[Tensor]] = {}
        for _ in range(draws):
            codes, unit = int4.split_bits(gradient)
            rows = int4._Rows(codes, unit, 256, 0.5)
            norms = rows._norms() * x.double().norm(dim=1).repeat(2)
            index, factor = rows._sample(norms, int4.keep_probabilities)
            paper = (rows.codes[index] * factor[:, None]).T @ x[index % 256].double() * unit
            drawn = {"input": rows.times(weight, int4.Operations()), "weight": rows.transposed_times(x, int4.Operations())}
            for name, value in (drawn | {"weight, probabilities of the paper": paper}).items():
                total = found.setdefault(name, [torch.zeros_like(value), torch.zeros_like(value)])
                total[0] += value
                total[1] += value.square()
    told = {}
    for name, (first, second) in found.items():
        wanted, mean = exact[name.partition(",")[0]], first / draws
        spread = (second / draws - mean.square()).clamp_min(0.0).sum().sqrt() / wanted.norm()
        told |= {f"{name}: bias": float((mean - wanted).norm() / wanted.norm()), f"{name}: spread": float(spread)}
        told[f"{name}: bias expected of unbiased draws"] = float(spread) / math.sqrt(draws)
    for name, value in told.items():
        print(f"{name:60} {value:.5f}")
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure training with 4-bit products.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--steps", type=int, default=400, help="of every run")
    parser.add_argument("--seeds", type=int, default=3, help="of every way")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="what to measure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    told = json.loads(options.out.read_text()) if options.out.exists() else {}
    told |= {"command": "python benchmarks/int4.py", "machine": "one core of a 2-core machine", "torch": torch.__version__}
    for part in options.parts:
        began = time.process_time()
        found = PARTS[part](options)
        command = f"python benchmarks/int4.py --parts {part} --steps {options.steps} --seeds {options.seeds}"
        told[part] = {"command": command, **found, "seconds_of_the_processor": round(time.process_time() - began, 1)}
        options.out.write_text(json.dumps(told, indent=1) + "\n")
    return 0


def vision(options: argparse.Namespace, outlier: float = 1.0, ways: Sequence[str] = ("float32", "int4")) -> dict[str, Any]:
    def run(way: str, seed: int, **more: Any) -> dict[str, Any]:
        made = (lambda: Vision(outlier), classify, digits(), accuracy)
        return trained(*made, way, seed, steps=options.steps, batch_size=32, skip=("pieces", "head"), **more)

    return study("vision" if outlier == 1.0 else "outlier", ways, options.seeds, run, 1)


def outlier(options: argparse.Namespace) -> dict[str, Any]:
    return vision(options, OUTLIER, ("float32", "int4", "no rotation"))


def on_characters(options: argparse.Namespace) -> dict[str, Any]:
    text = characters.sampler(characters.text(), 64)

    def run(way: str, seed: int, **more: Any) -> dict[str, Any]:
        made = (lambda: characters.CharacterModel(64, 2), characters.next_character, text, held_out)
        return trained(*made, way, seed, steps=options.steps, batch_size=8, **more)

    return study("characters", ("float32", "int4"), options.seeds, run, -1)


def held_out(model: nn.Module) -> float:
    return characters.held_out_loss(model, 64, 128)


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "moments": lambda options: moments(),
    "vision": vision,
    "outlier": outlier,
    "characters": on_characters,
}

if __name__ == "__main__":
    raise SystemExit(main())
