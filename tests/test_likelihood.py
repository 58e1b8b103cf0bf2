"""Densities along the ODE against closed forms; dequantizations against integrals; bounds are bounds."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import fewstep as fs
from fewstep.dequantization import DEQUANTIZATIONS, Levels, TruncatedNormal, Uniform, Variational, draw_uniform
from fewstep.errors import NetworkError, UnknownNameError
from fewstep.exact import FiniteData, Gaussian, GaussianMixture
from fewstep.integrate import ToleranceError
from fewstep.likelihood import bits_per_dim, log_likelihood
from fewstep.predictions import data_coefficients
from fewstep.schedules import EDM, Flow, FromBetas, VPCosine, VPLinear

SCHEDULES = [
    VPLinear(),
    VPCosine(),
    VPCosine(t_start=1.0),
    EDM(),
    Flow(),
    Flow(shift=3.0),
    FromBetas(np.linspace(1e-4, 0.02, 1000).tolist()),
]
MEANS = [[-1.0, 0.2, 0.0], [0.8, -0.5, 0.3]]
COVARIANCES = [np.diag([0.3, 0.1, 0.05]) + 0.02, np.diag([0.1, 0.2, 0.1])]
BITS = 3 * math.log(2.0)
"""Nats of one bit per dimension of the mixture."""


def mixture(schedule):
    return GaussianMixture(schedule, MEANS, np.stack(COVARIANCES), [0.3, 0.7])


def exact_prior(denoiser):
    return lambda x: denoiser.log_density(x, denoiser.schedule.t_start)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{type(s).__name__}-{s.t_start:g}")
def test_mixture_agrees_with_its_closed_form(schedule):
    """To 1e-4 bits per dimension with the exact trace, every sample."""
    exact = mixture(schedule)
    x = float(schedule.alpha(schedule.t_end)) * exact.draw(20, 0)
    x = x + float(schedule.sigma(schedule.t_end)) * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    found = log_likelihood(exact, x, trace="exact", prior=exact_prior(exact))
    error = (found.log_density - exact.log_density(x, schedule.t_end)).abs() / BITS
    assert error.max() < 1e-4
    finer = log_likelihood(exact, x[:4], trace="exact", prior=exact_prior(exact), tol=1e-8)
    assert (finer.log_density - exact.log_density(x[:4], schedule.t_end)).abs().max() / BITS < 1e-6
    assert (found.stderr == 0.0).all()


@pytest.mark.parametrize("schedule", [VPLinear(), EDM(sigma_max=1e4), Flow(t_start=1.0), VPCosine(t_start=1.0)], ids=repr)
def test_normal_prior_is_that_of_sampling(schedule):
    """Where the schedule ends in noise, or nearly so, N(0, sigma^2) gives the same: 1e-4 bits per dimension in the mean."""
    exact = mixture(schedule)
    x = exact.draw(400, 0) * float(schedule.alpha(schedule.t_end))
    difference = (log_likelihood(exact, x, trace="exact").log_density - exact.log_density(x, schedule.t_end)) / BITS
    assert abs(float(difference.mean())) < 1e-4 + 3 * float(difference.std()) / 20
    assert float(difference.std()) < 5e-3


@pytest.mark.parametrize(
    ("predicts", "mode"), [("noise", "forward"), ("data", "reverse"), ("velocity", "reverse"), ("flow", "forward")]
)
def test_any_prediction(predicts, mode):
    """A wrapped network, told its time; conditions go along with the samples."""
    schedule = VPLinear()
    exact = mixture(schedule)

    def network(x, time, label):
        a, b = (torch.as_tensor(v)[:, None] for v in data_coefficients(predicts, schedule.alpha(time), schedule.sigma(time)))
        return (exact(x, time, label=label) - a * x) / b

    x, label = exact.draw(8, 1), torch.arange(8) % 3 - 1
    options = {"cond": {"label": label}, "prior": lambda z: exact.log_density(z, 1.0, label=label), "tol": 1e-6}
    found = log_likelihood(fs.Denoiser(network, schedule, predicts), x, trace="exact", differentiation=mode, chunk=9, **options)
    assert (found.log_density - exact.log_density(x, schedule.t_end, label=label)).abs().max() / BITS < 1e-4


def test_hutchinson_is_unbiased():
    """The mean of 200 probes within 3 standard errors, for samples one by one; and the standard error of several probes is right."""
    schedule = VPLinear()
    exact = mixture(schedule)
    x = exact.draw(3, 5)
    wanted = exact.log_density(x, schedule.t_end)
    many = log_likelihood(exact, x.repeat_interleave(200, 0), prior=exact_prior(exact)).log_density.reshape(3, 200)
    spread = many.std(1) / math.sqrt(200)
    assert ((many.mean(1) - wanted).abs() < 3 * spread).all()
    together = log_likelihood(exact, x, probes=200, prior=exact_prior(exact))
    assert ((together.log_density - wanted).abs() < 3 * together.stderr).all()
    torch.testing.assert_close(together.stderr, spread, rtol=0.2, atol=0.0)  # four standard errors of a deviation of 200
    assert torch.isnan(log_likelihood(exact, x).stderr).all()


def test_a_sample_does_not_depend_on_the_others():
    exact = mixture(VPLinear())
    x = torch.cat([exact.draw(3, 0), torch.full((1, 3), 30.0, dtype=torch.float64)])  # the last one needs other steps
    for options in ({"trace": "exact"}, {"seeds": [4, 5, 6, 7], "probes": 2}):
        together = log_likelihood(exact, x, **options)
        alone = [
            log_likelihood(exact, x[i : i + 1], **{**options, **({"seeds": [4 + i]} if "seeds" in options else {})})
            for i in range(4)
        ]
        torch.testing.assert_close(together.log_density, torch.cat([one.log_density for one in alone]), rtol=1e-12, atol=1e-11)
        assert together.calls.tolist() == [int(one.calls[0]) for one in alone]
    assert together.calls[-1] != together.calls[0]


def test_states_arrive_where_the_ode_leads():
    exact = Gaussian(VPLinear(), [1.0, -1.0], [0.25, 2.0])
    x = torch.tensor([[1.5, -2.0], [0.0, 0.0]], dtype=torch.float64)
    found = log_likelihood(exact, x, trace="exact", tol=1e-9)
    torch.testing.assert_close(found.noise, exact.solution(x, 1e-3, 1.0), rtol=1e-7, atol=1e-7)


def test_the_trained_digits_in_both_modes():
    """The two ways of differentiating agree on a trained network to its rounding, and float32 data are no worse than float64."""
    denoiser = fs.load("digits")
    x = torch.from_numpy(np.linspace(-1, 1, 64).reshape(1, 1, 8, 8)).float()
    found = [
        log_likelihood(denoiser, states, t=0.2, tol=1e-3, differentiation=mode).log_density
        for states, mode in ((x, "forward"), (x, "reverse"), (x.double(), "forward"))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0.0)
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=0.0)


# ---- dequantization ------------------------------------------------------------------------------------------------------------------


def test_levels():
    levels = Levels(17)
    x = torch.arange(17).float() / 8 - 1
    assert levels.index(x).tolist() == list(range(17))
    assert torch.equal(levels.values(levels.index(x)), x.double())
    for wrong in (x + 0.05, x * 1.5):
        with pytest.raises(ValueError, match="Pass the levels"):
            levels.index(wrong)
    with pytest.raises(ValueError, match="at least 2 levels"):
        Levels(1)


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.7])
def test_truncated_normal_is_one(sigma):
    """Draws against SciPy's distribution, the price against its density, the entropy against SciPy's."""
    levels, alpha = Levels(17), math.sqrt(1 - sigma**2)
    tau = alpha * levels.width / (2 * sigma)
    law = stats.truncnorm(-tau, tau, loc=alpha * 0.5, scale=sigma)
    index = torch.full((4000, 1), 12)
    u = draw_uniform((1,), range(4000), 0)
    z, price = TruncatedNormal().draw(levels, index, u, alpha, sigma)
    assert stats.kstest(z[:, 0].numpy(), law.cdf).pvalue > 0.01
    np.testing.assert_allclose(price.numpy(), -law.logpdf(z[:, 0].numpy()), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(TruncatedNormal.entropy(levels, alpha, sigma), law.entropy(), rtol=1e-9)
    np.testing.assert_allclose(price.mean(), law.entropy(), atol=4 * float(price.std()) / 4000**0.5 + 1e-9)
    assert (z - alpha * 0.5).abs().max() <= alpha * levels.width / 2


def test_variational_decoder_by_hand():
    levels, alpha, sigma = Levels(4), 0.9, 0.3
    index, u = torch.tensor([[0, 2]]), torch.tensor([[0.3, 0.8]], dtype=torch.float64)
    z, price = Variational().draw(levels, index, u, alpha, sigma)
    wanted = 0.0
    for i, value, v in zip(index[0].tolist(), z[0].tolist(), u[0].tolist(), strict=True):
        centre = alpha * np.linspace(-1, 1, 4)
        assert value == pytest.approx(stats.norm(centre[i], sigma).ppf(v))
        decoder = stats.norm(centre, sigma).pdf(value)
        wanted += math.log(decoder[i] / decoder.sum()) - stats.norm(centre[i], sigma).logpdf(value)
    assert float(price) == pytest.approx(wanted, rel=1e-9)


def test_uniform_numbers_depend_on_the_seed_and_the_draw():
    u = draw_uniform((20_000,), [3, 4], 0)
    assert torch.equal(u[1:], draw_uniform((20_000,), [4], 0))
    assert not torch.equal(u, draw_uniform((20_000,), [3, 4], 1))
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 0.01


# ---- bits per dimension --------------------------------------------------------------------------------------------------------------


def byte_law():
    """Probabilities of 256 levels, about 7 bits of entropy."""
    x = np.linspace(-1, 1, 256)
    p = 0.6 * stats.norm(-0.3, 0.25).pdf(x) + 0.4 * stats.norm(0.5, 0.15).pdf(x) + 0.05
    return x, p / p.sum()


def bound_by_quadrature(name, gamma, count=128):
    """Excess over the entropy of the bound of one byte, the density of its noised states being exact: all integrals by quadrature."""
    x, p = byte_law()
    lam = -gamma / 2
    alpha, sigma = 1 / math.sqrt(1 + math.exp(-2 * lam)), 1 / math.sqrt(1 + math.exp(2 * lam))
    levels, nodes = Levels(256), (np.arange(count) + 0.5) / count
    index = torch.arange(256)[:, None].repeat(1, count).reshape(-1, 1)
    u = torch.from_numpy(nodes).repeat(256)[:, None]
    z, price = DEQUANTIZATIONS[name].draw(levels, index, u, alpha, sigma)
    density, states = np.zeros(len(z)), z[:, 0].numpy()
    for k in range(256):
        density += p[k] / (sigma * math.sqrt(2 * math.pi)) * np.exp(-0.5 * ((states - alpha * x[k]) / sigma) ** 2)
    logs = (np.log(density) + price.numpy()).reshape(256, count).mean(1)
    return float(-(p * logs).sum() / math.log(2)) + float((p * np.log2(p)).sum())


def test_one_byte_with_exact_densities():
    """i-DODE's setting, gamma = -13.3 and -11.8: the truncated normal costs next to nothing where the uniform law is ruinous."""
    tn, uniform = bound_by_quadrature("truncated_normal", -13.3, 512), bound_by_quadrature("uniform", -13.3)
    assert 0.0 <= tn < 1e-3
    assert uniform > 0.5
    assert 0.0 < bound_by_quadrature("uniform", -11.8) < 0.05
    assert 0.0 < bound_by_quadrature("truncated_normal", -11.8) < 0.05
    assert 0.0 <= bound_by_quadrature("variational", -13.3) < 5e-3


