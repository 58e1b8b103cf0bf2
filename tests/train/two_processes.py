"""What two real processes train, for `test_spread.py`: ``python two_processes.py FOLDER`` with RANK, WORLD_SIZE and so on set."""

import sys
from pathlib import Path

import torch
import toys
from safetensors.torch import save_file

from fewstep.train import ConstantH, LocalOptimizer, PowerFunction, fit

OPTIONS = {"steps": 12, "batch_size": 8, "warmup": 3, "checkpoint_every": 4, "log_every": 3, "ema": (0.9, PowerFunction(0.1))}


class Crash(Exception):
    pass


def crashing(objective, at):
    """Fails at the at-th call, in both processes."""

    class Crashing:
        def __call__(self, *arguments):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == at:
                raise Crash
            return objective(*arguments)

    if hasattr(objective, "draw_whole"):
        Crashing.draw_whole = staticmethod(objective.draw_whole)
    Crashing.__qualname__ = "Crashing"
    return Crashing()


def sharded():
    """Accelerate takes FSDP for accelerators only; what it then does works on the CPU as well."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    assert accelerator.is_fsdp2
    return accelerator


def local(parameters, lr):
    return LocalOptimizer(torch.optim.AdamW(parameters, lr=lr), ConstantH(5, OPTIONS["steps"]))


def main(folder):
    def keep(name, result):
        if result.main:
            averages = {f"{p}/{n}": v for p, values in result.averages.items() for n, v in flat(values).items()}
            save_file(
                {k: v.contiguous().clone() for k, v in {**flat(result.weights), **averages}.items()}, folder / f"{name}.safetensors"
            )
        return result

    def twice(name, objective, make, at, **options):
        """Whole; and crashed, then taken up."""
        data, found = options.pop("data", toys.DATA), options.pop("make_accelerator", lambda: None)

        def run(at, name):
            model = make()  # or a model and its optimizer
            model, own = model if isinstance(model, tuple) else (model, {})
            return fit(crashing(objective, at), model, data, **OPTIONS | options | own, folder=folder / name, accelerator=found())

        keep(name, run(-1, name))
        try:
            run(at, f"{name}-resumed")
        except Crash:
            keep(f"{name}-resumed", run(-1, f"{name}-resumed"))

    keep("ddp", fit(toys.Drawn(), toys.make(), toys.DATA, folder=folder / "ddp", **OPTIONS))
    twice("dropout", toys.undrawn, lambda: toys.make(0.3), 19, accumulate=2)
    keep("players", fit(toys.turns(), toys.players(), toys.DATA, **OPTIONS))
    twice("rounds", toys.undrawn, toys.make, 11, optimizer=toys.Rounds, share_gradients=False)
    twice("local", toys.undrawn, toys.make, 11, optimizer=local, share_gradients=False)
    try:
        fit(toys.undrawn, toys.make(), toys.DATA, optimizer=local, **OPTIONS)
    except ValueError as error:
        (folder / f"refused-{torch.distributed.get_rank()}").write_text(str(error))
    for name in ("int4", "sparse"):
        twice(name, toys.flipped, getattr(toys, name), 7, data=toys.WIDE, learning_rate=1e-2)
    for name, options in {"shards": {}, "shards-pieces": {"accumulate": 2}}.items():
        keep(name, fit(toys.Drawn(), toys.make(), toys.DATA, accelerator=sharded(), folder=folder / name, **OPTIONS | options))
    for name in ("auto", "rank1", "factored"):
        options = {"data": toys.WIDER, "learning_rate": 1e-2, "ema": 0.9}
        twice(f"4bit-{name}", toys.flipped, lambda name=name: toys.four_bits(name), 7, **options, make_accelerator=sharded)
    again = {**OPTIONS, "folder": folder / "shards-resumed"}
    try:
        fit(crashing(toys.Drawn(), 7), toys.make(), toys.DATA, accelerator=sharded(), **again)
    except Crash:
        keep("shards-resumed", fit(crashing(toys.Drawn(), -1), toys.make(), toys.DATA, accelerator=sharded(), **again))
    torch.distributed.destroy_process_group()


def flat(values):
    """Names of nested tensors."""
    return {k: v for k, v in values.items() if isinstance(v, torch.Tensor)} | {
        f"{name}.{k}": v for name, inner in values.items() if isinstance(inner, dict) for k, v in inner.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
