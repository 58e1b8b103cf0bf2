"""The reference solution against closed forms and SciPy, the honesty of its error, its inverse, and how it fails."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.denoisers import Denoiser
from fewstep.errors import FewstepError, GridError, NetworkError
from fewstep.exact import FiniteData, Gaussian, GaussianMixture
from fewstep.guidance import ClassifierFree
from fewstep.integrate import ERROR, STAGES, Reference, ToleranceError, invert, reference
from fewstep.schedules import EDM, Flow, FromBetas, NoiseSchedule, VPCosine, VPLinear

BETAS = FromBetas(np.linspace(1e-4, 0.02, 1000))  # type: ignore[arg-type]
SCHEDULES = [VPLinear(), VPCosine(t_start=1.0), EDM(), Flow(shift=2.0), BETAS]
VARIANCES = [1e-3, 0.1, 1.0, 9.0]

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)


def gaussian(schedule: NoiseSchedule) -> Gaussian:
    return Gaussian(schedule, [1.0, -1.0, 0.0, 2.0], VARIANCES)


def mixture(schedule: NoiseSchedule) -> GaussianMixture:
    means = [[1.0, 0.5], [-1.0, -0.3], [0.2, -1.2]]
    return GaussianMixture(schedule, means, [[0.1, 0.4], [0.2, 0.2], [0.3, 0.05]], [0.3, 0.5, 0.2])


def clusters(schedule: NoiseSchedule) -> FiniteData:
    points = 2.0 * torch.rand(50, 16, generator=torch.Generator().manual_seed(0)) - 1.0
    return FiniteData(schedule, points, bandwidth=0.05)


def noise(schedule: NoiseSchedule, size: int, batch: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.randn(batch, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (float(schedule.sigma(schedule.t_start)) * draw).to(dtype)


def error(x: Tensor, exact: Tensor) -> float:
    """As `reference` measures it: the worst sample."""
    return float(((x - exact).square().mean(-1).sqrt() / exact.square().mean(-1).sqrt().clamp_min(1.0)).max())


def scipy_solution(exact: GaussianMixture, x: Tensor, t_from: float, t_to: float) -> Tensor:
    """dy / dlambda = D - y with y = x / alpha: another variable, another method, another library."""
    from scipy.integrate import solve_ivp

    schedule = exact.schedule

    def slope(lam, y):
        t = float(schedule.t_of_lam(lam))
        return exact(torch.from_numpy(y.reshape(x.shape)) * float(schedule.alpha(t)), t).numpy().ravel() - y

    span = [float(schedule.lam(t)) for t in (t_from, t_to)]
    start = (x / float(schedule.alpha(t_from))).numpy().ravel()
    y = solve_ivp(slope, span, start, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    return torch.from_numpy(y.reshape(x.shape)) * float(schedule.alpha(t_to))


# ---- ground truth --------------------------------------------------------------------------------------------------------------------


def test_the_table_satisfies_the_order_conditions():
    # sum b c^k = 1 / (k + 1) up to order 5; the error weights vanish on polynomials of degree 3 (both formulas have order 4)
    nodes = np.array([0.0, *(sum(row) for row in STAGES)])
    weights = np.array([*STAGES[-1], 0.0])
    np.testing.assert_allclose(nodes, [0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1], atol=1e-14)
    for k in range(5):
        assert weights @ nodes**k == pytest.approx(1.0 / (k + 1), abs=1e-14)
    for k in range(4):
        assert np.array(ERROR) @ nodes**k == pytest.approx(0.0, abs=1e-14)


@every_schedule
@pytest.mark.parametrize("to_zero", [False, True])
def test_gaussian_closed_form(schedule, to_zero):
    exact, x = gaussian(schedule), noise(schedule, 4)
    t_end = schedule.t_zero if to_zero else schedule.t_end
    for tol in (1e-5, 1e-8):
        before = exact.calls
        result = reference(exact, x, schedule, tol=tol, t_end=t_end)
        assert result.nfe == exact.calls - before
        assert error(result, exact.solution(x, schedule.t_start, t_end)) <= tol
        assert 0.0 < result.error <= tol
        assert result.errors.shape == (8,)
        assert float(result.errors.max()) == result.error


@every_schedule
def test_mixture_against_scipy(schedule):
    exact = mixture(schedule)
    start = min(schedule.t_start, float(schedule.t_of_lam(-5.0)))  # SciPy integrates in lambda, which must be finite
    x = noise(schedule, 2)[:4]
    expected = scipy_solution(exact, x, start, schedule.t_end)
    result = reference(exact, x, schedule, tol=1e-9, t_start=start)
    assert error(result, expected) < 1e-9


def test_mixture_to_sigma_zero_against_scipy():
    # with alpha = 1 the ODE in v = sigma^2 is dx / dv = -score / 2, regular at v = 0, and needs no denoiser
    from scipy.integrate import solve_ivp

    exact, x = mixture(EDM()), noise(EDM(), 2)[:4]

    def slope(v, y):
        return -0.5 * exact.score(torch.from_numpy(y.reshape(x.shape)), math.sqrt(v)).numpy().ravel()

    y = solve_ivp(slope, [6400.0, 0.0], x.numpy().ravel(), method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    result = reference(exact, x, EDM(), tol=1e-8, t_end=0.0)
    assert error(result, torch.from_numpy(y.reshape(x.shape))) < 1e-8


@pytest.mark.parametrize("schedule", [Flow(t_end=0.0), EDM(sigma_max=10.0)], ids=["flow", "edm"])
def test_points_are_reached(schedule):
    points = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = FiniteData(schedule, points)
    result = reference(exact, noise(schedule, 3), schedule, tol=1e-8, t_end=0.0)
    assert float(torch.cdist(result.plain(), points).amin(1).max()) < 1e-12


# ---- the error estimate --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [VPLinear(), EDM(), Flow()], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize("make", [gaussian, mixture, clusters])
def test_the_error_estimate_is_honest_and_the_ladder_descends(schedule, make):
    exact = make(schedule)
    x = noise(schedule, math.prod(exact.shape))
    best = reference(exact, x, schedule, tol=1e-11)
    errors, calls = [], []
    for tol in (1e-3, 1e-5, 1e-7, 1e-9):
        result = reference(exact, x, schedule, tol=tol)
        errors.append(error(result, best))
        calls.append(result.nfe)
        assert errors[-1] <= 3.0 * result.error
        assert result.error <= tol
    assert errors == sorted(errors, reverse=True)
    assert calls == sorted(calls)
    assert calls[2] < 700


@pytest.mark.parametrize("predicts", ["data", "velocity", "flow"])
def test_a_float32_network_reaches_the_default_tolerance(predicts):
    schedule = Flow()
    exact, x = mixture(schedule), noise(schedule, 2)

    def network(state: Tensor, t: Tensor) -> Tensor:
        level = t.double()[:, None]
        d = exact(state.double(), t.double())
        velocity = (state.double() - d) / level  # eps - x_0, as x = (1 - t) x_0 + t eps
        epsilon = d + velocity
        return {"data": d, "flow": velocity, "velocity": (1 - level) * epsilon - level * d}[predicts].float()

    denoiser = Denoiser(network, schedule, predicts=predicts, network_dtype=torch.float32)
    best = reference(exact, x, schedule, tol=1e-10)
    result = reference(denoiser, x, schedule)
    assert result.dtype is torch.float64
    assert error(result, best) <= 3.0 * result.error
    assert result.error <= 1e-6
    assert result.nfe < 1000
    single = reference(denoiser, x.float(), schedule)
    assert single.dtype is torch.float32
    assert error(single.double(), best) < 2e-6  # the noise itself was rounded


def test_the_rest_of_the_batch_matters_within_the_tolerance_only():
    exact, x = mixture(VPLinear()), noise(VPLinear(), 2)
    together = reference(exact, x, VPLinear(), tol=1e-7)
    for i in range(3):
        assert error(reference(exact, x[i : i + 1], VPLinear(), tol=1e-7), together[i : i + 1]) < 2e-7


# ---- several times -------------------------------------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("count", [3, 40])
def test_times_are_hit_exactly(schedule, count):
    # 40 places set the length of the steps by themselves; the estimate must not vanish although the tolerance then sets nothing
    exact, x = gaussian(schedule), noise(schedule, 4)
    inner = schedule.t_of_lam(np.linspace(-3.0, 4.0, count))
    times = [schedule.t_start, *inner.tolist(), schedule.t_zero]
    result = reference(exact, x, schedule, tol=1e-6, times=times)
    assert result.shape == (count + 2, 8, 4)
    assert torch.equal(result[0], x)
    errors = [error(state, exact.solution(x, schedule.t_start, t)) for state, t in zip(result, times, strict=True)]
    assert max(errors) <= 3.0 * result.error
    assert max(errors) <= 1e-6
    assert result.nfe < 1600
    last = reference(exact, x, schedule, tol=1e-6, times=torch.tensor(times[1:2]))
    torch.testing.assert_close(last, result[1:2], rtol=0, atol=1e-5)


def test_several_times_do_not_restart_the_step_size():
    exact, x = mixture(VPLinear()), noise(VPLinear(), 2)
    one = reference(exact, x, VPLinear())
    five = reference(exact, x, VPLinear(), times=[0.8, 0.6, 0.4, 0.2, 1e-3])
    assert five.nfe < one.nfe + 2 * 5 * 12  # two solutions, at most two steps more for every time


# ---- backwards -----------------------------------------------------------------------------------------------------------------------


@every_schedule
def test_inversion_has_the_closed_form(schedule):
    exact = gaussian(schedule)
    x = exact.draw(8, 0)
    result = invert(exact, x, schedule, tol=1e-7)
    assert error(result, exact.solution(x, schedule.t_end, schedule.t_start)) <= 1e-7
    assert isinstance(result, Reference)


@every_schedule
def test_round_trip(schedule):
    exact, x = mixture(schedule), noise(schedule, 2)
    data = reference(exact, x, schedule, tol=1e-9)
    assert error(invert(exact, data.plain(), schedule, tol=1e-8), x) < 1e-7


def test_inversion_from_sigma_zero():
    exact = mixture(Flow())
    noise_ = invert(exact, exact.draw(8, 0), Flow(), tol=1e-6, t_from=0.0)
    back = reference(exact, noise_.plain(), Flow(), tol=1e-8, t_end=0.0)
    assert error(back, exact.draw(8, 0)) < 3e-6


# ---- conditions, guidance, derivatives -----------------------------------------------------------------------------------------------


def test_conditions_reach_the_denoiser():
    exact, labels = mixture(VPLinear()), torch.arange(8) % 3
    x = noise(VPLinear(), 2)
    result = reference(exact, x, VPLinear(), cond={"label": labels})
    means, variances = torch.tensor([[1.0, 0.5], [-1.0, -0.3], [0.2, -1.2]]), [[0.1, 0.4], [0.2, 0.2], [0.3, 0.05]]
    for i, label in enumerate(labels.tolist()):
        one = Gaussian(VPLinear(), means[label], variances[label])
        assert error(result[i : i + 1], one.solution(x[i : i + 1], 1.0, 1e-3)) < 1e-6
    assert error(invert(exact, result.plain(), VPLinear(), cond={"label": labels}), x) < 1e-5


def test_steps_end_where_guidance_jumps():
    exact, x = mixture(VPLinear()), noise(VPLinear(), 2)
    cond = {"label": torch.arange(8) % 3}
    guided = ClassifierFree(exact, 3.0, {"label": -1}, interval=(0.2, 0.6))
    result = reference(guided, x, VPLinear(), cond=cond)
    assert result.nfe < 600
    # the same in three pieces, each without a jump
    everywhere = ClassifierFree(exact, 3.0, {"label": -1})
    high = reference(exact, x, VPLinear(), tol=1e-8, t_end=0.6, cond=cond).plain()
    middle = reference(everywhere, high, VPLinear(), tol=1e-8, t_start=0.6, t_end=0.2, cond=cond).plain()
    low = reference(exact, middle, VPLinear(), tol=1e-8, t_start=0.2, cond=cond).plain()
    assert error(result, low) < 1e-6


def test_no_gradients_are_recorded():
    network = torch.nn.Linear(2, 2, dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: network(x), Flow(), predicts="data")
    result = reference(denoiser, noise(Flow(), 2).requires_grad_(), Flow(), tol=1e-3)
    assert not result.requires_grad


# ---- the result is a tensor ----------------------------------------------------------------------------------------------------------


def test_a_reference_behaves_as_a_tensor():
    x = noise(EDM(), 4)
    result = reference(gaussian(EDM()), x, EDM())
    assert isinstance(result, Tensor)
    assert result.shape == x.shape
    derived = [result + 1, x - result, result[0], result.float(), torch.stack([result, result]), result.clone(), result.plain()]
    derived += [copy.copy(result), copy.deepcopy(result)]
    assert all(type(value) is Tensor for value in derived)
    assert torch.equal(copy.deepcopy(result), result.plain())
    assert repr(result).startswith("Reference(error=")
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), result.plain())
    assert np.array_equal(result.numpy(), result.plain().numpy())


# ---- failing -------------------------------------------------------------------------------------------------------------------------


def test_a_half_precision_network_says_what_it_reached():
    exact, x = mixture(Flow()), noise(Flow(), 2)
    denoiser = Denoiser(lambda state, t: exact(state, t).half(), Flow(), predicts="data", network_dtype=torch.float16)
    message = r"tolerance 0\.0001 was not reached in \d+ calls: .*; an estimated error of .*tol=.*max_calls=.*float64"
    with pytest.raises(ToleranceError, match=message) as caught:
        reference(denoiser, x, Flow(), tol=1e-4)
    assert caught.value.nfe == denoiser.calls <= 20_000
    assert 1e-5 < caught.value.error < 1e-2
    assert isinstance(caught.value, FewstepError)
    assert isinstance(caught.value, RuntimeError)
    assert reference(denoiser, x, Flow(), tol=1e-2).error <= 1e-2


def test_the_budget_is_kept():
    exact = mixture(VPLinear())
    with pytest.raises(ToleranceError, match="in 50 calls: the calls allowed are spent; no estimate of the error") as caught:
        reference(exact, noise(VPLinear(), 2), VPLinear(), max_calls=50)
    assert exact.calls == caught.value.nfe == 50
    assert caught.value.error == math.inf


def test_values_that_are_not_finite_are_reported_with_their_time():
    exact = mixture(VPLinear())

    def broken(x: Tensor, t: float) -> Tensor:
        return exact(x, t) if t > 0.5 else torch.full_like(x, math.nan)

    with pytest.raises(NetworkError, match=r"not finite near t=0\.5\d*\."):
        reference(broken, noise(VPLinear(), 2), VPLinear())
    with pytest.raises(NetworkError, match="shape"):
        reference(lambda x, t: x[:, :1], noise(VPLinear(), 2), VPLinear())


def test_a_noise_prediction_cannot_begin_where_alpha_is_zero():
    denoiser = Denoiser(lambda x, t: x, VPCosine(t_start=1.0), predicts="noise")
    with pytest.raises(ValueError, match="alpha is 0"):
        reference(denoiser, noise(VPLinear(), 2), VPCosine(t_start=1.0))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"tol": 0.0}, ValueError, "tol must be at least"),
        ({"tol": math.nan}, ValueError, "tol must be at least"),
        ({"t_start": 0.1, "t_end": 0.5}, GridError, "strictly decrease in noise, but 0.1 and 0.5"),
        ({"times": [0.5, 0.5]}, GridError, "strictly decrease"),
        ({"times": []}, GridError, "at least one time"),
        ({"times": [0.5, 0.2], "t_start": 0.4}, GridError, "before the start 0.4"),
        ({"times": [0.5, 0.2], "t_end": 0.3}, GridError, "beyond t_end=0.3"),
    ],
)
def test_bad_options_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        reference(mixture(VPLinear()), noise(VPLinear(), 2), VPLinear(), **options)


def test_bad_states_are_refused():
    exact, schedule = mixture(VPLinear()), VPLinear()
    with pytest.raises(ValueError, match="Pass a state in float64"):
        reference(exact, noise(schedule, 2, dtype=torch.float32), schedule, tol=1e-9)
    with pytest.raises(ValueError, match="with a sample"):
        reference(exact, noise(schedule, 2)[:0], schedule)
    with pytest.raises(ValueError, match="floating-point"):
        reference(exact, torch.zeros(2, 2, dtype=torch.int64), schedule)
    with pytest.raises(ValueError, match="has the noise schedule VPLinear"):
        reference(exact, noise(schedule, 2), EDM())
    with pytest.raises(GridError, match="strictly decrease"):
        invert(exact, noise(schedule, 2), schedule, t_from=1.0, t_to=0.1)
