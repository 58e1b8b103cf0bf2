"""A style and an acceleration, added: ``python benchmarks/distill_style.py`` writes ``benchmarks/results/distill_style.json``.

One adapter is trained by LCM-LoRA on the plain teacher of ``distill_teacher.py``; others, which never see a student, are trained by
ordinary denoising on digits in another style: turned by a quarter, with light and dark exchanged, or only brighter. All are saved, loaded
into a fresh teacher by their files, and added with weights. Asked of the sum are samples of 2 and 4 calls in that style. ``--gentle``
makes adapters of low rank at low learning rates.

FD is Frechet's distance of 4,000 samples in the features of the classifier that comes along, after the style has been undone, from as
many of the teacher with the style's adapter in 20 calls of the solver "auto". Beside it: that teacher itself by the best of eight untuned
solvers on five grids, chosen on 512 other samples; the distance of two of its sets; the accelerated teacher without a style; and the sum
where the accelerator's file has lost its alpha (16, of rank 64: it then acts four times too strongly).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import distill_teacher
import torch
from distill_teacher import CLASSES, SHAPE, labels_of, sampled, wrapped, write_json
from torch import Tensor, nn

import fewstep as fs
from fewstep.adapt import LoraOptions, add_adapter, load_adapter, save_adapter, set_adapters
from fewstep.distill import LCM, Student, distill
from fewstep.evaluate import Frechet, digit_features
from fewstep.train.recipes import digits
from fewstep.tuners.task import GRIDS, UNTUNED

RESULTS = Path(__file__).parent / "results" / "distill_style.json"
COUNT, FEW, CALLS, REFERENCE_CALLS = 4000, 512, (2, 4), 20
REFERENCE_SEED, FLOOR_SEED, SCREEN_SEED, STUDENT_SEED = 0, 1_000_000, 2_000_000, 3_000_000
RANK, ALPHA = 64, 16.0


def bent(x: Tensor, power: float) -> Tensor:
    """Values of [-1, 1] along a power."""
    return 2.0 * (0.5 * (x.clamp(-1.0, 1.0) + 1.0)) ** power - 1.0


STYLES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "turned": (lambda x: x.rot90(1, (2, 3)), lambda x: x.rot90(-1, (2, 3))),
    "inverted": (lambda x: -x, lambda x: -x),
    "brighter": (lambda x: bent(x, 0.7), lambda x: bent(x, 1.0 / 0.7)),
}
"""Of a picture, and back."""
WEIGHTS = ((1.0, 1.0), (0.8, 1.0))
"""Of the style and of the acceleration."""
STYLE_TRAINING = {"steps": 2000, "batch_size": 128, "learning_rate": 2e-3, "ema": 0.995}
TRAINING = {"iterations": 1500, "batch_size": 128, "learning_rate": 1e-3, "ema": 0.995}


def plain_network() -> nn.Module:
    """That of the teacher, which has no adapter."""
    network = distill_teacher.load().network
    assert isinstance(network, nn.Module)
    return network


def style_adapter(style: str, seed: int, folder: Path, options: LoraOptions, training: dict[str, Any]) -> Path:
    """Train one on the plain teacher, and save it."""
    network = plain_network()
    add_adapter(network, options, name="style", seed=seed)
    data = digits("train")
    loss = fs.train.DenoisingLoss(fs.schedules.Flow(), "flow", times="logit_normal", dropout=fs.train.LabelDropout(CLASSES))
    result = fs.fit(loss, network, {**data, "x": STYLES[style][0](data["x"])}, **training, seed=seed)
    network.load_state_dict(result.averages[0.995])
    return save_adapter(network, folder, ask=asked, name="style")


def asked(network: nn.Module) -> Tensor:
    """What an adapter that was loaded again must still say."""
    generator = torch.Generator().manual_seed(0)
    return network(torch.randn(4, *SHAPE, generator=generator), torch.linspace(0.1, 0.9, 4), label=labels_of(4))


def together(adapters: Mapping[str, Path], weights: Mapping[str, float]) -> fs.Denoiser:
    """A fresh teacher with these adapters."""
    network = plain_network()
    for name, path in adapters.items():
        load_adapter(network, path, name=name)
    set_adapters(network, dict(weights))
    return wrapped(network.eval().requires_grad_(False))


def least_untuned(teacher: fs.Denoiser, nfe: int, fd: Callable[[Tensor], float]) -> tuple[str, float]:
    """The best solver and grid, chosen on a few samples, and its distance on all."""
    plans = {
        f"{name}, {grid}": made.plan(teacher.schedule, nfe, grid, final="zero") for name, made in UNTUNED.items() for grid in GRIDS
    }
    some = {name: fd(sampled(teacher, plan, FEW, SCREEN_SEED)) for name, plan in plans.items()}
    found = {name: fd(sampled(teacher, plans[name], COUNT, STUDENT_SEED)) for name in sorted(some, key=lambda name: some[name])[:3]}
    best = min(found, key=lambda name: found[name])
    return best, found[best]


def measured(
    style: str, seed: int, student: Student, accelerated: Path, folder: Path, options: LoraOptions, training: dict[str, Any]
) -> dict[str, Any]:
    began = time.process_time()
    styled = style_adapter(style, seed, folder, options, training)
    told: dict[str, Any] = {"style_cpu_seconds": round(time.process_time() - began)}
    teacher = together({"style": styled}, {"style": 1.0})
    many = fs.make_plan("auto", teacher.schedule, REFERENCE_CALLS, final="zero")
    plain = STYLES[style][1]
    reference = digit_features(plain(sampled(teacher, many, COUNT, REFERENCE_SEED)))

    def fd(samples: Tensor) -> float:
        return round(Frechet()(digit_features(plain(samples)), reference), 4)

    told["floor"] = fd(sampled(teacher, many, COUNT, FLOOR_SEED))
    told["from plain digits"] = fd(STYLES[style][0](sampled(distill_teacher.load(), many, COUNT, STUDENT_SEED)))
    for nfe in CALLS:
        best, least = least_untuned(teacher, nfe, fd)
        row: dict[str, Any] = {"untuned": best, "untuned_fd": least}
        for weights in WEIGHTS:
            both = together({"style": styled, "fewstep": accelerated}, dict(zip(("style", "fewstep"), weights, strict=True)))
            row[f"sum, {weights[0]:g} and {weights[1]:g}"] = fd(sampled(both, student.plan(nfe), COUNT, STUDENT_SEED))
        strong = together(
            {"style": styled, "fewstep": accelerated}, {"style": 1.0, "fewstep": options.rank / (options.alpha or options.rank)}
        )
        row["alpha lost"] = fd(sampled(strong, student.plan(nfe), COUNT, STUDENT_SEED))
        row["plain teacher, same student"] = round(
            Frechet()(
                digit_features(
                    sampled(together({"fewstep": accelerated}, {"fewstep": 1.0}), student.plan(nfe), COUNT, STUDENT_SEED)
                ),
                digit_features(sampled(distill_teacher.load(), many, COUNT, REFERENCE_SEED)),
            ),
            4,
        )
        told[str(nfe)] = row
    return told


def summary(styles: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians over the seeds, and the bars."""
    found = {}
    for style, seeds in styles.items():
        for weights in WEIGHTS:
            name = f"sum, {weights[0]:g} and {weights[1]:g}"

            def median(nfe: int, key: str, seeds: dict[str, Any] = seeds) -> float:
                return statistics.median(told[str(nfe)][key] for told in seeds.values())

            found[f"{style}, {name}"] = {
                "fd": {nfe: median(nfe, name) for nfe in CALLS},
                "untuned": {nfe: median(nfe, "untuned_fd") for nfe in CALLS},
                "4 calls: at most twice the best untuned solver of 4": median(4, name) <= 2.0 * median(4, "untuned_fd"),
                "4 calls: less than the best untuned solver of 2": median(4, name) < median(2, "untuned_fd"),
                "alpha lost": {nfe: median(nfe, "alpha lost") for nfe in CALLS},
            }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Add an adapter of a style to one of acceleration.")
    parser.add_argument(
        "--gentle", action="store_true", help="adapters of rank 8, trained at a quarter of the learning rates: small changes"
    )
    parser.add_argument("--styles", default=";".join(STYLES), help="separated by semicolons")
    parser.add_argument("--seeds", type=int, default=3, help="of training, from 0")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes; what is there is kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rank, alpha, share = (8, 8.0, 0.25) if options.gentle else (RANK, ALPHA, 1.0)
    adapter = LoraOptions(rank=rank, alpha=alpha)
    training = TRAINING | {"learning_rate": share * TRAINING["learning_rate"]}
    style_training = STYLE_TRAINING | {"learning_rate": share * STYLE_TRAINING["learning_rate"]}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            began = time.process_time()
            data = digits("train")
            student = distill(
                distill_teacher.load(), method=LCM(), adapter=adapter, data=data, steps=CALLS, seed=seed, compare=None, **training
            )
            seconds = round(time.process_time() - began)
            student.save(folder / "student")
            for style in options.styles.split(";"):
                told = measured(style, seed, student, folder / "student", folder / style, adapter, style_training)
                told["student_cpu_seconds"] = seconds
                name = f"{style}, gentle" if options.gentle else style
                print(name, seed, json.dumps(told), flush=True)
                write(options.out, name, seed, told)
    print(json.dumps(json.loads(options.out.read_text())["summary"], indent=1))
    return 0


def write(out: Path, style: str, seed: int, told: dict[str, Any]) -> None:
    def merged(report: dict[str, Any]) -> dict[str, Any]:
        report |= {"command": "python benchmarks/distill_style.py", "machine": "one core of a 2-core machine", "count": COUNT}
        report |= {"style_training": STYLE_TRAINING, "training": TRAINING, "rank": RANK, "alpha": ALPHA}
        report.setdefault("styles", {}).setdefault(style, {})[str(seed)] = told
        return report | {"summary": summary(report["styles"])}

    write_json(out, merged)


if __name__ == "__main__":
    raise SystemExit(main())