@pytest.mark.parametrize("name", DEQUANTIZATIONS)
def test_bits_of_discrete_data_are_bounds_of_their_entropy(name):
    """Three levels with known probabilities and their exact denoiser: importance weights close the bound."""
    schedule, levels = VPLinear(), Levels(3)
    points = [[-1.0]] * 5 + [[0.0]] * 2 + [[1.0]]
    exact = FiniteData(schedule, points)
    x = torch.tensor(points)
    p = np.array([5, 2, 1]) / 8
    entropy = -(p * np.log2(p)).sum()
    t = float(schedule.t_of_lam(math.log(2.5)))
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    options = {"trace": "exact", "t": t, "dequantization": name, "tol": 1e-4, "batch_size": 600}
    one = bits_per_dim(exact, x.repeat(60, 1), levels, draws=1, **options)
    tight = bits_per_dim(exact, x.repeat(12, 1), levels, draws=16, bound="importance", **options)
    assert one.is_bound
    assert tight.value <= one.value + 3 * one.stderr
    bins = Levels(3).width * alpha / 2

    def density(z):
        return sum(pk * stats.norm(alpha * ck, sigma).pdf(z) for pk, ck in zip(p, (-1, 0, 1), strict=True))

    # what perfect importance weights give: -log2 of the integral of the density over the bin, or the decoder's own mixture
    if name == "variational":
        exact_bits = entropy
    else:
        mass = [integrate.quad(density, alpha * c - bins, alpha * c + bins, points=[alpha * c])[0] for c in (-1, 0, 1)]
        exact_bits = -(p * np.log2(mass)).sum()
    if name != "variational":
        assert one.value > exact_bits - 3 * one.stderr
        assert abs(tight.value - exact_bits) < 0.02
    assert one.value > entropy - 1e-3  # no code is shorter than the entropy


