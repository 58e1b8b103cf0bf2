"""What holds of every method: it resumes bit for bit, refuses what it is not made for, says what it wants; students, wrappers, features."""

import copy
import math

import pytest
import torch
from mixtures import Wide, noises
from torch import nn

import fewstep as fs
from fewstep.distill import DMD2, TDM, Adversary, FreeFlow, HighFrequencyLoss, HiPA, Told, read_as, teacher_pairs
from fewstep.distill.networks import Features, Head, bottleneck, copy_of, layer_of
from fewstep.errors import NetworkError, PlanError, UnknownNameError
from fewstep.models import SmallUNet, SmallUNetConfig
from fewstep.train import stabilize

SHAPE = (1, 8, 8)


def small_unet(classes=3, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SmallUNet(SmallUNetConfig(1, 8, channels=(8, 16), blocks=(1, 1), embedding=16, classes=classes, **options))
        for p in network.parameters():  # layers that begin at zero say nothing
            p.data += 0.05 * torch.randn(p.shape)
    return network


def teacher(predicts="flow", schedule=None, guided=False):
    schedule = fs.schedules.Flow() if schedule is None else schedule
    info = fs.ModelInfo(shape=SHAPE, conditions={"label": {"classes": 3, "null": 3}})
    plain = fs.Denoiser(small_unet().eval().requires_grad_(False), schedule, predicts, info=info)
    return fs.guidance.ClassifierFree(plain, 2.0, {"label": 3}) if guided else plain


def batches(count, generator):
    return {
        "label": torch.randint(3, (count,), generator=generator),
        "x": torch.rand((count, *SHAPE), generator=generator) - 0.5,
        "noise": torch.randn((count, *SHAPE), generator=generator),
    }


def labels(count, generator):
    return {"label": torch.randint(3, (count,), generator=generator)}


STEADY = stabilize.BrownianMotionController()
METHODS = {
    "dmd2": (DMD2(update_ratio=2), labels),
    "dmd2, two calls": (DMD2(steps=2, update_ratio=2), labels),
    "dmd2, two calls from data": (DMD2(steps=2, update_ratio=2, simulate=False), batches),
    "dmd2, adversary": (DMD2(update_ratio=2, adversary=Adversary(stabilizer=stabilize.R1(0.1))), batches),
    "dmd2, adversary, noise": (DMD2(update_ratio=2, adversary=Adversary(stabilizer=STEADY)), batches),
    "tdm": (TDM(steps=3, update_ratio=1), labels),
    "tdm, steps-aware": (TDM(steps=(1, 3), update_ratio=2), labels),
    "tdm, overlapping": (TDM(steps=2, update_ratio=1, separate=False, importance=False), labels),
    "freeflow": (FreeFlow(), labels),
    "freeflow, prediction only": (FreeFlow(correct=0.0), labels),
    "freeflow, correction only": (FreeFlow(correct=1.0), labels),
    "hipa": (HiPA(), batches),
}


def train(method, data, folder=None, **options):
    guide = teacher(guided=True)
    network = copy_of(guide, small_unet())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        student = method.wrapped(network) if hasattr(method, "wrapped") else network
        training = method.training(guide, student)
    settings = {"steps": 6, "batch_size": 8, "learning_rate": 1e-3, "warmup": 2, "ema": 0.9, "checkpoint_every": 2, **options}
    return training, fs.fit(training.stages, dict(training.modules), data, **settings, folder=folder)


@pytest.mark.parametrize(("method", "data"), METHODS.values(), ids=METHODS)
def test_resumes_bit_for_bit(method, data, tmp_path):
    """Ended after step 3 of 6, whose last checkpoint is that of step 2, and started again with other weights in the way."""

    calls = 0

    def failing(count, generator):
        nonlocal calls
        calls += 1
        if calls > 4 * len(training.stages):
            raise SystemError
        return data(count, generator)

    failing.__qualname__ = data.__qualname__
    training, whole = train(method, data)
    with pytest.raises(SystemError):
        train(method, failing, tmp_path)
    torch.manual_seed(99)
    resumed, result = train(method, data, tmp_path)
    assert result.log[-1]["step"] == 6
    for name, module in training.modules.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, resumed.modules[name].state_dict()[key]), (name, key)
    for key, value in whole.averages[0.9]["student"].items():
        assert torch.equal(value, result.averages[0.9]["student"][key]), key
    student, begun = training.modules["student"], copy_of(teacher(), nn.Identity()).state_dict()
    trained = getattr(student, "network", student).state_dict()
    assert any(not torch.equal(value, begun[key]) for key, value in trained.items())


