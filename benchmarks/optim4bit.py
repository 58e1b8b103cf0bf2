r"""Do states of four bits train as well as full ones, in what memory, and how fast? ``python benchmarks/optim4bit.py`` writes
``benchmarks/results/optim4bit.json``. With ``--parts``, only that is measured, and the rest of the file is kept.

*Losses.* The U-Net of the recipe `digits`, and a small character-level transformer, from three seeds, which draw weights, batches and
noise; all but the optimizer is the same. The figure is the loss of the last weights on data that training never sees, at fixed times and
noise. Contestants: `torch.optim.AdamW`, ours in its forms, bitsandbytes', torchao's (which compiles every shape, and is left out where
there are many), and two that are put in place here and are no options of the library: a codebook that has a zero for the second moment,
and factors for those tensors of which ``"auto"`` keeps the second moment by blocks. A run whose loss is not finite has failed.

Ours keep full states of embeddings, as the paper does: most rows of their gradient are zero, and a small v beside a large one is rounded
up. "Embeddings too" shows what that costs.

*Seed noise* is the standard deviation of the losses of AdamW over seeds. The bar is that the mean of the differences at equal seeds is at
most that.

*Times* of a step with gradients at hand, on one thread: the U-Net's tensors, and a few large matrices. Rounds take every contestant in
turn; the least time of the rounds is reported, for an interruption only ever adds, in time of the processor.

*Compiled*: steps by `torch.compile` beside AdamW's, of the large matrices, in the same way; also the median over rounds of what a step
takes over AdamW's compiled one in the same round.

*Bytes* are counted in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import character_model
import torch
from torch import nn

from fewstep.errors import NetworkError
from fewstep.models import SmallUNet
from fewstep.train import RECIPES, fit
from fewstep.train.optim4bit import SECOND_MOMENTS, AdamW4bit, Factored, Quantized, Storage, optimizer_state_bytes
from fewstep.train.quantization import Codebook, Quantizer, Rank1Scale
from fewstep.train.recipes import digits

RESULTS = Path(__file__).parent / "results" / "optim4bit.json"
SEEDS = (0, 1, 2)
STEPS = {"digits": 200, "characters": 300}
BATCH = {"digits": 16, "characters": 16}
LENGTH = 64
WITH_ZERO = "rank1, with zero"
FACTORS = "rank1, or factors"
MATRICES = ((1024, 1024), (512, 2048), (2048, 512), (2048,))
BETAS = (0.9, 0.99)
Step = tuple[Callable[[], Any], torch.optim.Optimizer]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure states of four bits.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS], help="what to measure")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the losses")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the times")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it works")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with_zero = Quantized(Quantizer(zero_codebook(), Rank1Scale()))
    SECOND_MOMENTS[WITH_ZERO] = lambda shape, size: with_zero
    SECOND_MOMENTS[FACTORS] = rank1_or_factors
    if options.smoke:
        STEPS.update(dict.fromkeys(STEPS, 3))
        options.seeds, options.rounds = options.seeds[:2], 1
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    report |= {"command": "python benchmarks/optim4bit.py", "machine": "one core of a 2-core machine", "versions": versions()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        for found in PARTS[part](options):
            report[part] = report.get(part, {}) | found
            options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 0


def zero_codebook() -> Codebook:
    """Sixteen equal steps from 0 to 1, both ends included."""
    return Codebook(tuple(i / 15 for i in range(16)))


def rank1_or_factors(shape: Sequence[int], size: int) -> Storage:
    """As ``"auto"``, with factors in place of blocks."""
    rank1 = SECOND_MOMENTS["rank1"](shape, size)
    return rank1 if SECOND_MOMENTS["auto"](shape, size) is rank1 else Factored()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchao", "bitsandbytes"):
        with contextlib.suppress(ImportError), quiet():
            found[name] = importlib.import_module(name).__version__
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def contestants(task: str) -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """Name -> maker, called as ``maker(parameters, lr=...)``; none decays weights. torchao compiles every shape, which takes too long for
    the many of the U-Net."""
    alike = {"betas": BETAS, "weight_decay": 0.0}
    found: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "AdamW": functools.partial(torch.optim.AdamW, **alike),
        "ours": functools.partial(AdamW4bit, **alike),
        "ours, rank1": functools.partial(AdamW4bit, **alike, second_moment="rank1"),
        "ours, factored": functools.partial(AdamW4bit, **alike, second_moment="factored"),
        "ours, factors for blocks": functools.partial(AdamW4bit, **alike, second_moment=FACTORS),
        "ours, embeddings too": functools.partial(AdamW4bit, **alike),
        "zero in the map": functools.partial(AdamW4bit, **alike, second_moment=WITH_ZERO),
    }
    if task != "digits":
        with contextlib.suppress(ImportError), quiet():
            from torchao.optim import AdamW4bit as Theirs

            found["torchao, 4 bits"] = functools.partial(Theirs, **alike)
    with contextlib.suppress(ImportError), quiet():
        from bitsandbytes.optim import AdamW8bit

        found["bitsandbytes, 8 bits"] = functools.partial(AdamW8bit, **alike)
    return found


# ---- losses ------------------------------------------------------------------------------------------------------------------------


def losses(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The settings, then every task."""
    seeds = options.seeds
    yield {"seeds": seeds, "steps": STEPS, "batch": BATCH, "learning_rate": 1e-3, "betas": BETAS}
    for task, run in {"characters": train_characters, "digits": train_digits}.items():
        found: dict[str, dict[str, Any]] = {}
        for name, maker in contestants(task).items():
            apart = (name.startswith("ours") and "too" not in name) or "zero" in name
            runs = [run(maker, seed, apart) for seed in seeds]
            found[name] = {"held_out": [loss for loss, _ in runs], **runs[-1][1]}
            print(task, name, found[name], file=sys.stderr, flush=True)
        yield {task: {name: {**row, **beside(row["held_out"], found["AdamW"]["held_out"])} for name, row in found.items()}}


