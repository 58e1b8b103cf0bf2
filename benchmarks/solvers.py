r"""How far from the exact solution is each solver? ``python benchmarks/solvers.py`` writes ``benchmarks/results/solvers.json``.

On the two models that come along and on an exact Gaussian mixture: the root mean square distance, from the same noise, to the solution of
the probability-flow ODE. Ours and diffusers' classes, every one with each of its time grids and both ways to end. For a solver and model
the setting of least error (geometric mean over some numbers of calls) is chosen on noise that is used for nothing else; what is reported
was measured on other noise. A setting that ends at sigma = 0 is compared with the exact solution there, which is the exact state at
`t_end` followed by one prediction of the data.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers import diffusers_settings
from torch import Tensor
from tqdm import tqdm

import fewstep as fs

RESULTS = Path(__file__).parent / "results" / "solvers.json"
SOLVERS = ("auto", "ddim", "dpmpp_2m", "dpmpp_2m_taylor", "dpmpp_3m", "dpmpp_3m_official", "deis", "ipndm", "unipc")
GRIDS = ("auto", "time", "quadratic", "lambda", "karras", "beta")
NFES = (4, 5, 6, 8, 10, 15, 20, 30)
SHOWN = (5, 6, 8, 10, 15, 20)
CHOOSING = (5, 8, 12, 20)
OTHER_SEEDS = 1_000_000


@dataclass(frozen=True)
class Contestant:
    solver: str
    grid: str
    final: str
    run: Callable[[Any, Tensor, int, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Problem:
    """Noise, and the exact solutions at both ends."""

    denoiser: Any
    noise: Tensor
    cond: dict[str, Any]
    exact: dict[str, Tensor]
    exact_error: float

    def error(self, contestant: Contestant, nfe: int) -> float:
        samples = contestant.run(self.denoiser, self.noise, nfe, self.cond)
        return float((samples - self.exact[contestant.final]).double().square().mean().sqrt())


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the solvers against the exact solution.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--models", default="digits,photos,mixture", help="names, separated by commas")
    parser.add_argument("--count", type=int, default=64, help="samples that are measured")
    parser.add_argument("--choose", type=int, default=16, help="samples that settings are chosen on")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, notes = [], {}
    for name in options.models.split(","):
        began = time.perf_counter()
        found, notes[name] = measure(name, options)
        rows += found
        notes[name]["seconds"] = round(time.perf_counter() - began)
    report = {
        "title": "Root mean square distance to the exact solution, every solver at its best time grid",
        "command": "python benchmarks/solvers.py",
        "machine": "one core of a 2-core machine",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **peer_versions()},
        "seed": options.seed,
        "samples": options.count,
        "samples_to_choose_on": options.choose,
        "shown": list(SHOWN),
        "models": notes,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        print(f"{row['model']:8} {row['solver']:22} {row['grid']:28} {row['nfe']:3} {row['error']:.3e}")
    return 0


def measure(name: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    denoiser = open_model(name)
    everyone = contestants(denoiser.schedule)
    bar = tqdm(total=len(everyone) * len(CHOOSING), desc=f"{name}: choosing", unit="run")
    trial = problem(denoiser, OTHER_SEEDS + options.seed, options.choose)
    scores: dict[str, list[tuple[float, Contestant]]] = {}
    for contestant in everyone:
        errors = []
        for nfe in CHOOSING:
            errors.append(trial.error(contestant, nfe))
            bar.update()
        score = math.exp(sum(map(math.log, errors)) / len(errors)) if all(map(math.isfinite, errors)) else math.inf
        scores.setdefault(contestant.solver, []).append((score, contestant))
    bar.close()
    real = problem(denoiser, options.seed, options.count)
    chosen = {solver: min(found, key=lambda pair: pair[0])[1] for solver, found in scores.items()}
    rows = []
    for solver, contestant in tqdm(chosen.items(), desc=f"{name}: measuring", unit="solver"):
        grid = contestant.grid + (", to zero" if contestant.final == "zero" else "")
        rows += [{"model": name, "solver": solver, "grid": grid, "nfe": n, "error": real.error(contestant, n)} for n in NFES]
    tried = {
        solver: {f"{c.grid}, {c.final}": score if math.isfinite(score) else None for score, c in found}
        for solver, found in scores.items()
    }
    return rows, {"exact_error": real.exact_error, "tried": tried}


def contestants(schedule: fs.schedules.NoiseSchedule) -> list[Contestant]:
    def planned(solver: str, grid: str, final: str) -> Contestant:
        def run(denoiser: Any, noise: Tensor, nfe: int, cond: dict[str, Any]) -> Tensor:
            return fs.sample(denoiser, noise, fs.make_plan(solver, schedule, nfe, grid=grid, final=final), cond=cond)

        return Contestant(solver, grid, final, run)

    grids = {"auto": ("auto",)}  # that is the solver and the grid; the others choose
    ours = [planned(solver, grid, final) for solver in SOLVERS for grid in grids.get(solver, GRIDS) for final in ("t_end", "zero")]
    return ours + [Contestant(s.solver, s.options, s.final, s.run) for s in diffusers_settings(schedule)]


def open_model(name: str) -> Any:
    if name != "mixture":
        return fs.load(name)
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    spread = torch.rand(8, 6, generator=generator, dtype=torch.float64) * 0.15 + 0.02
    return fs.exact.GaussianMixture(fs.schedules.VPLinear(), means, torch.diag_embed(spread))


def problem(denoiser: Any, first_seed: int, count: int) -> Problem:
    schedule, exactly = denoiser.schedule, isinstance(denoiser, fs.exact.GaussianMixture)
    shape = (6,) if exactly else denoiser.info.shape
    noise = fs.draw_noise(shape, range(first_seed, first_seed + count), dtype=torch.float64 if exactly else torch.float32)
    noise = noise * float(schedule.sigma(schedule.t_start))
    cond = {"label": torch.arange(count) % 10} if not exactly and denoiser.info.conditions else {}
    exact = fs.reference(denoiser, noise, schedule, tol=1e-8 if exactly else 3e-4, cond=cond)
    end = schedule.t_end
    with torch.no_grad():
        last = denoiser(exact, end, **cond)
    return Problem(denoiser, noise, cond, {"t_end": exact, "zero": last}, float(exact.error))


def peer_versions() -> dict[str, str]:
    diffusers = importlib.import_module("diffusers")

    return {"diffusers": diffusers.__version__}


if __name__ == "__main__":
    raise SystemExit(main())