@pytest.mark.parametrize(("method", "data"), METHODS.values(), ids=METHODS)
def test_students_are_sampled_by_their_plans(method, data):
    guide = teacher()
    student = method.wrapped(small_unet()) if hasattr(method, "wrapped") else small_unet()
    numbers = getattr(method, "numbers", (getattr(method, "steps", 1),))
    for nfe in numbers:
        plan = method.plan(guide, nfe)
        network = method.sampled(student, nfe) if hasattr(method, "sampled") else student
        with torch.no_grad():
            noise = fs.draw_noise(SHAPE, range(4), plan)
            samples = fs.sample(read_as(guide, network), noise, plan, cond={"label": torch.arange(4) % 4}, seeds=range(4))
        assert plan.nfe == nfe
        assert samples.shape == (4, *SHAPE)
    with pytest.raises(PlanError, match="not 7"):
        method.plan(guide, 7)


@pytest.mark.parametrize("method", [DMD2(), TDM(steps=2, update_ratio=1)], ids=["dmd2", "tdm"])
def test_a_run_that_diverges_is_ended(method):
    guide = fs.Denoiser(Wide(), fs.schedules.Flow(), "flow")
    training = method.training(guide, Wide())
    options = {"batch_size": 16, "learning_rate": 30.0, "warmup": 100, "ema": (), "clip": None}
    with pytest.raises(NetworkError, match="diverged"):
        fs.fit(training.stages, dict(training.modules), noises(2), steps=450, **options)


def test_freeflows_loss_has_the_value_of_its_error():
    """The value of what is differentiated falls when the error rises, for the weight divides by it; the loop watches the error."""
    method, guide = FreeFlow(), fs.Denoiser(Wide(), fs.schedules.Flow(), "flow")
    training = method.training(guide, method.wrapped(Wide()))
    stage = training.stages[0]
    loss, info = stage.objective(training.modules, {"noise": torch.randn(8, 2)}, torch.Generator())
    assert stage.watched
    assert loss.item() == pytest.approx(info["prediction"].item())
    loss.backward()
    assert any(p.grad.abs().max() > 0.0 for p in training.modules["student"].parameters() if p.grad is not None)


def test_a_student_begins_as_the_teacher():
    guide, x, label = teacher(), torch.randn(4, *SHAPE), torch.arange(4)
    wanted = guide(x, 0.6, label=label)
    assert torch.equal(read_as(guide, copy_of(guide, nn.Identity()))(x, 0.6, label=label), wanted)
    told = read_as(guide, Told(copy_of(guide, nn.Identity())))
    for number in (0.1, 0.9, torch.rand(4)):
        assert torch.equal(told(x, 0.6, label=label, told=number), wanted)


def test_a_copy_is_of_the_teachers_network_and_all_of_it_trains():
    guide = teacher(guided=True)
    copied = copy_of(guide, nn.Identity())
    assert copied is not guide.denoiser.network
    assert all(p.requires_grad for p in copied.parameters())
    assert not any(p.requires_grad for p in guide.denoiser.network.parameters())


def test_a_state_of_a_later_call_is_where_the_sampler_would_be():
    """Backward simulation: the student's own calls and fresh noise, as its plan says."""
    guide, method = teacher(), DMD2(steps=2)
    plan, times = method.plan(guide, 2), method.call_times(guide.schedule)
    assert plan.grid.tolist()[:2] == list(times)
    assert [row.carry for row in plan.rows] == [(), ()]
    assert plan.rows[0].noise.scale == pytest.approx(float(guide.schedule.sigma(times[1])))
    assert plan.rows[0].weights == (pytest.approx(float(guide.schedule.alpha(times[1]))),)


def test_data_are_wanted_only_where_they_are_used():
    assert DMD2(adversary=Adversary()).needs_data
    assert DMD2(steps=2, simulate=False).needs_data
    assert HiPA.needs_data
    assert not any(method.needs_data for method in (DMD2(steps=4), TDM(), FreeFlow()))