def test_importance_bound_of_one_draw_is_the_average():
    exact, x = FiniteData(VPLinear(), [[-1.0], [1.0]]), torch.tensor([[-1.0], [1.0]])
    options = {"trace": "exact", "t": 0.1}
    one, other = (bits_per_dim(exact, x, Levels(2), bound=bound, **options) for bound in ("average", "importance"))
    assert torch.equal(one.each, other.each)
    assert not bits_per_dim(exact, x, Levels(2), t=0.1, bound="importance", draws=2).is_bound


def test_bits_do_not_depend_on_batches():
    exact, x = FiniteData(VPLinear(), [[-1.0, 1.0], [1.0, 1.0]]), torch.tensor([[-1.0, 1.0], [1.0, 1.0]]).repeat(3, 1)
    seen = []
    one = bits_per_dim(exact, x, Levels(2), t=0.1, draws=2, after=seen.append)
    other = bits_per_dim(exact, x, Levels(2), t=0.1, draws=2, batch_size=4, after=seen.append)
    torch.testing.assert_close(one.each, other.each, rtol=1e-11, atol=1e-12)
    assert seen == [6, 4, 2]
    assert one.calls.tolist() == other.calls.tolist()


def test_truncated_normal_beats_uniform_on_digits():
    """17 levels, the shipped model: the truncated normal at t = 0.01 against the uniform law there and below."""
    from fewstep.train.recipes import digits

    denoiser, x = fs.load("digits"), digits("held_out")["x"][:5]
    options = {"tol": 1e-2, "seeds": range(5)}
    mine = bits_per_dim(denoiser, x, Levels(17), t=0.01, **options)
    for t in (0.006, 0.01):
        other = bits_per_dim(denoiser, x, Levels(17), dequantization="uniform", t=t, **options)
        difference = other.each - mine.each  # the samples are the same, and so are the probes
        assert difference.mean() > 0.0
    assert 1.0 < mine.value < 3.0


