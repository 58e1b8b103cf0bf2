"""Local SGD: the paper's volumes, equality with data-parallel training in the limits, real processes, and the loss of one."""

import json
import math
import multiprocessing
import os
import signal
import time

import local_workers
import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from local_workers import PATIENCE, RULE, STEPS, WORKERS, Shards, classifier, numbers, simulated
from torch import nn

from fewstep.errors import FewstepError
from fewstep.schedules import VPLinear
from fewstep.train import (
    QSR,
    ConstantH,
    DenoisingLoss,
    ElasticGroup,
    InversePower,
    LocalOptimizer,
    PostLocal,
    SimulatedWorkers,
    Stage,
    WorkerLostError,
    communication_volume,
    fit,
    local_sgd_drift_factor,
    sharpness,
    warmup_cosine,
)

# ---- rules and volumes


@pytest.mark.parametrize(
    ("steps", "warmup", "peak", "h_base", "alpha", "rounds", "percent"),
    [
        (300 * 312, 10_000, 0.008, 4, 0.0175, 9711, 10.375),  # ViT-B, AdamW
        (300 * 312, 10_000, 0.008, 8, 0.0175, 6460, 6.90),
        (200 * 312, 5 * 312, 0.8, 2, 0.2, 24792, 39.73),  # ResNet-152, SGD
        (200 * 312, 5 * 312, 0.8, 4, 0.25, 12539, 20.09),
    ],
)
def test_volumes_of_the_paper(steps, warmup, peak, h_base, alpha, rounds, percent):
    rates = warmup_cosine(peak, total_steps=steps, warmup_steps=warmup)
    volume = communication_volume(QSR(alpha, h_base, warmup, steps), rates, steps)
    assert volume.rounds == rounds
    assert 100.0 * volume.relative == pytest.approx(percent, abs=5e-3)
    assert volume == communication_volume(QSR(alpha, h_base, warmup, steps), [rates(step) for step in range(steps)])


rules = strategies.one_of(
    strategies.builds(ConstantH, strategies.integers(1, 50), strategies.integers(1, 400)),
    strategies.builds(
        InversePower,
        strategies.sampled_from([1.0, 2.0, 3.0]),
        strategies.floats(0.0, 1.0),
        strategies.integers(1, 20),
        strategies.integers(0, 100),
        strategies.integers(1, 400),
    ),
    strategies.builds(
        PostLocal, strategies.integers(0, 400), strategies.builds(ConstantH, strategies.just(7), strategies.integers(1, 400))
    ),
)


@given(rules, strategies.floats(1e-6, 10.0))
def test_every_rule_fills_the_run_exactly(rule, peak):
    rates = warmup_cosine(peak, total_steps=rule.total_steps, warmup_steps=min(3, rule.total_steps - 1))
    volume = communication_volume(rule, rates)
    assert volume.steps == rule.total_steps
    assert min(volume.periods) >= 1
    start = 0
    for period in volume.periods[:-1]:  # only the last is cut
        assert period == max(1, rule.wanted(start, rates(start)))
        start += period


def test_qsr_is_the_power_2_and_grows_as_the_rate_falls():
    same = InversePower(2.0, 0.1, 2, 10, 1000)
    rule = QSR(0.1, 2, 10, 1000)
    rates = [10.0 ** (-i / 4) for i in range(12)]
    assert [rule.period(20, rate) for rate in rates] == [same.period(20, rate) for rate in rates]
    assert [rule.period(20, rate) for rate in rates] == sorted(rule.period(20, rate) for rate in rates)
    assert rule.period(9, 1e-3) == 2  # the warm-up
    assert QSR(0.1, 2, 10, 1000, h_warmup=5).period(9, 1e-3) == 5
    assert rule.period(20, 0.0) == 980  # a cosine's last rate: the end cuts the round
    assert QSR(0.0, 3, 0, 1000).period(20, 0.1) == 3
    assert rule.period(5000, 0.1) == 1  # beyond the end every step is averaged


