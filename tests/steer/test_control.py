"""Control by the starting noise: the closed-form optimum, the shell, resumption, and what cannot be."""

import pytest
import torch

import fewstep as fs
from fewstep.errors import ArtefactError, PlanError
from fewstep.steer import TARGETS, ClassTarget, IntensityTarget, MaskedPixels, optimize_noise

FLOW = fs.schedules.Flow(t_end=0.0)


def gaussian():
    return fs.exact.Gaussian(FLOW, torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64), torch.tensor([0.5, 1.0, 0.8]).double())


def plan_of(nfe, name="ddim"):
    return fs.make_plan(name, FLOW, nfe, final="zero")


def affine(plan, denoiser):
    """The run as x = M z + b."""
    eye = torch.eye(3, dtype=torch.float64)
    b = fs.sample(denoiser, torch.zeros(1, 3, dtype=torch.float64), plan)[0]
    return (fs.sample(denoiser, eye, plan) - b).T, b


def start(count=4):
    return fs.draw_noise((3,), range(count), plan_of(4), dtype=torch.float64)


@pytest.mark.parametrize("nfe", [1, 4])
def test_a_linear_feature_of_a_gaussian_model_has_the_optimum_in_closed_form(nfe):
    """G (M z + b) = y for a square G: z = M^-1 (G^-1 y - b). From pure noise one call says nothing of z; so from 0.8."""
    denoiser, plan = gaussian(), fs.solvers.DDIM().plan(FLOW, nfe, start=0.8, final="zero")
    torch.manual_seed(0)
    feature = torch.randn(3, 3, dtype=torch.float64) + 2 * torch.eye(3)
    matrix, shift = affine(plan, denoiser)
    wanted = feature @ (matrix @ torch.tensor([0.9, -0.6, 0.3], dtype=torch.float64) + shift)
    exact = torch.linalg.solve(matrix, torch.linalg.solve(feature, wanted) - shift)
    found = optimize_noise(
        denoiser,
        lambda x: (x @ feature.T - wanted).square().sum(1),
        start() * 0.8,
        plan,
        shell=False,
        iterations=1000,
        learning_rate=0.05,
        decay="cosine",
    )
    assert (found.noise - exact).abs().max() < 1e-3
    assert found.errors.max() < 1e-6


def test_on_the_shell_the_optimum_is_where_the_feature_points():
    """A feature a.x that is asked for more than the shell has: z = R M'a / |M'a|."""
    denoiser, plan = gaussian(), plan_of(4)
    a = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    matrix, _ = affine(plan, denoiser)
    noise = start()
    found = optimize_noise(
        denoiser, lambda x: (x @ a - 100.0).square(), noise, plan, iterations=400, learning_rate=0.05, decay="cosine"
    )
    direction = matrix.T @ a
    exact = noise.norm(dim=1, keepdim=True) * direction / direction.norm()
    assert (found.noise - exact).abs().max() < 1e-3
    torch.testing.assert_close(found.noise.norm(dim=1), noise.norm(dim=1), rtol=1e-9, atol=0.0)


def test_samples_are_optimised_each_by_itself():
    denoiser, plan = gaussian(), plan_of(2)
    loss = lambda x: (x[:, 0] - 0.7).square()  # noqa: E731
    both, one = (optimize_noise(denoiser, loss, start()[rows], plan, iterations=20) for rows in (slice(4), slice(1, 2)))
    torch.testing.assert_close(both.noise[1:2], one.noise, rtol=1e-12, atol=1e-12)