# ---- errors --------------------------------------------------------------------------------------------------------------------------


def test_wrong_options():
    exact, x = mixture(VPLinear()), torch.zeros(2, 3)
    cases = [
        ({"trace": "hutch"}, UnknownNameError, "Did you mean 'hutchinson'"),
        ({"differentiation": "back"}, UnknownNameError, "differentiation"),
        ({"probes": 0}, ValueError, "at least 1"),
        ({"tol": 0.0}, ValueError, "positive"),
        ({"t": 0.0}, ValueError, "sigma > 0"),
        ({"t": 1.0}, ValueError, "lambda"),
        ({"seeds": [1]}, ValueError, "1 seeds for 2 samples"),
        ({"max_calls": 20}, ToleranceError, "20 evaluations"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            log_likelihood(exact, x, **options)
    with pytest.raises(TypeError, match="must have a schedule"):
        log_likelihood(lambda x, t: x, x)
    with pytest.raises(ValueError, match="finite floating-point"):
        log_likelihood(exact, torch.full((2, 3), math.nan))
    with pytest.raises(ValueError, match=r"samples of shape \(2,\), but GaussianMixture is one of shape \(3,\)"):
        log_likelihood(exact, torch.zeros(2, 2), trace="exact")
    for options, message in (
        ({"bound": "mean"}, "unknown bound"),
        ({"dequantization": "normal"}, "unknown"),
        ({"draws": 0}, "draws"),
    ):
        with pytest.raises(ValueError, match=message):
            bits_per_dim(exact, x, Levels(3), **options)
    with pytest.raises(ValueError, match="Pass the levels"):
        bits_per_dim(exact, x + 0.2, Levels(3))
    assert isinstance(Uniform(), type(DEQUANTIZATIONS["uniform"]))


def test_networks_that_cannot_be_differentiated():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 0.5 * x

        @staticmethod
        def backward(ctx, gradient):
            return 0.5 * gradient

    denoiser = fs.Denoiser(lambda x, time: Opaque.apply(x), VPLinear(), "data")
    x = torch.zeros(1, 2)
    assert torch.isfinite(log_likelihood(denoiser, x, differentiation="reverse").log_density).all()
    with pytest.raises(NetworkError, match="reverse"):
        log_likelihood(denoiser, x)
    broken = fs.Denoiser(lambda x, time: x * math.nan, VPLinear(), "data")
    with pytest.raises(NetworkError, match="not finite"):
        log_likelihood(broken, x)