def test_noise_and_data_predictions_on_other_schedules_train():
    """One step for every kind of teacher on every kind of schedule: finite, and the student moves."""
    betas = torch.linspace(1e-3, 0.2, 100).tolist()
    schedules = (fs.schedules.VPLinear(), fs.schedules.EDM(), fs.schedules.FromBetas(betas), fs.schedules.Flow())
    tried = 0
    for schedule in schedules:
        for kind in ("noise", "data", "velocity", "flow"):
            if kind == "noise" and isinstance(schedule, fs.schedules.Flow):
                continue  # says nothing of the data at alpha = 0, and the denoiser says so
            for method in (DMD2(update_ratio=1), TDM(steps=2, update_ratio=1), FreeFlow()):
                guide = fs.Denoiser(Wide(), schedule, kind)
                student = method.wrapped(Wide()) if hasattr(method, "wrapped") else Wide()
                before = copy.deepcopy(student.state_dict())
                training = method.training(guide, student)
                fs.fit(training.stages, dict(training.modules), noises(2), steps=1, batch_size=4, warmup=0, ema=())
                assert all(bool(value.isfinite().all()) for value in student.state_dict().values())
                assert any(not torch.equal(value, before[name]) for name, value in student.state_dict().items())
                tried += 1
    assert tried == 45


# ---- modules -----------------------------------------------------------------------------------------------------------------------


def test_the_middle_of_networks():
    assert bottleneck(small_unet()) == "bottom"
    network = small_unet()
    features = Features(network, "bottom")
    with features.kept() as outputs:
        network(torch.randn(2, *SHAPE), torch.rand(2))
    assert outputs[0].shape == (2, 16, 4, 4)
    assert Head(layer_of(network.bottom))(outputs[0]).shape == (2,)
    with features.kept() as again:
        pass
    assert not again


def test_heads_of_maps_tokens_and_vectors():
    for layer, features in (
        (nn.Conv2d(4, 8, 1), torch.randn(3, 8, 5, 7)),
        (nn.Linear(4, 8), torch.randn(3, 11, 8)),
        (nn.Linear(4, 8), torch.randn(3, 8)),
        (nn.Conv1d(4, 8, 1), torch.randn(3, 8, 11)),
    ):
        assert Head(layer)(features).shape == (3,)
    with pytest.raises(ValueError, match="8 channels"):
        Head(nn.Linear(4, 8))(torch.randn(3, 9))


