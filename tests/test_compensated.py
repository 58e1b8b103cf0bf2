"""Dynamic compensation against the paper's loop, and the regression of its ratios."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import SCHEDULES
from test_solvers import mixture, noise
from test_unipc import papers_step

import fewstep as fs
from fewstep.errors import ArtefactError, PlanError, UnknownNameError
from fewstep.solvers import CascadePolynomial, Compensated, DPMSolverV3, UniPC
from fewstep.statistics import ModelStatistics

VP = fs.schedules.VPLinear()
RATIOS = (1.0, 1.0, 0.8, 1.3, 1.1, 0.7, 1.9, 2.0)


def papers_run(network, x, times, ratios, order, shortcut, prediction, lower, degree=2):
    """The authors' loop: compensate, predict, evaluate, correct; the compensated value stays in the history."""
    lam, alpha, sigma = VP.lam(times), VP.alpha(times), VP.sigma(times)
    scale, kept = (alpha, sigma) if prediction == "data" else (sigma, alpha)

    def stored(x, i):
        d = network(x, times[i])
        return d if prediction == "data" else (x - alpha[i] * d) / sigma[i]

    m, n = [stored(x, 0)], len(times) - 1
    for i in range(n):
        if ratios[i] != 1.0:
            place, near = ratios[i] * times[i] + (1 - ratios[i]) * times[i - 1], times[i::-1][: degree + 1]
            shares = [math.prod((place - q) / (p - q) for q in near if q != p) for p in near]
            m[0] = sum(share * value for share, value in zip(shares, m, strict=False))
        h = lam[i + 1] - lam[i]
        hh = -h if prediction == "data" else h
        b = hh if shortcut == "bh1" else math.expm1(hh)
        p = min(order, i + 1, n - i if lower else order)
        given = (m, x, lam[i::-1], scale[i + 1], kept[i + 1] / kept[i], p, b, hh)
        x_next = papers_step(*given)
        if i + 1 == n:
            return x_next
        new = stored(x_next, i + 1)
        x, m = papers_step(*given, new=new), [new, *m]
    return x


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_the_papers_algorithm(prediction, degree):
    x, network = noise(VP), mixture(VP)
    ratios = (1.0,) * degree + RATIOS[degree:]
    for order, shortcut, lower in ((3, "bh1", True), (2, "bh2", False)):
        solver = UniPC(order, shortcut=shortcut, prediction=prediction, lower_order_final=lower)
        plan = Compensated(solver, ratios, degree).plan(VP, 8, grid="time")
        paper = papers_run(network, x, plan.grid, ratios, order, shortcut, prediction, lower, degree)
        torch.testing.assert_close(fs.sample(network, x, plan), paper, rtol=1e-10, atol=1e-10)


def test_ratios_of_1_change_nothing():
    for schedule in SCHEDULES.values():
        solvers = [fs.solvers.DDIM(eta=1.0), fs.solvers.DPMSolverPP(order=3), UniPC(), UniPC(prediction="noise")]
        solvers.append(DPMSolverV3(ModelStatistics.gaussian(schedule, 0.0, 0.5, nodes=20)))
        for solver in solvers:
            for final in ("t_end", "zero"):
                one, two = (s.plan(schedule, 5, grid="lambda", final=final) for s in (solver, Compensated(solver, (1.0,) * 5)))
                assert one.rows == two.rows or all(
                    np.array_equal(np.asarray(a), np.asarray(b))
                    for r, q in zip(one.rows, two.rows, strict=True)
                    for a, b in zip(r.entries, q.entries, strict=True)
                )
    assert Compensated(UniPC(), (1.0,) * 5).claimed_order == UniPC().claimed_order
    assert Compensated(UniPC(), RATIOS).claimed_order == 1


def test_polynomial_predictions_of_the_time_are_compensated_to_their_own_past():
    """If the stored values are a quadratic in t, the compensated one is that quadratic at the other place."""
    plan = Compensated(UniPC(2), RATIOS[:4]).plan(VP, 4, grid="time")
    row, t = plan.rows[2], plan.grid
    values = 1.0 + 2.0 * t - 3.0 * t**2
    place = 0.8 * t[2] + 0.2 * t[1]
    found = row.output_gain * values[2] + row.memory[0] * values[1] + row.memory[1] * values[0]
    assert found == pytest.approx(1.0 + 2.0 * place - 3.0 * place**2, rel=1e-12)


