"""Ancestral solvers against their steps written out in y = x / alpha, in their limits, and in what they keep of the noise level."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import FINITE, SCHEDULES
from test_solvers import mixture, noise, same

import fewstep as fs
from fewstep.noise import BrownianPath
from fewstep.solvers import DDIM, DPM2Ancestral, DPMPP2SAncestral, EulerAncestral, FlowAncestral

SEEDS = range(16)
SECOND = [DPM2Ancestral, DPMPP2SAncestral]
ALL = [EulerAncestral, FlowAncestral, *SECOND]


def below(here, there, eta):
    up = min(there, eta * math.sqrt(there**2 * (here**2 - there**2) / here**2))
    return math.sqrt(there**2 - up**2), up


def written_out(kind, schedule, denoiser, x, times, xi, eta, s_noise):
    """Line by line, in y = x / alpha and sigma / alpha; xi[k] is the noise of step k."""

    def denoise(y, level):
        t = float(schedule.t_of_lam(-math.log(level)))
        return denoiser(y * float(schedule.alpha(t)), t)

    levels = np.exp(-schedule.lam(times)).tolist()
    y = x / float(schedule.alpha(times[0]))
    for k, (here, there) in enumerate(pairwise(levels)):
        down, up = below(here, there, eta)
        d = denoise(y, here)
        slope = (y - d) / here
        if down == 0.0 or kind is EulerAncestral:
            y = y + slope * (down - here)
        else:
            middle = math.exp(0.5 * (math.log(here) + math.log(down)))
            inner = y + slope * (middle - here)
            second = denoise(inner, middle)
            if kind is DPM2Ancestral:
                y = y + (inner - second) / middle * (down - here)
            else:
                y = down / here * y + (1.0 - down / here) * second
        y = y + xi[k] * s_noise * up
    return y * float(schedule.alpha(times[-1]))


def draws(plan):
    path = BrownianPath(SEEDS, (2,))
    found = [torch.from_numpy(path.normalised(r.noise.begin, r.noise.end)) for r in plan.rows if r.noise is not None]
    return [*found, torch.zeros(len(SEEDS), 2, dtype=torch.float64)]  # none is drawn at the end


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("kind", [EulerAncestral, *SECOND])
@pytest.mark.parametrize(("eta", "s_noise"), [(1.0, 1.0), (0.6, 1.1)])
def test_steps_written_out(name, kind, eta, s_noise):
    schedule = FINITE[name]
    for final in ("t_end", "zero"):
        times = fs.grids.make_grid("lambda", schedule, 7, final=final)
        plan, x = kind(eta, s_noise).plan(schedule, grid=times), noise(schedule)
        wanted = written_out(kind, schedule, mixture(schedule), x, times, draws(plan), eta, s_noise)
        torch.testing.assert_close(fs.sample(mixture(schedule), x, plan, seeds=SEEDS), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("eta", "s_noise"), [(1.0, 1.0), (0.4, 1.1)])
def test_the_step_of_flows_written_out(eta, s_noise):
    schedule = fs.schedules.Flow(t_end=0.0)
    plan, x = FlowAncestral(eta, s_noise).plan(schedule, 6, grid="time"), noise(schedule)
    ours, drawn = fs.sample(mixture(schedule), x, plan, seeds=SEEDS), draws(plan)
    for k, (here, there) in enumerate(pairwise(schedule.sigma(plan.grid).tolist())):
        down = there * (1.0 + (there / here - 1.0) * eta)
        x = down / here * x + (1.0 - down / here) * mixture(schedule)(x, float(plan.tau[k]))
        share = (1.0 - there) / (1.0 - down)
        x = share * x + math.sqrt(there**2 - down**2 * share**2) * s_noise * drawn[k]
    torch.testing.assert_close(ours, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("final", ["t_end", "zero"])
def test_without_noise_they_solve_the_ode(name, final):
    schedule = SCHEDULES[name]
    single = {DPM2Ancestral: "dpm_2s", DPMPP2SAncestral: "dpmpp_2s", EulerAncestral: "ddim", FlowAncestral: "ddim"}
    for kind, other in single.items():
        for n in (1, 4, 9):
            plan = kind(eta=0.0).plan(schedule, n, final=final)
            assert not plan.stochastic
            same(plan, fs.make_plan(other, schedule, n, final=final), schedule, 1e-9)
        assert kind(eta=0.0).claimed_order == fs.solvers.make_solver(other).claimed_order


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", [1e-9, 0.5, 1.0])
def test_euler_is_ddim_with_the_same_eta(name, eta):
    schedule = SCHEDULES[name]
    same(EulerAncestral(eta).plan(schedule, 8), DDIM(eta).plan(schedule, 8), schedule)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", [EulerAncestral, FlowAncestral, DPMPP2SAncestral])
def test_constant_data_keep_their_noise_level(name, kind):
    """The variance of what the run draws, and keeps, is sigma^2 at every state. (DPM2's step is not exact for constant data.)"""
    schedule = SCHEDULES[name]
    plan = kind(eta=0.7).plan(schedule, 9)
    assert plan.stochastic
    dense, first = plan.dense(), float(schedule.sigma(plan.grid[0]))
    variance = (dense.A * first) ** 2 + (dense.C**2).sum(1)
    np.testing.assert_allclose(variance, schedule.sigma(plan.grid) ** 2, rtol=1e-9)


@pytest.mark.parametrize("kind", SECOND)
def test_the_second_call_lies_at_the_end_at_eta_1(kind):
    plan = kind().plan(fs.schedules.VPLinear(), 9, grid="lambda")
    assert plan.tau[1:-2:2].tolist() == plan.tau[2:-1:2].tolist()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": -0.1}, r"\[0, 1\], got -0.1"),
        ({"eta": 1.1}, r"\[0, 1\], got 1.1"),
        ({"s_noise": 0.0}, "positive, got 0"),
        ({"s_noise": math.inf}, "positive, got inf"),
    ],
)
def test_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)
