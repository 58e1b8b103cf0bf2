"""A student that is told its number of calls is served as it samples by itself, for every number, also to requests that run at once."""

import pytest
import torch
from torch import nn

import fewstep as fs
from fewstep.denoisers import Around
from fewstep.distill.student import Student
from fewstep.errors import PlanError
from fewstep.loading import is_student
from fewstep.serve import Engine, Request
from fewstep.serve.served import ServedModel
from fewstep.serve.students import ByCalls, load_served, served_student

SCHEDULE = fs.schedules.Flow()
PLANS = {n: fs.make_plan("ddim", SCHEDULE, n, final="zero") for n in (1, 4)}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, time, label=None, told=0.0):
        shift = 0.0 if label is None else 0.1 * label.to(x).reshape(-1, 1)
        return self.weight * torch.tanh(x) + told + shift


def student(told=True):
    info = fs.ModelInfo(name="toy", shape=(2,), conditions={"label": {"classes": 3, "null": 3}})
    teacher = fs.Denoiser(Network(), SCHEDULE, "flow", info=info)
    card = {"told_number": {"1": 1.0, "4": 0.25}} if told else {}
    return Student(Network(), teacher, PLANS, card, {"x": torch.zeros(1, 2)})


def test_each_request_is_served_with_its_own_number():
    one = student()
    model = ServedModel.of(served_student(one))
    labels = {"label": torch.tensor([1, 2])}
    with Engine(Watching(model.denoiser), (2,), null=model.null, rows=16) as engine:
        tickets = {
            (nfe, scale): engine.submit(Request(PLANS[nfe], range(2), labels, scale)) for nfe in (1, 4) for scale in (1.0, 2.0)
        }
        for (nfe, scale), ticket in tickets.items():
            den = one.denoiser_of(nfe)
            den = den if scale == 1.0 else fs.guidance.ClassifierFree(den, scale, {"label": 3})
            with torch.no_grad():
                wanted = fs.sample(den, fs.draw_noise((2,), range(2), PLANS[nfe]), PLANS[nfe], cond=labels)
            assert torch.equal(ticket.result(60), wanted)
            if scale == 1.0:
                assert torch.equal(wanted, one.sample(range(2), nfe=nfe, cond=labels))
        with pytest.raises(PlanError, match="told how many calls it makes, 1, 4, but the plan makes 2"):
            engine.submit(Request(fs.make_plan("ddim", SCHEDULE, 2), range(2), labels))


def test_an_engine_of_one_number_refuses_plans_of_others():
    one = student()
    with Engine(one.denoiser, (2,)) as engine:
        assert torch.equal(engine.submit(Request(PLANS[4], range(2))).result(60), one.sample(range(2), nfe=4))
        with pytest.raises(
            PlanError, match=r"told that it makes 4 calls, but the plan makes 1. Make the engine with .*served_student"
        ):
            engine.submit(Request(PLANS[1], range(2)))


def test_a_plan_that_was_tuned_for_one_number_is_served_with_that():
    one = student()
    noise = fs.draw_noise((2,), range(64), PLANS[1], dtype=torch.float64)
    effort = fs.tuners.Effort(trajectories=64, held_out=32, pool=1, trials=10, polish=3)
    plan = fs.tune(one.denoiser_of(1), nfe=1, noise=noise, method="closed-form", effort=effort).plans[1]
    assert "tuned" in plan.provenance
    with torch.no_grad():
        wanted = fs.sample(one.denoiser_of(1), fs.draw_noise((2,), range(2), plan), plan)
    with Engine(Watching(served_student(one)), (2,)) as engine:
        assert torch.equal(engine.submit(Request(plan, range(2))).result(60), wanted)
    with Engine(served_student(other()), (2,)) as engine, pytest.raises(PlanError, match="tuned for the model student of toy"):
        engine.submit(Request(plan, range(2)))


def other():
    """Another student."""
    made = student()
    with torch.no_grad():
        made.network.weight.mul_(0.5)
    return made


class Watching(Around):
    """As the server's own counting is around the model."""

    def __call__(self, x, t, **cond):
        return self.denoiser(x, t, **cond)


def test_a_student_that_is_told_nothing_serves_every_plan():
    one = student(told=False)
    den = served_student(one)
    assert den is one.denoiser
    plan = fs.make_plan("ddim", SCHEDULE, 2)
    with Engine(den, (2,)) as engine:
        assert engine.submit(Request(plan, range(2))).result(60).isfinite().all()


def test_changes_of_a_model_reach_every_number():
    class Sized(Watching):
        def guided(self, scale):
            return self

        def with_size(self, size):
            made = Sized(self.denoiser)
            made.size = size
            return made

    by_calls = ByCalls({n: Sized(fs.Denoiser(Network(), SCHEDULE, "flow")) for n in PLANS})
    assert by_calls.guided(1.0) is by_calls
    other = by_calls.with_size((8, 8))
    assert isinstance(other, ByCalls)
    assert [each.size for each in other.denoisers.values()] == [(8, 8), (8, 8)]


def test_folders_of_students_and_models_are_opened_alike(tmp_path, monkeypatch):
    one = student()
    (tmp_path / "student.json").write_text("{}")
    monkeypatch.setattr(Student, "load", classmethod(lambda cls, *args, **options: one))
    assert sorted(load_served(str(tmp_path)).denoisers) == [1, 4]
    assert load_served("digits").info.name == fs.load("digits").info.name

    assert is_student(tmp_path)
    assert not is_student("digits")

    from fewstep.cli.serve import ServeOptions
    from fewstep.cli.setup import open_model

    assert isinstance(open_model(str(tmp_path), ServeOptions(), every=True), ByCalls)
