"""Solvers around solvers: at their neutral setting they give the inner solver's plan, whatever the inner solver's planning is like."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cases import SOLVERS

import fewstep as fs
from fewstep.artefacts import json_value
from fewstep.plan import Plan
from fewstep.recipes import Derivative, Move, Recipe, Update
from fewstep.solvers import (
    DDIM,
    DEIS,
    Compensated,
    DPMSolverPP,
    DPMSolverV3,
    DualFast,
    EpsilonScale,
    FlowRK,
    GaussianPrior,
    Mixed,
    Teleport,
    UniPC,
    make_solver,
)
from fewstep.statistics import ModelStatistics

SCHEDULES = {"vp_linear": fs.schedules.VPLinear(), "flow": fs.schedules.Flow(t_end=0.0), "edm": fs.schedules.EDM()}
PRIOR = GaussianPrior(np.array([1.0, -1.0]), np.eye(2), np.array([0.25, 0.5]))
AGAIN = Recipe(
    (
        Move(Update()),
        Move(Update.through([1]), "data", Update.through([0, 2], start=1), again=True),
        Move(Update.through([1])),
        Move(Update((Derivative((1,), "bh2"),))),
    )
)


def content(plan):
    """All of a plan but how it was made."""
    return Plan(plan.schedule, plan.grid, plan.rows, plan.start)


def inner_solvers(schedule):
    statistics = ModelStatistics.gaussian(schedule, 0.3, 0.5, nodes=60)
    yield from ((name, make_solver(name)) for name in SOLVERS)
    yield "zero", Mixed(Recipe(Recipe.multistep(5, order=2).moves, first="zero"))
    yield "mean", Mixed(Recipe(Recipe.multistep(5, order=2, corrector=1).moves, first="mean"), mean=0.2)
    if schedule != SCHEDULES["flow"]:  # from infinite lambda nothing is called again
        yield "again", Mixed(AGAIN)
    yield "v3", DPMSolverV3(statistics)
    yield "v3 official", DPMSolverV3(statistics, compat="official")
    middle = float(schedule.t_of_lam(-0.5))
    yield "teleport", Teleport(DPMSolverPP(), PRIOR, middle)
    yield "teleport and runge-kutta", Teleport(FlowRK("rk4"), PRIOR, middle)


def plans(solver, schedule):
    own = solver.recipe.nfe if isinstance(solver, Mixed) else None
    for nfe in (1, 2, 5, 8) if own is None else (own,):
        for grid in ("auto", "lambda"):
            yield nfe, lambda outer, nfe=nfe, grid=grid: outer.plan(schedule, nfe, grid)
            yield nfe, lambda outer, nfe=nfe, grid=grid: outer.plan(schedule, nfe, grid, final="zero")


@pytest.mark.parametrize("name", SCHEDULES)
def test_neutral_wrappers_give_the_inner_plan(name):
    schedule, tested, refused = SCHEDULES[name], 0, set()
    for inner_name, solver in inner_solvers(schedule):
        for nfe, plan in plans(solver, schedule):
            expected = content(plan(solver))
            assert expected.nfe == nfe
            assert content(plan(EpsilonScale(solver, 1.0))) == expected, inner_name
            assert content(plan(EpsilonScale(EpsilonScale(solver, [1.0] * nfe), 1.0))) == expected, inner_name
            if solver.stages > 1:
                refused.add(inner_name)
                with pytest.raises(ValueError, match="one call a step"):
                    DualFast(solver, 0.0)
                with pytest.raises(TypeError, match="one call a step"):
                    Compensated(solver, (1.0,) * nfe)
                continue
            assert content(plan(Compensated(solver, (1.0,) * nfe))) == expected, inner_name
            if not expected.stochastic:
                assert content(plan(DualFast(solver, 0.0))) == expected, inner_name
            tested += 1
    assert tested > 4 * 4 * 30
    assert {"flow_heun", "dpmpp_3s", "teleport and runge-kutta"} <= refused
    assert refused <= {n for n, c in SOLVERS.items() if make_solver(n).stages > 1} | {"again", "teleport and runge-kutta"}


def test_what_a_wrapper_does_over_an_analytic_first_step():
    """Weights belong to calls: the rows of a plan whose first call is at the second time are changed by that time's noise level."""
    schedule = SCHEDULES["vp_linear"]
    moves = Recipe.multistep(5, order=1).moves
    analytic, whole = (Mixed(Recipe(moves, first=first)).plan(schedule, grid="lambda") for first in ("zero", "network"))
    wrapped = DualFast(Mixed(Recipe(moves, first="zero")), (0.3, 0.2, 0.1)).plan(schedule, grid="lambda")
    from_second = DualFast(DDIM(), (0.3, 0.2, 0.1)).plan(schedule, grid=whole.grid[1:])
    np.testing.assert_allclose(wrapped.dense().B, from_second.dense().B, rtol=1e-12, atol=1e-12)
    assert wrapped.start is not None
    assert wrapped.nfe == analytic.nfe == 4


def test_provenance_names_the_prior_by_its_digest():
    schedule = SCHEDULES["edm"]
    plan = EpsilonScale(Teleport(DDIM(), PRIOR, 5.0), 1.01).plan(schedule, 4, "karras")
    inner = json_value(plan.provenance["solver"]["options"]["solver"])
    assert inner["name"] == "Teleport"
    assert inner["options"] == {"solver": DDIM().described(), "prior": PRIOR.digest, "to": 5.0}
    json.dumps(inner)
    other = GaussianPrior(PRIOR.mean, PRIOR.axes, np.array([0.25, 0.6]))
    assert other.digest != PRIOR.digest
    assert Teleport(UniPC(), other, 5.0).options()["prior"] == other.digest


def test_no_way_back_over_teleportation():
    for solver in (Teleport(DDIM(), PRIOR, 0.5), EpsilonScale(Teleport(DDIM(), PRIOR, 0.5), 1.0)):
        with pytest.raises(ValueError, match="transforms the noise before the first call"):
            solver.inverse_plan(SCHEDULES["vp_linear"], 5)


def test_numbers_for_calls_come_in_any_sequence():
    schedule = SCHEDULES["vp_linear"]
    given = [0.3, 0.2]
    for make in (DualFast, EpsilonScale):
        same = [make(DEIS(), values if make is DualFast else [1.0, *values]) for values in (given, tuple(given))]
        assert same[0] == same[1]
        assert content(same[0].plan(schedule, 3)) == content(same[1].plan(schedule, 3))
        for wrong in (["a"], None, [[1.0]], "0.5"):
            with pytest.raises(TypeError, match="a number, or a sequence of numbers"):
                make(DDIM(), wrong)
    with pytest.raises(ValueError, match="at least 0"):
        DualFast(DDIM(), -0.1)
    with pytest.raises(ValueError, match="at least 0"):
        DualFast(DDIM(), [0.1, -0.1])
