"""Latent consistency distillation against what is exact."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fewstep as fs
from fewstep.distill import LCM, STUDENT, distill, make_method, read_as
from fewstep.distill.consistency import INDEX, NOISE, SCALE, solver_times
from fewstep.distill.student_network import GuidanceEmbedded, guidance_embedding
from fewstep.errors import NetworkError, PlanError, UnknownNameError
from fewstep.schedules import EDM, Flow, FromBetas, VPCosine, VPLinear

TABLE = FromBetas((np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).tolist())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Closed(nn.Module):
    """The closed-form map of a Gaussian to the least noisy level, as a network that predicts data."""

    def __init__(self, exact):
        super().__init__()
        self.exact = exact

    def forward(self, x, time):
        return torch.cat([self.exact.solution(x[i : i + 1], float(t), self.exact.schedule.t_end) for i, t in enumerate(time)])


class Small(nn.Module):
    """A network of two numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x, time):
        return self.layers(torch.cat([x, time[:, None].to(x)], 1))


def small():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Small()


def objective_of(method, teacher, student):
    (stage,) = method.training(teacher, student).stages
    return stage.objective


# ---- the times and the boundary ------------------------------------------------------------------------------------------------


def test_times_of_a_table_are_the_published_ones():
    times = solver_times(TABLE, 50)
    told = TABLE.network_time(times.time)
    np.testing.assert_array_equal(told, np.arange(19, 1000, 20))
    np.testing.assert_array_equal(TABLE.network_time(times.before), [0, *np.arange(19, 980, 20)])
    np.testing.assert_allclose(times.skip[0, 0], 0.25 / (190.0**2 + 0.25), rtol=1e-14)
    assert 6.9e-6 < times.skip[0, 0] < 7.0e-6
    np.testing.assert_allclose(times.out[0], 10 * told / np.sqrt((10 * told) ** 2 + 0.25), rtol=1e-14)
    assert (times.skip[1, 0], times.out[1, 0]) == (1.0, 0.0)
    np.testing.assert_array_equal(times.skip[0, :-1], times.skip[1, 1:])


@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), EDM(), Flow(), Flow(shift=3.0, t_end=0.0)], ids=repr)
def test_the_boundary_of_a_continuous_schedule_is_a_switch_at_its_end(schedule):
    times = solver_times(schedule, 20)
    assert len(times.time) == 20
    assert times.before[0] == schedule.t_end
    assert times.time[-1] == schedule.t_start
    np.testing.assert_array_equal(times.before[1:], times.time[:-1])
    np.testing.assert_array_equal(times.skip[0], 0.0)
    np.testing.assert_array_equal(times.skip[1], np.arange(20) == 0)
    np.testing.assert_array_equal(times.skip + times.out, 1.0)


def test_a_table_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="a table of 10 times has no 50 solver times"):
        solver_times(FromBetas(np.linspace(0.1, 0.2, 10).tolist()), 50)


@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 8])
def test_times_of_samples_are_those_of_diffusers(nfe):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(nfe)
    plan = LCM().plan(fs.exact.Gaussian(TABLE, [0.0], 1.0), nfe)
    np.testing.assert_allclose(TABLE.network_time(plan.tau), scheduler.timesteps.numpy())
    if nfe == 4:
        assert TABLE.network_time(plan.tau).tolist() == [999.0, 759.0, 499.0, 259.0]


@pytest.mark.parametrize("schedule", [TABLE, Flow(), EDM()], ids=["table", "flow", "edm"])
def test_one_call_is_the_consistency_function(schedule):
    teacher, network = fs.exact.Gaussian(schedule, [0.5, -1.0], 0.3), small().double()
    plan = LCM().plan(teacher, 1)
    noise = fs.draw_noise((2,), range(5), plan, dtype=torch.float64)
    student = read_as(teacher, network)
    f = objective_of(LCM(), teacher, network)._end(network, noise, np.full(5, plan.tau[0]), 0, np.full(5, -1), {})
    assert (fs.sample(student, noise, plan) - f).abs().max() <= 1e-12
    assert not plan.stochastic
    with pytest.raises(PlanError, match="1 to 50 calls"):
        LCM().plan(teacher, 51)