def beside(values: list[float], reference: list[float]) -> dict[str, Any]:
    """The mean, the mean of the differences from AdamW at equal seeds, and whether that is within the noise of its seeds."""
    if not all(map(math.isfinite, values)):
        return {"mean": None, "difference": None, "within_seed_noise": False}
    difference = statistics.fmean(a - b for a, b in zip(values, reference, strict=True))
    noise = statistics.stdev(reference)
    mean = statistics.fmean(values)
    return {
        "mean": round(mean, 5),
        "difference": round(difference, 5),
        "seed_noise": round(noise, 5),
        "within_seed_noise": difference <= noise,
    }


def train_digits(maker: Callable[..., torch.optim.Optimizer], seed: int, apart: bool) -> tuple[float, dict[str, Any]]:
    recipe = RECIPES["digits"]
    torch.manual_seed(seed)
    model = SmallUNet(recipe.network)
    held_out = digits("held_out")

    def judge() -> float:
        model.eval()
        with torch.no_grad():
            generators = [torch.Generator().manual_seed(repeat) for repeat in range(4)]
            return float(torch.stack([recipe.loss(model, held_out, generator)[0] for generator in generators]).mean())

    return trained(recipe.loss, model, digits("train"), "digits", maker, seed, apart, judge)


def train_characters(maker: Callable[..., torch.optim.Optimizer], seed: int, apart: bool) -> tuple[float, dict[str, Any]]:
    torch.manual_seed(seed)
    model = character_model.CharacterModel(longest=LENGTH)
    data = character_model.sampler(character_model.text("train"), LENGTH)
    judge = functools.partial(character_model.held_out_loss, model, LENGTH)
    return trained(character_model.next_character, model, data, "characters", maker, seed, apart, judge)


def trained(
    objective: Any, model: nn.Module, data: Any, task: str, maker: Any, seed: int, apart: bool, judge: Callable[[], float]
) -> Any:
    """The loss on held-out data after training, and what the states take."""
    made: list[torch.optim.Optimizer] = []

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        made.append(maker(grouped(model) if apart else parameters, lr=lr))
        return made[0]

    steps = STEPS[task]
    try:
        with quiet():
            fit(
                objective,
                model,
                data,
                steps=steps,
                batch_size=BATCH[task],
                warmup=steps // 10,
                optimizer=optimizer,
                ema=(),
                seed=seed,
            )
        loss = judge()
    except NetworkError:
        loss = math.inf
    return loss, measured(made[0])


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    """The embeddings in a group of their own, that is not rounded."""
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    others = [parameter for parameter in model.parameters() if not any(parameter is weight for weight in embeddings)]
    return [{"params": others}, {"params": embeddings, "min_quantized_numel": math.inf}]


