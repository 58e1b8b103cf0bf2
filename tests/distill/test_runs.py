"""Runs of distillation: what they refuse, what they cost, what is the same for the same seed, where tensors are."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import fewstep as fs
from fewstep.denoisers import Clipped
from fewstep.distill import (
    DMD2,
    LCM,
    TDM,
    Adversary,
    Comparison,
    FiniteDifference,
    ForwardMode,
    FreeFlow,
    HiPA,
    Student,
    distill,
    make_method,
    teacher_pairs,
    teacher_samples,
)
from fewstep.distill.networks import copy_of
from fewstep.distill.report import _line, _saved, compare_student
from fewstep.distill.run import _reader, own_steps
from fewstep.distill.sheets import Sheets
from fewstep.distill.states import call_times
from fewstep.distill.student_network import student_network
from fewstep.distill.told import Told
from fewstep.errors import ArtefactError, UnknownNameError

LITTLE = {"iterations": 4, "batch_size": 4, "warmup": 0, "compare": None}


class Small(nn.Module):
    """A network of points in the plane, with a class."""

    def __init__(self, width=16, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.label = nn.Embedding(5, 4)
            self.layers = nn.Sequential(nn.Linear(7, width), nn.SiLU(), nn.Dropout(0.5), nn.Linear(width, 2))

    def forward(self, x, time, label):
        return self.layers(torch.cat([x, time[:, None].to(x), self.label(label).to(x)], 1))


def teacher(seed=0, schedule=None, network=None, **known):
    info = fs.ModelInfo(shape=(2,), conditions={"label": {"classes": 4, "null": 4}}, **known)
    network = (Small(seed=seed) if network is None else network).eval()
    return fs.Denoiser(network, fs.schedules.Flow() if schedule is None else schedule, "flow", info=info)


def guided(scale=2.0, seed=0):
    return fs.guidance.ClassifierFree(teacher(seed), scale, {"label": 4})


LABEL = {"label": torch.arange(12) % 4}
POINTS = {"x": torch.linspace(-1, 1, 24).reshape(12, 2), **LABEL}
NOISES = {"noise": torch.linspace(1, -1, 24).reshape(12, 2), **POINTS}


# ---- a student that is told its number of calls ------------------------------------------------------------------------------------


def steps_aware():
    student = distill(
        teacher(), method="tdm", steps=(1, 2, 4), conditions=LABEL, learning_rate=1e-2, **{**LITTLE, "iterations": 30}
    )
    assert own_steps("tdm", [1, 2, 4]) == {"steps": (1, 2, 4)}
    return student


def test_one_student_of_several_numbers_of_calls_is_told_which(tmp_path):
    student, cond = steps_aware(), {"label": torch.arange(4)}
    assert student.card["told_number"] == {"1": 1.0, "2": 0.5, "4": 0.25}
    method, plan = TDM(steps=(1, 2, 4)), student.plan(4)
    samples = student.sample(range(4), nfe=4, cond=cond)
    networks = {n: fs.distill.read_as(student.teacher, method.sampled(student.network, n)) for n in (1, 4)}
    with torch.no_grad():
        noise = fs.draw_noise((2,), range(4), plan)
        told = {n: fs.sample(network, noise, plan, cond=cond) for n, network in networks.items()}
    assert torch.equal(samples, told[4])
    assert (samples - told[1]).abs().max() > 1e-4
    again = Student.load(student.save(tmp_path / "student"), teacher())
    assert torch.equal(again.sample(range(4), nfe=4, cond=cond), samples)
    assert torch.equal(fs.sample(again.denoiser_of(4), noise, plan, cond=cond), samples)
    prints = {n: fs.identity.identity(again.denoiser_of(n))["fingerprint"] for n in (1, 2, 4)}
    assert len(set(prints.values())) == 3


def test_pictures_and_report_ask_a_student_as_it_is_sampled(monkeypatch):
    student, seen, forward = steps_aware(), [], Told.forward

    def noted(self, x, time, told=None, **cond):
        seen.append(told)
        return forward(self, x, time, told=told, **cond)

    monkeypatch.setattr(Told, "forward", noted)
    _reader(student.teacher, student.card)(student.network, 4)(torch.ones(2, 2), 0.5, label=torch.arange(2))
    assert seen == [0.25]
    seen.clear()
    compare_student(student, Comparison(count=16, tuned=None, reference_calls=4), LABEL | POINTS, 100)
    assert seen == [1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]


# ---- going on ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "source"),
    [
        (LCM(), {"data": POINTS}),
        (DMD2(), {"conditions": LABEL}),
        (TDM(steps=1), {"conditions": LABEL}),
        (FreeFlow(), {"conditions": LABEL}),
        (HiPA(losses=()), {"data": NOISES}),
    ],
    ids=["lcm", "dmd2", "tdm", "freeflow", "hipa"],
)
def test_a_checkpoint_of_another_teacher_or_other_conditions_is_refused(method, source, tmp_path):
    options = {"method": method, "steps": 1, "folder": tmp_path, **LITTLE}
    distill(teacher(), **source, **options)
    distill(teacher(), **source, **options)  # the same one goes on
    with pytest.raises(ArtefactError, match=r"other settings: objective was \[.?_Watched\(made_for=.?'network"):
        distill(teacher(seed=5), **source, **options)
    other = {name: {**values, "label": torch.full((12,), 3)} for name, values in source.items()}
    with pytest.raises(ArtefactError, match="other settings"):
        distill(teacher(), **other, **options)
    with pytest.raises(ArtefactError, match="other settings"):
        distill(guided(), **source, **options)


def test_weights_are_looked_at_whatever_a_model_says_of_itself(tmp_path):
    options = {"method": "dmd2", "steps": 1, "conditions": LABEL, "folder": tmp_path, **LITTLE}
    one, other = teacher(fingerprint="same"), teacher(seed=1, fingerprint="same")
    distill(one, **options)
    with pytest.raises(ArtefactError, match="other settings"):
        distill(other, **options)


class Stop(Exception):
    """Of a process that is killed."""


@pytest.mark.parametrize("method", [LCM(), DMD2(update_ratio=3), TDM(steps=1), FreeFlow(correct=0.0, update_ratio=2)])
def test_a_run_that_went_on_has_cost_what_a_whole_one_has(method, tmp_path):
    calls, limit = 0, 10**9

    def rows(count, generator):
        nonlocal calls
        calls += 1
        if calls > limit:
            raise Stop
        return {name: values[torch.randint(12, (count,), generator=generator)] for name, values in NOISES.items()}

    options = {"method": method, "steps": 1, "checkpoint_every": 3, **LITTLE, "iterations": 10}
    whole = distill(teacher(), data=rows, folder=tmp_path / "whole", **options)
    spent = whole.card["training"]["evaluations"]
    assert (
        distill(teacher(), data=rows, folder=tmp_path / "whole", **options).card["training"]["evaluations"] == spent
    )  # none were done
    calls, limit = 0, {LCM: 8, FreeFlow: 5}.get(type(method), 10)  # one batch for the probe, one for every update
    with pytest.raises(Stop):
        distill(teacher(), data=rows, folder=tmp_path / "killed", **options)
    limit = 10**9
    resumed = distill(teacher(), data=rows, folder=tmp_path / "killed", **options)
    assert resumed.card["training"]["evaluations"] == spent


def test_what_is_not_done_is_not_counted():
    """FreeFlow without corrections, updated in every second of four steps: two calls for a slope, one to learn, one of the teacher."""
    costs = [
        distill(teacher(), method=FreeFlow(correct=0.0, update_ratio=ratio), steps=1, conditions=LABEL, **LITTLE).card["training"][
            "evaluations"
        ]
        for ratio in (1, 2)
    ]
    assert costs == [4 * 4 * (2 + 3 + 1), 2 * 4 * (2 + 3 + 1)]


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before():
    for method, source in (
        (FreeFlow(), {"conditions": LABEL}),
        (DMD2(adversary=Adversary(at="layers.0"), update_ratio=1), {"data": POINTS}),
    ):
        made = []
        for before in (0, 1):
            torch.manual_seed(before)
            student = distill(teacher(), method=method, steps=1, **source, **LITTLE)
            made.append(student.network.state_dict())
        assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())
        torch.manual_seed(7)
        wanted = torch.rand(3)
        torch.manual_seed(7)
        distill(teacher(), method=method, steps=1, **source, **{**LITTLE, "iterations": 0})
        assert torch.equal(torch.rand(3), wanted)


# ---- networks ----------------------------------------------------------------------------------------------------------------------


def test_nothing_that_is_trained_drops_anything_out():
    network = nn.ModuleDict({"a": Small(), "b": nn.MultiheadAttention(4, 2, dropout=0.1), "c": nn.Dropout2d(0.3)})
    guide = teacher(network=network)
    for made in (copy_of(guide, nn.Identity()), student_network(network)):
        assert [part.p for part in made.modules() if hasattr(part, "p")] == [0.0, 0.0]
        assert made["b"].dropout == 0.0
    assert network["c"].p == 0.3
    training = DMD2().training(teacher(), student_network(teacher().network))
    assert {part.p for module in training.modules.values() for part in module.modules() if isinstance(part, nn.Dropout)} == {0.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_students_of_teachers_in_half_precision_are_in_single(dtype, tmp_path):
    guide = teacher(network=Small().to(dtype))
    student = distill(guide, method="dmd2", steps=1, conditions=LABEL, **{**LITTLE, "iterations": 10})
    assert {p.dtype for p in student.network.parameters()} == {torch.float32}
    assert {p.dtype for p in guide.network.parameters()} == {dtype}
    pairs = zip(student.network.layers.parameters(), guide.network.layers.parameters(), strict=True)
    assert all((a != b).float().mean() > 0.9 for a, b in pairs)
    cond = {"label": torch.arange(4)}
    again = Student.load(student.save(tmp_path / "student"), guide)
    assert torch.equal(again.sample(range(4), cond=cond), student.sample(range(4), cond=cond))


def test_a_difference_is_in_full_precision_where_the_network_is_called_in_less():
    network = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    delta = torch.linspace(0.1, 0.9, 16)

    def call(d):
        return network(d[:, None])[:, 0]

    _, exact = ForwardMode()(call, delta)
    with torch.autocast("cpu", torch.bfloat16):
        value, slope = FiniteDifference()(call, delta)
    assert value.dtype is torch.bfloat16
    assert (slope - exact).norm() < 0.01 * exact.norm()


def test_limits_are_those_of_the_guided_prediction():
    """Under a range of guidance scales the target is what the limited teacher says at each scale."""
    limited = Clipped(fs.guidance.ClassifierFree(teacher(), 2.0, {"label": 4}), -0.2, 0.2)
    objective = LCM(guidance=(1.0, 8.0)).training(limited, Small()).stages[0].objective
    x, cond, scales = (
        3.0 * torch.randn(4, 2, generator=torch.Generator().manual_seed(0)),
        {"label": torch.arange(4)},
        torch.tensor([1.0, 3.0, 5.0, 8.0]),
    )
    with torch.no_grad():
        target = objective._teach(x, np.full(4, 0.9), cond, scales)
        wanted = torch.cat(
            [limited.with_scale(float(s))(x[i : i + 1], 0.9, label=cond["label"][i : i + 1]) for i, s in enumerate(scales)]
        )
    assert wanted.abs().max() == pytest.approx(0.2)
    torch.testing.assert_close(target, wanted)


class Elsewhere(nn.Module):
    """On another device, as far as a machine without one can tell; notes where its inputs are."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(1, device="meta")), []

    def forward(self, x, time, label=None):
        self.seen.append({tensor.device.type for tensor in (x, time, label)})
        raise Stop


