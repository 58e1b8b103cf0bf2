from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from cases import SOLVERS

import fewstep as fs
from fewstep.errors import NetworkError, PlanError
from fewstep.plan import Plan, Row, StartTransform

VP = fs.schedules.VPLinear()


def each(x, t, **_):
    """A network that treats every number by itself: results cannot depend on the batch."""
    return torch.tanh(1.3 * x) * (1.1 - 0.4 * t)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_do_not_depend_on_the_batch(name, dtype):
    plan = fs.make_plan(name, VP, 6, grid="lambda")
    seeds = list(range(64))
    x = fs.draw_noise((1, 3, 5), seeds, plan, dtype=dtype)
    whole = fs.sample(each, x, plan, seeds=seeds)
    pieces = torch.cat([fs.sample(each, x[i : i + 7], plan, seeds=seeds[i : i + 7]) for i in range(0, 64, 7)])
    assert torch.equal(whole, pieces)
    order = np.random.default_rng(0).permutation(64)
    assert torch.equal(fs.sample(each, x[order], plan, seeds=[seeds[i] for i in order]), whole[order])


def test_two_threads_on_one_plan_get_what_each_gets_alone():
    den = fs.Denoiser(lambda x, t: torch.tanh(1.3 * x) * torch.cos(t)[:, None, None], VP)
    plan = fs.make_plan("dpmpp_2m_sde", VP, 12)
    starts = [fs.draw_noise((8, 8), range(k, k + 4), plan) for k in (0, 100)]

    def run(k, into):
        for _ in range(5):
            into[k] = fs.sample(den, starts[k], plan, seeds=range(k, k + 4))

    alone, together = {}, {}
    for k in (0, 1):
        run(k, alone)
    threads = [threading.Thread(target=run, args=(k, together)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])


def test_the_noise_of_stochastic_plans_is_one_path_for_all_numbers_of_steps():
    """Strong convergence: refining an SDE plan on the same seeds converges to one sample, far faster than to another seed's."""
    exact = fs.exact.Gaussian(fs.schedules.VPLinear(t_end=0.1), torch.zeros(4), 0.5)
    seeds = range(8)
    x = fs.draw_noise((4,), seeds, dtype=torch.float64)
    runs = {
        n: fs.sample(exact, x, fs.make_plan("dpmpp_2m_sde", exact.schedule, n, grid="lambda"), seeds=seeds)
        for n in (20, 40, 80, 320)
    }
    errors = [float((runs[n] - runs[320]).square().mean().sqrt()) for n in (20, 40, 80)]
    assert errors[0] > 1.5 * errors[1] > 2.2 * errors[2]
    assert errors[2] < 0.03 * float((runs[320] - runs[320].roll(1, 0)).square().mean().sqrt())


def test_trajectory_and_callback_see_every_step():
    plan, x, seen = fs.make_plan("dpmpp_2m", VP, 5), fs.draw_noise((3,), range(2)), []
    run = fs.sample(each, x, plan, trajectory=True, callback=lambda i, t, z, d: seen.append((i, t, z, d)))
    assert run.states.shape == (6, 2, 3)
    assert run.predictions.shape == (5, 2, 3)
    assert torch.equal(run.states[0], x)
    assert torch.equal(run.states[-1], run.samples)
    assert torch.equal(run.samples, fs.sample(each, x, plan))
    assert [entry[0] for entry in seen] == list(range(5))
    assert [entry[1] for entry in seen] == plan.tau.tolist()
    assert all(torch.equal(z, run.states[i + 1]) and torch.equal(d, run.predictions[i]) for i, _, z, d in seen)
    np.testing.assert_array_equal(run.times, plan.grid)


def test_conditions_reach_every_call():
    labels, got = torch.arange(2), []

    def network(x, t, label, scale):
        got.append((label, scale))
        return x

    fs.sample(fs.Denoiser(network, VP, "data"), torch.ones(2, 3), fs.make_plan("ddim", VP, 3), cond={"label": labels, "scale": 2.0})
    assert len(got) == 3
    assert all(label is labels and scale == 2.0 for label, scale in got)


