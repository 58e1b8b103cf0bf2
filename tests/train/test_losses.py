"""The denoising loss: one error has one size in every kind of prediction; weights, times and label dropout do what they say."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fewstep.errors import NetworkError, UnknownNameError
from fewstep.predictions import PREDICTIONS, data_coefficients
from fewstep.schedules import EDM, Flow, FromBetas, VPCosine, VPLinear
from fewstep.train import DenoisingLoss, HighOrderLoss, LabelDropout, importance_of_weight, measured_importance
from fewstep.train.times import TIMES, ImportanceTimes, LambdaTimes, LogitNormalTimes
from fewstep.train.weightings import P2, WEIGHTINGS, MinSNR

SCHEDULES = [VPLinear(), VPCosine(), EDM(), Flow(), Flow(shift=3.0), FromBetas(np.linspace(1e-3, 0.2, 50).tolist())]
X = torch.randn(12, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def data_network(x_t, time):
    """Some smooth data prediction."""
    return torch.tanh(x_t) * torch.cos(time)[:, None, None]


def as_kind(schedule, predicts):
    """The same network, speaking another kind: f = (x_0 - a x_t) / b."""

    def network(x_t, time):
        lookup = {float(schedule.network_time(t)): t for t in network.times}
        t = np.array([lookup[float(v)] for v in time])
        a, b = data_coefficients(predicts, schedule.alpha(t), schedule.sigma(t))
        column = lambda v: torch.as_tensor(v)[:, None, None]  # noqa: E731
        return (data_network(x_t, time) - column(a) * x_t) / column(b)

    return network


def losses(schedule, predicts, weighting, seed=0):
    objective = DenoisingLoss(schedule, predicts, weighting)
    network = as_kind(schedule, predicts)
    network.times = objective.prepare({"x": X}, torch.Generator().manual_seed(seed)).t
    return objective(network, {"x": X}, torch.Generator().manual_seed(seed))[0].item()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "constant"])
def test_weighted_loss_is_the_same_in_every_kind(schedule, weighting):
    values = [losses(schedule, predicts, weighting) for predicts in PREDICTIONS]
    np.testing.assert_allclose(values, values[0], rtol=1e-9)
    assert values[0] > 0.0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_weight_of_a_kind_is_the_plain_loss_of_that_kind(schedule, kind):
    np.testing.assert_allclose(losses(schedule, kind, kind), losses(schedule, kind, "constant"), rtol=1e-12)
    other = next(predicts for predicts in PREDICTIONS if predicts != kind)
    np.testing.assert_allclose(losses(schedule, other, kind), losses(schedule, kind, "constant"), rtol=1e-9)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_true_target_has_no_loss(predicts):
    """A network that knows x_0, here always 0.5, is right in every kind."""
    schedule = VPLinear()
    objective = DenoisingLoss(schedule, predicts)

    def network(x_t, time):
        t = time.numpy()
        a, b = (torch.as_tensor(v)[:, None] for v in data_coefficients(predicts, schedule.alpha(t), schedule.sigma(t)))
        return (0.5 - a * x_t) / b

    data = {"x": torch.full((32, 4), 0.5, dtype=torch.float64)}
    loss, info = objective(network, data, torch.Generator().manual_seed(0))
    assert loss < 1e-20
    assert info["squared_error"] < 1e-20


def test_weights_by_hand():
    """The tables of the papers, for data, noise and velocity."""
    schedule = VPLinear()
    t = np.array([0.01, 0.3, 0.9])
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    snr = alpha**2 / sigma**2
    tables = {
        "debiased": (np.sqrt(snr), 1 / np.sqrt(snr), alpha * sigma),
        "min_snr": (np.minimum(snr, 5), np.minimum(snr, 5) / snr, np.minimum(snr, 5) / (snr + 1)),
        "soft_min_snr": (4 * snr / (snr + 4), 4 / (snr + 4), 4 * snr / (snr + 4) / (snr + 1)),
        "p2": (snr / (1 + snr), 1 / (1 + snr), snr / (1 + snr) ** 2),
        "edm": (snr + 4, 1 + 4 / snr, (snr + 4) / (1 + snr)),
    }
    for name, rows in tables.items():
        for predicts, wanted in zip(("data", "noise", "velocity"), rows, strict=True):
            np.testing.assert_allclose(DenoisingLoss(schedule, predicts, name).weight(t), wanted, rtol=1e-10, err_msg=name)
    assert set(tables) | {"constant", *PREDICTIONS} == set(WEIGHTINGS)
    np.testing.assert_allclose(DenoisingLoss(Flow(), "flow", "debiased").weight(t), t * (1 - t), rtol=1e-10)
    np.testing.assert_allclose(DenoisingLoss(schedule, "data", MinSNR(gamma=1.0)).weight(t), np.minimum(snr, 1), rtol=1e-10)
    np.testing.assert_allclose(DenoisingLoss(schedule, "data", P2(2.0, 0.5)).weight(t), snr / np.sqrt(2 + snr), rtol=1e-10)


def test_debiased_is_the_geometric_mean_and_edm_weights_its_own_output_with_1():
    t = np.linspace(0.01, 0.99, 9)
    noise, data, debiased = (DenoisingLoss(VPCosine(), "velocity", name).weight(t) for name in ("noise", "data", "debiased"))
    np.testing.assert_allclose(debiased, np.sqrt(noise * data), rtol=1e-12)
    sigma = np.array([0.01, 0.5, 20.0])
    c_out = sigma * 0.5 / np.hypot(sigma, 0.5)  # of EDM's preconditioning
    np.testing.assert_allclose(DenoisingLoss(EDM(), "data", "edm").weight(sigma), c_out**-2, rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "constant"])
def test_gradients_are_equal_whatever_the_network_predicts(schedule, weighting):
    """One linear model of the data, spoken in every kind, trained by the same weighting: one gradient."""
    schedule = dataclasses.replace(schedule, t_start=float(schedule.t_of_lam(-2.0)), t_end=float(schedule.t_of_lam(3.0)))
    gradients = []
    for predicts in PREDICTIONS:
        weights = torch.full((3, 3), 0.2, dtype=torch.float64, requires_grad=True)
        objective = DenoisingLoss(schedule, predicts, weighting)
        drawn = objective.prepare({"x": X}, torch.Generator().manual_seed(1))
        a, b = data_coefficients(predicts, schedule.alpha(drawn.t), schedule.sigma(drawn.t))

        def network(x_t, time, weights=weights, a=a, b=b):
            data = torch.einsum("ij,bjk->bik", weights, x_t)
            return (data - torch.as_tensor(a)[:, None, None] * x_t) / torch.as_tensor(b)[:, None, None]

        objective(network, {"x": X}, torch.Generator().manual_seed(1))[0].backward()
        gradients.append(weights.grad)
    for gradient in gradients:
        assert (gradient - gradients[0]).abs().max() <= 1e-10 * gradients[0].abs().max()


@given(seed=st.integers(0, 2**32), count=st.integers(1, 40))
def test_times_lie_between_the_ends(seed, count):
    for name in TIMES:
        for schedule in (Flow(t_start=0.8, t_end=0.1), EDM(), VPLinear()):
            t, factor = TIMES[name].draw(schedule, count, torch.Generator().manual_seed(seed))
            assert (factor == 1.0).all()
            assert t.shape == (count,)
            assert ((t >= schedule.t_end) & (t <= schedule.t_start)).all()


def test_distributions_of_times():
    generator = torch.Generator().manual_seed(0)
    unit = Flow(t_end=0.0)  # times are the quantiles themselves
    even = np.sort(TIMES["low_discrepancy"].draw(unit, 64, generator)[0])
    assert np.abs(np.diff(even) - 1 / 64).max() < 1e-12
    normal = torch.from_numpy(TIMES["logit_normal"].draw(unit, 20_000, generator)[0]).logit()
    assert abs(normal.mean()) < 4 / 20_000**0.5  # four standard errors
    assert abs(normal.std() - 1) < 4 / 40_000**0.5
    uniform = TIMES["uniform"].draw(unit, 20_000, generator)[0]
    assert abs(uniform.mean() - 0.5) < 4 * (1 / 12 / 20_000) ** 0.5
    even = np.sort(VPLinear().lam(TIMES["lambda"].draw(VPLinear(), 64, generator)[0]))
    np.testing.assert_allclose(np.diff(even), np.ptp(VPLinear().lam([1.0, 1e-3])) / 64, rtol=1e-9)
    log = np.log(TIMES["log_normal"].draw(EDM(sigma_min=1e-9, sigma_max=1e9), 20_000, generator)[0])  # EDM's table 1
    assert abs(log.mean() + 1.2) < 4 * 1.2 / 20_000**0.5
    assert abs(log.std() - 1.2) < 4 * 1.2 / 40_000**0.5


def test_log_normal_times_are_cut_off_not_piled_up():
    log = np.log(TIMES["log_normal"].draw(EDM(sigma_min=0.1, sigma_max=1.0), 20_000, torch.Generator().manual_seed(0))[0])
    truncated = stats.truncnorm((math.log(0.1) + 1.2) / 1.2, 1.0, -1.2, 1.2)
    assert stats.kstest(log, truncated.cdf).pvalue > 0.01


def test_lambda_times_of_a_flow_begin_before_1():
    loss = DenoisingLoss(Flow(t_start=0.999), "flow", "noise", "lambda")
    assert math.isfinite(loss(lambda x, time: 0.0 * x, {"x": X}, torch.Generator().manual_seed(0))[0])
    with pytest.raises(ValueError, match="t_start where alpha > 0"):
        dataclasses.replace(loss, schedule=Flow())(lambda x, time: x, {"x": X}, torch.Generator().manual_seed(0))


def test_lambda_times_need_finite_ends():
    with pytest.raises(ValueError, match="lambda runs from -inf"):
        TIMES["lambda"].draw(Flow(), 4, torch.Generator())


def test_label_dropout():
    seen = []

    def network(x_t, time, label):
        seen.append(label)
        return x_t

    data = {"x": torch.zeros(4000, 1), "label": torch.arange(4000) % 10}
    DenoisingLoss(VPLinear(), "noise", dropout=LabelDropout(null=10, probability=0.2))(
        network, data, torch.Generator().manual_seed(0)
    )
    dropped = seen[0] == 10
    assert abs(dropped.float().mean() - 0.2) < 4 * (0.2 * 0.8 / 4000) ** 0.5
    assert torch.equal(seen[0][~dropped], data["label"][~dropped])
    assert data["label"].max() == 9  # the caller's batch is untouched


def test_repeatable_and_dependent_on_the_generator():
    objective = DenoisingLoss(VPLinear(), "noise")
    call = lambda seed: objective(data_network, {"x": X}, torch.Generator().manual_seed(seed))[0].item()  # noqa: E731
    assert call(1) == call(1) != call(2)


# ---- importance sampling ----


@pytest.mark.parametrize(("schedule", "predicts"), [(VPLinear(), "velocity"), (Flow(t_start=0.999), "flow")], ids=repr)
def test_importance_times_of_the_likelihood_are_those_of_i_dode(schedule, predicts):
    """log sigma is uniform for variance-preserving schedules, log sigma - sigma on the straight path; in the paper's terms,
    gamma(u) = -log(e^{-Zu} (1 + e^{-gamma_0}) - 1)."""
    likelihood = DenoisingLoss(schedule, predicts, "noise", "lambda")
    u = np.linspace(0.0, 1.0, 33)
    t, factor = importance_of_weight(likelihood, bins=4096).at(schedule, u)
    sigma = schedule.sigma(t)
    place = np.log(sigma) - (sigma if predicts == "flow" else 0.0)
    np.testing.assert_allclose(place, np.linspace(place[0], place[-1], 33), atol=2e-3)
    np.testing.assert_allclose(np.sort(t)[[0, -1]], sorted([schedule.t_end, schedule.t_start]), rtol=1e-9)
    if predicts == "velocity":
        low, high = -2 * schedule.lam(schedule.t_end), -2 * schedule.lam(schedule.t_start)
        Z = np.log1p(np.exp(-low)) - np.log1p(np.exp(-high))
        gamma = -np.log(np.expm1(np.log1p(np.exp(-low)) - Z * (1 - u)))
        np.testing.assert_allclose(-2 * schedule.lam(t), gamma, atol=2e-2)
        # Z / 2 is the weight of every velocity error: weight x factor x range of lambda
        np.testing.assert_allclose(
            likelihood.weight(t) * factor * (high - low) / 2, Z / 2, rtol=2.5e-3
        )  # half a bin of lambda times the slope 2


def test_importance_sampling_keeps_the_mean_and_lowers_the_variance():
    """Of the bound of the likelihood of a model that is off by 0.1 in the velocity: ratio of variances as theory says."""
    schedule = VPLinear()
    plain = DenoisingLoss(schedule, "velocity", "noise", LambdaTimes())
    times = importance_of_weight(plain)
    sizes = {}
    for name, distribution in (("plain", LambdaTimes()), ("importance", times.times), ("stratified", times)):
        objective = dataclasses.replace(plain, times=distribution)
        generator, losses = torch.Generator().manual_seed(0), []
        for _ in range(400):
            drawn = objective.prepare({"x": torch.zeros(16, 1, dtype=torch.float64)}, generator)
            losses.append((drawn.weight * 0.1**2).mean())
        sizes[name] = (np.mean(losses), np.std(losses))
    t, _ = LambdaTimes().at(schedule, (np.arange(20_000) + 0.5) / 20_000)
    exact, square = plain.weight(t).mean() * 0.01, (plain.weight(t) ** 2).mean() * 1e-4
    for mean, spread in sizes.values():
        assert abs(mean - exact) < 4 * max(spread, 1e-5 * exact) / 20
    assert sizes["plain"][1] == pytest.approx(math.sqrt((square - exact**2) / 16), rel=0.15)  # four standard errors of a deviation
    assert sizes["importance"][1] < 1e-2 * exact  # a constant error has no variance left but that of the bins
    assert sizes["stratified"][1] < 1e-2 * exact


def test_measured_importance():
    """The density is proportional to weight times error; the mean stays; it beats the objective's own times."""
    schedule = VPLinear()
    objective = DenoisingLoss(schedule, "noise", "data", "uniform")
    data = {"x": torch.randn(256, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}
    network = lambda x, time: torch.zeros_like(x)  # noqa: E731  # an error of 1 in the mean at every time
    times = measured_importance(objective, network, data, bins=16, samples=4000, plain=1e-9)
    middle = schedule.t_end + (np.arange(16) + 0.5) / 16 * (schedule.t_start - schedule.t_end)
    shares = np.array(times.times.masses) / sum(times.times.masses)
    wanted = objective.weight(middle) / objective.weight(middle).sum()
    np.testing.assert_allclose(shares[2:-2], wanted[2:-2], rtol=0.12)

    def spread(times):
        one, generator = dataclasses.replace(objective, times=times), torch.Generator().manual_seed(2)
        values = np.array([one(network, {"x": data["x"][:32]}, generator)[0].item() for _ in range(300)])
        return values.mean(), values.std()

    (mean, plain), (other, less) = spread("uniform"), spread(times.times)
    assert abs(mean - other) < 4 * math.hypot(plain, less) / 300**0.5
    assert less < 0.7 * plain


def test_importance_times_are_exact_whatever_the_masses():
    """The mean of any function survives any masses; and low discrepancy around importance is the same distribution."""
    schedule, u = Flow(), (np.arange(100_000) + 0.5) / 100_000
    t, factor = ImportanceTimes(LogitNormalTimes(), (0.1, 3.0, 1.0)).at(schedule, u)
    plain, _ = LogitNormalTimes().at(schedule, u)
    np.testing.assert_allclose((factor * t**2).mean(), (plain**2).mean(), rtol=1e-4)
    np.testing.assert_allclose(factor.mean(), 1.0, rtol=1e-3)
    with pytest.raises(ValueError, match="positive masses"):
        ImportanceTimes(LogitNormalTimes(), (1.0, 0.0))
    with pytest.raises(ValueError, match=r"share in \(0, 1\]"):
        measured_importance(DenoisingLoss(schedule, "flow"), data_network, {"x": X}, plain=0.0)


@pytest.mark.parametrize("order", ["first", "second"])
def test_a_step_in_pieces_is_that_of_the_whole(order):
    """What is drawn for a whole batch is cut with it: the mean over the pieces is the loss of the whole, label dropout included."""
    first = DenoisingLoss(VPLinear(), "velocity", "debiased", "low_discrepancy", LabelDropout(null=3, probability=0.5))
    objective = first if order == "first" else HighOrderLoss(first)
    batch = {"x": X, "label": torch.arange(12) % 3}
    network = lambda x, time, label: torch.tanh(x) * label[:, None, None]  # noqa: E731
    whole = objective(network, batch, torch.Generator().manual_seed(0))[0]
    drawn = objective.draw_whole(batch, torch.Generator().manual_seed(0))
    assert all(len(value) == 12 for value in drawn.values())
    parts = [objective(network, {name: value[i : i + 4] for name, value in drawn.items()}, torch.Generator())[0] for i in (0, 4, 8)]
    assert sum(part.item() for part in parts) / 3 == pytest.approx(whole.item(), rel=1e-12)


def test_wrong_options():
    for wrong in ({"predicts": "noize"}, {"weighting": "snr"}, {"times": "normal"}):
        with pytest.raises(UnknownNameError, match="Known"):
            dataclasses.replace(DenoisingLoss(VPLinear(), "noise"), **wrong)
    for wrong in (lambda: MinSNR(gamma=0.0), lambda: P2(k=-1.0), lambda: LogitNormalTimes(std=0.0)):
        with pytest.raises(ValueError, match="positive"):
            wrong()
    with pytest.raises(ValueError, match="probability"):
        LabelDropout(null=0, probability=1.5)


def test_a_network_of_another_shape_is_refused_rather_than_broadcast():
    first = DenoisingLoss(VPLinear(), "noise")
    batch = {"x": torch.randn(8, 3, generator=torch.Generator().manual_seed(0))}
    for network, told in (
        (lambda x, time: x[:, :1], r"shape \(8, 1\), but what it should predict has shape \(8, 3\)"),
        (lambda x, time: x.sum(1), r"shape \(8,\), but"),
        (lambda x, time: (x,), "returned tuple, not a tensor"),
    ):
        for objective in (first, HighOrderLoss(first)):
            with pytest.raises(NetworkError, match=told):
                objective(network, batch, torch.Generator().manual_seed(0))