def test_errors_are_those_after_decoding_and_refining_closes_the_gap():
    once, decode = plan_of(1), plan_of(5)
    loss = lambda x: (x[:, 0] - 0.8).square()  # noqa: E731
    model = fs.exact.GaussianMixture(FLOW, torch.tensor([[1.0, 0.5, 0.0], [-1.0, -0.3, 0.2]], dtype=torch.float64), 0.1)
    surrogate = lambda x, t, **_: model(x, 0.9)  # noqa: E731
    options = {"iterations": 60, "learning_rate": 0.1}
    plain = optimize_noise(model, loss, start(), once, decode, surrogate=surrogate, **options)
    torch.testing.assert_close(plain.errors, loss(fs.sample(model, plain.noise, decode)))
    refined = optimize_noise(model, loss, start(), once, decode, surrogate=surrogate, refined=30, **options)
    assert refined.errors.mean() < 0.5 * plain.errors.mean()
    assert (plain.calls, refined.calls) == (60 * 3 + 5, 30 * 3 + 30 * 15 + 5)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    model = fs.load("digits")
    plan, decode = (fs.make_plan("ddim", model.schedule, n, final="zero") for n in (1, 2))
    noise, cond = fs.draw_noise((1, 8, 8), range(2), plan), {"label": torch.tensor([1, 2])}
    target, asked = ClassTarget(torch.tensor([1, 2])), []

    class Stopped(Exception):
        pass

    class Stopping:
        def __call__(self, x):
            asked.append(1)
            if len(asked) == 6:
                raise Stopped
            return target(x)

        def __repr__(self):
            return repr(target)

    options = {"cond": cond, "iterations": 6, "refined": 3, "checkpoint_every": 1}
    whole = optimize_noise(model, target, noise, plan, decode, **options)
    with pytest.raises(Stopped):
        optimize_noise(model, Stopping(), noise, plan, decode, folder=tmp_path, **options)
    with pytest.raises(ArtefactError, match="other settings"):
        optimize_noise(model, target, -noise, plan, decode, folder=tmp_path, **options)
    again = optimize_noise(model, target, noise, plan, decode, folder=tmp_path, sheets=3, **options)
    assert torch.equal(whole.noise, again.noise)
    assert [file.name for file in sorted(tmp_path.glob("*.png"))] == ["samples-0000006.png"]


def test_the_noise_of_a_stochastic_decode_is_held_by_its_seeds():
    denoiser, plan = gaussian(), plan_of(3, "lcm")
    loss = lambda x: (x[:, 0] - 0.8).square()  # noqa: E731
    found = optimize_noise(denoiser, loss, start(), plan, seeds=range(4), iterations=80, learning_rate=0.1)
    assert found.initial_errors.shape == found.errors.shape
    torch.testing.assert_close(found.errors, loss(fs.sample(denoiser, found.noise, plan, seeds=range(4))))
    with pytest.raises(PlanError, match="seeds"):
        optimize_noise(denoiser, loss, start(), plan)


def test_targets():
    x = torch.zeros(2, 1, 4, 4)
    mask = torch.zeros(1, 4, 4)
    mask[..., :2] = 1.0
    assert MaskedPixels(torch.ones(1, 4, 4), mask)(x).tolist() == [1.0, 1.0]
    assert IntensityTarget(torch.tensor(0.5), axis=2)(x).tolist() == [0.25, 0.25]
    assert IntensityTarget(torch.tensor(0.5), axis=2, tolerance=0.5)(x).tolist() == [0.0, 0.0]
    sure = ClassTarget(1, classifier=lambda x: x.flatten(1)[:, :2] + torch.tensor([0.0, 50.0]))(x)
    assert sure.max() < 1e-6
    assert sorted(TARGETS) == ["class", "inpaint", "intensity"]
    with pytest.raises(ValueError, match="nowhere 1"):
        MaskedPixels(torch.ones(1, 4, 4), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="does not fit"):
        MaskedPixels(torch.ones(1, 4, 4), torch.ones(3))
    with pytest.raises(ValueError, match="sees samples of shape"):
        ClassTarget(1)(x)


def test_what_makes_no_sense_is_refused():
    denoiser, noise = gaussian(), start()
    with pytest.raises(ValueError, match="one number a sample"):
        optimize_noise(denoiser, lambda x: x.square(), noise, plan_of(1))
    with pytest.raises(PlanError, match="plan both from one start"):
        optimize_noise(denoiser, lambda x: x[:, 0], noise, plan_of(1), fs.solvers.DDIM().plan(FLOW, 3, start=0.7))
    with pytest.raises(ValueError, match="refined"):
        optimize_noise(denoiser, lambda x: x[:, 0], noise, plan_of(1), refined=71)


@pytest.mark.parametrize("other", [{"shell": False}, {"surrogate": lambda x, t, **cond: fs.load("digits")(0.5 * x, t, **cond)}])
def test_a_checkpoint_of_another_shell_or_surrogate_is_refused(tmp_path, other):
    model = fs.load("digits")
    plan = fs.make_plan("ddim", model.schedule, 1, final="zero")
    noise = fs.draw_noise((1, 8, 8), range(2), plan)
    options = {"cond": {"label": torch.tensor([1, 2])}, "iterations": 2, "checkpoint_every": 1, "folder": tmp_path}
    optimize_noise(model, ClassTarget(3), noise, plan, **options)
    with pytest.raises(ArtefactError, match="other settings"):
        optimize_noise(model, ClassTarget(3), noise, plan, **options, **other)
