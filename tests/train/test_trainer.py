"""The loop: resumes bit for bit after a kill at any moment, refuses damaged checkpoints, and says when training diverges."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep.errors import ArtefactError, NetworkError, UnknownNameError
from fewstep.schedules import VPLinear
from fewstep.train import DenoisingLoss, LabelDropout, PowerFunction, Stage, fit
from fewstep.train.batches import rows_of
from fewstep.train.trainer import CHECKPOINT, LOG, Options

DATA = {"x": torch.randn(50, 4, generator=torch.Generator().manual_seed(0))}
OBJECTIVE = DenoisingLoss(VPLinear(), "noise")


class Small(nn.Module):
    """With dropout, which draws from the ambient generator, and with a buffer that training changes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.SiLU(), nn.Linear(16, 4))

    def forward(self, x, time):
        return self.layers(torch.cat([x, time[:, None].to(x)], 1))


def make():
    torch.manual_seed(7)
    return Small()


def run(folder=None, model=None, **options):
    model = make() if model is None else model
    options = {"steps": 30, "batch_size": 8, "warmup": 5, "checkpoint_every": 10, "log_every": 7, "ema": (0.9, 0.99), **options}
    return model, fit(OBJECTIVE, model, DATA, folder=folder, **options)


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def comparable(log):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in log]


@pytest.fixture(scope="module")
def whole():
    return run()


@pytest.mark.parametrize("crash", [3, 10, 19, 29])
def test_resume_is_bit_exact(tmp_path, whole, crash, monkeypatch):
    monkeypatch.setattr(DenoisingLoss, "__call__", counting(DenoisingLoss.__call__, crash))
    with pytest.raises(SystemError):
        run(tmp_path)
    monkeypatch.undo()
    torch.manual_seed(99)  # the state of the ambient generator must not matter
    model, result = run(tmp_path, model=Small())
    if crash < 10:  # no checkpoint yet: it starts afresh, from the other weights
        assert not same(model.state_dict(), whole[0].state_dict())
        return
    assert same(model.state_dict(), whole[0].state_dict())
    assert result.averages.keys() == {0.9, 0.99}
    assert all(same(result.averages[decay], whole[1].averages[decay]) for decay in (0.9, 0.99))
    assert comparable(result.log) == comparable(whole[1].log)
    assert [json.loads(line)["step"] for line in (tmp_path / LOG).read_text().splitlines()] == [7, 14, 21, 28, 30]


def counting(call, most):
    def counted(self, *arguments):
        counted.calls += 1
        if counted.calls > most:
            raise SystemError
        return call(self, *arguments)

    counted.calls = 0
    return counted


def test_continuing_twice_and_when_done(tmp_path, whole):
    run(tmp_path)
    model, result = run(tmp_path, model=Small())
    assert result.step == 30
    assert same(model.state_dict(), whole[0].state_dict())
    assert comparable(result.log) == comparable(whole[1].log)


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import test_trainer as t
original = t.OBJECTIVE.__class__.__call__
def slow(self, *arguments):
    time.sleep(0.002)
    return original(self, *arguments)
