"""The run of a plan as Gaussian steps: exact densities of paths, whatever the plan remembers."""

import dataclasses

import pytest
import torch
from torch import nn

import fewstep as fs
from fewstep.errors import PlanError
from fewstep.steer import GaussianSteps, log_density, log_ratio

SOLVERS = ("lcm", "ddpm", "dpmpp_1_sde", "dpmpp_2m_sde", "dpm_2s_ancestral", "sa")


class Linear(nn.Module):
    """D(x, t) = gain x + shift."""

    def __init__(self, gain=0.6, shift=0.3):
        super().__init__()
        self.gain, self.shift = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (gain, shift))

    def forward(self, x, time):
        return self.gain * x + self.shift


def denoiser(schedule, **options):
    return fs.Denoiser(Linear(**options), schedule, "data")


def plan_of(name, schedule, nfe=4):
    return fs.make_plan(name, schedule, nfe, final="t_end")


def test_the_ratio_is_the_difference_of_the_densities():
    torch.manual_seed(0)
    x, one, other = torch.randn(3, 5, 4, dtype=torch.float64)
    scale = torch.rand(4, dtype=torch.float64) + 0.1
    difference = log_density(x, one, scale) - log_density(x, other, scale)
    torch.testing.assert_close(log_ratio(x, one, other, scale), difference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("schedule", [fs.schedules.VPLinear(), fs.schedules.EDM(sigma_min=0.1, sigma_max=10.0)], ids=["vp", "edm"])
def test_the_density_of_a_path_is_that_of_the_joint_gaussian(name, schedule):
    """A linear denoiser makes all states one Gaussian. Its density at the states that were drawn is the product of the steps'."""
    model, steps = denoiser(schedule), GaussianSteps(plan_of(name, schedule))
    unit = float(schedule.sigma(steps.plan.noise_time))
    noise = steps.start(2, (1,), torch.Generator().manual_seed(1), like=torch.zeros(1, dtype=torch.float64))
    with torch.no_grad():
        states = steps.draw(model, noise, torch.Generator().manual_seed(2))
        means = steps.means_on(model, states)
        zero, columns = _response(steps, model, unit)
    drawn = [0, *(row + 1 for row in steps.rows)]
    found = sum(log_density(states[row + 1], means[row], steps.scale(row, states)) for row in steps.rows)
    found = found + log_density(states[0], torch.zeros_like(states[0]), unit)
    joint = torch.distributions.MultivariateNormal(zero[drawn], columns[drawn] @ columns[drawn].T)
    torch.testing.assert_close(found, joint.log_prob(states[drawn, :, 0].T), rtol=1e-7, atol=1e-7)


def _response(steps, model, unit):
    """Every state without noise "N+1", and its response to a unit of each noise "N+1 noises": by running the plan with one at a time."""

    def run(start, which):
        def add(i, t, x):
            return x + (steps.scale(i, x) if i == which else 0.0)

        hooks = fs.Hooks(state=add)
        return fs.sample(model, torch.full((1, 1), start, dtype=torch.float64), steps.means, hooks=hooks, trajectory=True).states[
            :, 0, 0
        ]

    zero = run(0.0, None)
    columns = [run(unit, None) - zero, *(run(0.0, row) - zero for row in steps.rows)]
    return zero, torch.stack(columns, 1)


@pytest.mark.parametrize("name", SOLVERS)
def test_drawn_noise_is_what_lies_between_states_and_means(name):
    schedule = fs.schedules.VPLinear()
    model, steps = denoiser(schedule), GaussianSteps(plan_of(name, schedule))
    with torch.no_grad():
        states = steps.draw(model, torch.ones(5, 3, dtype=torch.float64), torch.Generator().manual_seed(7))
        means = steps.means_on(model, states)
    again = torch.Generator().manual_seed(7)
    for row in steps.rows:
        xi = torch.randn(5, 3, generator=again).double()
        torch.testing.assert_close((states[row + 1] - means[row]) / steps.scale(row, states), xi, rtol=1e-9, atol=1e-9)


def test_the_law_of_the_runs_is_that_of_sample():
    """Means and deviations of 4,000 ends within 5 standard errors of those that `sample` draws by seeds."""
    schedule = fs.schedules.VPLinear()
    model, plan = denoiser(schedule), plan_of("ddpm", schedule)
    steps, seeds = GaussianSteps(plan), range(4000)
    with torch.no_grad():
        mine = steps.draw(model, fs.draw_noise((3,), seeds, plan, dtype=torch.float64), torch.Generator().manual_seed(0))[-1]
        theirs = fs.sample(model, fs.draw_noise((3,), seeds, plan, dtype=torch.float64), plan, seeds=seeds)
    deviation = theirs.std()
    assert abs(float(mine.mean() - theirs.mean())) < 5 * float(deviation) * (2 / 12000) ** 0.5
    assert abs(float(mine.std() / deviation) - 1) < 5 / 12000**0.5


def test_gradients_reach_the_network_through_what_a_plan_remembers():
    """The mean of a step of a two-step method depends on the prediction of the step before, made by the network that is judged."""
    schedule = fs.schedules.VPLinear()
    model, steps = denoiser(schedule), GaussianSteps(plan_of("dpmpp_2m_sde", schedule))
    with torch.no_grad():
        states = steps.draw(model, torch.ones(1, 3, dtype=torch.float64), torch.Generator().manual_seed(0))
    mean = steps.means_on(model, states)[1]
    (slope,) = torch.autograd.grad(mean.sum(), model.network.gain)
    row = steps.plan.rows[1]
    expected = row.weights[0] * states[1].sum() + row.weights[1] * states[0].sum()
    torch.testing.assert_close(slope, torch.as_tensor(float(expected), dtype=torch.float64), rtol=1e-9, atol=0.0)


def test_plans_without_steps_of_their_own_are_refused():
    schedule = fs.schedules.VPLinear()
    with pytest.raises(PlanError, match="draw noise"):
        GaussianSteps(fs.make_plan("ddim", schedule, 4))
    plan = plan_of("ddpm", schedule)
    shared = (plan.rows[0], dataclasses.replace(plan.rows[1], noise=plan.rows[0].noise), *plan.rows[2:])
    with pytest.raises(PlanError, match="rows 0 and 1 of the plan share noise"):
        GaussianSteps(fs.Plan(schedule, plan.grid, shared))
