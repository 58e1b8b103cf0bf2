r"""Are the shipped models good enough to judge solvers with? ``python benchmarks/models.py`` writes ``benchmarks/results/models.json``.

Samples are solutions of the probability-flow ODE, 100 calls of DPM-Solver++(2M), so this judges the models, not a solver: the result says
how far 200 calls are from 100 (root mean square over a sample; median and worst of 20 samples).

*digits*, 100 samples of each class. A small convolutional classifier, trained here on the training part with its own seed, judges them:

- the share of samples that it takes for the class that was asked for: at least 97 %;
- the Frechet distance between samples and held-out digits, in its features: at most 1.5 times that between the training and the held-out
  digits.

*photos*, unconditional. With S samples, T crops of the training region, T' others of them, H crops of the held-back right quarter, and the
sliced Wasserstein distance SW of 7 x 7 pixel patches (fixed random projections):

- SW(S, H) at most 1.25 times SW(T, H): to the unseen region the samples are about as near as training crops are;
- SW(S, T) at most half of SW(T, H): they are nearer to the training region than another part of the same photographs;
- the mean absolute difference of the log radial power spectra of S and T at most 0.3 a band (natural logarithm: a third in power, which
  at 32 pixels one begins to see). SW(T', T) and the difference of T' and T are what chance alone gives.

The bars of photos compare with other crops of the same two photographs; they say nothing of other photographs. The model knows only two.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fewstep as fs
from fewstep.evaluate import Frechet
from fewstep.train.recipes import digits, photos, train_classifier

RESULTS = Path(__file__).parent / "results" / "models.json"
NFE, PROBES = 100, 20
PATCH, PROJECTIONS, PATCHES_A_CROP = 7, 256, 16


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge the shipped models.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--seed", type=int, default=2026, help="of samples, crops, projections and the classifier")
    parser.add_argument("--threads", type=int, default=None, help="processor threads")
    parser.add_argument("--digits", default="digits", help="model folder to judge instead of the shipped one")
    parser.add_argument("--photos", default="photos", help="model folder to judge instead of the shipped one")
    parser.add_argument("--only", choices=["digits", "photos"], help="judge one of them")
    parser.add_argument("--pictures", type=Path, help="a folder for a picture of samples of each model")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "command": "python benchmarks/models.py",
        "seed": options.seed,
        "machine": machine(),
    }
    judges = {"digits": judge_digits, "photos": judge_photos}
    for name, judge in judges.items():
        if options.only in (None, name):
            started = time.monotonic()
            report[name] = judge(getattr(options, name), options.seed, options.pictures)
            report[name]["seconds"] = round(time.monotonic() - started, 1)
            print(json.dumps(report[name], indent=2))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    passed = all(bar["passed"] for name in judges if name in report for bar in report[name]["bars"].values())
    print("all bars passed" if passed else "A BAR FAILED")
    return 0 if passed else 1


def machine() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"architecture": platform.machine(), "threads": torch.get_num_threads(), **versions}


def describe(denoiser: fs.Denoiser, bars: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    parameters = sum(p.numel() for p in denoiser.network.parameters())  # type: ignore[attr-defined]
    model = {
        "parameters": parameters,
        "schedule": denoiser.schedule.config(),
        "predicts": denoiser.predicts,
        "sha256": denoiser.info.fingerprint,
        "training": denoiser.info.extra["training"],
    }
    return {"bars": bars, "figures": figures, "model": model}


def bar(value: float, bound: float, *, at_least: bool = False) -> dict[str, Any]:
    passed = value >= bound if at_least else value <= bound
    return {"value": round(value, 4), "bound": bound, "is": "at least" if at_least else "at most", "passed": bool(passed)}


def solve(denoiser: fs.Denoiser, nfe: int, seeds: range, cond: dict[str, Tensor]) -> Tensor:
    plan = fs.make_plan("dpmpp_2m", denoiser.schedule, nfe=nfe, grid="lambda")
    assert denoiser.info.shape is not None
    return fs.sample(denoiser, fs.draw_noise(denoiser.info.shape, seeds, plan), plan, cond=cond)


def draw(denoiser: fs.Denoiser, count: int, seed: int, chunk: int, **cond: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Accurate samples, and how accurate."""
    parts = []
    for first in range(0, count, chunk):
        rows = slice(first, min(first + chunk, count))
        part = {name: value[rows] for name, value in cond.items()}
        parts.append(solve(denoiser, NFE, range(seed + rows.start, seed + rows.stop), part))
    samples = torch.cat(parts)
    finer = solve(denoiser, 2 * NFE, range(seed, seed + PROBES), {name: value[:PROBES] for name, value in cond.items()})
    error = (samples[:PROBES] - finer).square().flatten(1).mean(1).sqrt()
    rounded = {"median": float(f"{float(error.median()):.2g}"), "worst": float(f"{float(error.max()):.2g}")}
    return samples, {"samples": count, "nfe": NFE, "ode_error": rounded}


# ---- digits ------------------------------------------------------------------------------------------------------------------------


def nearest(x: Tensor, others: Tensor) -> float:
    """Median distance to the nearest of the others, root mean square a pixel."""
    distance = torch.cdist(x.flatten(1), others.flatten(1)).min(1).values
    return float(distance.median()) / x[0].numel() ** 0.5


