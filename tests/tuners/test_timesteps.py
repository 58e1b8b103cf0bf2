"""Searched times: better than every rule on noise the search never saw, distinct, reproducible, on discrete and continuous times."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.tuners import Effort
from fewstep.tuners.draws import Draws
from fewstep.tuners.preparation import prepare
from fewstep.tuners.task import Counted, errors_of
from fewstep.tuners.timesteps import search_times

EFFORT = Effort(trajectories=384, held_out=256, pool=4, reference_calls=64)
SOLVER = fs.solvers.DPMSolverPP(order=2)


def mixture(schedule):
    return fs.exact.GaussianMixture(schedule, [[1.0, 0.5], [-1.0, -0.3], [0.2, -1.2]], [0.1, 0.2, 0.15], [0.3, 0.5, 0.2])


def task_of(denoiser, effort=EFFORT):
    schedule = denoiser.schedule
    noise = fs.draw_noise((2,), range(64), dtype=torch.float64) * float(schedule.sigma(schedule.t_start))
    counted = Counted(denoiser, 512)
    return prepare(counted, Draws(counted, noise, {}, 0), effort, final="t_end", seed=0)


@pytest.mark.parametrize("method", ["evolution", "continuous"])
@pytest.mark.parametrize("seed", [0, 1])
def test_searched_times_beat_the_rules_on_other_noise(method, seed):
    """0.7 of the best of three rules, in 200 evaluations: the bar for AutoDiffusion's evolution at five calls of DPM-Solver++ 2M."""
    schedule = fs.schedules.VPLinear(t_end=0.01)
    denoiser = mixture(schedule)
    found = search_times(task_of(denoiser), 5, SOLVER, method=method, evaluations=200, seed=seed)
    noise = fs.draw_noise((2,), range(9000, 9512), dtype=torch.float64)
    exact = fs.reference(denoiser, noise, schedule, tol=1e-7).plain()
    grids = [errors_of(fs.sample(denoiser, noise, SOLVER.plan(schedule, 5, grid)), exact) for grid in ("time", "lambda", "karras")]
    mine = errors_of(fs.sample(denoiser, noise, SOLVER.plan(schedule, grid=found.times)), exact)
    assert found.tried <= 200
    assert mine.rms < 0.7 * min(errors.rms for errors in grids)
    assert mine.median < 0.35 * min(errors.median for errors in grids)


@pytest.mark.parametrize("method", ["evolution", "continuous"])
@pytest.mark.parametrize("schedule", [fs.schedules.EDM(), fs.schedules.Flow(t_end=0.0)], ids=["EDM", "Flow to 0"])
def test_times_are_distinct_and_keep_their_ends(method, schedule):
    found = search_times(task_of(mixture(schedule)), 4, SOLVER, method=method, evaluations=60)
    assert (found.times[0], found.times[-1]) == (schedule.t_start, schedule.t_end)
    assert (np.diff(schedule.lam(found.times)) > 0.0).all()
    again = search_times(task_of(mixture(schedule)), 4, SOLVER, method=method, evaluations=60)
    np.testing.assert_array_equal(found.times, again.times)


def test_a_discrete_model_gets_times_of_its_table():
    schedule = fs.schedules.FromBetas(np.linspace(1e-4, 0.02, 50).tolist())
    task = task_of(mixture(schedule))
    found = search_times(task, 6, SOLVER, evaluations=300)
    entries = found.times * 50
    rules = [task.judge(grid, SOLVER.plan(schedule, 6, grid)).errors.rms for grid in ("time", "lambda", "karras")]
    assert task.judge("searched", SOLVER.plan(schedule, grid=found.times)).errors.rms < min(rules)
    np.testing.assert_allclose(entries, entries.round(), atol=1e-9)
    assert len(set(entries.round())) == 7
    few = fs.schedules.FromBetas([0.1, 0.2, 0.5])
    with pytest.raises(ValueError, match="3 times between the ends, but the model has 1"):
        search_times(task_of(mixture(few)), 4, SOLVER)


def test_any_objective_of_samples():
    """Samples that shall be far to the right end farther there than those that shall be exact."""
    task = task_of(mixture(fs.schedules.VPLinear()))

    def left(samples):
        return -float(samples[:, 0].mean())

    pushed = search_times(task, 3, SOLVER, evaluations=80, objective=left)
    plain = search_times(task, 3, SOLVER, evaluations=80)
    means = [-left(task.run(SOLVER.plan(task.schedule, grid=found.times), task.held_out)) for found in (pushed, plain)]
    assert means[0] > means[1] + 0.01


def test_one_call_has_nothing_to_search():
    found = search_times(task_of(mixture(fs.schedules.VPLinear())), 1, SOLVER)
    assert found.times.tolist() == [1.0, 1e-3]


def test_what_is_wrong_is_said():
    task = task_of(mixture(fs.schedules.VPLinear()), Effort(trajectories=4, held_out=4, pool=1))
    with pytest.raises(ValueError, match="evolution"):
        search_times(task, 3, SOLVER, method="evolutoin")
    with pytest.raises(ValueError, match="one call a step"):
        search_times(task, 3, fs.solvers.DPMSolverSinglestep())
    with pytest.raises(ValueError, match="at least 1 evaluation"):
        search_times(task, 3, SOLVER, evaluations=0)


def test_it_is_a_method_of_tune():
    denoiser = mixture(fs.schedules.VPLinear(t_end=0.01))
    noise = fs.draw_noise((2,), range(64), dtype=torch.float64)
    tuned = fs.tune(denoiser, nfe=4, noise=noise, method="timesteps", effort=EFFORT)
    names = [candidate.name for candidate in tuned.candidates[4][1:]]
    assert [name.split(",")[0] for name in names] == ["timesteps: evolution", "timesteps: continuous"]
    assert tuned.report["plans"]["4"]["ratio"] < 0.8