def test_hooks():
    plan, x = fs.make_plan("dpmpp_2m", VP, 4), fs.draw_noise((3,), range(4))
    plain = fs.sample(each, x, plan)
    neutral = fs.Hooks(
        time=lambda i, t, x: t,
        denoiser=lambda i: each,
        prediction=lambda i, t, d: d,
        state=lambda i, t, x: x,
        resample=lambda i, x: None,
    )
    assert torch.equal(fs.sample(each, x, plan, hooks=neutral), plain)
    clipped = fs.sample(each, x, plan, hooks=fs.Hooks(prediction=lambda i, t, d: d.clamp(-0.1, 0.1)), trajectory=True)
    assert clipped.predictions.abs().max() <= 0.1
    index = torch.tensor([3, 3, 0, 1])
    chosen = fs.sample(each, x, plan, hooks=fs.Hooks(resample=lambda i, x: index if i == 1 else None))
    assert torch.equal(chosen, plain[index])  # the memory is permuted with the states
    levels = []
    fs.sample(each, x, plan, hooks=fs.Hooks(state=lambda i, t, x: levels.append(t) or x))
    assert levels == plan.grid[1:].tolist()
    used = []
    fs.sample(
        each, x, plan, hooks=fs.Hooks(time=lambda i, t, x: 0.5 * t, denoiser=lambda i: lambda x, t: used.append(t) or each(x, t))
    )
    assert used == (0.5 * plan.tau).tolist()


def test_gradients_flow_through_the_loop():
    weight = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    x = fs.draw_noise((3,), range(2), dtype=torch.float64).requires_grad_()
    plan = fs.make_plan("dpmpp_3m", VP, 4)

    def run(w, x):
        return fs.sample(lambda x, t: torch.tanh(w * x), x, plan).sum()

    assert torch.autograd.gradcheck(run, (weight, x))


def test_array_coefficients_and_start_transform():
    scale = np.array([[1.0, 2.0, 3.0]])
    start = StartTransform(2.0, 0.5, basis=np.array([[[1.0, 0.0, 0.0]]]), gains=np.array([10.0]))
    plan = Plan(VP, np.array([0.9, 0.5]), (Row(0.9, (scale,), (0.0,)),), start)
    x = torch.ones(2, 1, 3)
    assert fs.sample(each, x, plan).tolist() == [[[12.5, 5.0, 7.5]]] * 2
    with pytest.raises(PlanError, match=r"coefficients of shape \(1, 3\)"):
        fs.sample(each, torch.ones(2, 4), Plan(VP, plan.grid, plan.rows))


def test_no_tensor_is_read_by_the_host_in_the_loop():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.reads += "local_scalar_dense" in str(func) or "nonzero" in str(func)
            return func(*args, **(kwargs or {}))

    den, x = fs.Denoiser(lambda x, t: x, VP, "noise"), fs.draw_noise((4, 8, 8), range(2))
    for name in ("ddim", "dpmpp_2m", "dpmpp_3m"):
        for check, reads in ((False, 0), (True, 1)):  # the one read is after the last call
            with Reads() as counter:
                fs.sample(den, x, fs.make_plan(name, VP, 20), check=check)
            assert counter.reads == reads


def nan_at(call):
    calls = []

    def network(x, t):
        calls.append(1)
        return x * (float("nan") if len(calls) % 6 == call else 1.0)

    return fs.Denoiser(network, VP, "data")


@pytest.mark.parametrize("call", [1, 4, 5])
def test_a_network_that_returns_nan_is_named(call):
    plan = fs.make_plan("dpmpp_2m", VP, 6)
    with pytest.raises(NetworkError, match=rf"call {call} of 6, t={plan.tau[call - 1]:.6g}: .*not finite"):
        fs.sample(nan_at(call), torch.ones(3, 2), plan)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: fs.sample(each, torch.ones(3), p), PlanError, "batch dimension"),
        (lambda p: fs.sample(each, torch.ones(3, 2, dtype=torch.int64), p), TypeError, "floating-point"),
        (lambda p: fs.sample(each, [[1.0]], p), TypeError, "list"),
        (lambda p: fs.sample(each, torch.ones(3, 2), "plan"), TypeError, "make_plan"),
        (lambda p: fs.sample(each, torch.full((3, 2), float("nan")), p), PlanError, "noise is not finite"),
        (
            lambda p: fs.sample(lambda x, t: x[:1], torch.ones(3, 2), p),
            NetworkError,
            r"call 1 of 4, t=1: .*\(1, 2\) for a state of shape \(3, 2\)",
        ),
        (
            lambda p: fs.sample(fs.Denoiser(lambda x, t: x[:1], VP, "data"), torch.ones(3, 2), p),
            NetworkError,
            r"call 1 of 4: the network returned shape \(1, 2\) at t=1",
        ),
        (
            lambda p: fs.sample(fs.Denoiser(lambda x, t: x, fs.schedules.Flow(), "data"), torch.ones(3, 2), p),
            PlanError,
            "made for VPLinear.*but the denoiser has Flow",
        ),
        (lambda p: fs.sample(each, torch.ones(3, 2), fs.make_plan("ddpm", VP, 4)), PlanError, "pass seeds="),
        (lambda p: fs.sample(each, torch.ones(3, 2), fs.make_plan("ddpm", VP, 4), seeds=[1]), ValueError, "1 seeds for 3 samples"),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(fs.make_plan("dpmpp_2m", VP, 4))


