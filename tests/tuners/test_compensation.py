"""The search of compensation ratios: what it gains, that it never harms, and both ways to the same ratios."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.errors import MissingExtraError, UnknownNameError
from fewstep.solvers import CascadePolynomial, Compensated, DPMSolverPP, DPMSolverV3, UniPC
from fewstep.statistics import ModelStatistics
from fewstep.tuners import Effort, cascade, compensation, trace_paths
from fewstep.tuners.compensation import searched
from fewstep.tuners.task import Counted, errors_of

VP = fs.schedules.VPLinear(t_end=1e-2)


def mixture(schedule=VP):
    """Three clusters in the plane, of unequal weight and width."""
    return fs.exact.GaussianMixture(schedule, [[1.0, 0.5], [-1.0, -0.3], [0.2, -1.2]], [0.1, 0.2, 0.15], [0.3, 0.5, 0.2])


def noise(count, first=0):
    return fs.draw_noise((2,), range(first, first + count), dtype=torch.float64)


def error(denoiser, plan, paths):
    return errors_of(fs.sample(denoiser, paths.noise, plan, cond=paths.cond), paths.target).rms


@pytest.fixture(scope="module")
def paths():
    return trace_paths(mixture(), noise(128), VP, calls=128)


@pytest.fixture(scope="module")
def others():
    return trace_paths(mixture(), noise(256, first=9000), VP, calls=256)


@pytest.mark.parametrize("solver", [UniPC(3), UniPC(3, lower_order_final=True)], ids=["order 3", "lower final"])
def test_a_quarter_of_the_error_goes_at_5_and_6_calls(solver, paths, others):
    for nfe in (5, 6):
        ratios = compensation(mixture(), solver, paths=paths, nfe=nfe)
        plain, compensated = (each.plan(VP, nfe, "time") for each in (solver, Compensated(solver, ratios)))
        assert error(mixture(), compensated, others) < 0.75 * error(mixture(), plain, others)


def test_both_searches_find_the_same_and_brent_takes_fewer_evaluations(paths):
    ten, solver = paths.take(slice(10)), UniPC(3)
    start = Compensated(solver, (1.0,) * 6)
    found, cost = {}, {}
    for method in ("brent", "gradient"):
        counted = Counted(mixture(), 256)
        found[method] = searched(counted, start, solver.plan(VP, 6, "time").grid, ten, method)
        cost[method] = counted.evaluations
    np.testing.assert_allclose(found["brent"], found["gradient"], atol=0.03)
    assert cost["brent"] < 0.2 * cost["gradient"]
    assert cost["brent"] <= 10 * (6 + 3 * 15)  # the run, and 14 + 1 trials of the three ratios whose next state is corrected


@pytest.mark.parametrize("solver", [UniPC(2, shortcut="bh2"), UniPC(3, prediction="noise"), DPMSolverPP(order=2)], ids=repr)
def test_ratios_lower_the_error_of_the_step_they_are_searched_for(solver, paths):
    """The states before the corrector of a plan are those that the search made: the last ratio is the best for the end."""
    ten = paths.take(slice(10))
    ratios = searched(Counted(mixture(), 256), Compensated(solver, (1.0,) * 5), solver.plan(VP, 5, "time").grid, ten)
    assert ratios[:2] == (1.0, 1.0) != ratios[3:]

    def last(ratio):
        return error(mixture(), Compensated(solver, (*ratios[:-1], ratio)).plan(VP, 5, "time"), ten)

    assert last(ratios[-1]) <= min(last(ratios[-1] + 0.05), last(ratios[-1] - 0.05), last(1.0))


def test_with_statistics_of_an_elements_size(paths):
    solver = DPMSolverV3(ModelStatistics.gaussian(VP, [0.0, 0.1], [0.8, 0.5]))
    ratios = compensation(mixture(), solver, paths=paths, nfe=5)
    assert error(mixture(), Compensated(solver, ratios).plan(VP, 5, "time"), paths) <= error(
        mixture(), solver.plan(VP, 5, "time"), paths
    )


def test_ratios_that_do_not_help_elsewhere_are_1(others):
    """With strong guidance the greedy search makes the end worse."""
    guided = fs.guidance.ClassifierFree(mixture(), 3.0, {"label": -1})
    solver = UniPC(3, lower_order_final=True)
    paths = trace_paths(guided, noise(128), VP, calls=128, cond={"label": torch.arange(128) % 3})
    start = Compensated(solver, (1.0,) * 5)
    raw = searched(Counted(guided, 256), start, solver.plan(VP, 5, "time").grid, paths.take(slice(10)))
    checked = paths.take(slice(10, None))
    assert error(guided, Compensated(solver, raw).plan(VP, 5, "time"), checked) > error(guided, solver.plan(VP, 5, "time"), checked)
    assert compensation(guided, solver, paths=paths, nfe=5) == (1.0,) * 5


def test_cascade_predicts_between_what_was_searched(tmp_path):
    def guided(scale):
        return fs.guidance.ClassifierFree(mixture(), scale, {"label": -1})

    options = {"noise": noise(64), "cond": {"label": torch.zeros(64, dtype=torch.int64)}}
    fitted = cascade(guided, UniPC(3), scales=(0.5, 1.0, 1.5), calls=(5, 6, 8), **options)
    fitted.save(tmp_path / "cascade.safetensors")
    fitted = CascadePolynomial.load(tmp_path / "cascade.safetensors")
    guidance = [model["guidance"] for model in fitted.provenance["models"]]
    assert guidance[1] is None  # scale 1 is none
    assert [told["guidance_scale"] for told in (guidance[0], guidance[2])] == [0.5, 1.5]
    assert fitted.provenance["solver"]["name"] == "UniPC"
    paths = trace_paths(guided(1.0), noise(64, first=9000), VP, calls=128, cond=options["cond"])
    plan = Compensated(UniPC(3), fitted.ratios(1.0, 7)).plan(VP, 7, "time")
    assert error(guided(1.0), plan, paths) < 0.75 * error(guided(1.0), UniPC(3).plan(VP, 7, "time"), paths)
    with pytest.raises(ValueError, match="not for 2 and 7"):
        fitted.ratios(2.0, 7)


def test_tune_by_compensation():
    effort = Effort(trajectories=64, held_out=64, pool=1)
    tuned = fs.tune(mixture(), nfe=5, noise=noise(64), method="compensation", effort=effort)
    told = tuned.report["plans"]["5"]
    assert told["rms"] <= told["untuned_rms"]
    tried = [candidate for candidate in tuned.candidates[5] if candidate.tuned]
    assert {candidate.plan.provenance["solver"]["name"] for candidate in tried} == {"Compensated"}


@pytest.mark.parametrize("schedule", [fs.schedules.Flow(t_end=0.0), fs.schedules.EDM()], ids=["Flow", "EDM"])
def test_ends_at_infinite_lambda(schedule):
    denoiser = mixture(schedule)
    start = noise(40) * float(schedule.sigma(schedule.t_start))
    paths = trace_paths(denoiser, start, schedule, calls=64, final="zero")
    ratios = compensation(denoiser, UniPC(2), paths=paths, nfe=6, grid="auto", final="zero")
    plans = [each.plan(schedule, 6, "auto", final="zero") for each in (UniPC(2), Compensated(UniPC(2), ratios))]
    assert error(denoiser, plans[1], paths) <= error(denoiser, plans[0], paths)


def test_what_is_wrong_is_said(paths, monkeypatch):
    with pytest.raises(UnknownNameError, match="brent"):
        compensation(mixture(), UniPC(), paths=paths, nfe=5, method="brend")
    with pytest.raises(ValueError, match="128 paths are too few"):
        compensation(mixture(), UniPC(), paths=paths, nfe=5, noises=128)
    with pytest.raises(ValueError, match="draws noise"):
        compensation(mixture(), fs.solvers.DDIM(eta=1.0), paths=paths, nfe=5)
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(MissingExtraError, match=r"fewstep\[tune\]"):
        compensation(mixture(), UniPC(), paths=paths, nfe=5)