def test_bad_rules_are_refused():
    for make in (lambda: ConstantH(0, 10), lambda: ConstantH(True, 10), lambda: QSR(-1.0, 2, 0, 10), lambda: QSR(1.0, 2, 0, 0)):
        with pytest.raises(ValueError, match=r"at least|not negative"):
            make()
    with pytest.raises(ValueError, match="power above 0"):
        InversePower(0.0, 0.1, 2, 0, 10)
    with pytest.raises(ValueError, match="as many learning rates, got 3"):
        communication_volume(ConstantH(2, 10), [0.1] * 3)
    with pytest.raises(ValueError, match="made for 10 steps, not for 20"):
        communication_volume(ConstantH(2, 10), [0.1] * 20, 20)
    with pytest.raises(ValueError, match="those of 20 steps, the rule's of 10"):
        communication_volume(ConstantH(2, 10), warmup_cosine(0.1, total_steps=20))
    with pytest.raises(ValueError, match="not negative, got nan"):
        ConstantH(2, 10).period(0, math.nan)


# ---- the slow SDE


@pytest.mark.parametrize("h", [1, 4, 16, 64])
def test_drift_factor_is_what_a_simulation_gives(h):
    """The mean square of the states at which gradients are taken, over that of SGD with all workers' samples."""
    rate, workers, random = 0.05, 4, np.random.default_rng(h)
    y, total, steps = np.zeros((4000, workers)), 0.0, 64 * 12
    for step in range(steps):
        if step >= steps // 4:  # stationary: 0.95^(2 * 192) is below 1e-8
            total += (y**2).mean() / (steps - steps // 4)
        y = y - rate * (y + random.standard_normal(y.shape))
        if (step + 1) % h == 0:
            y = np.repeat(y.mean(1, keepdims=True), workers, 1)
    plain = rate**2 / workers / (1.0 - (1.0 - rate) ** 2)
    assert total / plain == pytest.approx(local_sgd_drift_factor(rate, h, 1.0, workers), rel=0.02)


def test_drift_factor_limits():
    assert local_sgd_drift_factor(0.05, 1, 1.0, 4) == pytest.approx(1.0, abs=1e-14)
    assert local_sgd_drift_factor(0.0, 50, 1.0, 4) == 1.0
    assert local_sgd_drift_factor(1e-12, 1, 1.0, 4) == pytest.approx(1.0, abs=1e-9)
    assert local_sgd_drift_factor(0.1, 10**7, 1.0, 8) == pytest.approx(8.0, abs=1e-4)
    assert local_sgd_drift_factor(1.0, 4, 1.0, 3) == pytest.approx(1.0 + 2.0 * 0.75)  # q = 0
    for product in (0.3, 0.7, 1.4):  # against the formula as it stands
        q = (1.0 - product) ** 2
        assert local_sgd_drift_factor(product, 6, 1.0, 5) == pytest.approx(1.0 + 4.0 * (1.0 - (1.0 - q**6) / (6.0 * (1.0 - q))))
    with pytest.raises(ValueError, match=r"in \[0, 2\), got 2"):
        local_sgd_drift_factor(1.0, 4, 2.0, 3)


def test_sharpness_is_the_largest_eigenvalue():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    hessian = basis @ torch.diag(torch.tensor([-5.0, 3.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)) @ basis.T
    x, unused = torch.randn(2, 3, generator=generator, dtype=torch.float64), torch.zeros(2, requires_grad=True)
    x.requires_grad_()
    loss = lambda: 0.5 * x.reshape(-1) @ hessian @ x.reshape(-1)  # noqa: E731
    assert sharpness(loss, [x, unused], iterations=60, generator=generator) == pytest.approx(-5.0, abs=1e-6)
    assert sharpness(lambda: x.sum(), [x]) == 0.0


# ---- one process


def test_one_worker_is_the_plain_optimizer():
    for kind, make in local_workers.OPTIMIZERS.items():
        plain, shards = classifier(torch.float32), Shards()
        local_workers.train(plain, make(plain.parameters()), shards, 0)
        model, optimizer = simulated(kind, workers=1, shards=shards, model=classifier(torch.float32))
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
        assert optimizer.traffic.payload_bytes == optimizer.traffic.rounds * optimizer.round_bytes


def test_simulated_workers_do_what_workers_of_their_own_do():
    """Against K copies, each with its optimizer, averaged by hand."""
    shards, models = Shards(), [classifier() for _ in range(3)]
    optimizers = [local_workers.OPTIMIZERS["adamw"](m.parameters()) for m in models]
    for start in range(0, STEPS, 4):
        for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for step in range(start, start + 4):
                optimizer.param_groups[0]["lr"] = local_workers.RATES(step)
                optimizer.zero_grad()
                shards.loss(model, worker, step).backward()
                optimizer.step()
        with torch.no_grad():
            for group in zip(*[m.parameters() for m in models], strict=True):
                mean = torch.stack(group).mean(0)
                for p in group:
                    p.copy_(mean)
    model, _ = simulated("adamw", ConstantH(4, STEPS), workers=3, shards=shards)
    np.testing.assert_allclose(numbers(model), numbers(models[0]), rtol=0, atol=1e-12)


def test_half_precision_is_averaged_in_single():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    group = SimulatedWorkers(3)
    optimizer = LocalOptimizer(torch.optim.SGD([weight], lr=1.0), ConstantH(1, 1), group)
    values = (256.0, 1.0, 1.0)  # in bfloat16 256 + 1 + 1 is 256, and its third 85.5: in single precision 86
    place = weight.data_ptr()
    for value in values:
        weight.grad = torch.full_like(weight, -value)
        optimizer.step()
    assert weight.tolist() == [86.0, 86.0]
    assert weight.data_ptr() == place
    assert optimizer.round_bytes == 8


def test_buckets_keep_views_and_mixed_types(monkeypatch):
    monkeypatch.setattr("fewstep.train.local_sgd.BUCKET", 5)
    flat = torch.arange(6.0)
    parameters = [
        flat[:4].view(2, 2),
        torch.ones(3, dtype=torch.float64),
        flat[4:],
        torch.ones(7),
        torch.ones((), dtype=torch.float16),
    ]
    group = SimulatedWorkers(2)
    optimizer = LocalOptimizer(torch.optim.SGD([p.requires_grad_() for p in parameters], lr=1.0), ConstantH(1, 1), group)
    for value in (1.0, 3.0):
        for p in parameters:
            p.grad = torch.full_like(p, value)
        optimizer.step()
    assert flat.tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]  # the views still are views
    assert parameters[1].tolist() == [-1.0] * 3
    assert parameters[4].item() == -1.0
    assert optimizer.traffic.payload_bytes == optimizer.round_bytes == 4 * (4 + 2 + 7 + 1) + 8 * 3


def test_averaged_states_are_those_named():
    model, optimizer = simulated("adamw", ConstantH(STEPS, STEPS), average_states=("exp_avg",))
    states = optimizer.workers.states
    first, last = (states[k][next(model.parameters())] for k in (0, WORKERS - 1))
    assert torch.equal(first["exp_avg"], last["exp_avg"])
    assert not torch.equal(first["exp_avg_sq"], last["exp_avg_sq"])
    assert optimizer.round_bytes == 2 * 8 * len(numbers(model))
    for name, fits in (("momentum", "'exp_avg', 'exp_avg_sq'"), ("step", "'exp_avg'")):
        with pytest.raises(ValueError, match=rf"names {name!r}.*{fits}"):
            simulated("adamw", average_states=(name,))
    with pytest.raises(ValueError, match=r"got the string 'exp_avg'"):
        simulated("adamw", average_states="exp_avg")


def test_the_spread_is_that_of_the_workers():
    shards, rounds = Shards(), []
    copies = []
    for worker in range(WORKERS):
        model = classifier()
        local_workers.train(model, local_workers.OPTIMIZERS["sgd"](model.parameters()), shards, worker, steps=4)
        copies.append(numbers(model))
    simulated("sgd", ConstantH(4, STEPS), shards=shards, monitor=rounds.append)
    spread = math.sqrt(np.var(copies, axis=0).sum())
    assert rounds[0].spread == pytest.approx(spread, rel=1e-6)
    assert [(r.step, r.h, r.learning_rate, r.workers) for r in rounds] == [
        (4 * (i + 1), 4, local_workers.RATES(4 * i), 4) for i in range(3)
    ]
    assert rounds[0].drift_factor(1.0) == local_sgd_drift_factor(0.1, 4, 1.0, 4)


def test_skipped_steps_of_a_scaler_count():
    model = classifier(torch.float32)
    optimizer = LocalOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ConstantH(2, 10), SimulatedWorkers(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = numbers(model)
    x = torch.ones(4, 64)
    for value in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean() * value).backward()
        scaler.step(optimizer)
        assert (numbers(model) == before) == math.isinf(value)
        scaler.update()
    assert optimizer.steps == 2
    assert optimizer.traffic.rounds == 1
    plain = classifier(torch.float32)
    plain(x).square().mean().backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    np.testing.assert_allclose(numbers(model), numbers(plain), atol=1e-6)  # gradients were unscaled


def test_schedulers_and_closures_take_it_for_an_optimizer():
    x = nn.Parameter(torch.tensor([2.0]))
    optimizer = LocalOptimizer(torch.optim.SGD([x], lr=0.5), ConstantH(1, 4), SimulatedWorkers(1))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def closure():
        optimizer.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.25
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "LocalOptimizer(SGD" in repr(optimizer)
    with pytest.raises(ValueError, match="before LocalOptimizer takes it"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_a_state_fits_only_what_made_it():
    def make(sync=RULE, workers=2):
        return LocalOptimizer(torch.optim.SGD(classifier().parameters(), lr=0.1), sync, SimulatedWorkers(workers))

    state = make().state_dict()
    make().load_state_dict(state)
    with pytest.raises(ValueError, match="was made with QSR"):
        make(ConstantH(2, STEPS)).load_state_dict(state)
    with pytest.raises(ValueError, match="a state of 3 simulated workers has 13 entries, got 9"):
        make(workers=3).load_state_dict(state)
    with pytest.raises(ValueError, match="plain optimizer"):
        make().load_state_dict(torch.optim.SGD(classifier().parameters(), lr=0.1).state_dict())
    workers = SimulatedWorkers(2)
    LocalOptimizer(torch.optim.SGD(classifier().parameters(), lr=0.1), RULE, workers)
    with pytest.raises(ValueError, match="make new ones"):
        LocalOptimizer(torch.optim.SGD(classifier().parameters(), lr=0.1), RULE, workers)


# ---- in fit


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 4))

    def forward(self, x, time):
        return self.layers(torch.cat([x, time[:, None].to(x)], 1))