def test_progress_bar_goes_to_standard_error(capsys):
    fs.sample(each, torch.ones(1, 2), fs.make_plan("ddim", VP, 3), progress=True)
    assert "sampling" in capsys.readouterr().err


def test_an_output_written_over_the_last_one_is_refused():
    schedule = fs.schedules.EDM()
    buffer = torch.zeros(2, 3)

    def network(x, t):
        return torch.mul(x, 0.5, out=buffer)

    with pytest.raises(NetworkError, match="call 2 wrote its output over"):
        fs.sample(fs.Denoiser(network, schedule, "data"), torch.ones(2, 3), fs.make_plan("dpmpp_2m", schedule, 4))
    same = torch.ones(2, 3)
    fs.sample(fs.Denoiser(lambda x, t: same, schedule, "data"), torch.ones(2, 3), fs.make_plan("dpmpp_2m", schedule, 4))


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({"prediction": lambda i, t, d: d[:, :1]}, "'prediction' returned shape"),
        ({"state": lambda i, t, x: x[:1]}, "'state' returned shape"),
        ({"resample": lambda i, x: torch.tensor([0])}, "'resample' returned shape"),
    ],
)
def test_hooks_keep_the_shape(hook, message):
    schedule = fs.schedules.EDM()
    den = fs.Denoiser(lambda x, t: 0.5 * x, schedule, "data")
    with pytest.raises(PlanError, match=message):
        fs.sample(den, torch.ones(2, 3), fs.make_plan("ddim", schedule, 3), hooks=fs.Hooks(**hook))


def test_a_denoiser_that_returns_no_tensor_is_named():
    with pytest.raises(NetworkError, match=r"call 1 of 3.*returned NoneType"):
        fs.sample(lambda x, t: None, torch.ones(2, 3), fs.make_plan("ddim", fs.schedules.EDM(), 3))


def test_noise_of_another_shape_than_the_model_takes_is_refused():
    den = fs.load("photos")
    plan = fs.make_plan("ddim", den.schedule, 2)
    with pytest.raises(PlanError, match=r"shape \(1, 8, 8\), but the model takes \(3, 32, 32\)"):
        fs.sample(den, fs.draw_noise((1, 8, 8), range(2), plan), plan)


def test_conditions_are_those_the_model_takes():
    den = fs.load("digits")
    plan = fs.make_plan("auto", den.schedule, 2)
    noise = fs.draw_noise(den.info.shape, range(3), plan)
    for cond, message in [
        ({"labels": torch.zeros(3, dtype=torch.long)}, "no condition 'labels'"),
        ({"label": torch.zeros(4, dtype=torch.long)}, "3 whole numbers"),
        ({"label": [0, 1, 2]}, r"torch.tensor\(\[...\]\); got list"),
        ({"label": 7}, r"torch.full\(\(3,\), 7\); got int 7"),
        ({"label": 12}, "cannot be 12"),
        ({"label": torch.tensor([0, 1, 33])}, "cannot be 33: it has 10 classes"),
    ]:
        with pytest.raises(PlanError, match=message):
            fs.sample(den, noise, plan, cond=cond)


def test_a_plan_with_numbers_of_every_element_serves_one_size():
    schedule = fs.schedules.EDM()
    plan = fs.Plan(schedule, np.array([1.0, 0.0]), (Row(1.0, (), (np.ones((2, 4, 4)),)),))
    den = fs.Denoiser(lambda x, t: 0.5 * x, schedule, predicts="data")
    assert fs.sample(den, torch.ones(1, 2, 4, 4), plan).shape == (1, 2, 4, 4)
    with pytest.raises(
        fs.FewstepError, match=r"shape \(2, 4, 4\), which do not fit samples of shape \(2, 6, 6\): .* of the size that it"
    ):
        fs.sample(den, torch.ones(1, 2, 6, 6), plan)