def measured(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    found = optimizer_state_bytes(optimizer)
    row: dict[str, Any] = {"bytes_a_parameter": round(found.per_parameter, 4)}
    if found.quantized_parameters:
        row["bytes_a_quantised_parameter"] = round(found.per_quantized_parameter, 4)
        row["quantised"] = round(found.quantized_parameters / found.parameters, 4)
    return row


# ---- times -------------------------------------------------------------------------------------------------------------------------


def times(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every set of tensors."""
    shapes = {
        "digits": [tuple(p.shape) for p in SmallUNet(RECIPES["digits"].network).parameters()],
        "matrices": list(MATRICES),
    }
    for name, tensors in shapes.items():
        yield {name: timed(name, tensors, options.rounds)}


def timed(task: str, shapes: list[tuple[int, ...]], rounds: int) -> dict[str, Any]:
    """Milliseconds a step, over that of AdamW, and the seconds of the first step."""
    makers = {name: maker for name, maker in contestants(task).items() if not any(word in name for word in ("zero", "too", "for"))}
    makers["AdamW, foreach"] = functools.partial(torch.optim.AdamW, foreach=True)
    makers["AdamW, fused"] = functools.partial(torch.optim.AdamW, fused=True)
    steps = {name: prepared(maker, shapes) for name, maker in makers.items()}
    first, took = in_turns(steps, rounds)
    least = {name: 1000 * min(values) for name, values in took.items()}
    return {
        "parameters": sum(math.prod(shape) for shape in shapes),
        "tensors": len(shapes),
        **{
            name: {
                "milliseconds": round(least[name], 3),
                "over_adamw": round(least[name] / least["AdamW"], 2),
                "first_step_seconds": round(first[name], 2),
                **measured(optimizer),
            }
            for name, (_, optimizer) in steps.items()
        },
    }


def compiled_times(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The matrices, compiled."""
    steps = {"AdamW, compiled": compiled(*prepared(torch.optim.AdamW, list(MATRICES)))}
    for kind in ("auto", "block", "factored"):
        maker = functools.partial(AdamW4bit, compiled=True, second_moment=kind)
        steps[f"ours, {kind}, compiled"] = prepared(maker, list(MATRICES))
    first, took = in_turns(steps, options.rounds)
    reference = took["AdamW, compiled"]
    yield {"load_average": round(os.getloadavg()[0], 1), "rounds": options.rounds}
    yield {
        name: {
            "milliseconds": round(1000 * min(values), 3),
            "over_adamw_compiled": round(min(values) / min(reference), 2),
            "median_over_adamw_compiled": round(statistics.median(a / b for a, b in zip(values, reference, strict=True)), 2),
            "first_step_seconds": round(first[name], 2),
        }
        for name, values in took.items()
    }


def in_turns(steps: Mapping[str, Step], rounds: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Seconds of the first step, and of a step in every round."""
    first = {name: seconds(step, 1) for name, (step, _) in steps.items()}
    took: dict[str, list[float]] = {name: [] for name in steps}
    for step, _ in steps.values():
        seconds(step, 3)
    for _ in range(rounds):
        for name, (step, _) in steps.items():
            took[name].append(seconds(step, 3))
    return first, took


def prepared(maker: Callable[..., torch.optim.Optimizer], shapes: list[tuple[int, ...]]) -> Step:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer = maker(parameters, lr=1e-3)
    return optimizer.step, optimizer


def compiled(step: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Step:
    """As PyTorch's guide compiles an optimizer: the rate is a tensor, so that it may change."""
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)
    return torch.compile(lambda: optimizer.step(), fullgraph=False), optimizer


def seconds(step: Callable[[], Any], count: int) -> float:
    with quiet():
        start = time.process_time()
        for _ in range(count):
            step()
        return (time.process_time() - start) / count


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "times": times,
    "compiled": compiled_times,
    "losses": losses,
}


if __name__ == "__main__":
    sys.exit(main())
