from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from cases import SCHEDULES

from fewstep import schedules
from fewstep.errors import GridError, UnknownNameError
from fewstep.grids import (
    AYS_SIGMAS,
    DMN,
    FINITE_LAM,
    BetaTime,
    Karras,
    Shifted,
    check_grid,
    dmn_bound,
    grid_names,
    make_grid,
)

TABLE_GRIDS = {"leading", "linspace", "trailing"}
CONTINUOUS = sorted(set(grid_names()) - TABLE_GRIDS)
TABLES = {"betas", "stable_diffusion", "zero_snr"}


def fits(grid, name):
    return grid not in TABLE_GRIDS or name in TABLES


@pytest.mark.parametrize("grid", grid_names())
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_rule_on_every_schedule(grid, name):
    schedule = SCHEDULES[name]
    if not fits(grid, name):
        with pytest.raises(GridError, match="has none"):
            make_grid(grid, schedule, 5)
        return
    if grid == "shifted" and name == "edm":
        with pytest.raises(GridError, match=r"\[0, 1\]"):
            make_grid(grid, schedule, 5)
        return
    for nfe in (1, 2, 3, 4, 7, 12, 30, 50) if grid == "dmn" else range(1, 51):  # each of DMN's is an optimisation
        for final in ("t_end", "zero"):
            times = make_grid(grid, schedule, nfe, final=final)
            assert times.shape == (nfe + 1,)
            assert (np.diff(schedule.lam(times)) > 0).all()
            assert times[-1] == (schedule.t_end if final == "t_end" else schedule.t_zero)
            if grid not in ("leading",):
                assert times[0] == pytest.approx(schedule.t_start, rel=1e-12)