t.OBJECTIVE.__class__.__call__ = slow
print("go", flush=True)
t.run({folder!r}, steps=200, checkpoint_every=1)
"""


def test_killed_process_resumes_bit_exactly(tmp_path):
    """A real process that writes a checkpoint every step, killed with SIGKILL somewhere in the middle, then finished here."""
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline().strip() == b"go"
        deadline = time.monotonic() + 60
        while not (tmp_path / CHECKPOINT).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done = json.loads((tmp_path / LOG).read_text().splitlines()[-1])["step"] if (tmp_path / LOG).read_text() else 0
    assert done < 200
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    wanted, _ = run(steps=200)
    model, result = run(tmp_path, model=Small(), steps=200, checkpoint_every=1)
    torch.set_num_threads(threads)
    assert result.step == 200
    assert same(model.state_dict(), wanted.state_dict())
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, LOG}


def interrupting(original, at):
    """Ctrl-C within a call of that number."""

    def call(self, *arguments):
        call.calls += 1
        if call.calls == at:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    call.calls = 0
    return call


def test_ctrl_c_leaves_a_good_checkpoint(tmp_path, whole):
    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenoisingLoss, "__call__", interrupting(DenoisingLoss.__call__, 13))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert json.loads((tmp_path / LOG).read_text().splitlines()[-1])["step"] == 13
    model, result = run(tmp_path, model=Small())
    assert same(model.state_dict(), whole[0].state_dict())
    assert result.log[1]["step"] == 13


def test_runs_in_a_thread(whole):
    found = []
    worker = threading.Thread(target=lambda: found.append(run()))
    worker.start()
    worker.join()
    assert same(found[0][0].state_dict(), whole[0].state_dict())


# ---- bad checkpoints ---------------------------------------------------------------------------------------------------------------


def test_damaged_checkpoint_is_refused(tmp_path):
    run(tmp_path)
    path = tmp_path / CHECKPOINT
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-3] ^= 4
    for broken in (content[: len(content) // 2], b"", bytes(flipped), b"foreign" * 100):
        path.write_bytes(broken)
        with pytest.raises(ArtefactError, match="resume=False"):
            run(tmp_path)
    model, _ = run(tmp_path, resume=False)
    assert same(model.state_dict(), run()[0].state_dict())


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"batch_size": 9}, {"learning_rate": 1e-4}, {"ema": 0.5}, {"optimizer": torch.optim.SGD}, {"steps": 31}]
)
def test_other_settings_are_refused(tmp_path, other):
    run(tmp_path)
    with pytest.raises(ArtefactError, match=next(iter(other))):
        run(tmp_path, **other)


def test_other_model_data_and_objective_are_refused(tmp_path):
    run(tmp_path)
    options = {"steps": 30, "batch_size": 8, "warmup": 5, "ema": (0.9, 0.99), "folder": tmp_path}
    with pytest.raises(ArtefactError, match="data was"):
        fit(OBJECTIVE, make(), {"x": DATA["x"][1:]}, **options)
    with pytest.raises(ArtefactError, match="objective was"):
        fit(DenoisingLoss(VPLinear(), "data"), make(), DATA, **options)
    with pytest.raises(ArtefactError, match="model was"):
        fit(OBJECTIVE, nn.Linear(4, 4), DATA, **options)


def test_what_a_killed_run_left_half_written_goes(tmp_path, whole):
    for name in (CHECKPOINT, LOG, "averages-000000010.safetensors"):
        (tmp_path / f".{name}.123.abcdef01.tmp").write_bytes(b"half")
    model, _ = run(tmp_path)
    assert same(model.state_dict(), whole[0].state_dict())
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, LOG}


def test_torn_line_of_the_log_is_dropped(tmp_path, whole):
    run(tmp_path)
    with open(tmp_path / LOG, "a") as file:
        file.write('{"step": 3')
    _, result = run(tmp_path)
    assert comparable(result.log) == comparable(whole[1].log)


# ---- what a step does --------------------------------------------------------------------------------------------------------------


def test_divergence_is_one_clear_error(tmp_path):
    def objective(model, batch, generator):
        loss, info = OBJECTIVE(model, batch, generator)
        objective.calls += 1
        return loss * (float("nan") if objective.calls == 17 else 1.0), info

    objective.calls = 0
    options = {"steps": 30, "batch_size": 8, "checkpoint_every": 10, "folder": tmp_path}
    with pytest.raises(NetworkError, match="loss is nan at step 17"):
        fit(objective, make(), DATA, **options)
    assert fit(objective, make(), DATA, **options).step == 30  # the checkpoint of step 10 was good


def test_infinite_gradient_is_an_error():
    def objective(model, batch, generator):
        return model.layers[0].weight.pow(2).sum().sub(model.layers[0].weight.pow(2).sum().detach()).sqrt().sum(), {}

    with pytest.raises(NetworkError, match=r"gradient is (nan|inf)"):
        fit(objective, make(), DATA, steps=3, batch_size=8)


def test_every_epoch_sees_every_row_once():
    rows = torch.cat([rows_of(10, 4, 0, step) for step in range(1, 16)])
    epochs = rows.reshape(6, 10)
    assert all(torch.equal(epoch.sort().values, torch.arange(10)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert len(rows_of(3, 8, 0, 2)) == 8  # batches larger than the data
    assert not torch.equal(rows_of(10, 10, 0, 1), rows_of(10, 10, 1, 1))


def test_learning_rate():
    options = Options(
        steps=100, batch_size=1, learning_rate=1.0, warmup=10, decay="cosine", clip=None, ema=(), precision=None, seed=0
    )
    rates = [options.rate(step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[50] == pytest.approx(0.5)
    assert 0.0 < rates[99] < 1e-3
    assert max(rates) < 1.0
    lifted = dataclasses.replace(options, floor=0.1)
    assert lifted.rate(51) == pytest.approx(0.55)
    assert lifted.rate(100) == pytest.approx(0.1, abs=1e-3)
    assert [lifted.rate(step) for step in range(1, 101)] == pytest.approx(
        [0.9 * rate + 0.1 * min(s / 10, 1.0) for s, rate in enumerate(rates, 1)]
    )
    for wrong in ({"floor": -0.1}, {"floor": 1.1}, {"floor": 0.1, "decay": "constant"}):
        with pytest.raises(ValueError, match="floor is the share"):
            dataclasses.replace(options, **wrong)


def test_average_by_hand():
    """One weight, one known gradient: SGD and its averages are sequences that can be written down."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    result = fit(
        lambda model, batch, generator: (-model.weight.sum(), {}),
        model,
        {"x": torch.zeros(1, 1)},
        steps=3,
        batch_size=1,
        learning_rate=1.0,
        warmup=0,
        decay="constant",
        optimizer=torch.optim.SGD,
        clip=None,
        ema=0.999,
    )
    assert model.weight.item() == 3.0
    average = 0.0
    for step in (1, 2, 3):
        decay = min(0.999, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * step
    assert result.averages[0.999]["weight"].item() == pytest.approx(average, rel=1e-6)


def test_clipping():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    options = {"steps": 1, "batch_size": 1, "learning_rate": 1.0, "warmup": 0, "optimizer": torch.optim.SGD}
    result = fit(lambda m, b, g: (-100.0 * m.weight.sum(), {}), model, {"x": torch.zeros(1, 1)}, clip=0.5, **options)
    assert model.weight.item() == pytest.approx(0.5, rel=1e-5)
    assert result.log[-1]["gradient_norm"] == pytest.approx(100.0)


def test_data_from_a_function_and_momentum_free_optimizer(tmp_path):
    def draw(size, generator):
        return {"x": torch.randn(size, 4, generator=generator)}

    def train(folder, steps=20):
        model = make()
        fit(
            OBJECTIVE,
            model,
            draw,
            steps=steps,
            batch_size=8,
            folder=folder,
            checkpoint_every=5,
            optimizer=torch.optim.RMSprop,
            ema=(),
        )
        return model.state_dict()

    assert same(train(None), train(tmp_path))
    assert same(train(None), train(tmp_path))  # now from the checkpoint


def test_lower_precision_leaves_weights_alone():
    model, result = run(precision=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    exact = run()[1].log[-1]["loss"]
    assert result.log[-1]["loss"] != exact
    assert result.log[-1]["loss"] == pytest.approx(exact, rel=0.05)


def test_mode_and_ambient_generator_are_restored():
    model = make().eval()
    state = torch.get_rng_state()
    run(model=model)
    assert not model.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"clip": 0.0}, "clip"),
        ({"ema": 1.0}, "ema"),
        ({"decay": "linear"}, "decay"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"ema": PowerFunction(0.05), "snapshot_every": 2}, "snapshot_every=2 needs a folder"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises((ValueError, UnknownNameError), match=message):
        run(**options)


