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


@pytest.mark.parametrize(
    "name", ["dropout", "rounds", "local", "int4", "sparse", "shards", "4bit-auto", "4bit-rank1", "4bit-factored"]
)
def test_processes_resume_bit_exactly(spread, name):
    """DDP, also of 4-bit products and moving masks; weights of each process' own between averages; shards, also with 4-bit states."""
    assert same(trained(spread, name), trained(spread, f"{name}-resumed"))


def test_sparse_processes_are_one_process_with_as_many_pieces(spread):
    model, options = toys.sparse()
    result = fit(toys.flipped, model, toys.WIDE, **OPTIONS | options, accumulate=2, learning_rate=1e-2)
    two = trained(spread, "sparse")
    for name, value in result.weights.items():
        if name.endswith("sparsity_state"):  # the step, and operations, which every process counts for itself
            assert two[name][0] == value[0]
        else:
            torch.testing.assert_close(two[name], value, **ROUNDING)


def test_one_process_chooses_blocks_and_steps_for_all(spread):
    """The first process's part of the first batch decides, so there is one state, and one file."""
    assert [path.name for path in (spread / "int4").glob("*.safetensors")] == ["checkpoint.safetensors"]
    blocks = {
        name: int(value) for name, value in trained(spread, "int4").items() if name.endswith("hadamard_block") and "/" not in name
    }
    assert len(blocks) == 2
    assert min(blocks.values()) > 1


def test_weights_are_averaged_or_gradients_not_both(spread):
    told = [(spread / f"refused-{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert "pass fit(share_gradients=False) with a LocalOptimizer" in told[0]


def test_gradients_of_processes_apart_are_unscaled(monkeypatch):
    """float16 without shared gradients: the scale of the loss is undone before clipping and before the step."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from fewstep.train import processes

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # what Accelerate makes for float16 on a GPU
    accelerator.state._shared_state["_mixed_precision"] = "fp16"
    monkeypatch.setitem(processes.PRECISIONS, "fp16", None)  # the scale alone: the network runs in float32
    options = {**OPTIONS, "log_every": 1, "clip": 0.5, "optimizer": torch.optim.SGD, "learning_rate": 0.1}
    found = fit(toys.Drawn(), toys.make(), toys.DATA, **options, accelerator=accelerator, share_gradients=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = fit(toys.Drawn(), toys.make(), toys.DATA, **options)
    assert [row["gradient_norm"] for row in found.log] == pytest.approx([row["gradient_norm"] for row in plain.log], rel=1e-5)
    assert accelerator.scaler.get_scale() == 1024.0
    for name, value in plain.weights.items():
        torch.testing.assert_close(found.weights[name], value)


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
