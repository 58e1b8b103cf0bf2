"""USF recipes: the solvers they must be, the decisions that no other solver has, and their file form."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from cases import SCHEDULES
from test_solvers import mixture, noise

import fewstep as fs
from fewstep.errors import GridError, PlanError, UnknownNameError
from fewstep.recipes import Derivative, Move, Recipe, Update
from fewstep.solvers import DDIM, DPMSolverPP, DPMSolverV3, Mixed, UniPC
from fewstep.statistics import ModelStatistics

VP = fs.schedules.VPLinear()
N = 8


def assert_same(one, two):
    one, two = one.dense(), two.dense()
    scale = np.abs(two.B).max()
    for a, b in ((one.A, two.A), (one.B, two.B), (one.e, two.e)):
        np.testing.assert_allclose(*np.broadcast_arrays(a, b), rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("final", ["t_end", "zero"])
def test_recipes_of_known_solvers(name, final):
    schedule = SCHEDULES[name]
    stats = ModelStatistics.gaussian(schedule, 0.3, 0.5, nodes=30)
    start = {"infinite_start": math.isinf(schedule.lam(schedule.t_start))}

    def recipe(statistics=None, **options):
        return Mixed(Recipe.multistep(N, **options, **start), statistics)

    bh1 = {"relaxation": "bh1", "corrector_relaxation": "bh1"}
    bh2 = {"relaxation": "bh2", "corrector_relaxation": "bh2"}
    pairs = [
        (recipe(order=1), DDIM()),
        (recipe(order=1, prediction="noise"), DDIM()),
        (recipe(order=2), DPMSolverPP(order=2, variant="taylor")),
        (recipe(order=2, relaxation="bh2"), DPMSolverPP(order=2)),
        (recipe(order=1, corrector=1, **bh1), UniPC(1)),
        (recipe(order=2, corrector=1, **bh2), UniPC(2, shortcut="bh2")),
        (recipe(order=3, corrector=1, **bh1), UniPC(3)),
        (recipe(order=4, corrector=1, lower_order_final=True), UniPC(4, shortcut="none", lower_order_final=True)),
        (recipe(order=3, corrector=1, prediction="noise", **bh1), UniPC(3, prediction="noise")),
        (recipe(stats, order=3, corrector=1, corrector_pseudo=True, prediction="v3", lower_order_final=True), DPMSolverV3(stats)),
        (
            recipe(stats, order=3, corrector=0, pseudo=True, prediction="v3"),
            DPMSolverV3(stats, pseudo=True, corrector="same", lower_order_final=False),
        ),
    ]
    for mixed, known in pairs:
        assert_same(*(solver.plan(schedule, N, grid="lambda", final=final) for solver in (mixed, known)))


def test_single_steps_are_dpm_solver_2():
    """Blocks of two steps from the same state with the relaxation bh2, against the published formula."""
    plan = Mixed(Recipe.singlestep(4, order=2, prediction="noise", relaxation="bh2")).plan(VP, grid="lambda")
    x, network, grid = noise(VP), mixture(VP), plan.grid
    lam, alpha, sigma = VP.lam(grid), VP.alpha(grid), VP.sigma(grid)

    def eps(x, i):
        return (x - alpha[i] * network(x, grid[i])) / sigma[i]

    state = x
    for i in (0, 2):
        h, r = lam[i + 2] - lam[i], (lam[i + 1] - lam[i]) / (lam[i + 2] - lam[i])
        first = eps(state, i)
        inner = alpha[i + 1] / alpha[i] * state - sigma[i + 1] * math.expm1(r * h) * first
        change = eps(inner, i + 1) - first
        state = alpha[i + 2] / alpha[i] * state - sigma[i + 2] * math.expm1(h) * (first + change / (2 * r))
    torch.testing.assert_close(fs.sample(network, x, plan), state, rtol=1e-11, atol=1e-11)


def test_a_recipe_of_everything():
    """Predictions mixed, low-order estimates, single steps, all relaxations, a corrector with another call: by its definition."""
    stats = ModelStatistics.gaussian(VP, [[0.3], [-0.2]], [[0.5], [0.9]], nodes=40)
    moves = (
        Move(Update(), "v3", Update((Derivative((0,), "half_exp"),), 1), again=True),
        Move(Update((Derivative((1,), "minus_half_exp"),)), "noise"),
        Move(Update((Derivative((0, 2), "linear", 0.3), Derivative((0, 2))), 1), "data", Update((Derivative((0,), "bh2"),), 2)),
        Move(Update((Derivative((1,), "bh1"), Derivative((2, 1))), 0), "v3"),
    )
    times = (1.0, 0.8, 0.5, 0.3, 0.05)
    recipe = Recipe(moves, times)
    plan = Mixed(recipe, stats).plan(VP)
    assert plan.nfe == recipe.nfe == 5
    np.testing.assert_array_equal(plan.grid, [1.0, 0.8, 0.8, 0.5, 0.3, 0.05])

    lam, alpha, sigma = (f(np.array(times)) for f in (VP.lam, VP.alpha, VP.sigma))
    x = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def network(x, t):
        return torch.tanh(1.3 * x) * (1.1 - 0.4 * t)

    def value(prediction, seen, j):
        d = network(seen, times[j])
        if prediction == "data":
            return d
        eps = (seen - alpha[j] * d) / sigma[j]
        l = torch.from_numpy(stats.at(lam[j]))  # noqa: E741
        return eps if prediction == "noise" else (sigma[j] * eps - l * seen) / alpha[j]

    def step(prediction, states, seen, s, t, points, factor=lambda h: 1.0):
        """A Taylor step, its integrals by a fine Gauss rule; points: for every derivative."""
        h, u, w = lam[t] - lam[s], *np.polynomial.legendre.leggauss(60)
        u, w = 0.5 * h * (u + 1), 0.5 * h * w
        if prediction == "v3":
            parts = [stats.integrals(lam[s], lam[s] + v) for v in u]
            whole = stats.integrals(lam[s], lam[t])
            growth = [torch.from_numpy(np.exp(p.L + p.S)) for p in parts]
            out = alpha[t] * torch.from_numpy(np.exp(-whole.L)) * (states[s] / alpha[s])
            scale = -alpha[t] * torch.from_numpy(np.exp(-whole.L))
            out = out + scale * sum(wi * g * torch.from_numpy(p.drift) for wi, g, p in zip(w, growth, parts, strict=True))
        else:
            data = prediction == "data"
            out = (sigma if data else alpha)[t] / (sigma if data else alpha)[s] * states[s]
            growth = [math.exp(v - h) if data else math.exp(h - v) for v in u]
            scale = alpha[t] if data else -sigma[t]

        def g(j):
            f = value(prediction, seen[j], j)
            if prediction != "v3" or j == s:
                return f
            up, plus = stats.align(lam[j], lam[s])
            return torch.from_numpy(up) * f + torch.from_numpy(plus)

        derivatives = [g(s)]
        for k, near in enumerate(points, start=1):
            matrix = np.array([[(lam[j] - lam[s]) ** q / math.factorial(q) for q in range(1, len(near) + 1)] for j in near])
            inverse = np.linalg.inv(matrix)[k - 1]
            derivatives.append(sum(c * (g(j) - g(s)) for c, j in zip(inverse, near, strict=True)) * (factor(h) if k == 1 else 1.0))
        for k, derivative in enumerate(derivatives):
            out = out + scale * sum(wi * gr * v**k / math.factorial(k) for wi, gr, v in zip(w, growth, u, strict=True)) * derivative
        return out

    states, seen = {0: x}, {0: x}
    predicted = step("v3", states, seen, 0, 1, [])
    seen[1] = predicted
    states[1] = step("v3", states, seen, 0, 1, [[1]], lambda h: 1 + 0.5 * math.expm1(h))
    seen[1] = states[1]
    states[2] = seen[2] = step("noise", states, seen, 1, 2, [[0]], lambda h: 1 - 0.5 * math.expm1(h))
    seen[3] = step("data", states, seen, 1, 3, [[2, 0], [2, 0]], lambda h: 1 + 0.3 * h)
    states[3] = step("data", states, seen, 1, 3, [[3]], lambda h: 0.5 * h * math.expm1(-h) / (math.expm1(-h) + h) * -1)
    last = step("v3", states, seen, 3, 4, [[2], [1, 2]], lambda h: 0.5 * h * h / (math.expm1(h) - h))
    # the statistics are cubics between nodes, whose kinks the fine rule here does not see
    torch.testing.assert_close(fs.sample(network, x, plan), last, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["vp_linear", "edm", "flow_full"])
@pytest.mark.parametrize("first", ["zero", "mean"])
def test_analytic_first_step(name, first):
    """The plan is that of the same recipe on a network whose first prediction is zero, or the mean; and it makes a call less."""
    schedule = SCHEDULES[name]
    x, network, mean = noise(schedule), mixture(schedule), np.array([0.2, -0.1])
    base = Recipe.multistep(6, order=3, corrector=1, prediction="data", infinite_start=math.isinf(schedule.lam(schedule.t_start)))
    for prediction in ("data", "noise"):
        moves = tuple(Move(m.predictor, prediction, m.corrector) for m in base.moves)
        solver = Mixed(Recipe(moves, first=first), mean=mean if first == "mean" else None)
        plan = solver.plan(schedule, grid="lambda")
        full = Mixed(Recipe(moves)).plan(schedule, 6, grid="lambda")
        assert (plan.nfe, full.nfe) == (5, 6)
        assert plan.noise_time == full.grid[0]
        calls = []

        def analytic(x, t, full=full, calls=calls):
            calls.append(t)
            told = torch.from_numpy(mean).expand_as(x) if first == "mean" else torch.zeros_like(x)
            return told if t == full.grid[0] else network(x, t)

        torch.testing.assert_close(fs.sample(network, x, plan), fs.sample(analytic, x, full), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("first", "mean"), [("zero", None), ("mean", 0.2)])
def test_no_way_back_over_an_analytic_first_step(first, mean):
    solver = Mixed(Recipe(Recipe.multistep(4, order=2).moves, first=first), mean=mean)
    with pytest.raises(ValueError, match="transforms the noise before the first call"):
        solver.inverse_plan(VP, grid="lambda")
    back = Mixed(Recipe.multistep(4, order=2)).inverse_plan(VP, grid="lambda")
    assert back.start is None
    assert back.nfe == 4


def test_json_keeps_everything():
    recipe = Recipe(
        (
            Move(Update(), "noise", Update((Derivative((0,), "linear", 0.25),), 1), again=True),
            Move(Update.through([1], relaxation="bh1"), "v3"),
        ),
        (1.0, 0.1234567890123, 1e-3),
        "mean",
    )
    text = recipe.to_json()
    assert Recipe.from_json(text) == recipe
    assert isinstance(json.loads(text), dict)
    plan = Mixed(Recipe.multistep(3)).plan(VP, grid="time")
    assert plan.provenance["solver"]["options"]["recipe"]["first"] == "network"
    with pytest.raises(ValueError, match="no recipe"):
        Recipe.from_json("{}")


def test_orders_of_steps():
    assert Mixed(Recipe.multistep(4, order=1)).claimed_order == 1
    assert Mixed(Recipe.multistep(9, order=2)).claimed_order == 1  # its first step
    assert Update.through([1, 2]).order == 3
    assert Mixed(Recipe((Move(Update(), "data", Update.through([0], 1)), Move(Update.through([1]))))).claimed_order == 2


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Derivative((1, 1)), ValueError, "different numbers"),
        (lambda: Derivative((1,), "bh3"), UnknownNameError, "bh1"),
        (lambda: Update((Derivative((0,)),)), ValueError, "besides the start"),
        (lambda: Update((Derivative((1,)), Derivative((1,)))), ValueError, "needs 2 points"),
        (lambda: Update((Derivative((1, 2)), Derivative((1, 2), "bh1"))), ValueError, "only a first"),
        (lambda: Move(Update(), "velocity"), UnknownNameError, "noise"),
        (lambda: Move(Update(), "data", Update()), ValueError, "1 or more"),
        (lambda: Move(Update(), again=True), ValueError, "no corrector"),
        (lambda: Recipe((Move(Update.through([1])),)), ValueError, "only 1 exist"),
        (lambda: Recipe((Move(Update(), "data", Update.through([0], 1)),)), ValueError, "Leave it out"),
        (lambda: Recipe((Move(Update()),), (1.0,)), ValueError, "2 times"),
        (lambda: Recipe((Move(Update()),), first="zero"), ValueError, "calls the network"),
        (lambda: Recipe((Move(Update()),), first="none"), UnknownNameError, "network"),
        (lambda: Mixed(Recipe((Move(Update(), "v3"),))), ValueError, "statistics="),
        (lambda: Mixed(Recipe((Move(Update()), Move(Update())), first="mean")), ValueError, "mean="),
        (lambda: Mixed(Recipe.multistep(4)).plan(VP, 5), GridError, "4 network calls"),
        (lambda: Mixed(Recipe.multistep(4)).plan(VP, grid=[1.0, 0.5, 0.1]), GridError, "5 times"),
        (
            lambda: Mixed(Recipe((Move(Update(), "data", Update.through([0], 1), True), Move(Update())))).plan(
                SCHEDULES["flow_full"], 3
            ),
            PlanError,
            "infinite lambda",
        ),
    ],
)
def test_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
