"""Two processes share a model by FSDP; run by `test_optim4bit`. Prints one line a claim that holds."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fewstep.train.optim4bit import AdamW4bit

PROCESSES = 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 257), nn.Tanh(), nn.Linear(257, 96), nn.LayerNorm(96))  # 257 rows: uneven shards


def sharded(mesh):
    model = network()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        x = torch.randn(8, 96, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for kind in ("auto", "rank1", "factored"):
        options = {"lr": 1e-2, "second_moment": kind, "rounding": "stochastic" if kind == "rank1" else "nearest"}
        model = sharded(mesh)
        optimizer = AdamW4bit(model.parameters(), **options)
        train(model, optimizer, range(5))

        whole = network()
        exact = torch.optim.AdamW(whole.parameters(), lr=1e-2)
        train(whole, exact, range(5))
        largest = 0.0
        for shard, full in zip(model.parameters(), whole.parameters(), strict=True):
            largest = max(largest, float((shard.full_tensor() - full).abs().mean().detach()))
        assert largest < 0.01, largest  # five steps of at most 0.01

        states, others = get_state_dict(model, optimizer)
        dcp.save({"model": states, "optimizer": others}, checkpoint_id=f"{folder}/{kind}")
        again = sharded(mesh)
        resumed = AdamW4bit(again.parameters(), **options)
        states, others = get_state_dict(again, resumed)
        both = {"model": states, "optimizer": others}
        dcp.load(both, checkpoint_id=f"{folder}/{kind}")
        set_state_dict(again, resumed, model_state_dict=both["model"], optim_state_dict=both["optimizer"])
        train(model, optimizer, range(5, 8))
        train(again, resumed, range(5, 8))
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(a.to_local(), b.to_local())
        if rank == 0:
            print(f"{kind}: trained and resumed", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=PROCESSES)