@pytest.mark.parametrize("data", [{}, {"x": torch.zeros(0, 2)}, {"x": torch.zeros(3), "y": torch.zeros(4)}, {"x": 3}])
def test_wrong_data(data):
    with pytest.raises(ValueError, match="data"):
        fit(OBJECTIVE, make(), data, steps=1)


BYTES = torch.zeros(64, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"y": DATA["x"]}, ValueError, "the data have no 'x', .*; they have y"),
        ({"x": DATA["x"].numpy()}, TypeError, r"'x' is a NumPy array: pass torch.from_numpy"),
        (DATA["x"].numpy(), TypeError, r'got a NumPy array: pass \{"x": torch.from_numpy\(data\)\}'),
        (DATA["x"], TypeError, r'got a tensor: pass \{"x": data\}'),
        ({"x": BYTES}, ValueError, r'"x" as torch.uint8; .* pass x.float\(\) / 127.5 - 1'),
        (
            {"x": DATA["x"].double()},
            NetworkError,
            r"data are float64, the network's weights torch.float32: pass data\[\"x\"\].float",
        ),
    ],
)
def test_common_mistakes_in_the_data_are_one_line(data, error, message):
    with pytest.raises(error, match=message) as found:
        fit(OBJECTIVE, make(), data, steps=1, batch_size=8)
    assert "\n" not in str(found.value)


