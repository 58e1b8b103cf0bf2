"""Several processes: two real ones, started as a launcher does, against one process; and what is refused."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import toys  # noqa: E402 - beside this file
from two_processes import OPTIONS, crashing, flat  # noqa: E402

pytest.importorskip("accelerate")

from fewstep.errors import ArtefactError, MissingExtraError  # noqa: E402
from fewstep.train import fit  # noqa: E402

ROUNDING = {"rtol": 1e-4, "atol": 2e-6}
"""Sums in another order, through 12 steps of AdamW, whose first steps divide a gradient by its own size."""


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Name -> what two processes trained; and where."""
    folder = tmp_path_factory.mktemp("spread")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)]), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(HERE / "two_processes.py"), str(folder)]
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]
    told = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(told)
    return folder


def trained(spread, name):
    return load_file(spread / f"{name}.safetensors")


def alone(objective, model, **options):
    result = fit(objective, model, toys.DATA, **{**OPTIONS, **options})
    return flat(result.weights) | {f"{p}/{n}": v for p, values in result.averages.items() for n, v in flat(values).items()}


def close(first, second):
    assert first.keys() == second.keys()
    assert len(first) >= 12
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=lambda told, name=name: f"{name}: {told}", **ROUNDING)
    return True


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("name", ["ddp", "shards", "shards-pieces"])
def test_processes_are_one_process_with_the_whole_batch(spread, name):
    """DDP, FSDP, and FSDP in pieces: an objective that draws for the whole batch does not notice the processes."""
    assert close(trained(spread, name), alone(toys.Drawn(), toys.make()))


def test_processes_are_one_process_with_as_many_pieces(spread):
    """With noise and dropout of each piece's own: two processes with two pieces each are one with four."""
    assert close(trained(spread, "dropout"), alone(toys.undrawn, toys.make(0.3), accumulate=4))


def test_stages_of_processes(spread):
    assert close(trained(spread, "players"), alone(toys.turns(), toys.players(), accumulate=2))


@pytest.mark.parametrize("name", ["dropout", "rounds", "shards"])
def test_processes_resume_bit_exactly(spread, name):
    """DDP; weights of each process' own between rounds of averaging; weights in shards."""
    assert same(trained(spread, name), trained(spread, f"{name}-resumed"))


def test_resumed_with_another_number_of_processes(spread, tmp_path):
    """Right where the pieces stay as many, refused elsewhere."""
    (tmp_path / "checkpoint.safetensors").write_bytes((spread / "ddp" / "checkpoint.safetensors").read_bytes())
    weights = fit(toys.Drawn(), toys.make(), toys.DATA, folder=tmp_path, **OPTIONS, accumulate=2).weights
    assert all(torch.equal(weights[name], trained(spread, "ddp")[name]) for name in weights)
    with pytest.raises(ArtefactError, match=r"pieces \(processes x accumulate\) was 2, now 1"):
        fit(toys.Drawn(), toys.make(), toys.DATA, folder=tmp_path, **OPTIONS)


def test_states_of_their_own_need_as_many_processes(spread):
    assert sorted(path.name for path in (spread / "rounds").glob("*.safetensors")) == [
        "checkpoint-12-of-1.safetensors",
        "checkpoint.safetensors",
    ]
    with pytest.raises(ArtefactError, match="of 2 processes that had weights or states of their own; now there are 1"):
        fit(
            crashing(toys.undrawn, -1),
            toys.make(),
            toys.DATA,
            folder=spread / "rounds",
            **OPTIONS,
            accumulate=2,
            optimizer=toys.Rounds,
            share_gradients=False,
        )


def test_accelerator_of_one_process_and_its_refusals():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def accelerator(**options):
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=True, **options)

    found = fit(toys.Drawn(), toys.make(), toys.DATA, **OPTIONS, accelerator=accelerator())
    assert all(
        torch.equal(value, found.weights[name])
        for name, value in fit(toys.Drawn(), toys.make(), toys.DATA, **OPTIONS).weights.items()
    )
    with pytest.raises(ValueError, match="leave that at 1 and pass"):
        fit(toys.Drawn(), toys.make(), toys.DATA, **OPTIONS, accelerator=accelerator(gradient_accumulation_steps=2))
    with pytest.raises(ValueError, match="contradicts the Accelerator's mixed_precision='no'"):
        fit(toys.Drawn(), toys.make(), toys.DATA, **OPTIONS, accelerator=accelerator(), precision=torch.bfloat16)
    lower = fit(toys.Drawn(), toys.make(), toys.DATA, **OPTIONS, accelerator=accelerator(mixed_precision="bf16"))
    mine = fit(toys.Drawn(), toys.make(), toys.DATA, **OPTIONS, precision=torch.bfloat16)
    for name, value in mine.weights.items():
        torch.testing.assert_close(lower.weights[name], value, rtol=0.02, atol=2e-3)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_launcher_without_accelerate_is_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"several processes needs accelerate.*fewstep\[train\]"):
        fit(toys.Drawn(), toys.make(), toys.DATA, **OPTIONS)
