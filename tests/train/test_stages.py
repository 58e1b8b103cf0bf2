"""Several updates a step, optimizers of every kind and pieces of a batch: one loop serves them, and resumes them bit for bit."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import toys
from two_processes import OPTIONS, Crash, crashing, flat

from fewstep.errors import ArtefactError, MissingExtraError, NetworkError, UnknownNameError
from fewstep.schedules import Flow
from fewstep.train import DenoisingLoss, PowerFunction, Stage, fit
from fewstep.train.checkpoints import CHECKPOINT, read_checkpoint, restore_optimizer, same_state


def weights(result):
    return flat(result.weights) | {f"{p}/{n}": v for p, values in result.averages.items() for n, v in flat(values).items()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def resumed(stages, make, folder, **options):
    """Whole; and crashed in the first stage at step 7 (the last checkpoint is that of 4), then taken up with other initial weights."""
    options = {**OPTIONS, "steps": 14, **options}
    whole = fit(stages(-1), make(), toys.DATA, folder=folder / "whole", **options)
    with pytest.raises(Crash):
        fit(stages(7), make(), toys.DATA, folder=folder / "crashed", **options)
    model = make()
    for module in model.values() if isinstance(model, dict) else [model]:
        for p in module.parameters():
            p.data.add_(1.0)
    again = fit(stages(-1), model, toys.DATA, folder=folder / "crashed", **options)
    assert same(weights(whole), weights(again))
    assert whole.log == again.log
    left, taken_up = (read_checkpoint(folder / name / CHECKPOINT) for name in ("whole", "crashed"))
    assert same_state(left[1], taken_up[1])
    return whole


def test_two_players_resume_bit_exactly(tmp_path):
    def stages(at):
        first, second = toys.turns()
        return [Stage(crashing(first.objective, at), "adversary", averaged=False, learning_rate=3e-3), second]

    result = resumed(stages, toys.players, tmp_path)
    assert result.averages.keys() == {0.9, PowerFunction(0.1)}
    assert result.averages[0.9].keys() == {"student"}  # the adversary is not averaged
    assert {"adversary/loss", "adversary/real", "student/loss", "student/learning_rate"} <= result.log[-1].keys()
    coded = [Stage(toys.student_loss, "student"), Stage(toys.adversary_loss, "adversary", torch.optim.Adam)]
    fit(coded, toys.players(), toys.DATA, folder=tmp_path / "sgd", **{**OPTIONS, "steps": 1}, optimizer=torch.optim.SGD)
    told = read_checkpoint(tmp_path / "sgd" / CHECKPOINT)[0]["settings"]["optimizer"]
    assert [stage[0][0] for stage in told] == ["SGD", "Adam"]
    assert "student/loss" not in fit(stages(-1), toys.players(), toys.DATA, **{**OPTIONS, "steps": 2}).log[-1]  # not its turn yet


def test_stages_are_the_alternation_written_out():
    """Two players by hand, with plain PyTorch, from the generators that the loop documents: the same weights to the bit."""
    from fewstep.train.batches import rows_of
    from fewstep.train.randomness import make_generator

    def sgd(parameters, lr):
        return torch.optim.SGD(parameters, lr=lr)

    stages = [
        Stage(toys.adversary_loss, "adversary", sgd, 0.1, clip=float("inf")),
        Stage(toys.student_loss, "student", sgd, 0.2, clip=float("inf"), every=3),
    ]
    model = toys.players()
    fit(stages, model, toys.DATA, steps=7, batch_size=8, warmup=0, decay="constant", ema=())
    mine = toys.players()
    for step in range(1, 8):
        batch = {"x": toys.DATA["x"][rows_of(48, 8, 0, step)]}
        for number, (stage, rate) in enumerate(((stages[0], 0.1), (stages[1], 0.2))):
            if step % stage.every == 0:
                purpose = "objective" + (" of stage 1" if number else "")
                trained = list(mine[stage.trains[0]].parameters())
                loss, _ = stage.objective(mine, batch, make_generator(0, purpose, step))
                for p, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                    p.data.sub_(rate * gradient)
    for name in model:
        for p, q in zip(model[name].parameters(), mine[name].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_what_a_stage_does_not_train_stays_and_needs_no_gradients():
    seen = []

    def objective(model, batch, generator):
        seen.append([p.requires_grad for name in ("student", "adversary") for p in model[name].parameters()])
        return toys.student_loss(model, batch, generator)

    model = toys.players()
    before = {name: value.clone() for name, value in model["adversary"].state_dict().items()}
    fit(Stage(objective, "student"), model, toys.DATA, **OPTIONS)
    assert seen[0] == [True] * 4 + [False] * 4
    assert all(p.requires_grad and p.grad is None for p in model["adversary"].parameters())
    assert same(before, model["adversary"].state_dict())


# ---- objectives that are objects -----------------------------------------------------------------------------------------------------


class Following:
    """Has a learned temperature of its own, and a target that follows the model."""

    def __init__(self, target):
        torch.manual_seed(3)
        self.modules = {"temperature": nn.Linear(1, 1), "target": target.requires_grad_(False)}

    def __call__(self, model, batch, generator):
        time = torch.rand(len(batch["x"]), generator=generator)
        error = (model(batch["x"], time) - self.modules["target"](batch["x"], 0.9 * time) - batch["x"]).square().mean()
        scale = self.modules["temperature"](torch.ones(1, 1)).squeeze()
        return error * (-scale).exp() + scale, {}

    def updated(self, model, step):
        for mine, its in zip(self.modules["target"].parameters(), model.parameters(), strict=True):
            mine.lerp_(its.detach(), 0.1)


def test_an_objectives_own_modules_are_trained_kept_and_follow(tmp_path):
    made = []

    def objective(at):
        made.append(Following(toys.make()))
        wrapped = crashing(made[-1], at)
        wrapped.modules, wrapped.updated = made[-1].modules, made[-1].updated
        return wrapped

    resumed(objective, toys.make, tmp_path)
    whole, _, again = made
    fresh = Following(toys.make())
    for name in ("temperature", "target"):
        assert same(whole.modules[name].state_dict(), again.modules[name].state_dict())
        assert not same(whole.modules[name].state_dict(), fresh.modules[name].state_dict())


# ---- optimizers ----------------------------------------------------------------------------------------------------------------------


def several(parameters, lr):
    """Matrices and vectors by optimizers of their own, one with groups."""
    parameters = list(parameters)
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) is big] for big in (True, False))
    groups = [{"params": vectors[:1], "lr": 2 * lr}, {"params": vectors[1:]}]
    return [torch.optim.SGD(matrices, lr=lr, momentum=0.9), torch.optim.Adam(groups, lr=lr)]


@pytest.mark.parametrize(
    "optimizer", [toys.Coded, toys.CodedSigns, several, torch.optim.LBFGS, torch.optim.Rprop], ids=lambda o: o.__name__
)
def test_optimizers_resume_bit_exactly(tmp_path, optimizer):
    """States of bytes, nested dicts and tuples, wrappers, several optimizers: all come back to the bit."""
    if optimizer is torch.optim.LBFGS:
        with pytest.raises(TypeError, match="closure"):
            fit(toys.Drawn(), toys.make(), toys.DATA, **OPTIONS, optimizer=optimizer)
        return
    resumed(lambda at: crashing(toys.Drawn(), at), toys.make, tmp_path, optimizer=optimizer)


def test_bytes_and_wide_numbers_survive_where_pytorch_alone_loses_them():
    model = toys.make()
    first, second = (toys.CodedSigns(model.parameters(), 0.1) for _ in range(2))
    model(toys.DATA["x"], torch.zeros(48)).square().sum().backward()
    first.step()
    saved = first.state_dict()
    second.load_state_dict(saved)
    assert not same_state(second.state_dict(), saved)
    restore_optimizer(second, saved)
    assert same_state(second.state_dict(), saved)
    assert second.state_dict()["state"][0]["moment"]["codes"].dtype is torch.uint8
    assert second.state_dict()["state"][0]["moment"]["scale"].dtype is torch.float64


def test_an_optimizer_that_forgets_is_refused(tmp_path):
    class Forgetful(toys.Coded):
        def load_state_dict(self, state):
            self.inner.load_state_dict(state["inner"])

    run = {**OPTIONS, "optimizer": Forgetful, "folder": tmp_path}
    fit(toys.Drawn(), toys.make(), toys.DATA, **run)
    with pytest.raises(ArtefactError, match="Forgetful does not give back the state"):
        fit(toys.Drawn(), toys.make(), toys.DATA, **run)


def test_a_state_that_no_file_holds_is_told_after_the_first_step(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self):
            super().step()
            self.state[self.param_groups[0]["params"][0]]["thing"] = {"deep": [object()]}

    with pytest.raises(TypeError, match=r"has a object at optimizers/0/0/state/0/thing/deep/0"):
        fit(toys.Drawn(), toys.make(), toys.DATA, **OPTIONS, optimizer=Odd, folder=tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


# ---- pieces --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [2, 4])
def test_pieces_are_the_whole_batch_to_rounding(accumulate):
    """For an objective that draws for the whole batch. In float64 the only difference is the order of sums."""
    data = {"x": toys.DATA["x"].double()}
    options = {**OPTIONS, "steps": 30}
    whole, pieces = (fit(toys.Drawn(), toys.make().double(), data, **options, accumulate=k) for k in (1, accumulate))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(pieces)[name], value, rtol=1e-8, atol=1e-10)
    assert pieces.log[-1]["loss"] == pytest.approx(whole.log[-1]["loss"], rel=1e-8)
    assert pieces.log[-1]["largest"] == pytest.approx(whole.log[-1]["largest"], rel=1e-8)


def test_pieces_have_rows_and_noise_of_their_own():
    seen = []

    def objective(model, batch, generator):
        seen.append((batch["row"].tolist(), torch.randn(2, generator=generator).tolist()))
        return model.weight.sum() * 0.0, {}

    fit(objective, nn.Linear(1, 1), {"row": torch.arange(12)}, steps=2, batch_size=6, accumulate=3, ema=(), resume=False)
    assert sorted(row for rows, _ in seen for row in rows) == list(range(12))
    assert len({tuple(noise) for _, noise in seen}) == 6


def test_rows_are_read_when_needed():
    asked = []

    class Squares:
        def __len__(self):
            return 10

        def __getitem__(self, rows):
            asked.append(rows.tolist())
            return {"x": rows[:, None].float().expand(-1, 4)}

    loss = DenoisingLoss(Flow(), "flow")  # draws for the whole batch, so that is read whole, once
    for objective, read in ((loss, [4] * 5), (lambda *given: loss(*given), [2] * 10)):
        asked.clear()
        fit(objective, toys.make(), Squares(), steps=5, batch_size=4, accumulate=2)
        assert [len(rows) for rows in asked] == read
    assert sorted(row for rows in asked for row in rows) == sorted([*range(10)] * 2)


def test_float16_scales_the_loss_and_resumes(tmp_path):
    """Gradients of 1e-8 vanish in float16; scaled they do not. The scale is part of the checkpoint."""

    def small(model, batch, generator):
        loss, info = toys.undrawn(model, batch, generator)
        return 1e-6 * loss, info

    options = {"precision": torch.float16, "optimizer": torch.optim.SGD, "learning_rate": 1e4, "clip": None}
    result = resumed(lambda at: crashing(small, at), toys.make, tmp_path, **options)
    wanted = fit(small, toys.make(), toys.DATA, **{**OPTIONS, "steps": 14, **options, "precision": None})
    for name, value in wanted.weights.items():
        torch.testing.assert_close(result.weights[name], value, rtol=0.05, atol=5e-3)


# ---- divergence, logs, refusals --------------------------------------------------------------------------------------------------------


def test_a_loss_far_above_its_level_ends_the_run():
    def objective(model, batch, generator):
        objective.calls += 1
        loss, info = toys.undrawn(model, batch, generator)
        return loss * (200.0 if objective.calls > 150 else 1.0), info

    options = {**OPTIONS, "steps": 350, "log_every": 400, "learning_rate": 1e-4}
    objective.calls = 0
    with pytest.raises(NetworkError, match=r"above 10 times its level of .* for 100 steps at step 250\. Lower learning_rate"):
        fit(objective, toys.make(), toys.DATA, **options)
    objective.calls = 0
    assert fit(objective, toys.make(), toys.DATA, **options, divergence=None).step == 350


def test_a_learning_rate_far_too_high_is_caught():
    """Gradient descent that crosses its bound of stability during the warm-up, on a saturating loss: large, finite and stuck."""

    def objective(model, batch, generator):
        return (model(batch["x"], batch["x"][:, 0]) - batch["x"]).square().mean().clamp(max=1e6), {}

    options = {
        "steps": 500,
        "batch_size": 8,
        "warmup": 400,
        "clip": None,
        "optimizer": torch.optim.SGD,
        "ema": (),
        "decay": "constant",
    }
    assert fit(objective, toys.make(), toys.DATA, **options, learning_rate=1.0).log[-1]["loss"] < 0.01
    for rate in (3.0, 10.0):
        with pytest.raises(NetworkError, match="above 10 times its level"):
            fit(objective, toys.make(), toys.DATA, **options, learning_rate=rate)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    with pytest.raises(ValueError, match="needs a folder"):
        fit(toys.Drawn(), toys.make(), toys.DATA, **OPTIONS, tensorboard=True)
    fit(toys.Drawn(), toys.make(), toys.DATA, **OPTIONS, tensorboard=True, folder=tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [3, 6, 9, 12]
    assert {"largest", "gradient_norm", "learning_rate"} <= set(events.Tags()["scalars"])


def test_tensorboard_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"fewstep\[train\]"):
        fit(toys.Drawn(), toys.make(), toys.DATA, **OPTIONS, tensorboard=True, folder=tmp_path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fit(Stage(toys.student_loss, "teacher"), toys.players(), toys.DATA, steps=1),
            UnknownNameError,
            "adversary, student",
        ),
        (lambda: fit(Stage(toys.Drawn(), "student"), toys.make(), toys.DATA, steps=1), ValueError, "mapping of names"),
        (lambda: fit([], toys.make(), toys.DATA, steps=1), ValueError, "at least one Stage"),
        (lambda: Stage(toys.Drawn(), every=0), ValueError, "at least 1"),
        (lambda: Stage(toys.Drawn(), clip=-1.0), ValueError, "positive learning_rate and clip"),
        (lambda: fit(toys.Drawn(), toys.make(), toys.DATA, steps=1, batch_size=9, accumulate=2), ValueError, "multiple of 2"),
        (lambda: fit(toys.Drawn(), toys.make(), toys.DATA, steps=1, accumulate=0), ValueError, "accumulate"),
        (lambda: fit(toys.Drawn(), toys.make(), toys.DATA, steps=1, divergence=0.5), ValueError, "divergence"),
        (lambda: fit(toys.Drawn(), toys.make(), toys.DATA, steps=1, snapshot_every=5), ValueError, "power function"),
        (lambda: fit(toys.Drawn(), toys.make(), toys.DATA, steps=1, ema=(0.9, 0.9)), ValueError, "twice"),
        (
            lambda: fit(toys.Drawn(), toys.make(), toys.DATA, steps=1, optimizer=lambda p, lr: 3),
            TypeError,
            "int has no param_groups",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
