"""The numbers of a recipe: the recipe itself at their start, and found again where they are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import fewstep as fs
from fewstep.recipes import Recipe
from fewstep.solvers import Mixed
from fewstep.tuners.relaxations import Relaxations, polished

SCHEDULES = {"VPLinear": fs.schedules.VPLinear(), "Flow to 0": fs.schedules.Flow(t_end=0.0), "EDM": fs.schedules.EDM()}


def timed(schedule, **options):
    times = fs.grids.make_grid("karras", schedule, 5)
    return replace(Recipe.multistep(5, **options), times=tuple(times.tolist()))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("relaxation", ["none", "bh1", "bh2", "half_exp", "minus_half_exp"])
@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_the_numbers_of_a_recipe_make_its_plan(name, relaxation, prediction):
    schedule = SCHEDULES[name]
    recipe = timed(schedule, order=2, relaxation=relaxation, corrector=1, prediction=prediction)
    numbers = Relaxations(recipe, schedule)
    before, after = (Mixed(each).plan(schedule).dense() for each in (recipe, numbers.recipe(numbers.values)))
    np.testing.assert_allclose(np.array(after.B, float), np.array(before.B, float), rtol=1e-9, atol=1e-12)


def test_a_polish_finds_the_numbers_of_another_plan():
    """The dense coefficients as residuals: what remains of them is nothing."""
    schedule = fs.schedules.VPLinear()
    recipe = timed(schedule, order=3)
    numbers = Relaxations(recipe, schedule)
    wanted = numbers.values + 0.2 * np.random.default_rng(0).standard_normal(len(numbers.values))
    target = np.array(Mixed(numbers.recipe(wanted)).plan(schedule).dense().B, float)
    tried = []

    def residuals(found):
        difference = np.array(Mixed(found).plan(schedule).dense().B, float) - target
        tried.append(float(np.abs(difference).max()))
        return difference.ravel()

    polished(residuals, recipe, schedule)
    assert tried[0] > 0.05
    assert min(tried) < 1e-6


def test_a_polish_ends_when_there_are_no_more_evaluations():
    schedule, left = fs.schedules.VPLinear(), list(range(7))
    polished(lambda found: np.ones(3) if left and not left.pop() else (np.ones(3) if left else None), timed(schedule), schedule)
    assert not left