def test_noise_and_conditions_are_where_the_network_is(tmp_path):
    network, cond = Elsewhere(), {"label": torch.arange(4)}
    guide = teacher(network=network)
    plan = fs.make_plan("ddim", guide.schedule, 1, final="zero")
    rows = {"label": torch.arange(8) % 4}
    sheets = Sheets(lambda student, nfe: fs.distill.read_as(guide, student), {1: plan}, rows, (2,), tmp_path, 1)
    for call in (
        lambda: teacher_samples(guide, range(4), cond, nfe=1),
        lambda: teacher_pairs(guide, range(4), plan, cond=cond),
        lambda: sheets({"student": network}, 1),
    ):
        network.seen.clear()
        with pytest.raises(Stop):
            call()
        assert network.seen == [{"meta"}]


def test_times_of_tables_are_whole():
    table = fs.schedules.FromBetas(torch.linspace(1e-4, 0.02, 1000).tolist())
    assert table.network_time(np.array(call_times(table, 3))).tolist() == [999.0, 666.0, 333.0]
    times = np.array(DMD2(steps=2, times=(0.9005, 0.4)).call_times(table))
    assert table.network_time(times).tolist() == pytest.approx([899.0, 399.0])
    scale = DMD2(times=(0.5,)).start_scale
    assert scale(table) == pytest.approx(1.0)  # variance-preserving: of unit variance, as published
    assert scale(fs.schedules.Flow()) == pytest.approx(0.5**0.5, rel=1e-3)


