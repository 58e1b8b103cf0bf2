from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import SCHEDULES

import fewstep as fs
from fewstep.errors import ArtefactError, GridError
from fewstep.solvers import DDIM, DPMSolverPP, GaussianPrior, Teleport

RNG = np.random.default_rng(0)
MEAN = RNG.normal(size=6)
ROOT = RNG.normal(size=(6, 6)) * [1.5, 1.0, 0.5, 0.2, 0.1, 0.0]  # singular: no data along one direction
COVARIANCE = ROOT @ ROOT.T


def prior():
    variances, axes = np.linalg.eigh(COVARIANCE)
    return GaussianPrior(MEAN, axes.T, np.maximum(variances, 0.0))


@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_on_gaussian_data(name):
    schedule = SCHEDULES[name]
    exact = fs.exact.Gaussian(schedule, MEAN, COVARIANCE)
    x = float(schedule.sigma(schedule.t_start)) * fs.draw_noise((6,), range(5), dtype=torch.float64)
    low, high = (max(-6.0, min(6.0, float(schedule.lam(t)))) for t in (schedule.t_start, schedule.t_end))
    for share in (0.25, 0.9):
        to = float(schedule.t_of_lam(low + share * (high - low)))
        plan = Teleport(DDIM(), prior(), to).plan(schedule, 3)
        run = fs.sample(exact, x, plan, trajectory=True)
        wanted = exact.solution(x, schedule.t_start, to)
        torch.testing.assert_close(run.states[0], wanted, rtol=1e-10, atol=1e-10)


def test_kept_components_and_the_variance_of_the_rest():
    """What is orthogonal to the axes behaves as a Gaussian of the variance `rest`."""
    schedule = fs.schedules.VPCosine()
    axes = np.linalg.qr(RNG.normal(size=(6, 2)))[0].T
    partial = GaussianPrior(MEAN, axes, np.array([2.0, 0.3]), rest=0.05)
    full = fs.exact.Gaussian(schedule, MEAN, axes.T @ np.diag([1.95, 0.25]) @ axes + 0.05 * np.eye(6))
    x = fs.draw_noise((6,), range(5), dtype=torch.float64)
    got = fs.sample(full, x, Teleport(DDIM(), partial, 0.6).plan(schedule, 1), trajectory=True).states[0]
    torch.testing.assert_close(got, full.solution(x, schedule.t_start, 0.6), rtol=1e-11, atol=1e-11)


def test_from_a_start_in_the_middle():
    schedule = fs.schedules.EDM()
    exact = fs.exact.Gaussian(schedule, MEAN, COVARIANCE)
    plan = Teleport(DPMSolverPP(), prior(), 2.0).plan(schedule, 4, "karras", start=20.0)
    assert plan.noise_time == 20.0
    x = 20.0 * fs.draw_noise((6,), range(3), dtype=torch.float64)
    torch.testing.assert_close(fs.sample(exact, x, plan, trajectory=True).states[0], exact.solution(x, 20.0, 2.0))


def test_the_plan_is_saved_with_its_start(tmp_path):
    schedule = fs.schedules.EDM()
    shaped = GaussianPrior(MEAN.reshape(2, 3), np.eye(6)[:4].reshape(4, 2, 3), np.arange(4.0), 0.1)
    plan = Teleport(DPMSolverPP(), shaped, 5.0).plan(schedule, 4, "karras", final="zero")
    plan.save(tmp_path / "p.safetensors")
    again = fs.Plan.load(tmp_path / "p.safetensors")
    assert again == plan
    made_by = again.provenance["solver"]
    assert made_by["name"] == "Teleport"
    assert made_by["options"]["solver"]["name"] == "DPMSolverPP"
    assert (made_by["options"]["to"], made_by["options"]["prior"]) == (5.0, shaped.digest)
    noise = fs.draw_noise((2, 3), range(4), plan)
    assert float(noise.std()) == pytest.approx(80.0, rel=0.5)
    exact = fs.exact.Gaussian(schedule, MEAN.reshape(2, 3), 0.2)
    assert torch.equal(fs.sample(exact, noise, again), fs.sample(exact, noise, plan))


def test_a_truncated_grid():
    schedule = fs.schedules.EDM()
    times = fs.grids.make_grid("karras", schedule, 12)
    to = float(times[4])
    plan = Teleport(DDIM(), prior(), to).plan(schedule, grid=times[4:])
    assert plan.nfe == 8
    with pytest.raises(GridError, match="starts at 80"):
        Teleport(DDIM(), prior(), to).plan(schedule, grid=times)