# ---- the loss ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [TABLE, VPLinear(), Flow(), EDM()], ids=["table", "vp", "flow", "edm"])
def test_the_step_is_ddim(schedule):
    teacher = fs.exact.GaussianMixture(schedule, [[-1.0, 0.5], [1.5, -0.5]], 0.2)
    objective = objective_of(LCM(), teacher, small())
    index = np.array([0, 1, 20, 49])
    x = torch.randn(4, 2, generator=generator(), dtype=torch.float64)
    found = objective.skipped(x, index, {})
    for i, (t, before) in enumerate(zip(objective.times.time[index], objective.times.before[index], strict=True)):
        plan = fs.solvers.DDIM().plan(schedule, grid=[t, before])
        assert (fs.sample(teacher, x[i : i + 1], plan) - found[i : i + 1]).abs().max() <= 1e-9


def test_the_step_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(50)  # leading: 980, ..., 0; steps of 20
    network = small()
    teacher = fs.Denoiser(network, TABLE, "noise", network_time=lambda t: TABLE.network_time(t) / 1000)
    objective = objective_of(LCM(), teacher, small())
    index = np.array([0, 1, 24, 49])
    x = torch.randn(4, 2, generator=generator())
    with torch.no_grad():
        found = objective.skipped(x, index, {})
        for i, told in enumerate([19, 39, 499, 999]):
            noise = network(x[i : i + 1], torch.tensor([told / 1000]))
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
            theirs = scheduler.step(noise, told, x[i : i + 1]).prev_sample
            assert (theirs - found[i : i + 1]).abs().max() <= 1e-5


@pytest.mark.parametrize("loss", ["l2", "huber"])
@pytest.mark.parametrize("schedule", [Flow(), Flow(shift=3.0, t_end=0.0), VPLinear(), EDM()], ids=repr)
def test_the_closed_form_of_a_point_has_no_loss(schedule, loss):
    exact = fs.exact.Gaussian(schedule, [0.7, -1.2], 0.0)
    batch = {"x": exact.draw(64, seed=0)}
    network = Closed(exact)
    for decay in (None, 0.95):
        objective = objective_of(LCM(loss=loss, target_decay=decay), exact, network)
        value, info = objective({STUDENT: network}, objective.draw_whole(batch, generator()), generator())
        assert value.abs() <= 1e-20 if loss == "l2" else value.abs() <= 1e-12
        assert info["difference"] <= 1e-9


@pytest.mark.parametrize("schedule", [Flow(t_end=0.05, t_start=0.95), VPLinear(t_end=0.05)], ids=["flow", "vp"])
def test_the_closed_form_of_a_gaussian_has_the_loss_of_the_local_error(schedule):
    """DDIM is wrong by h^2 in a step, so the loss is of order h^4 and vanishes with the skipping step."""
    exact = fs.exact.Gaussian(schedule, [0.7, -1.2], [0.4, 0.1])
    network, losses = Closed(exact), []
    for count in (50, 100):
        objective = objective_of(LCM(loss="l2", solver_steps=count), exact, network)
        batch = objective.draw_whole({"x": exact.draw(400, seed=0)}, generator())
        batch[INDEX] = batch[INDEX] // (count // 50) * (count // 50)  # at about the same times
        losses.append(float(objective({STUDENT: network}, batch, generator())[0]))
    assert losses[0] < 1e-5
    assert 12.0 < losses[0] / losses[1] < 20.0


def test_huber_is_the_published_one():
    teacher = fs.exact.Gaussian(Flow(), [0.0, 0.0], 1.0)
    objective = objective_of(LCM(huber_c=0.1), teacher, small())
    u = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    assert float(objective._measured(u)) == pytest.approx((np.hypot(0.3, 0.1) + np.hypot(0.4, 0.1)) / 2 - 0.1, rel=1e-12)


def test_no_gradient_through_the_target_nor_to_the_teacher():
    inner = small()
    teacher = fs.Denoiser(inner, Flow(), "flow")
    student = copy.deepcopy(inner)
    for decay in (None, 0.9):
        objective = objective_of(LCM(target_decay=decay), teacher, student)
        batch = objective.draw_whole({"x": torch.randn(8, 2, generator=generator())}, generator())
        loss, _ = objective({STUDENT: student}, batch, generator())
        loss.backward()
        assert all(p.grad is None for p in inner.parameters())
        if decay is not None:
            assert all(p.grad is None for p in objective.modules["target"].parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_the_target_is_a_running_average():
    teacher = fs.Denoiser(small(), Flow(), "flow")
    student = small()
    objective = objective_of(LCM(target_decay=0.9), teacher, student)
    before = copy.deepcopy(objective.modules["target"].state_dict())
    with torch.no_grad():
        for value in student.parameters():
            value.add_(1.0)
    objective.updated({STUDENT: student}, 1)
    for name, value in objective.modules["target"].state_dict().items():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * student.state_dict()[name])
    assert objective_of(LCM(target_decay=None), teacher, student).modules == {}