# ---- what is refused beforehand ----------------------------------------------------------------------------------------------------


def test_a_network_of_its_own_is_saved_and_asked_for(tmp_path):
    for method, source in (("lcm", {"data": POINTS}), ("freeflow", {"conditions": LABEL})):
        student = distill(teacher(), method=method, network=Small(8), steps=1, **source, **LITTLE)
        place = student.save(tmp_path / method)
        with pytest.raises(TypeError, match="a network of its own, a Small: pass network="):
            Student.load(place, teacher())
        again = Student.load(place, teacher(), network=Small(8))
        cond = {"label": torch.arange(4)}
        assert torch.equal(again.sample(range(4), cond=cond), student.sample(range(4), cond=cond))


def test_batches_without_x_are_conditions():
    student = distill(teacher(), method="tdm", steps=1, data=LABEL, **LITTLE)
    assert student.probe["x"].shape == (2, 2)

    def drawn(count, generator):
        return {"label": torch.randint(4, (count,), generator=generator)}

    assert distill(teacher(), method="tdm", steps=1, data=drawn, **LITTLE).probe["x"].shape == (2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: distill(teacher(), data=POINTS, conditions=LABEL, steps=1, **LITTLE), ValueError, "one of data and conditions"),
        (
            lambda: distill(teacher(), method="tdm", data=POINTS, conditions=LABEL, steps=1),
            ValueError,
            "one of data and conditions",
        ),
        (
            lambda: distill(teacher(), method="tdm", conditions={**LABEL, "b": torch.ones(2)}, steps=1),
            ValueError,
            "equal first dimension",
        ),
        (lambda: Comparison(distance="typo"), UnknownNameError, "typo"),
        (lambda: distill(teacher(), data=POINTS, steps=1, sheets=2, folder="nowhere", **LITTLE), ValueError, "leave sheets out"),
        (lambda: make_method("dmd2", adversary=True), ValueError, "--adversary"),
        (
            lambda: make_method("lcm", solver_steps="a"),
            ValueError,
            "whole number of solver_steps, and|whole number of solver_steps",
        ),
        (lambda: make_method("lcm", guidance=3), ValueError, r"a range \(lowest scale, highest scale\), got 3"),
        (lambda: make_method("tdm", steps="4"), ValueError, "whole numbers of steps"),
        (lambda: make_method("freeflow", correct="a"), ValueError, "freeflow cannot be made with correct='a'"),
        (lambda: HiPA(pairs=0), ValueError, "pairs and pair_calls"),
    ],
)
def test_is_refused_beforehand(call, error, message):
    with pytest.raises(error, match=message) as found:
        call()
    assert "\n" not in str(found.value)


