"""The choice of a time shift and of epsilon scaling's factor: a biased network is put right in part, and nothing is ever made worse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.solvers import DDIM, DPMSolverPP, EpsilonScale
from fewstep.tuners import epsilon_scale, time_shift, trace_paths
from fewstep.tuners.judge import mean_error

VP = fs.schedules.VPLinear()
SIZE = 256


def sound():
    """An exact mixture of four Gaussians in 256 dimensions, of about unit second moment."""
    means = np.random.default_rng(0).normal(size=(4, SIZE)) * 0.5
    return fs.exact.GaussianMixture(VP, means, [0.05] * 4)


def biased(factor):
    """The same with its noise prediction scaled."""
    exact = sound()

    def denoise(x, t):
        alpha = torch.as_tensor(VP.alpha(t)).reshape(-1, 1)
        return (x - factor * (x - alpha * exact(x, t))) / alpha

    denoise.schedule = VP
    return denoise


@pytest.fixture(scope="module")
def paths():
    return trace_paths(sound(), fs.draw_noise((SIZE,), range(128), dtype=torch.float64), VP, calls=128)


@pytest.fixture(scope="module")
def others():
    return trace_paths(sound(), fs.draw_noise((SIZE,), range(9000, 9128), dtype=torch.float64), VP, calls=128)


def loss(denoiser, plan, paths, hooks=None):
    return mean_error(fs.sample(denoiser, paths.noise, plan, hooks=hooks), paths.target)


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_the_factor_puts_a_biased_network_right(factor, paths, others):
    """In 20 calls of 2M nearly all of the error is the bias; the factor undoes it."""
    denoiser, solver = biased(factor), DPMSolverPP(order=2)
    chosen = epsilon_scale(denoiser, solver, paths=paths, nfe=20, grid="lambda")
    assert chosen.scale == pytest.approx(factor, abs=5e-3)
    before, after = (loss(denoiser, each.plan(VP, 20, "lambda"), others) for each in (solver, chosen.solver))
    assert after < 0.3 * before


@pytest.mark.parametrize("nfe", [5, 10, 20])
def test_a_shift_of_a_biased_network_is_no_worse_than_none(nfe, paths, others):
    denoiser, plan = biased(0.98), DDIM().plan(VP, nfe, "time")
    chosen = time_shift(denoiser, plan, paths=paths)
    told = chosen.report["held_out"]
    assert told["chosen"] <= told["none"]
    before, after = (loss(denoiser, plan, others, hooks) for hooks in (None, chosen.hooks))
    assert after <= 1.01 * before  # other noise: a hundredth for its noise


def test_sound_networks_in_many_calls_get_next_to_no_correction(paths, others):
    denoiser, solver = sound(), DPMSolverPP(order=3)
    plan = solver.plan(VP, 40, "lambda")
    scaled = epsilon_scale(denoiser, solver, paths=paths, nfe=40, grid="lambda")
    assert scaled.scale == pytest.approx(1.0, abs=3e-3)
    assert loss(denoiser, scaled.solver.plan(VP, 40, "lambda"), others) <= 1.01 * loss(denoiser, plan, others)
    shifted = time_shift(denoiser, plan, paths=paths)
    assert loss(denoiser, plan, others, shifted.hooks) <= 1.01 * loss(denoiser, plan, others)


def test_none_is_none_to_the_bit(paths):
    """With windows of 0 every choice is as good as none, and none is taken."""
    plan = DDIM().plan(VP, 5, "time")
    chosen = time_shift(sound(), plan, paths=paths, windows=(0.0,), cutoffs=(0.0,))
    assert chosen.hook is None
    assert len(chosen.report["tried"]) == 3
    samples = [fs.sample(sound(), paths.noise, plan, hooks=hooks) for hooks in (None, chosen.hooks)]
    assert torch.equal(*samples)


def test_an_objective_of_the_samples_decides(paths):
    """With the bias of the network's own paths unknown to it, the second moment of the data leads to the same factor."""
    denoiser, second = biased(0.98), float(paths.target.square().mean())

    def objective(samples):
        return abs(float(samples.square().mean()) - second)

    own = trace_paths(denoiser, paths.noise, VP, calls=64)
    chosen = epsilon_scale(denoiser, DPMSolverPP(order=2), paths=own, nfe=20, grid="lambda", objective=objective)
    assert chosen.scale == pytest.approx(0.98, abs=1e-2)
    assert isinstance(chosen.solver, EpsilonScale)


def test_what_cannot_be_chosen_is_refused(paths):
    with pytest.raises(ValueError, match="draws noise"):
        time_shift(sound(), fs.make_plan("ddpm", VP, 5), paths=paths)
    with pytest.raises(ValueError, match="4 paths are too few"):
        epsilon_scale(sound(), DDIM(), paths=paths.take(slice(4)), nfe=5)