POINTS = {"x": torch.randn(50, 4, generator=torch.Generator().manual_seed(0))}


def fitted(folder=None, steps=60, stop=None):
    torch.manual_seed(1)
    model, made = Small(), []

    def optimizer(parameters, lr):
        sync = QSR(alpha=0.01, h_base=2, warmup_steps=0, total_steps=20)
        made.append(LocalOptimizer(torch.optim.AdamW(parameters, lr=lr), sync, SimulatedWorkers(3)))
        return made[-1]

    loss = DenoisingLoss(VPLinear(), "noise")

    def objective(model, batch, generator):
        if made[-1].steps == stop:
            raise SystemError
        return loss(model, batch, generator)

    fit(objective, model, POINTS, steps=steps, batch_size=8, warmup=0, optimizer=optimizer, folder=folder, checkpoint_every=7)
    return model, made[-1]


def test_fit_resumes_bit_for_bit_within_a_round(tmp_path):
    model, optimizer = fitted()
    with pytest.raises(SystemError):
        fitted(tmp_path, stop=13)  # after 39 calls; the checkpoint is of call 35, within a step and within a round
    again, resumed = fitted(tmp_path)
    assert numbers(again) == numbers(model)
    assert resumed.traffic.rounds == optimizer.traffic.rounds
    assert resumed.traffic.payload_bytes == optimizer.traffic.payload_bytes == optimizer.traffic.rounds * optimizer.round_bytes
    assert optimizer.steps == 20
    planned = communication_volume(optimizer.sync, lambda step: 1e-3 * 0.5 * (1.0 + math.cos(math.pi * step / 20)))
    assert planned.payload_bytes(len(numbers(model))) == optimizer.traffic.payload_bytes