def test_golden_rules():
    vp = schedules.VPLinear()
    np.testing.assert_allclose(make_grid("time", vp, 3), [1.0, 0.667, 0.334, 0.001])
    np.testing.assert_allclose(make_grid("quadratic", vp, 2)[1], ((1 + 0.001**0.5) / 2) ** 2)
    np.testing.assert_allclose(vp.lam(make_grid("lambda", vp, 4)), np.linspace(vp.lam(1.0), vp.lam(1e-3), 5), rtol=1e-10)
    edm = schedules.EDM()
    karras = (80 ** (1 / 7) + np.arange(18) / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7  # eq. 5 of arXiv 2206.00364, 18 values
    np.testing.assert_allclose(make_grid("karras", edm, 17), karras, rtol=1e-10)
    np.testing.assert_allclose(make_grid(Karras(rho=7.0), edm, 17), karras, rtol=1e-10)
    mirrored = make_grid("reverse_quadratic", vp, 3)
    np.testing.assert_allclose(mirrored, 1.001 - make_grid("quadratic", vp, 3)[::-1], rtol=1e-12)
    flow = schedules.Flow(t_end=0.0)
    np.testing.assert_allclose(make_grid(Shifted(3.0), flow, 4), [1.0, 0.9, 0.75, 0.5, 0.0], atol=1e-12)


def test_discrete_rules_give_the_published_indices():
    sd = SCHEDULES["stable_diffusion"]
    indices = {name: np.rint(make_grid(name, sd, 10) * 1000 - 1)[:10].astype(int).tolist() for name in sorted(TABLE_GRIDS)}
    # diffusers' set_timesteps(10) with 1000 training steps
    assert indices["trailing"] == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert indices["leading"] == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert indices["linspace"] == [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]


def test_align_your_steps_tables():
    sd = SCHEDULES["stable_diffusion"]
    times = make_grid("ays_sd15", sd, 10, final="zero")
    np.testing.assert_allclose(np.exp(-sd.lam(times[:10])), AYS_SIGMAS["sd15"], rtol=2e-3)
    published = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # the authors' integer times
    assert np.abs(times[:10] * 1000 - 1 - published).max() < 1.0
    svd = schedules.EDM(sigma_max=700.0)
    np.testing.assert_allclose(make_grid("ays_svd", svd, 10)[:10], AYS_SIGMAS["svd"], rtol=1e-10)


def test_align_your_steps_for_other_numbers_of_calls():
    """Log-linear interpolation of the authors' eleven values, whose last gives way to 0."""
    eleven = {"sd15": (*AYS_SIGMAS["sd15"], 0.0291671582), "svd": (*AYS_SIGMAS["svd"], 0.002)}
    for nfe in (1, 4, 7, 10, 25):
        places = np.linspace(0.0, 1.0, nfe + 1)
        for table, sigmas in eleven.items():
            schedule = SCHEDULES["stable_diffusion"] if table == "sd15" else schedules.EDM(sigma_max=700.0, sigma_min=0.002)
            expected = np.exp(np.interp(places, np.linspace(0.0, 1.0, 11), np.log(sigmas)))[:-1]
            times = make_grid(f"ays_{table}", schedule, nfe, final="zero")
            np.testing.assert_allclose(np.exp(-schedule.lam(times[:-1])), expected, rtol=2e-3)  # tables have 3 digits
    part = make_grid("ays_sd15", SCHEDULES["stable_diffusion"], 6, start=0.5)
    assert part[0] == 0.5


def test_align_your_steps_tables_are_those_of_diffusers():
    utils = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    for table, name in (("sd15", ""), ("sdxl", "XL"), ("svd", "Video")):
        assert list(AYS_SIGMAS[table]) == utils.AysSchedules[f"StableDiffusion{name}Sigmas"][:-1]
    sdxl = make_grid("ays_sdxl", SCHEDULES["stable_diffusion"], 10)[:10] * 1000 - 1
    assert np.abs(sdxl - utils.AysSchedules["StableDiffusionXLTimesteps"]).max() < 1.0


def test_beta_grids():
    from scipy.special import betainc

    times = make_grid("beta_time", schedules.Flow(t_end=0.0), 8)
    np.testing.assert_allclose(betainc(0.6, 0.6, times), 1.0 - np.arange(9) / 8, atol=1e-12)
    np.testing.assert_allclose(make_grid(BetaTime(1.0, 1.0), schedules.VPLinear(), 5), make_grid("time", schedules.VPLinear(), 5))
    edm = make_grid("beta", schedules.EDM(), 8)  # diffusers: the same quantiles between the two sigmas
    np.testing.assert_allclose(betainc(0.6, 0.6, (edm - 0.002) / (80.0 - 0.002)), 1.0 - np.arange(9) / 8, atol=1e-9)


def test_shifts():
    flow = schedules.Flow(t_end=0.0)
    shifted = make_grid(Shifted(3.0), flow, 6)
    np.testing.assert_allclose(
        shifted, schedules.Flow(shift=3.0).sigma(np.linspace(1.0, 0.0, 7)), rtol=1e-12
    )  # a shifted schedule's
    uniform = flow.lam(np.linspace(1.0, 0.0, 7)[1:-1])
    np.testing.assert_allclose(flow.lam(shifted[1:-1]), uniform - np.log(3.0), rtol=1e-12)  # log k in lambda
    # diffusers' calculate_shift and its exponential time shift, with Flux's defaults: mu = 0.5 at 256 tokens, 1.15 at 4096
    for tokens, mu in ((256, 0.5), (1024, 0.63), (4096, 1.15)):
        t = np.linspace(1.0, 0.0, 5)[:-1]
        expected = np.exp(mu) / (np.exp(mu) + (1.0 / t - 1.0))
        np.testing.assert_allclose(make_grid(Shifted.of_tokens(tokens), flow, 4)[:-1], expected, rtol=1e-12)


def test_the_bound_of_dmn_is_that_of_the_authors_code():
    """Values of the objective in the authors' code at grids of VP-linear from 1 to 1e-3, float64; theirs have float32 ends."""
    vp = schedules.VPLinear()
    golden = {
        ("lambda", 5, 3): 231.478595,
        ("time", 5, 3): 75.965308,
        ("lambda", 10, 3): 28.6121986,
        ("time", 10, 3): 25.8643034,
        ("lambda", 10, 0): 15.9069,  # printed to six digits
        ("time", 10, 0): 17.4991,
    }
    for (grid, nfe, apart), value in golden.items():
        assert dmn_bound(vp.lam(make_grid(grid, vp, nfe)), DMN(3, 2.0, apart)) == pytest.approx(value, rel=4e-6)
    # and where their search ends, whatever its start
    found = make_grid(DMN(3, 2.0, 3), vp, 5)
    assert dmn_bound(vp.lam(found), DMN(3, 2.0, 3)) == pytest.approx(49.9048192184469, rel=1e-6)
    np.testing.assert_allclose(found, [1.0, 0.6582, 0.4978, 0.3095, 0.1014, 0.001], atol=1e-4)


def test_dmn_finds_a_minimum_and_remembers_it():
    vp = schedules.VPLinear()
    # at order 1 and power 1 the bound is the sum of e^h - 1, least where all h are equal
    np.testing.assert_allclose(make_grid(DMN(1, 1.0), vp, 6), make_grid("lambda", vp, 6), atol=1e-5)
    for rule in (DMN(), DMN(order=3, power=2.0), DMN(order=1, power=2.0)):
        best = vp.lam(make_grid(rule, vp, 6))
        least = dmn_bound(best, rule)
        for i in range(1, 6):
            for step in (-1e-3, 1e-3):
                beside = best.copy()
                beside[i] += step
                assert dmn_bound(beside, rule) > least
        assert all(dmn_bound(vp.lam(make_grid(name, vp, 6)), rule) > least for name in ("lambda", "time", "karras"))
    assert make_grid("dmn", vp, 6).tolist() == make_grid("dmn", vp, 6).tolist()
    same_lams = schedules.EDM(sigma_max=float(np.exp(-vp.lam(1.0))), sigma_min=float(np.exp(-vp.lam(1e-3))))
    np.testing.assert_allclose(same_lams.lam(make_grid("dmn", same_lams, 6)), vp.lam(make_grid("dmn", vp, 6)), atol=1e-6)


def test_infinite_ends_keep_their_place_and_the_rest_lies_in_the_finite_range():
    for name in ("flow_full", "vp_cosine_full"):
        schedule = SCHEDULES[name]
        for grid in ("lambda", "karras", "beta"):
            times = make_grid(grid, schedule, 9)
            assert times[0] == 1.0
            assert times[-1] == 0.0
            inner = schedule.lam(times[1:-1])
            assert inner.min() >= FINITE_LAM[0]
            assert inner.max() <= FINITE_LAM[1]


def test_own_lists_are_taken_unmodified():
    schedule, mine = schedules.EDM(), [80.0, 3.0, 0.5, 0.0]
    for form in (mine, np.array(mine), torch.tensor(mine, dtype=torch.float64), tuple(mine)):
        assert make_grid(form, schedule).tolist() == mine
    assert make_grid(mine, schedule, 3, start=80.0, final="zero").tolist() == mine


def test_start_in_the_middle():
    schedule = schedules.VPLinear()
    for grid in CONTINUOUS:
        times = make_grid(grid, schedule, 6, start=0.4)
        assert times[0] == 0.4
        assert len(times) == 7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: make_grid([1.0, 0.5, 0.7], s), r"does not decrease in noise: grid\[1\]=0.5 and grid\[2\]=0.7"),
        (lambda s: make_grid([1.0, 0.5, 0.5], s), "repeats"),
        (lambda s: make_grid([1.0], s), "at least 2"),
        (lambda s: make_grid([[1.0, 0.5]], s), "one dimension"),
        (lambda s: make_grid([1.0, float("nan")], s), r"grid\[1\]=nan is not a time"),
        (lambda s: make_grid(["a", "b"], s), "list of numbers"),
        (lambda s: make_grid([1.0, 0.5], s, 3), "makes 1 network calls, but nfe=3"),
        (lambda s: make_grid([1.0, 0.5], s, start=0.9), "start=0.9"),
        (lambda s: make_grid([1.0, 0.5], s, final="zero"), "sigma = 0"),
        (lambda s: make_grid("lambda", s), "nfe=None"),
        (lambda s: make_grid("lambda", s, 0), "at least 1"),
        (lambda s: make_grid("lambda", s, 2.5), "whole number"),
        (lambda s: make_grid("lambda", s, 5, start=1e-4), "must start noisier"),
        (lambda s: make_grid(lambda *_: np.ones(3), s, 5), "returned shape"),
        (lambda s: make_grid("leading", SCHEDULES["betas"], 2000), "ask for fewer calls"),
        (lambda s: make_grid(DMN(order=4), s, 5), "order 1, 2 or 3"),
        (lambda s: make_grid(DMN(power=-1.0), s, 5), "at least 0"),
        (lambda s: check_grid([2.0, 1.0, -1.0], schedules.EDM()), "not a time"),
    ],
)
def test_refused(call, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(GridError, match=message):
            call(schedules.VPLinear())


def test_unknown_names_give_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'karras'"):
        make_grid("karas", schedules.EDM(), 5)
    with pytest.raises(UnknownNameError, match="zero"):
        make_grid("karras", schedules.EDM(), 5, final="zeros")