def test_a_label_to_drop_must_be_there():
    objective = dataclasses.replace(OBJECTIVE, dropout=LabelDropout(null=3))
    with pytest.raises(ValueError, match="the data have no 'label'"):
        fit(objective, make(), DATA, steps=1, batch_size=8)


@pytest.mark.parametrize("optimizer", ["adamw", torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)])
def test_optimizers_that_cannot_be_called(optimizer):
    with pytest.raises(TypeError, match=r"pass a class such as torch\.optim\.AdamW") as found:
        fit(OBJECTIVE, make(), DATA, steps=1, batch_size=8, optimizer=optimizer)
    assert "\n" not in str(found.value)


def test_data_that_are_not_finite_are_not_called_a_divergence():
    x = DATA["x"].clone()
    x[::2] = float("nan")
    with pytest.raises(NetworkError, match="data of step 1 hold values of 'x' that are not finite"):
        fit(OBJECTIVE, make(), {"x": x}, steps=3, batch_size=8)


def test_a_run_says_from_where_it_goes_on(tmp_path, capsys, monkeypatch):
    options = {"steps": 20, "batch_size": 8, "checkpoint_every": 5, "folder": tmp_path, "progress": True}
    with monkeypatch.context() as patch:
        patch.setattr(DenoisingLoss, "__call__", interrupting(DenoisingLoss.__call__, 12))
        with pytest.raises(KeyboardInterrupt):
            fit(OBJECTIVE, make(), DATA, **options)
    assert "going on" not in capsys.readouterr().err
    result = fit(OBJECTIVE, make(), DATA, **options)
    assert "going on from step 12 of 20\n" in capsys.readouterr().err
    fit(OBJECTIVE, make(), DATA, **options)
    assert (
        "finished already, with step 20; to train again, start afresh (resume=False; for commands --afresh"
        in capsys.readouterr().err
    )
    assert len(repr(result)) < 250
    assert repr(result).startswith("FitResult(step=20, averages=[0.999], last record={'step': 20, 'loss'")


def test_a_refusal_says_what_of_a_stage_is_another(tmp_path):
    fit(Stage(OBJECTIVE), make(), DATA, steps=2, batch_size=8, folder=tmp_path)
    with pytest.raises(ArtefactError, match=r"settings: learning rates of stage 0 was \[\[0.001\]\], now \[\[0.5\]\]\. Use"):
        fit(Stage(OBJECTIVE, learning_rate=0.5), make(), DATA, steps=2, batch_size=8, folder=tmp_path)
    with pytest.raises(ArtefactError, match=r"settings: clip was 1.0, now 2.0\. Use"):
        fit(Stage(OBJECTIVE), make(), DATA, steps=2, batch_size=8, folder=tmp_path, clip=2.0)