def test_the_ends_and_other_solvers():
    schedule = SCHEDULES["flow_full"]  # its first node is at infinite lambda and no part of a compensation
    x, network = noise(schedule), mixture(schedule)
    for solver in (UniPC(), fs.solvers.DPMSolverPP(order=2), UniPC(2, prediction="noise")):
        last = 1.0 if solver == UniPC(2, prediction="noise") else 0.9
        plan = Compensated(solver, (1.0, 1.0, 1.0, 0.9, 1.2, last), variable="lambda" if last < 1 else "time").plan(schedule, 6)
        assert bool(torch.isfinite(fs.sample(network, x, plan)).all())
    with pytest.raises(PlanError, match="Make this ratio 1"):
        Compensated(UniPC(), (1.0, 1.0, 0.9, 1.0, 1.0)).plan(schedule, 5)
    with pytest.raises(PlanError, match="of its kind"):  # the last step stores the data prediction, the others the noise
        Compensated(UniPC(2, prediction="noise"), (1.0,) * 4 + (0.9,)).plan(VP, 5, final="zero")


def test_provenance_names_the_inner_solver():
    plan = Compensated(UniPC(2), RATIOS).plan(VP, 8)
    assert plan.provenance["solver"]["name"] == "Compensated"
    assert plan.provenance["solver"]["options"]["solver"]["name"] == "UniPC"
    assert plan.provenance["solver"]["options"]["solver"]["options"]["order"] == 2
    assert plan.provenance["solver"]["options"]["ratios"] == tuple(RATIOS)


def test_regression_finds_a_polynomial_and_does_not_extrapolate(tmp_path):
    rng = np.random.default_rng(0)
    truth = CascadePolynomial(rng.standard_normal(36), (1.0, 12.0), (4, 20))
    pairs = [(scale, nfe) for scale in (1.0, 4.0, 7.5, 12.0) for nfe in (4, 6, 9, 14, 20)]
    found = CascadePolynomial.fit({pair: truth.ratios(*pair) for pair in pairs}, provenance={"model": "m"})
    np.testing.assert_allclose(found.ratios(5.0, 11), truth.ratios(5.0, 11), rtol=1e-8, atol=1e-8)
    assert found.ratios(5.0, 11)[:2] == (1.0, 1.0)
    with pytest.raises(ValueError, match="not for 5 and 21"):
        found.ratios(5.0, 21)
    found.save(tmp_path / "c.safetensors")
    again = CascadePolynomial.load(tmp_path / "c.safetensors")
    assert again.ratios(5.0, 11) == found.ratios(5.0, 11)
    assert again.provenance["model"] == "m"
    # the closed formula of the paper's code, spelled out for one ratio
    phi, x, u, n = truth.coefficients, 3 / 8, 7.5 / 12, 8 / 50
    inner = [[n * n * q[0] + n * q[1] + q[2] for q in p] for p in phi]
    outer = [u * u * p[0] + u * p[1] + p[2] for p in inner]
    assert truth.ratios(7.5, 8)[2] == pytest.approx(sum(c * x**k for k, c in enumerate(outer)), rel=1e-12)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Compensated("unipc", (1.0,)), TypeError, "one call a step"),
        (lambda: Compensated(UniPC(), (1.0,), degree=4), ValueError, "degree 1, 2 or 3"),
        (lambda: Compensated(UniPC(), (1.0,), variable="sigma"), UnknownNameError, "lambda"),
        (lambda: Compensated(UniPC(), RATIOS).plan(VP, 7), PlanError, "8 compensation ratios"),
        (lambda: Compensated(UniPC(), (1.0, 1.0, 0.0)).plan(VP, 3), PlanError, "no use"),
        (lambda: CascadePolynomial(np.zeros((3, 3, 4)), (1, 2), (3, 4)), ArtefactError, r"\(4, 3, 3\)"),
        (lambda: CascadePolynomial.fit({(1.0, 4): [1.0, 1.0, 0.9]}), ValueError, "4 calls have 4 ratios"),
        (lambda: CascadePolynomial.fit({(1.0, 2): [1.0, 1.0]}), ValueError, "more than 2 calls"),
    ],
)
def test_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