# ---- guidance ------------------------------------------------------------------------------------------------------------------


def test_every_sample_is_taught_under_its_scale():
    teacher = fs.guidance.ClassifierFree(fs.load("digits"), 2.0, {"label": 10})
    network = fs.load("digits").network
    objective = objective_of(LCM(guidance=(1.0, 5.0)), teacher, network)
    x, label = torch.randn(3, 1, 8, 8, generator=generator()), torch.tensor([1, 2, 3])
    index = np.array([10, 30, 49])
    scale = torch.tensor([1.0, 2.0, 5.0])
    with torch.no_grad():
        found = objective.skipped(x, index, {"label": label}, scale)
        for i, s in enumerate(scale.tolist()):
            one = objective_of(LCM(), teacher.with_scale(s), network)
            alone = one.skipped(x[i : i + 1], index[i : i + 1], {"label": label[i : i + 1]})
            assert (found[i : i + 1] - alone).abs().max() <= 1e-5
    drawn = objective.draw_whole({"x": x.repeat(200, 1, 1, 1)}, generator())
    assert 1.0 <= drawn[SCALE].min() < 1.2 < 4.8 < drawn[SCALE].max() <= 5.0
    assert drawn[NOISE].shape == (600, 1, 8, 8)
    with pytest.raises(TypeError, match="needs a teacher with guidance"):
        LCM(guidance=(1.0, 5.0)).training(fs.load("digits"), network)


@torch.no_grad()
def test_a_student_that_is_told_the_scale_begins_as_the_teacher():
    network = fs.load("digits").network
    told = GuidanceEmbedded(copy.deepcopy(network))
    x, time, label = torch.randn(4, 1, 8, 8, generator=generator()), torch.rand(4, generator=generator()), torch.arange(4)
    scales = torch.tensor([1.0, 3.0, 7.5, 14.0])
    assert torch.equal(told(x, time, guidance=scales, label=label), network(x, time, label=label))
    nn.init.normal_(told.project.weight, std=0.05)
    first = told(x, time, guidance=scales, label=label)
    assert not torch.equal(first, told(x, time, guidance=scales + 1, label=label))
    assert torch.equal(copy.deepcopy(told)(x, time, guidance=scales, label=label), first)
    assert torch.equal(told.network(x, time, label=label), network(x, time, label=label))  # nothing is left behind
    with pytest.raises(fs.FewstepError, match="none of the time embeddings that are known"):
        GuidanceEmbedded(small())
    assert GuidanceEmbedded(small(), "layers.0").layer == "layers.0"


def test_the_embedding_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    w = torch.tensor([0.0, 0.5, 7.5, 14.0])
    theirs = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, w, 256)
    torch.testing.assert_close(guidance_embedding(w), theirs, rtol=0, atol=2e-3)  # angles of 14,000 in single precision
    torch.testing.assert_close(guidance_embedding(w[:2]), theirs[:2], rtol=0, atol=2e-4)


# ---- options -------------------------------------------------------------------------------------------------------------------


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(UnknownNameError, match="unknown loss of LCM 'l1'"):
        LCM(loss="l1")
    with pytest.raises(ValueError, match="needs a range to learn"):
        LCM(embedded=True)
    with pytest.raises(ValueError, match="lowest and the highest"):
        LCM(guidance=(3.0, 1.0))
    with pytest.raises(ValueError, match="solver_steps"):
        LCM(solver_steps=0)
    with pytest.raises(ValueError, match="target_decay"):
        LCM(target_decay=1.0)
    with pytest.raises(UnknownNameError, match=r"unknown method of distillation 'lcn'\. Did you mean 'lcm'"):
        make_method("lcn")
    with pytest.raises(TypeError, match="lcm has no option 'losss'"):
        make_method("lcm", losss="l2")


def test_a_diverging_run_ends_early():
    teacher = fs.Denoiser(small(), Flow(), "flow")
    with pytest.raises(NetworkError, match="training diverged"):
        distill(
            teacher, data={"x": torch.randn(64, 2)}, steps=1, iterations=400, learning_rate=1e25, clip=None, warmup=0, compare=None
        )