def test_pairs_are_drawn_and_paid_for():
    student = distill(teacher(), method=HiPA(losses=(), pairs=20, pair_calls=3), steps=1, conditions=LABEL, **LITTLE)
    assert student.card["training"]["evaluations"] == 20 * 3 + 4 * 4 * 3
    assert student.card["method"]["name"] == "hipa"
    assert TDM().update_ratio == 3


# ---- the report --------------------------------------------------------------------------------------------------------------------


def found(student=0.3, untuned=0.31, tuned=None, equal=6, equal_tuned=None, rows=1, nfe=4, cost=120_000):
    told = None if tuned is None else {"distance": tuned}
    plans = {"equal": equal, "equal_tuned": equal_tuned}
    return {"student": student, "untuned": {"distance": untuned}, "tuned": told, **plans, **_saved(nfe, plans, rows, cost)}


def test_the_report_does_not_contradict_itself():
    report = {"floor": 0.05}
    assert _line("4", found(), report).endswith("needs 6 calls to be as good; pays after 60,000 samples")
    line = _line("4", found(tuned=0.12, equal_tuned=4), report)
    assert line.endswith("a tuned plan of 4 calls is as good: the student does not pay")
    line = _line("4", found(untuned=0.25, equal=4, rows=2), report)  # guided: of as many calls, but twice the evaluations
    assert line.endswith("needs 4 calls to be as good; pays after 30,000 samples")
    line = _line("4", found(untuned=0.25, equal=2, rows=2), report)
    assert line.endswith("the student does not pay")
    line = _line("4", found(tuned=0.2, equal=4, equal_tuned=4, rows=2), report)
    assert "pay" not in line
    line = _line("1", found(equal=None, equal_tuned=4, nfe=1), report)
    assert line.endswith("no untuned plan of up to 48 calls is as good, a tuned one of 4 is; pays after 40,000 samples")
    line = _line("1", found(student=None, untuned=None, equal=1, nfe=1), report)
    assert "not finite" in line
    for made in (found(), found(student=None)):
        json.dumps(made, allow_nan=False)


def test_a_student_that_is_not_finite_is_reported():
    student = distill(teacher(), data=POINTS, steps=1, **LITTLE)
    broken = copy.deepcopy(student.network)
    with torch.no_grad():
        broken.layers[3].bias.fill_(torch.inf)
    wrong = Student(broken, student.teacher, student.plans, dict(student.card), student.probe)
    how = Comparison(count=32, tuned=None, reference_calls=4)
    wrong.card["report"] = compare_student(wrong, how, POINTS, 100)
    assert wrong.card["report"]["calls"]["1"]["student"] is None
    assert how.told(wrong.card["report"])[0].endswith("are not finite: it does not pay")
    json.dumps(wrong.card, allow_nan=False)
