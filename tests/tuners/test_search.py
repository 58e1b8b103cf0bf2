"""Searched recipes: half the error of the best published solver, always the right number of calls, reproducible."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.errors import MissingExtraError
from fewstep.tuners import Effort
from fewstep.tuners.draws import Draws
from fewstep.tuners.preparation import prepare
from fewstep.tuners.search import _Breeder, search_recipe
from fewstep.tuners.task import UNTUNED, Counted, errors_of

EFFORT = Effort(trajectories=64, held_out=32, pool=1, reference_calls=64)
PUBLISHED = {name: solver for name, solver in UNTUNED.items() if name != "auto" and not name.startswith("flow_adams")}


def mixture(schedule, size=2):
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(5, size, generator=generator, dtype=torch.float64)
    return fs.exact.GaussianMixture(schedule, means, 0.02 + 0.1 * torch.rand(5, size, generator=generator, dtype=torch.float64))


def start(denoiser, seeds):
    schedule = denoiser.schedule
    return fs.draw_noise(denoiser.draw(1, 0).shape[1:], seeds, dtype=torch.float64) * float(schedule.sigma(schedule.t_start))


def task_of(denoiser, effort=EFFORT):
    counted = Counted(denoiser, 512)
    return prepare(counted, Draws(counted, start(denoiser, range(64)), {}, 0), effort, final="t_end", seed=0)


@pytest.fixture
def quick(monkeypatch):
    """Little evolution against the predictor, which takes most of the time."""
    monkeypatch.setattr("fewstep.tuners.search.GENERATIONS", 2)
    monkeypatch.setattr("fewstep.tuners.search.BRED", 20)


def test_half_the_error_of_the_best_published_solver():
    """NFE 5, 300 evaluations on 64 noises, judged on 256 others: the bar for a search of recipes."""
    denoiser = mixture(fs.schedules.EDM(), 16)
    found = search_recipe(task_of(denoiser), 5, evaluations=300)
    noise = start(denoiser, range(9000, 9256))
    exact = fs.reference(denoiser, noise, denoiser.schedule, tol=1e-6).plain()
    grids = ("time", "quadratic", "lambda", "karras")
    plans = [solver.plan(denoiser.schedule, 5, grid) for solver in PUBLISHED.values() for grid in grids]
    fixed = [errors_of(fs.sample(denoiser, noise, plan), exact) for plan in plans]
    mine = errors_of(fs.sample(denoiser, noise, found.plan), exact)
    assert found.tried == 300
    assert found.plan.nfe == 5
    assert mine.rms < 0.5 * min(errors.rms for errors in fixed)
    assert mine.median < 0.5 * min(errors.median for errors in fixed)


@pytest.mark.parametrize(
    "schedule",
    [fs.schedules.Flow(t_end=0.0), fs.schedules.FromBetas(np.linspace(1e-4, 0.02, 100).tolist())],
    ids=["Flow to 0", "discrete"],
)
@pytest.mark.parametrize("nfe", [1, 3])
def test_every_bred_recipe_makes_the_calls_that_were_asked_for(schedule, nfe):
    breeder = _Breeder(task_of(mixture(schedule), Effort(trajectories=8, held_out=4, pool=1)), nfe, 0)
    recipes = breeder.published()
    for _ in range(150):
        recipes.append(breeder.bred(recipes))
    assert {recipe.nfe for recipe in recipes} == {nfe}
    assert {recipe.first for recipe in recipes} >= {"network", "mean"}
    for recipe in recipes:
        assert (recipe.times[0], recipe.times[-1]) == (schedule.t_start, schedule.t_end)
        assert np.isfinite(breeder.features(recipe)).all()


@pytest.mark.usefixtures("quick")
def test_a_search_repeats_and_improves_on_what_it_starts_from():
    task = task_of(mixture(fs.schedules.VPLinear()))
    found, again = (search_recipe(task, 3, evaluations=100) for _ in range(2))
    assert found.recipe == again.recipe
    breeder = _Breeder(task, 3, 0)
    first = [errors_of(task.run(breeder.plan(recipe), task.held_out), task.held_out.target).rms for recipe in breeder.published()]
    assert errors_of(task.run(found.plan, task.held_out), task.held_out.target).rms < min(first)


@pytest.mark.usefixtures("quick")
def test_any_objective_of_samples():
    task = task_of(mixture(fs.schedules.VPLinear()))
    found = search_recipe(task, 3, evaluations=100, objective=lambda samples: -float(samples[:, 0].mean()))
    plain = search_recipe(task, 3, evaluations=100)
    means = [float(task.run(searched.plan, task.fit)[:, 0].mean()) for searched in (found, plain)]
    assert means[0] == pytest.approx(-found.loss)
    assert means[0] > means[1] + 0.01


@pytest.mark.usefixtures("quick")
def test_few_evaluations_and_one_call_end():
    task = task_of(mixture(fs.schedules.VPLinear()), Effort(trajectories=4, held_out=4, pool=1))
    assert search_recipe(task, 4, evaluations=3).tried == 3
    assert search_recipe(task, 1, evaluations=90).plan.nfe == 1
    with pytest.raises(ValueError, match="at least 1 evaluation"):
        search_recipe(task, 3, evaluations=0)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.gaussian_process", None)
    task = task_of(mixture(fs.schedules.VPLinear()), Effort(trajectories=4, held_out=4, pool=1))
    with pytest.raises(MissingExtraError, match=r"fewstep\[tune\]"):
        search_recipe(task, 3, evaluations=80)


@pytest.mark.usefixtures("quick")
def test_it_is_a_method_of_tune():
    denoiser = mixture(fs.schedules.EDM(), 4)
    tuned = fs.tune(denoiser, nfe=3, noise=start(denoiser, range(64)), method="recipe", effort=EFFORT)
    assert tuned.candidates[3][1].name == "recipe"
    assert tuned.plan.nfe == 3
