"""The engine: samples are those of each request alone, whatever it is batched with, and whatever happens to the others."""

import numpy as np
import pytest
import torch
from torch import nn

import fewstep as fs
from fewstep.plan import Plan, Row, StartTransform
from fewstep.serve import Engine, Request

SCHEDULE = fs.schedules.VPLinear()
SHAPE = (3, 5)
WAIT = 60.0


def network(x, time, label=None, text=None, **cond):
    """Treats samples one by one: only operations of elements and of rows of fixed length."""
    shift = 0.0 if label is None else torch.sin(1.0 + label.to(x)).reshape(-1, 1, 1)
    if text is not None:
        shift = shift + text["pooled"].to(x).reshape(-1, 1, 5)
    return torch.tanh(0.7 * x + shift) * torch.cos(time.to(x)).reshape(-1, 1, 1)


def denoiser(act=network, predicts="noise"):
    return fs.Denoiser(act, SCHEDULE, predicts)


def with_arrays(nfe, seed):
    """A plan with a coefficient of every element, an offset and a start transform, as tuners make them."""
    numbers = np.random.default_rng(seed)
    rows = [
        Row(
            row.tau,
            row.carry,
            tuple(w * (1 + 0.1 * numbers.normal(size=SHAPE)) for w in row.weights),
            offset=numbers.normal(size=SHAPE),
        )
        for row in fs.make_plan("dpmpp_2m", SCHEDULE, nfe=nfe).rows
    ]
    basis, gains = np.linalg.qr(numbers.normal(size=(15, 2)))[0].T.reshape(2, *SHAPE), np.array([0.3, -0.2])
    return Plan(SCHEDULE, np.linspace(1.0, 0.1, nfe + 1), tuple(rows), StartTransform(0.9, 0.1, basis, gains))


PLANS = {
    "ddim": fs.make_plan("ddim", SCHEDULE, nfe=4, final="zero"),
    "one call": fs.make_plan("ddim", SCHEDULE, nfe=1),
    "unipc": fs.make_plan("unipc", SCHEDULE, nfe=7, grid="lambda"),
    "single-step": fs.make_plan("dpm_fast", SCHEDULE, nfe=8),
    "arrays": with_arrays(6, 0),
    "other arrays": with_arrays(3, 1),
    "ancestral": fs.make_plan("euler_ancestral", SCHEDULE, nfe=9),
    "sde": fs.make_plan("sa", SCHEDULE, nfe=5),
    "long": fs.make_plan("dpmpp_2m", SCHEDULE, nfe=20, grid="lambda"),
}


def alone(den, request, null=None, dtype=torch.float32):
    """What `fewstep.sample` gives."""
    guided = den if request.guidance == 1.0 else fs.guidance.ClassifierFree(den, request.guidance, null)
    noise = fs.draw_noise(SHAPE, request.seeds, request.plan, dtype=dtype)
    with torch.no_grad():
        return fs.sample(guided, noise, request.plan, cond=request.cond, seeds=request.seeds)


def mixed(count=18, seed=0, guided=True):
    draw = np.random.default_rng(seed)
    requests = []
    for k in range(count):
        plan = PLANS[sorted(PLANS)[k % len(PLANS)]]
        samples = int(draw.integers(1, 7))
        cond = {"label": torch.as_tensor(draw.integers(0, 10, samples))}
        scale = float(draw.choice([1.0, 2.5, 0.0])) if guided else 1.0
        requests.append(Request(plan, range(100 * k, 100 * k + samples), cond, scale, previews=int(draw.integers(0, 3))))
    return requests


@pytest.mark.parametrize("scheduler", ["fifo", "shortest-remaining", "maxweight", "softmw", "ssmw"])
@pytest.mark.parametrize("rows", [5, 32])
def test_samples_are_those_of_each_request_alone(scheduler, rows):
    den, null, requests = denoiser(), {"label": 10}, mixed()
    with Engine(den, SHAPE, null=null, rows=rows, scheduler=scheduler) as engine:
        tickets = [engine.submit(request) for request in requests]
        found = [ticket.result(WAIT) for ticket in tickets]
    for request, ticket, x in zip(requests, tickets, found, strict=True):
        assert torch.equal(x, alone(den, request, null))
        assert ticket.state == "finished"
    statistics = engine.statistics()
    wanted = sum((1 if r.guidance in (0.0, 1.0) else 2) * len(r.seeds) * r.plan.nfe for r in requests)
    assert statistics.rows == wanted
    assert statistics.finished == len(requests)
    assert statistics.waiting == statistics.running == 0


def test_network_of_matrices_to_rounding_and_in_double_precision():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 15)).double()

    def act(x, time, label=None):
        return layers(torch.cat([x.flatten(1), time[:, None].to(x)], 1)).view_as(x)

    den, requests = denoiser(act, "data"), mixed(18, guided=False)
    with Engine(den, SHAPE, rows=11, dtype=torch.float64) as engine:
        tickets = [engine.submit(request) for request in requests]
        for request, ticket in zip(requests, tickets, strict=True):
            torch.testing.assert_close(ticket.result(WAIT), alone(den, request, dtype=torch.float64), rtol=1e-10, atol=1e-10)