def test_digits_far_from_the_data():
    """Exact denoiser of 1,500 digits, bandwidth 0.15: to sigma = 10 the path is that of the Gaussian to 1e-3 of the end point."""
    datasets = pytest.importorskip("sklearn.datasets")
    points = datasets.load_digits().images[:1500] / 8.0 - 1.0
    schedule = fs.schedules.EDM(sigma_min=0.002)
    exact = fs.exact.FiniteData(schedule, points, bandwidth=0.15)
    fitted = GaussianPrior.fit(points)
    widened = GaussianPrior(fitted.mean, fitted.axes, fitted.variances + 0.15**2, 0.15**2)
    x = 80.0 * fs.draw_noise((8, 8), range(8), dtype=torch.float64)
    end = fs.reference(exact, x, schedule, tol=1e-5).plain()
    for to, bound in ((40.0, 1e-3), (10.0, 1e-3), (0.5, 0.5)):
        start = fs.sample(exact, x, Teleport(DDIM(), widened, to).plan(schedule, 1), trajectory=True).states[0]
        moved = fs.reference(exact, start, schedule, tol=1e-5, t_start=to).plain()
        change = float((moved - end).norm() / end.norm())
        assert change < bound, to
    assert change > 0.03  # and near the data it is not


def test_fit_finds_mean_covariance_and_what_is_left_out():
    data = RNG.normal(size=(4000, 6)) @ ROOT.T + MEAN
    whole = GaussianPrior.fit(torch.from_numpy(data))
    covariance = np.cov(data.T, bias=True)
    np.testing.assert_allclose(whole.axes.T @ np.diag(whole.variances) @ whole.axes, covariance, atol=1e-10)
    np.testing.assert_allclose(whole.mean, data.mean(0), atol=1e-12)
    assert whole.rest == 0.0
    two = GaussianPrior.fit(data, rank=2)
    np.testing.assert_allclose(two.variances, whole.variances[:2], rtol=1e-10)
    assert two.rest == pytest.approx(whole.variances[2:].sum() / 4, rel=1e-9)
    few = GaussianPrior.fit(data[:4])  # fewer samples than elements: what they do not span has no variance
    assert few.axes.shape == (3, 6)
    assert few.rest == 0.0


def test_random_projections_find_the_same_components():
    scales = np.concatenate([[9.0, 5.0, 3.0], 0.3 * np.ones(197)])
    data = np.random.default_rng(1).normal(size=(300, 200)) * scales
    fast, slow = GaussianPrior.fit(data.reshape(300, 10, 20), rank=3), GaussianPrior.fit(data)
    np.testing.assert_allclose(fast.variances, slow.variances[:3], rtol=1e-6)
    overlap = np.abs(fast.axes.reshape(3, -1) @ slow.axes[:3].T)
    np.testing.assert_allclose(overlap, np.eye(3), atol=1e-4)
    assert fast.rest == pytest.approx((data.var(0).sum() - fast.variances.sum()) / 197, rel=1e-9)


def test_a_prior_is_saved_bit_for_bit(tmp_path):
    path = tmp_path / "prior.safetensors"
    prior().save(path)
    again = GaussianPrior.load(path)
    for name in ("mean", "axes", "variances"):
        assert np.array_equal(getattr(again, name), getattr(prior(), name))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtefactError):
        GaussianPrior.load(path)
    DDIM().plan(fs.schedules.EDM(), 3).save(path)
    with pytest.raises(ArtefactError, match="gaussian-prior"):
        GaussianPrior.load(path)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GaussianPrior(MEAN, np.eye(5), np.ones(5)), ValueError, "rank"),
        (lambda: GaussianPrior(MEAN, np.eye(6), -np.ones(6)), ValueError, "at least 0"),
        (lambda: GaussianPrior(MEAN, np.ones((2, 6)), np.ones(2)), ValueError, "orthonormal"),
        (lambda: GaussianPrior.fit(np.zeros((1, 3))), ValueError, "at least 2"),
        (lambda: GaussianPrior.fit(np.zeros((4, 3)), rank=4), ValueError, "1 to 3 components"),
        (lambda: Teleport(DDIM(), prior(), 90.0).plan(fs.schedules.EDM(), 4), GridError, "not from t=80 to t=90"),
        (lambda: Teleport(DDIM(), prior(), 1e-4).plan(fs.schedules.EDM(), 4), GridError, "start noisier"),
        (
            lambda: Teleport(Teleport(DDIM(), prior(), 5.0), prior(), 50.0).plan(fs.schedules.EDM(), 4),
            GridError,
            "start of its own",
        ),
    ],
)
def test_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