@pytest.mark.parametrize(("steps", "each"), [(59, 19.6667), (30, 10), (63, 21)])
def test_fit_refuses_a_rule_whose_last_average_is_not_that_of_its_last_step(steps, each):
    """Shorter, the workers would end with models of their own; longer, they would average every step from there on."""
    with pytest.raises(ValueError, match=f"different models: .*steps={steps}.* does {each} optimizer steps a worker.* made for 20"):
        fitted(steps=steps)


def test_fit_counts_the_steps_of_a_stage():
    def optimizer(parameters, lr):
        return LocalOptimizer(torch.optim.SGD(parameters, lr=lr), ConstantH(2, 3), SimulatedWorkers(1))

    stage = Stage(DenoisingLoss(VPLinear(), "noise"), optimizer=optimizer, every=2)
    fit(stage, Small(), POINTS, steps=7, batch_size=8)  # updates at 2, 4 and 6
    with pytest.raises(ValueError, match="does 4 optimizer steps"):
        fit(stage, Small(), POINTS, steps=8, batch_size=8)


# ---- processes


def start(task, folder, *options):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fewstep.train", "sklearn.datasets", "torch._dynamo"])  # once, not in each process
    processes = [context.Process(target=local_workers.main, args=(task, rank, str(folder), *options)) for rank in range(WORKERS)]
    for process in processes:
        process.start()
    return processes


