"""Workers of Local SGD, each a run of `fit` with a folder of its own: killed together at any moment, they go on as if nothing had happened.

The workers are threads here. A death is an exception that nobody catches; the others live on until they would need the dead one, which is
as far apart as workers can get.
"""

import contextlib
import threading

import pytest
import torch
from torch import nn

from fewstep.train import ConstantH, LocalOptimizer, SynchronizationError, fit
from fewstep.train import trainer as trainer_module
from fewstep.train.checkpoints import CHECKPOINT, earlier_files, read_checkpoint
from fewstep.train.groups import WorkerGroup

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(5))
STEPS, H, EVERY = 24, 4, 6  # checkpoints at 8, 16 and 24
OPTIONS = {"steps": STEPS, "batch_size": 8, "warmup": 0, "ema": 0.9, "checkpoint_every": EVERY, "learning_rate": 1e-2}


class Killed(BaseException):
    pass


class Threads(WorkerGroup):
    """Two threads that sum: all have a sum, or none."""

    def __init__(self, rank, barrier, slots):
        self.rank, self.barrier, self.slots = rank, barrier, slots

    @property
    def size(self):
        return 2

    @property
    def index(self):
        return self.rank

    def total(self, fill):
        try:
            self.slots[self.rank] = [value.clone() for value in fill()]
            self.barrier.wait(60)
            sums = [a + b for a, b in zip(*self.slots, strict=True)]
            self.barrier.wait(60)
        except threading.BrokenBarrierError:
            raise Killed from None
        return sums, 1


def start(folder, monkeypatch, at=None, interrupted=None):
    """Both workers until they end or die; at: (rank, what, number of the call) of a death. Returns their weights and averages."""
    barrier, slots, found = threading.Barrier(2), [None, None], [None, None]
    counts, mine = {}, threading.local()

    def reach(what):
        key = (mine.rank, what)
        counts[key] = counts.get(key, 0) + 1
        if at == (*key, counts[key]):
            raise Killed

    def write(*arguments):
        reach("before a file")
        write_checkpoint(*arguments)
        reach("after a file")

    @contextlib.contextmanager
    def interruptible():
        mine.asked = []
        yield mine.asked

    def objective(model, batch, generator):
        reach("step")
        if interrupted == (mine.rank, counts[mine.rank, "step"]):
            mine.asked.append(True)
        noise = torch.randn(batch["x"].shape, generator=generator)
        return (model(batch["x"] + 0.1 * noise) - batch["x"][:, :1]).square().mean(), {}

    def work(rank):
        mine.rank = rank
        net = nn.Linear(8, 1)
        nn.init.constant_(net.weight, rank)
        nn.init.zeros_(net.bias)
        group = Threads(rank, barrier, slots)

        def optimizer(parameters, lr):
            return LocalOptimizer(torch.optim.AdamW(parameters, lr=lr), ConstantH(H, STEPS), group)

        try:
            result = fit(objective, net, {"x": X}, optimizer=optimizer, seed=rank, folder=folder / str(rank), **OPTIONS)
            found[rank] = {**result.weights, **{f"average {k}": v for k, v in result.averages[0.9].items()}}
        except (Killed, KeyboardInterrupt, SynchronizationError) as error:
            found[rank] = error
            if not isinstance(error, SynchronizationError):  # which all find
                barrier.abort()

    write_checkpoint = trainer_module.write_checkpoint
    with monkeypatch.context() as patched:
        patched.setattr(trainer_module, "write_checkpoint", write)
        patched.setattr(trainer_module, "_interruptible", interruptible)
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


def steps_in(folder):
    """Of the checkpoints of both workers."""
    return [
        sorted([*earlier_files(folder / str(rank)), read_checkpoint(folder / str(rank) / CHECKPOINT)[1]["step"]])
        for rank in range(2)
    ]


def same(first, second):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(first, second, strict=True)
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        found = start(folder, patch)
    assert steps_in(folder) == [[16, 24]] * 2
    assert not torch.equal(found[0]["average weight"], found[1]["average weight"])  # each has its own
    return found


MOMENTS = [("step", number) for number in (1, 8, 9, 13, 24)] + [
    (when, number) for when in ("before a file", "after a file") for number in (1, 2, 3)
]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_killed_at_any_moment(whole, tmp_path, monkeypatch, moment, rank):
    found = start(tmp_path, monkeypatch, at=(rank, *moment))
    assert any(isinstance(each, Killed) for each in found)
    assert same(start(tmp_path, monkeypatch), whole)
    assert steps_in(tmp_path) == [[16, 24]] * 2 or moment == ("after a file", 3)  # all were through


def test_killed_again_and_again(whole, tmp_path, monkeypatch):
    for rank, moment in (
        (1, ("after a file", 1)),
        (0, ("before a file", 1)),
        (0, ("step", 3)),
        (1, ("before a file", 2)),
        (0, ("after a file", 1)),
    ):
        start(tmp_path, monkeypatch, at=(rank, *moment))
    assert same(start(tmp_path, monkeypatch), whole)


def test_interrupted_between_averages(whole, tmp_path, monkeypatch):
    found = start(tmp_path, monkeypatch, interrupted=(1, 10))
    assert isinstance(found[1], KeyboardInterrupt)
    assert steps_in(tmp_path) == [[8], [8, 10]]
    assert same(start(tmp_path, monkeypatch), whole)


def test_a_worker_whose_checkpoints_are_lost_is_told(tmp_path, monkeypatch):
    start(tmp_path, monkeypatch)
    for file in (tmp_path / "1").glob("*.safetensors"):
        file.unlink()
    for error in start(tmp_path, monkeypatch):
        assert isinstance(error, SynchronizationError)
        assert "no common step (worker: steps; 0: [16, 24], 1: none)" in str(error)
    assert sorted(earlier_files(tmp_path / "0")) == [16]  # and nothing is deleted