def test_what_is_told_is_added_in_the_time_embedding():
    network = Told(small_unet())
    assert network.options == {"at": "time.3", "default": 1.0, "highest": 10.0, "size": 32}
    nn.init.normal_(network.branch[2].weight)
    x, time = torch.randn(3, *SHAPE), torch.rand(3)
    assert not torch.equal(network(x, time, told=0.2), network(x, time, told=0.4))
    assert torch.equal(network(x, time), network(x, time, told=1.0))
    rows = torch.tensor([0.2, 0.4, 0.2])
    each = [network(x[i : i + 1], time[i : i + 1], told=rows[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(network(x, time, told=rows), torch.cat(each))
    assert not network.network.time[3]._forward_hooks


def test_what_is_told_is_smooth():
    """Differences by 0.01 give the derivative: the code has no high frequency."""
    network = Told(small_unet()).double()
    nn.init.normal_(network.branch[2].weight)
    x, time = torch.randn(3, *SHAPE, dtype=torch.float64), torch.rand(3, dtype=torch.float64)

    def call(delta):
        return network(x, time, told=delta)

    _, exact = fs.distill.ForwardMode()(call, torch.full((3,), 0.5, dtype=torch.float64))
    _, near = fs.distill.FiniteDifference(0.01)(call, torch.full((3,), 0.5, dtype=torch.float64))
    assert (near - exact).norm() < 0.01 * exact.norm()


def test_told_maps_and_other_places():
    network = Told(small_unet(), at="stem")
    nn.init.normal_(network.branch[2].weight)
    x, time = torch.randn(2, *SHAPE), torch.rand(2)
    assert not torch.equal(network(x, time, told=0.1), network(x, time, told=0.9))
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        Told(small_unet(), at="nowhere")
    with pytest.raises(ValueError, match="'time' of SmallUNet is not called as such"):
        Told(small_unet(), at="time")(x, time)


# ---- HiPA --------------------------------------------------------------------------------------------------------------------------


def test_without_weights_hipa_is_plain_regression():
    guide = teacher()
    batch = batches(8, torch.Generator().manual_seed(0))
    zero, none = HiPA(losses=(HighFrequencyLoss(0.0, 0.0),)), HiPA(losses=())
    losses = [
        method.training(guide, small_unet()).stages[0].objective({"student": small_unet()}, batch, torch.Generator())[0]
        for method in (zero, none)
    ]
    found = read_as(guide, small_unet())(batch["noise"], 1.0, label=batch["label"])
    assert losses[0] == losses[1] == nn.functional.huber_loss(found, batch["x"])


def test_the_loss_sees_high_frequencies_only():
    down = torch.arange(16.0)[:, None].expand(1, 1, 16, 16)
    slow, fast = (torch.cos(2.0 * math.pi * k * down / 16.0) for k in (1, 6))
    zero, loss = torch.zeros(1, 1, 16, 16), HighFrequencyLoss(1.0, 0.0)
    assert loss(slow, zero) < 1e-3
    assert loss(fast, zero) > 0.1
    # amplitudes do not see a shift
    assert loss(fast, fast.roll(3, 2)) < 1e-3
    edges = HighFrequencyLoss(0.0, 1.0)
    assert edges(slow + 0.3, slow) < 1e-12 < edges(slow, fast)


def test_gradients_of_the_loss_are_finite_where_amplitudes_vanish():
    x = torch.zeros(1, 1, 8, 8, requires_grad=True)
    HighFrequencyLoss()(x, torch.zeros(1, 1, 8, 8)).backward()
    assert bool(x.grad.isfinite().all())


def test_pairs_are_the_teachers_own():
    guide = teacher()
    plan = fs.make_plan("ddim", guide.schedule, 5, final="zero")
    pairs = teacher_pairs(guide, range(6), plan, cond={"label": torch.arange(6) % 3}, block=4)
    again = fs.sample(guide, fs.draw_noise(SHAPE, range(6), plan), plan, cond={"label": torch.arange(6) % 3})
    torch.testing.assert_close(pairs["x"], again)
    with pytest.raises(ValueError, match="deterministic"):
        teacher_pairs(guide, range(2), fs.make_plan("ddpm", guide.schedule, 5))


# ---- messages ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DMD2(steps=0), ValueError, "at least 1"),
        (lambda: DMD2(steps=2, times=(1.0,)), ValueError, "1 times were given for steps=2"),
        (lambda: DMD2(levels=(0.5, 0.2)), ValueError, "lower one first"),
        (lambda: DMD2(weighting="snr"), UnknownNameError, "min_snr"),
        (lambda: Adversary(head_weight=0.0), ValueError, "head_weight"),
        (lambda: Adversary(noise=(0.5, 2.0)), ValueError, "between 0 and 1"),
        (lambda: TDM(steps=()), ValueError, "numbers of steps"),
        (lambda: TDM(steps=(2, 2)), ValueError, "each once"),
        (lambda: TDM(huber=0.0), ValueError, "positive huber"),
        (lambda: FreeFlow(correct=2.0), ValueError, r"\[0, 1\]"),
        (lambda: HighFrequencyLoss(radius=1.0), ValueError, r"\[0, 1\)"),
        (lambda: HighFrequencyLoss()(torch.zeros(2, 4), torch.zeros(2, 4)), ValueError, "Decode latents"),
        (lambda: TDM(steps=(1, 2)).training(teacher(), small_unet()), TypeError, "wrapped"),
        (lambda: FreeFlow().training(teacher(), small_unet()), TypeError, "wrapped"),
        (lambda: read_as(lambda x, t: x, small_unet()), TypeError, "a teacher is a denoiser with a noise schedule"),
    ],
)
def test_options_that_make_no_sense(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_nothing_says_the_shape():
    guide = fs.Denoiser(small_unet(), fs.schedules.Flow(), "flow")
    training = DMD2(update_ratio=1).training(guide, small_unet())
    with pytest.raises(ValueError, match="shape of a sample"):
        fs.fit(training.stages, dict(training.modules), labels, steps=1, batch_size=2, ema=())
