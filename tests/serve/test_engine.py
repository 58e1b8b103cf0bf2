"""The engine: samples are those of each request alone, whatever it is batched with, and whatever happens to the others."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

import fewstep as fs
from fewstep.errors import NetworkError, PlanError
from fewstep.plan import Plan, Row, StartTransform
from fewstep.sampler import prepare
from fewstep.serve import CancelledError, Engine, EngineClosedError, QueueFullError, Request, Ticket
from fewstep.serve.batches import Batches
from fewstep.serve.conditions import key, mark
from fewstep.serve.engine import REMEMBERED_SCALES
from fewstep.serve.schedulers import make_scheduler
from fewstep.serve.work import Job, Piece

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


def held(act=network):
    """A denoiser whose calls wait until `gate` is set, and an event that says that one has begun."""
    gate, begun = threading.Event(), threading.Event()

    def waits(x, time, **cond):
        begun.set()
        assert gate.wait(WAIT)
        return act(x, time, **cond)

    return denoiser(waits), gate, begun


def request_of(name="ddim", count=2, first=0, **options):
    return Request(PLANS[name], range(first, first + count), **options)


# ---- conditions --------------------------------------------------------------------------------------------------------------------


def test_nested_conditions_of_several_requests_share_a_call_and_others_do_not():
    rows = []

    def act(x, time, text=None, scale=1.0):
        rows.append(len(x))
        return network(x, time, text=text) * scale

    def request(count, first, **cond):
        pooled = torch.linspace(-1, 1, 5 * count).reshape(count, 5) + first
        return request_of(count=count, first=first, cond={"text": {"pooled": pooled, "kind": "clip"}, **cond})

    den = denoiser(act)
    requests = [request(2, 0), request(3, 10), request(1, 20, scale=2.0), request(2, 30, scale=torch.tensor(2.0))]
    with_gate, gate, _ = held(act)
    with Engine(with_gate, SHAPE, rows=8) as engine:
        tickets = [engine.submit(request) for request in requests]
        gate.set()
        found = [ticket.result(WAIT) for ticket in tickets]
    calls = list(rows)
    for request, x in zip(requests, found, strict=True):
        assert torch.equal(x, alone(den, request))
    assert 5 in calls  # the first two together
    assert max(calls) == 5  # and never with those of another scale, nor these with one another


def test_numbers_can_be_guided_and_everything_is_checked_at_once():
    den = fs.Denoiser(network, SCHEDULE, info=fs.ModelInfo(shape=SHAPE, conditions={"label": {"classes": 10, "null": 10}}))
    label = torch.tensor([1, 2])
    with Engine(den, SHAPE, null={"label": 10}, rows=8, waiting=8) as engine:
        request = request_of(cond={"label": torch.tensor(3)})
        assert torch.equal(engine.submit(request).result(WAIT), alone(den, request))
        for wrong, error, message in [
            (request_of(cond={"label": torch.tensor([1, 11])}), PlanError, "cannot be 11"),
            (request_of(cond={"lable": label}), PlanError, "no condition 'lable'"),
            (request_of(guidance=2.0), ValueError, "guidance needs the condition 'label'"),
            (request_of(cond={"label": torch.tensor(3)}, guidance=2.0), ValueError, "one entry a sample"),
            (request_of(cond={"label": label}, guidance=float("nan")), ValueError, "guidance must be finite"),
            (request_of(previews=-1), ValueError, "previews"),
            (Request(PLANS["ddim"], []), ValueError, "no seeds"),
            (Request(PLANS["ddim"], [-1]), ValueError, "at least 0"),
            (request_of(count=17), ValueError, "never fit"),
            (Request(fs.make_plan("ddim", fs.schedules.Flow(), nfe=2), [0]), PlanError, "was made for"),
        ]:
            with pytest.raises(error, match=message):
                engine.submit(wrong)
    with Engine(denoiser(), (4, 4)) as engine:
        with pytest.raises(PlanError, match="made for samples of shape"):
            engine.submit(request_of("arrays"))
        with pytest.raises(ValueError, match="make the engine with null="):
            engine.submit(request_of(guidance=2.0))
    exact = fs.exact.Gaussian(SCHEDULE, torch.zeros(SHAPE), 1.0)
    with Engine(denoiser(), SHAPE, null={"label": 10}) as engine:
        request = request_of(cond={"label": 3}, guidance=2.0)  # as a number for all samples
        assert torch.equal(engine.submit(request).result(WAIT), alone(denoiser(), request, {"label": 10}))
    for wrong in ({"rows": 0}, {"waiting": -1}, {"dtype": torch.float16}, {"scheduler": "lifo"}):
        with pytest.raises(ValueError, match=r"rows|waiting|dtype|unknown scheduler"):
            Engine(exact, SHAPE, **wrong)
    with pytest.raises(ValueError, match="shape of a sample"):
        Engine(exact, ())


@pytest.mark.parametrize("guidance", [1.0, 2.0, 0.0])
def test_large_shared_tensors_can_be_guided_and_shared(guidance):
    mask, rows = torch.linspace(0.5, 1.0, 5000).reshape(1000, 5), []  # more than is told by its numbers

    def act(x, time, label, mask):
        rows.append(len(x))
        return network(x, time, label) * mask.mean()

    null, gate_of = {"label": 10}, held(act)
    requests = [
        request_of(first=9 * k, cond={"label": torch.tensor([1, 2]), "mask": mask}, guidance=guidance, name="ddim") for k in (0, 1)
    ]
    with Engine(gate_of[0], SHAPE, null=null, rows=8) as engine:
        tickets = [engine.submit(request) for request in requests]
        assert tickets[0].request.cond["mask"] is mask
        gate_of[1].set()
        for request, ticket in zip(requests, tickets, strict=True):
            assert torch.equal(ticket.result(WAIT), alone(denoiser(act), request, null))
    assert key(mark({"mask": mask}, 2, torch.device("cpu"))) == key(mark({"mask": mask}, 3, torch.device("cpu")))


def test_scales_that_are_remembered_are_bounded():
    with Engine(denoiser(), SHAPE, null={"label": 10}) as engine:
        for k in range(REMEMBERED_SCALES + 5):
            engine.submit(request_of("one call", 1, cond={"label": torch.tensor([1])}, guidance=2.0 + k / 100)).result(WAIT)
        assert all(len(scales) <= REMEMBERED_SCALES for _, _, scales in engine._plans.values())


# ---- faults ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["raises", "nan", "late", "shape"])
def test_only_the_guilty_request_fails(fault):
    def act(x, time, label):
        bad = label == 7
        if fault == "raises" and bad.any():
            raise RuntimeError("out of luck")
        if fault == "shape" and bad.any():
            return x[:1]
        d = network(x, time, label)
        if fault == "nan" or (fault == "late" and time.min() < 0.5):
            d = torch.where(bad.reshape(-1, 1, 1), torch.nan, d)
        return d

    gated, gate, _ = held(act)
    requests = [request_of(name, 3, 10 * k, cond={"label": torch.full((3,), k)}) for k, name in enumerate(sorted(PLANS))]
    with Engine(gated, SHAPE, rows=32) as engine:
        tickets = [engine.submit(request) for request in requests]
        gate.set()
        for k, (request, ticket) in enumerate(zip(requests, tickets, strict=True)):
            if k != 7:
                assert torch.equal(ticket.result(WAIT), alone(denoiser(), request))
                continue
            with pytest.raises(NetworkError, match={"raises": "out of luck", "shape": "shape"}.get(fault, "not finite")) as caught:
                ticket.result(WAIT)
            assert f"of {request.plan.nfe}, t=" in str(caught.value)
            if fault == "raises":
                assert isinstance(caught.value.__cause__, RuntimeError)
        again = engine.submit(requests[0])
        assert torch.equal(again.result(WAIT), tickets[0].result())
    statistics = engine.statistics()
    assert (statistics.failed, statistics.finished) == (1, len(requests))
    assert (statistics.retries > 0) == (fault in ("raises", "shape"))


def test_an_error_in_a_step_is_its_requests_alone(monkeypatch):
    step = Piece.advance

    def fails(piece, d):
        if piece.job.seeds[0] == 99 and piece.call == 1:
            raise MemoryError("no room")
        return step(piece, d)

    monkeypatch.setattr(Piece, "advance", fails)
    gated, gate, _ = held()
    with Engine(gated, SHAPE, rows=5) as engine:
        good, bad = request_of("sde"), request_of("sde", 4, first=99)  # the bad one in several pieces
        tickets = [engine.submit(request) for request in (good, bad, good)]
        gate.set()
        with pytest.raises(NetworkError, match=r"call 2 of 5, t=.*the step after it raised MemoryError: no room") as caught:
            tickets[1].result(WAIT)
        assert isinstance(caught.value.__cause__, MemoryError)
        for ticket in (tickets[0], tickets[2], engine.submit(good)):
            assert torch.equal(ticket.result(WAIT), alone(denoiser(), good))


def test_pieces_that_are_left_out_hold_their_own_memory():
    batches = Batches(denoiser(), SHAPE, 64, make_scheduler("shortest-remaining"))

    def add(plan, count, arrival):
        request = Request(plan, range(count))
        steps = prepare(plan, torch.empty(0, *SHAPE))
        batches.add(Job(Ticket(request), steps, list(range(count)), mark({}, count, torch.device("cpu")), None, "k", arrival))

    add(PLANS["long"], 1, 1)
    add(PLANS["unipc"], 63, 2)
    with torch.no_grad():
        for _ in range(5):
            batches.turn()
        add(PLANS["unipc"], 64, 3)
        batches.turn()
    long = next(piece for piece in batches.pieces if piece.samples == 1)
    assert long.call == 5  # the last turn was for the others
    for tensor in (*long.states, *long.outputs):
        assert tensor.untyped_storage().nbytes() <= 2 * tensor.numel() * tensor.element_size()


def test_states_that_overflow_fail_at_the_end():
    huge = Plan(SCHEDULE, np.array([1.0, 0.5]), (Row(1.0, (3e38,), (3e38,)),))
    with Engine(denoiser(), SHAPE) as engine:
        bad, good = engine.submit(Request(huge, [0])), engine.submit(request_of())
        with pytest.raises(NetworkError, match="samples are not finite"):
            bad.result(WAIT)
        assert good.result(WAIT).isfinite().all()


def test_outputs_that_are_written_over_are_found():
    buffer = torch.empty(2, *SHAPE)
    with Engine(denoiser(lambda x, time: torch.tanh(x, out=buffer), "data"), SHAPE, rows=2) as engine:
        ticket = engine.submit(request_of("unipc"))
    with pytest.raises(NetworkError, match="written over that of the call before"):
        ticket.result(WAIT)
    constant = torch.ones(2, *SHAPE)  # the same tensor every time, which nobody writes to
    with Engine(denoiser(lambda x, time: constant, "data"), SHAPE, rows=2) as engine:
        assert engine.submit(request_of()).result(WAIT).isfinite().all()


def test_calls_that_are_looked_at_later_give_the_same():
    """What happens on a device that works by itself: a call is looked at when the next one is on its way."""

    def act(x, time, label):
        return torch.where((label == 3).reshape(-1, 1, 1), torch.nan, network(x, time, label))

    requests = [request_of(name, 2, 10 * k, cond={"label": torch.full((2,), k)}) for k, name in enumerate(sorted(PLANS))]
    found = []
    for ahead in (0, 1, 3):
        engine = Engine(denoiser(act), SHAPE, rows=6)
        engine._batches = Batches(engine.denoiser, SHAPE, 6, make_scheduler("ssmw"), ahead=ahead)
        with engine:
            tickets = [engine.submit(request) for request in requests]
            found.append([None if k == 3 else ticket.result(WAIT) for k, ticket in enumerate(tickets)])
            with pytest.raises(NetworkError, match="call 1 of"):
                tickets[3].result(WAIT)
    for others in found[1:]:
        assert all(a is None or torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_one_call_is_under_way_while_the_next_is_prepared():
    log = []

    class Mark:
        def synchronize(self):
            log.append("wait")

    def act(x, time):
        log.append("call")
        return network(x, time)

    engine = Engine(denoiser(act), SHAPE, rows=2)
    engine._batches = Batches(engine.denoiser, SHAPE, 2, make_scheduler("fifo"), record=Mark)
    request = request_of("ddim")
    with engine:
        assert torch.equal(engine.submit(request).result(WAIT), alone(denoiser(), request))
    assert log == ["call", "call", "wait", "call", "wait", "call", "wait", "wait"]


# ---- life ---------------------------------------------------------------------------------------------------------------------------


def test_full_queue_refuses_and_recovers():
    den, gate, begun = held()
    with Engine(den, SHAPE, rows=4, waiting=4) as engine:
        tickets = [engine.submit(request_of(first=10 * k)) for k in range(4)]
        assert begun.wait(WAIT)
        with pytest.raises(QueueFullError, match="8 samples are unfinished, and 8 may be"):
            engine.submit(request_of())
        assert tickets[3].cancel()
        late = engine.submit(request_of(first=50))
        gate.set()
        for ticket in (*tickets[:3], late):
            assert torch.equal(ticket.result(WAIT), alone(denoiser(), ticket.request))
        assert engine.statistics().rejected == 1


def test_cancelled_rows_are_free_at_the_next_call():
    rows, gates = [], [threading.Event() for _ in range(6)]
    begun = [threading.Event() for _ in range(6)]

    def act(x, time):
        call = len(rows)
        rows.append(len(x))
        begun[call].set()
        assert gates[call].wait(WAIT)
        return network(x, time)

    with Engine(denoiser(act), SHAPE, rows=4) as engine:
        long = engine.submit(request_of("ddim", 4))
        assert begun[0].wait(WAIT)
        assert long.state == "running"
        waits = engine.submit(request_of("one call", 3))
        assert waits.state == "waiting"
        assert long.cancel()
        assert not long.cancel()
        with pytest.raises(CancelledError):
            long.result()
        for gate in gates:
            gate.set()
        assert torch.equal(waits.result(WAIT), alone(denoiser(), waits.request))
    assert rows == [4, 3]
    assert engine.statistics().cancelled == 1


def test_previews_are_the_data_predictions():
    request = request_of("unipc", 5, previews=2)
    with Engine(denoiser(), SHAPE, rows=2) as engine:  # in pieces
        ticket = engine.submit(request)
        seen = list(ticket.previews(WAIT))
    assert [(preview.call, preview.calls) for preview in seen] == [(2, 7), (4, 7), (6, 7)]
    noise = fs.draw_noise(SHAPE, request.seeds, request.plan)
    run = fs.sample(denoiser(), noise, request.plan, trajectory=True)
    for preview in seen:
        assert torch.equal(preview.samples, run.predictions[preview.call - 1])
    assert [preview.call for preview in ticket.previews()] == [2, 4, 6]
    with Engine(denoiser(), SHAPE) as engine:
        assert list(engine.submit(request_of()).previews(WAIT)) == []


def test_a_ticket_may_keep_the_newest_previews_alone():
    with Engine(denoiser(), SHAPE) as engine:
        ticket = engine.submit(request_of("unipc", previews=1, keep=2))
        ticket.result(WAIT)
        assert [preview.call for preview in ticket.previews()] == [6, 7]
        with pytest.raises(ValueError, match="keep must be a whole number of at least 1"):
            engine.submit(request_of(previews=1, keep=0))


def test_results_and_previews_have_a_time_out():
    den, gate, _ = held()
    with Engine(den, SHAPE) as engine:
        ticket = engine.submit(request_of(previews=1))
        with pytest.raises(TimeoutError, match="not there after"):
            ticket.result(0.01)
        with pytest.raises(TimeoutError, match="no preview"):
            next(ticket.previews(0.01))
        gate.set()
        assert ticket.result(WAIT).shape == (2, *SHAPE)


def test_callbacks_are_called_once_and_may_fail(caplog):
    den, gate, _ = held()
    called = []
    with Engine(den, SHAPE) as engine:
        ticket, other = engine.submit(request_of()), engine.submit(request_of(first=9))
        ticket.add_done_callback(lambda done: 1 / 0)
        ticket.add_done_callback(called.append)
        gate.set()
        ticket.result(WAIT)
        assert torch.equal(other.result(WAIT), alone(denoiser(), other.request))
    ticket.add_done_callback(called.append)
    assert called == [ticket, ticket]
    assert "a callback of" in caplog.text


def test_many_threads_submit():
    den, found = denoiser(), {}

    def client(k):
        request = request_of(sorted(PLANS)[k % len(PLANS)], 2, 1000 * k)
        found[k] = request, engine.submit(request).result(WAIT)

    with Engine(den, SHAPE, rows=8) as engine:
        threads = [threading.Thread(target=client, args=(k,)) for k in range(18)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
    assert len(found) == 18
    for request, x in found.values():
        assert torch.equal(x, alone(den, request))


def test_close_drains_or_cancels():
    engine = Engine(denoiser(), SHAPE, rows=2)
    tickets = [engine.submit(request_of("long", first=10 * k)) for k in range(4)]
    assert engine.close(drain=True)
    assert [ticket.state for ticket in tickets] == ["finished"] * 4
    with pytest.raises(EngineClosedError, match="closed"):
        engine.submit(request_of())
    assert engine.close(drain=True)

    den, gate, begun = held()
    engine = Engine(den, SHAPE, rows=2)
    tickets = [engine.submit(request_of(first=10 * k)) for k in range(3)]
    assert begun.wait(WAIT)
    assert not engine.close(drain=True, timeout=0.05)  # the call under way cannot be ended
    assert [ticket.state for ticket in tickets] == ["cancelled"] * 3
    gate.set()
    assert engine.close(drain=False, timeout=WAIT)


def test_nobody_waits_for_a_thread_that_ended(caplog):
    class Broken(type(make_scheduler("fifo"))):
        def arrange(self, works, rows):
            raise KeyError("no order")

    engine = Engine(denoiser(), SHAPE, scheduler=Broken())
    with pytest.raises(EngineClosedError, match="no order"):
        engine.submit(request_of()).result(WAIT)
    engine._thread.join(WAIT)
    with pytest.raises(EngineClosedError, match="KeyError"):
        engine.submit(request_of())
    assert "ended by an error" in caplog.text
