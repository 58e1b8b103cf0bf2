"""The worked example of CONTRIBUTING.md is a solver: it runs, claims an order and keeps it."""

import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from cases import FINITE

import fewstep as fs

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def example():
    source = next(block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "(Solver)" in block)
    module = sys.modules["bashforth"] = types.ModuleType("bashforth")  # dataclasses look their module up
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    (name,) = module.__all__
    return getattr(module, name)


@pytest.mark.parametrize("schedule", FINITE.values(), ids=FINITE)
def test_the_example_has_the_order_it_claims(schedule):
    solver = example()()
    denoiser = fs.exact.GaussianMixture(schedule, torch.tensor([[1.0, 0.5], [-1.0, -0.3]], dtype=torch.float64), 0.1)
    noise = fs.draw_noise((2,), range(16), dtype=torch.float64) * float(schedule.sigma(schedule.t_start))
    exact = fs.reference(denoiser, noise, schedule, tol=1e-10)
    errors = [
        float((fs.sample(denoiser, noise, solver.plan(schedule, n, "lambda")) - exact).square().mean().sqrt()) for n in (80, 160)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(solver.claimed_order, abs=0.15)


def test_the_example_handles_both_ends_and_every_number_of_calls():
    solver = example()()
    for schedule in (fs.schedules.Flow(t_end=0.0), fs.schedules.VPCosine(t_start=1.0, t_end=0.0), fs.schedules.EDM()):
        for nfe in range(1, 31):
            for final in ("t_end", "zero"):
                plan = solver.plan(schedule, nfe, final=final)
                assert plan.nfe == nfe
                samples = fs.sample(lambda x, t: 0.3 * x, torch.ones(1, 2), plan)
                assert bool(torch.isfinite(samples).all())