def finish(processes, folder, seconds, lost=()):
    """What the processes found; those that are lost are killed at the end."""
    end = time.monotonic() + seconds
    try:
        for rank, process in enumerate(processes):
            if rank not in lost:
                process.join(max(0.0, end - time.monotonic()))
                assert process.exitcode is not None, f"worker {rank} still runs after {seconds} s"
                assert process.exitcode == 0, f"worker {rank} failed"
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORKERS) if rank not in lost}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healthy")
    return finish(start("healthy", folder), folder, 120)


@pytest.mark.parametrize("kind", ["sgd", "momentum"])
def test_an_average_every_step_is_data_parallel_training(found, kind):
    for rank in range(WORKERS):
        np.testing.assert_allclose(found[rank][f"local {kind}"], found[rank][f"parallel {kind}"], rtol=0, atol=1e-13)
        np.testing.assert_allclose(found[rank]["local single"], found[rank]["parallel single"], rtol=0, atol=1e-6)


def test_adamw_averaged_every_step_is_another_method(found):
    for name in ("local adamw", "local adamw, states averaged"):
        assert np.abs(np.subtract(found[0][name], found[0]["parallel adamw"])).max() > 0.01


def test_all_workers_end_with_one_model_which_is_the_simulated_one(found):
    model, _ = simulated()
    for rank in range(WORKERS):
        assert found[rank]["qsr"] == found[0]["qsr"]
    np.testing.assert_allclose(found[0]["qsr"], numbers(model), rtol=0, atol=1e-12)
    assert found[0]["rounds"] == found[3]["rounds"]
    assert [r[1] for r in found[0]["rounds"]] == list(communication_volume(RULE, local_workers.RATES).periods)
    assert all(spread > 0.0 for *_, spread in found[0]["rounds"])


def test_traffic_is_what_was_planned(found):
    volume = communication_volume(RULE, local_workers.RATES)
    traffic = found[0]["traffic"]
    assert traffic["rounds"] == volume.rounds
    assert traffic["payload_bytes"] == volume.payload_bytes(len(found[0]["qsr"]), element_size=8)
    assert traffic["payload_bytes"] == volume.rounds * found[0]["round bytes"]
    assert traffic["control_bytes"] == volume.rounds * 40
    assert traffic["other_bytes"] == 16 + found[0]["round bytes"] + 12  # the start, and one average of three numbers


