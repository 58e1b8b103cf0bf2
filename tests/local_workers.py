"""What the processes of the tests of Local SGD do. Each writes what it found to ``folder/RANK.json``."""

import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fewstep.train import (
    QSR,
    ConstantH,
    ElasticGroup,
    FixedGroup,
    LocalOptimizer,
    SimulatedWorkers,
    SynchronizationError,
    WorkerLostError,
    warmup_cosine,
)
from fewstep.train.recipes import digits

WORKERS, STEPS, BATCH = 4, 12, 16
PATIENCE = 3.0
RATES = warmup_cosine(0.1, total_steps=STEPS)
RULE = QSR(alpha=0.1, h_base=2, warmup_steps=0, total_steps=STEPS)
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
}


def classifier(dtype=torch.float64, seed=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.SiLU(), nn.Linear(16, 10)).to(dtype)


class Shards:
    """The batch of a worker at a step."""

    def __init__(self):
        data = digits()
        self.x, self.label = data["x"], data["label"]

    def loss(self, model, worker, step):
        rows = torch.randint(len(self.x), (BATCH,), generator=torch.Generator().manual_seed(1000 * worker + step))
        return functional.cross_entropy(model(self.x[rows].to(next(model.parameters()).dtype)), self.label[rows])


def numbers(model):
    return [value for p in model.parameters() for value in p.detach().double().reshape(-1).tolist()]


def train(model, optimizer, shards, worker, steps=STEPS, before=lambda step: None):
    for step in range(steps):
        before(step)
        for group in optimizer.param_groups:
            group["lr"] = RATES(step)
        optimizer.zero_grad()
        shards.loss(model, worker, step).backward()
        optimizer.step()


def simulated(kind="momentum", sync=RULE, workers=WORKERS, shards=None, model=None, **options):
    """The same as `WORKERS` processes, in one."""
    model, shards = model or classifier(), shards or Shards()
    group = SimulatedWorkers(workers)
    optimizer = LocalOptimizer(OPTIMIZERS[kind](model.parameters()), sync, group, **options)
    for call in range(sync.total_steps * workers):
        for entries in optimizer.param_groups:
            entries["lr"] = RATES(call // workers)
        optimizer.zero_grad()
        shards.loss(model, group.current, call // workers).backward()
        optimizer.step()
    return model, optimizer


def data_parallel(kind, shards, worker, **options):
    model = classifier(**options)
    train(DistributedDataParallel(model), OPTIMIZERS[kind](model.parameters()), shards, worker)
    return numbers(model)


def local(kind, shards, worker, sync, monitor=None, average_states=(), **options):
    model = classifier(seed=3 + worker, **options)  # the first worker's parameters count
    optimizer = OPTIMIZERS[kind](model.parameters())
    optimizer = LocalOptimizer(optimizer, sync, FixedGroup(timeout=30.0), monitor=monitor, average_states=average_states)
    places = [p.data_ptr() for p in model.parameters()]
    train(model, optimizer, shards, worker)
    assert places == [p.data_ptr() for p in model.parameters()]
    return numbers(model), optimizer


def healthy(rank, folder):
    """Every check that needs all workers and no loss."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORKERS)
    shards, found = Shards(), {}
    every = ConstantH(1, STEPS)
    for kind in OPTIMIZERS:
        found[f"parallel {kind}"] = data_parallel(kind, shards, rank)
        found[f"local {kind}"], optimizer = local(kind, shards, rank, every)
    averaged = local("adamw", shards, rank, every, average_states=("exp_avg", "exp_avg_sq"))
    found["local adamw, states averaged"] = averaged[0]
    found["parallel single"] = data_parallel("momentum", shards, rank, dtype=torch.float32)
    found["local single"] = local("momentum", shards, rank, every, dtype=torch.float32)[0]
    rounds = []
    found["qsr"], optimizer = local("momentum", shards, rank, RULE, rounds.append)
    found["traffic"], found["round bytes"] = vars(optimizer.traffic), optimizer.round_bytes
    found["rounds"] = [(r.step, r.h, r.workers, r.spread) for r in rounds]
    mine = torch.full((3,), float(rank))
    optimizer.average([mine, torch.tensor([7])])
    found["average"] = mine.tolist()
    model = classifier()
    optimizer = LocalOptimizer(OPTIMIZERS["sgd"](model.parameters()), ConstantH(2 if rank else 1, 4))
    found["out of step"] = told(SynchronizationError, lambda: train(model, optimizer, shards, rank, steps=2))
    other = nn.Linear(2, 3 if rank == 1 else 2)
    found["other model"] = told(SynchronizationError, lambda: LocalOptimizer(OPTIMIZERS["sgd"](other.parameters()), every))
    write(folder, rank, found)
    dist.destroy_process_group()


def told(kind, act):
    try:
        act()
    except kind as error:
        return str(error)
    return "no error"


def reported(rank, folder, lost, how):
    """A process group that does not survive: `lost` says who dies before which step."""
    options = {"rank": rank, "world_size": WORKERS, "timeout": timedelta(seconds=600)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **options)
    model, shards = classifier(), Shards()
    optimizer = LocalOptimizer(OPTIMIZERS["sgd"](model.parameters()), ConstantH(4, STEPS), FixedGroup(timeout=PATIENCE))
    before = time.monotonic()
    message = told(WorkerLostError, lambda: train(model, optimizer, shards, rank, before=dies(rank, lost, how)))
    write(folder, rank, {"error": message, "seconds": time.monotonic() - before, "steps": optimizer.steps})


def elastic(rank, folder, lost, how, fewest=1):
    """An elastic group, three rounds of four steps."""
    import warnings

    group = ElasticGroup(dist.FileStore(f"{folder}/store"), rank, WORKERS, PATIENCE, fewest)
    model, shards, rounds = classifier(), Shards(), []
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    optimizer = LocalOptimizer(optimizer, ConstantH(4, STEPS), group, monitor=rounds.append)
    before = time.monotonic()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        act = lambda: train(model, optimizer, shards, rank, before=dies(rank, lost, how))  # noqa: E731
        error = told(WorkerLostError, act)
    found = {"error": error, "seconds": time.monotonic() - before, "model": numbers(model), "traffic": vars(optimizer.traffic)}
    found |= {"warned": [str(w.message) for w in warned if w.category is RuntimeWarning], "workers": [r.workers for r in rounds]}
    write(folder, rank, found)


def dies(rank, lost, how):
    def before(step):
        if lost.get(rank) == step:
            os.kill(os.getpid(), getattr(signal, how))

    return before


def write(folder, rank, found):
    partial = Path(folder, f"{rank}.partial")
    partial.write_text(json.dumps(found))
    partial.rename(Path(folder, f"{rank}.json"))


def main(task, rank, folder, *options):
    torch.set_num_threads(1)
    {"healthy": healthy, "reported": reported, "elastic": elastic}[task](rank, folder, *options)