def judge_digits(source: str, seed: int, pictures: Path | None) -> dict[str, Any]:
    denoiser = fs.load(source)
    train, held_out = digits("train"), digits("held_out")
    classifier = train_classifier(seed=seed + 1)
    label = torch.arange(1000) % 10
    x, cost = draw(denoiser, 1000, seed, 250, label=label)
    clipped = x.clamp(-1.0, 1.0)
    save_picture(pictures, "digits", clipped[:100], 10)

    def accuracy(images: Tensor, wanted: Tensor) -> float:
        return float((classifier(images).argmax(1) == wanted).float().mean())

    features = {
        name: classifier.features(images)
        for name, images in (("samples", clipped), ("train", train["x"]), ("held_out", held_out["x"]))
    }
    frechet = Frechet()
    of_samples, of_train = (frechet(features[name], features["held_out"]) for name in ("samples", "train"))
    figures = {
        **cost,
        "classifier_accuracy_held_out": round(accuracy(held_out["x"], held_out["label"]), 4),
        "frechet_samples_to_held_out": round(of_samples, 4),
        "frechet_train_to_held_out": round(of_train, 4),
        "frechet_samples_to_train": round(frechet(features["samples"], features["train"]), 4),
        "share_of_values_outside_range": round(float((x.abs() > 1.05).float().mean()), 4),
        "nearest_training_digit_of_samples": round(nearest(clipped, train["x"]), 4),
        "nearest_training_digit_of_held_out": round(nearest(held_out["x"], train["x"]), 4),
    }
    bars = {
        "asked_class": bar(accuracy(clipped, label), 0.97, at_least=True),
        "frechet_ratio": bar(of_samples / of_train, 1.5),
    }
    return describe(denoiser, bars, figures)


# ---- photos ------------------------------------------------------------------------------------------------------------------------


def patches(x: Tensor, seed: int) -> Tensor:
    """Random patches of every image, ``"patches values"``."""
    generator = torch.Generator().manual_seed(seed)
    last = x.shape[-1] - PATCH + 1
    corners = torch.randint(last, (len(x), PATCHES_A_CROP, 2), generator=generator)
    views = x.unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # batch 3 rows columns patch patch
    rows = torch.arange(len(x))[:, None]
    return views.permute(0, 2, 3, 1, 4, 5)[rows, corners[..., 0], corners[..., 1]].flatten(0, 1).flatten(1)


def sliced_wasserstein(first: Tensor, second: Tensor, seed: int) -> float:
    """Mean over random directions of the Wasserstein-1 distance of the projected patches."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3 * PATCH**2, PROJECTIONS, generator=generator)
    directions /= directions.norm(dim=0)
    a, b = ((patches(x, seed + i) @ directions).sort(dim=0).values for i, x in enumerate((first, second)))
    return float((a - b).abs().mean())


def log_spectrum(x: Tensor) -> Tensor:
    """Log power of the mean of the channels in every radial band but the constant one, averaged over the images."""
    size = x.shape[-1]
    window = torch.hann_window(size)
    gray = x.mean(1)
    power = torch.fft.fft2((gray - gray.mean((1, 2), keepdim=True)) * window[:, None] * window).abs().square().mean(0)
    frequency = torch.fft.fftfreq(size) * size
    band = torch.hypot(frequency[:, None], frequency).round().long()
    return torch.stack([power[band == k].mean() for k in range(1, size // 2 + 1)]).log()


def judge_photos(source: str, seed: int, pictures: Path | None) -> dict[str, Any]:
    denoiser, count = fs.load(source), 500
    x, cost = draw(denoiser, count, seed, 125)
    samples = x.clamp(-1.0, 1.0)
    save_picture(pictures, "photos", samples[:100], 10)

    def crops(part: str, number: int) -> Tensor:
        return photos(part)(count, torch.Generator().manual_seed(seed + number))["x"]

    train, again, held_out = crops("train", 1), crops("train", 2), crops("held_out", 3)
    distance = {
        "samples_to_held_out": sliced_wasserstein(samples, held_out, seed),
        "train_to_held_out": sliced_wasserstein(train, held_out, seed),
        "samples_to_train": sliced_wasserstein(samples, train, seed),
        "train_to_train": sliced_wasserstein(again, train, seed),
    }
    spectra = {name: log_spectrum(images) for name, images in (("samples", samples), ("train", train), ("again", again))}
    gap = {name: float((spectra[name] - spectra["train"]).abs().mean()) for name in ("samples", "again")}
    figures = {
        **cost,
        **{f"sliced_wasserstein_{name}": round(value, 4) for name, value in distance.items()},
        "log_power_gap_by_band": [round(float(v), 3) for v in spectra["samples"] - spectra["train"]],
        "log_power_gap_train_to_train": round(gap["again"], 4),
        "share_of_values_outside_range": round(float((x.abs() > 1.05).float().mean()), 4),
    }
    bars = {
        "sliced_wasserstein_to_held_out_ratio": bar(distance["samples_to_held_out"] / distance["train_to_held_out"], 1.25),
        "sliced_wasserstein_to_train_ratio": bar(distance["samples_to_train"] / distance["train_to_held_out"], 0.5),
        "log_power_gap": bar(gap["samples"], 0.3),
    }
    return describe(denoiser, bars, figures)


def save_picture(folder: Path | None, name: str, x: Tensor, columns: int) -> None:
    if folder is None:
        return
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    framed = torch.nn.functional.pad((x + 1.0) * 127.5, (1, 1, 1, 1), value=90.0)
    rows = framed.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    pixels = rows.round().to(torch.uint8).expand(-1, -1, 3)
    pixels = pixels.repeat_interleave(4, 0).repeat_interleave(4, 1)
    Image.fromarray(pixels.numpy()).save(folder / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