def test_workers_that_do_not_fit_are_told(found):
    for rank in range(WORKERS):
        assert "not at the same step" in found[rank]["out of step"]
        assert "different sizes" in found[rank]["other model"]
        assert found[rank]["average"] == [1.5] * 3


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_lost_worker_is_reported_in_time(tmp_path, how):
    found = finish(start("reported", tmp_path, {2: 5}, how), tmp_path, 60, lost=(2,))
    for rank in (0, 1, 3):
        assert "a synchronisation of 4 workers failed" in found[rank]["error"]
        assert found[rank]["steps"] == 8
        assert found[rank]["seconds"] < 2 * PATIENCE + 5.0  # the machine may be busy


@pytest.mark.parametrize(("lost", "how"), [({2: 5}, "SIGKILL"), ({0: 5, 2: 9}, "SIGKILL"), ({3: 5}, "SIGSTOP")])
def test_a_lost_worker_is_survived(tmp_path, lost, how):
    found = finish(start("elastic", tmp_path, lost, how), tmp_path, 60, lost=lost)
    present = [[rank for rank in range(WORKERS) if lost.get(rank, STEPS) >= end] for end in (4, 8, 12)]
    expected = survivors(present)
    for rank in present[-1]:
        assert found[rank]["error"] == "no error"
        assert found[rank]["seconds"] < 4 * len(lost) * PATIENCE + 5.0  # the machine may be busy
        assert found[rank]["workers"] == [len(alive) for alive in present]
        assert found[rank]["warned"] == [
            f"workers [{name}] were lost; {3 - i} go on, from the last average." for i, name in enumerate(lost)
        ]
        np.testing.assert_allclose(found[rank]["model"], expected, rtol=0, atol=1e-12)
        assert found[rank]["model"] == found[present[-1][0]]["model"]
        assert found[rank]["traffic"]["rounds"] == 3


def survivors(present):
    """Rounds of four steps of those that are present, who keep their momentum, averaged by hand."""
    shards, models = Shards(), [classifier() for _ in range(WORKERS)]
    optimizers = [local_workers.OPTIMIZERS["momentum"](m.parameters()) for m in models]
    for start, alive in zip((0, 4, 8), present, strict=True):
        for worker in alive:
            for step in range(start, start + 4):
                optimizers[worker].param_groups[0]["lr"] = local_workers.RATES(step)
                optimizers[worker].zero_grad()
                shards.loss(models[worker], worker, step).backward()
                optimizers[worker].step()
        with torch.no_grad():
            for group in zip(*[models[worker].parameters() for worker in alive], strict=True):
                mean = torch.stack(group).mean(0)
                for p in group:
                    p.copy_(mean)
    return numbers(models[present[-1][0]])


def test_a_worker_that_comes_late_is_told_and_too_few_end_the_run(tmp_path):
    processes = start("elastic", tmp_path, {1: 5}, "SIGSTOP", 4)
    for rank in (0, 2, 3):
        processes[rank].join(60)
    os.kill(processes[1].pid, signal.SIGCONT)
    found = finish(processes, tmp_path, 30)
    assert "came too late" in found[1]["error"]
    for rank in (0, 2, 3):
        assert "workers [1] were lost; 3 are left, fewer than fewest=4" in found[rank]["error"]


def test_groups_say_what_they_need():
    with pytest.raises(ValueError, match="init_process_group"):
        LocalOptimizer(torch.optim.SGD(classifier().parameters(), lr=0.1), RULE)
    with pytest.raises(ValueError, match="got 4, 4 and 1"):
        ElasticGroup(torch.distributed.HashStore(), 4, 4)
    with pytest.raises(ValueError, match="patience is a number of seconds"):
        ElasticGroup(torch.distributed.HashStore(), 0, 1, patience=0.0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SimulatedWorkers(0)
    assert issubclass(WorkerLostError, FewstepError)
    store = torch.distributed.HashStore()
    with pytest.raises(WorkerLostError, match="only 1 of 2 workers came to the start within 1 s"):
        ElasticGroup(store, 0, 2, start=1.0)
    for _ in range(2):
        store.add("assembled", 1)
    with pytest.raises(ValueError, match="keys of an earlier run"):
        ElasticGroup(store, 1, 2)
