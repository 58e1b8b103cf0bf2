r"""Likelihoods, and what trains for them: ``python benchmarks/likelihood.py`` writes ``benchmarks/results/likelihood.json``.

- *mixture*: the log density of an exact mixture along the ODE against its closed form, largest error in bits per dimension, every schedule;
- *byte*: one byte with 256 probabilities and the exact density of its noised states: bits over the entropy of every dequantization, by
  quadrature, at i-DODE's gamma = -2 lambda;
- *digits*: bits per dimension of held-out digits (17 levels) under the shipped model, by dequantization and noise level;
- *variance*: of the likelihood's loss and its gradient on that model, by how times are drawn, relative to draws uniform in lambda;
- *order*: by how much the targets of second and third order are off where the first-order prediction is off by delta, against delta;
- *fine_tuning*: one small network of digits, trained on for as many steps with and without the second order: bits per dimension.

``--only mixture,byte`` runs some of them and keeps the others' figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.dequantization import DEQUANTIZATIONS, Levels
from fewstep.likelihood import bits_per_dim, log_likelihood
from fewstep.models import SmallUNet, SmallUNetConfig
from fewstep.predictions import data_coefficients
from fewstep.schedules import EDM, Flow, FromBetas, VPCosine, VPLinear
from fewstep.train import DenoisingLoss, HighOrderLoss, fit, importance_of_weight, measured_importance
from fewstep.train.high_order import residuals
from fewstep.train.recipes import digits
from fewstep.train.times import LambdaTimes, LowDiscrepancy

RESULTS = Path(__file__).parent / "results" / "likelihood.json"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure likelihoods and the objectives that are about them.")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    report |= {"command": "python benchmarks/likelihood.py", "machine": "one core of a 2-core machine", "seed": 0}
    for name in options.only.split(","):
        began = time.process_time()
        report[name] = PARTS[name]()
        report.setdefault("cpu_seconds", {})[name] = round(time.process_time() - began)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(name, json.dumps(report[name], indent=1), flush=True)
    return 0


# ---- the ODE ---------------------------------------------------------------------------------------------------------------------------


def of_mixture() -> list[dict[str, Any]]:
    """Largest error of 50 samples at two tolerances, and the evaluations they took."""
    schedules = [VPLinear(), VPCosine(), EDM(), Flow(), Flow(shift=3.0), FromBetas(np.linspace(1e-4, 0.02, 1000).tolist())]
    rows = []
    for schedule in schedules:
        exact = fs.exact.GaussianMixture(
            schedule, [[-1.0, 0.2, 0.0], [0.8, -0.5, 0.3]], [[0.3, 0.1, 0.05], [0.1, 0.2, 0.1]], [0.3, 0.7]
        )
        noise = fs.draw_noise((3,), range(50), dtype=torch.float64)
        x = float(schedule.alpha(schedule.t_end)) * exact.draw(50, 0) + float(schedule.sigma(schedule.t_end)) * noise
        for tol in (1e-5, 1e-7):
            found = log_likelihood(exact, x, trace="exact", tol=tol, prior=lambda z, e=exact: e.log_density(z, e.schedule.t_start))
            error = (found.log_density - exact.log_density(x, schedule.t_end)).abs() / (3 * math.log(2))
            row = {"schedule": repr(schedule), "tol": tol, "largest_error_bits_per_dim": float(error.max())}
            rows.append({**row, "evaluations": float(found.calls.mean())})
    return rows


def of_byte() -> dict[str, Any]:
    levels = Levels(256, -255 / 256, 255 / 256)
    x = levels.values(torch.arange(256)).numpy()
    p = 0.6 * np.exp(-0.5 * ((x + 0.3) / 0.12) ** 2) / 0.12 + 0.4 * np.exp(-0.5 * ((x - 0.5) / 0.1) ** 2) / 0.1 + 0.05
    p /= p.sum()
    excess = {}
    for name, dequantization in DEQUANTIZATIONS.items():
        for gamma in (-13.3, -11.8, -10.0):
            alpha, sigma = (1 / math.sqrt(1 + math.exp(sign * gamma)) for sign in (1, -1))
            count = 2048
            u = ((torch.arange(count, dtype=torch.float64) + 0.5) / count).repeat(256)[:, None]
            z, price = dequantization.draw(levels, torch.arange(256).repeat_interleave(count)[:, None], u, alpha, sigma)
            states, density = z[:, 0].numpy(), np.zeros(len(z))
            for k in range(256):
                density += p[k] / (sigma * math.sqrt(2 * math.pi)) * np.exp(-0.5 * ((states - alpha * x[k]) / sigma) ** 2)
            logs = (np.log(density) + price.numpy()).reshape(256, count).mean(1)
            excess[f"{name}, gamma {gamma}"] = float((p * (np.log2(p) - logs / math.log(2))).sum())
    return {"entropy": float(-(p * np.log2(p)).sum()), "excess_bits": excess}


def of_digits() -> list[dict[str, Any]]:
    """The same 30 samples, and the same probes, for every row."""
    denoiser, x = fs.load("digits"), digits("held_out")["x"][:30]
    rows = []
    for name in DEQUANTIZATIONS:
        for t in (0.001, 0.003, 0.006, 0.01, 0.015):
            found = bits_per_dim(denoiser, x, Levels(17), dequantization=name, t=t, tol=1e-3)
            row = {"dequantization": name, "t": t, "sigma": float(denoiser.schedule.sigma(t)), "bits_per_dim": found.value}
            rows.append({**row, "stderr": found.stderr, "evaluations": float(found.calls.mean())})
    best = {
        name: min((row for row in rows if row["dequantization"] == name), key=lambda row: row["bits_per_dim"])
        for name in DEQUANTIZATIONS
    }
    pair = [
        bits_per_dim(denoiser, x, Levels(17), dequantization=name, t=best[name]["t"], tol=1e-3).each
        for name in ("uniform", "truncated_normal")
    ]
    difference = pair[0] - pair[1]
    gain = {
        "uniform_minus_truncated_normal": float(difference.mean()),
        "stderr": float(difference.std() / math.sqrt(len(difference))),
    }
    return [*rows, {"each_at_its_best": gain}]


# ---- training --------------------------------------------------------------------------------------------------------------------------


def of_variance() -> dict[str, Any]:
    """Relative to independent draws uniform in lambda: the variance of a batch's loss, and of its gradient, all parameters together."""
    denoiser, data = fs.load("digits"), {"x": digits("train")["x"]}
    network = denoiser.network
    assert isinstance(network, nn.Module)
    network.requires_grad_(True)
    plain = DenoisingLoss(denoiser.schedule, "velocity", "noise", LambdaTimes())
    closed, measured = importance_of_weight(plain), measured_importance(plain, network, data, samples=64)
    assert isinstance(closed, LowDiscrepancy)
    assert isinstance(measured, LowDiscrepancy)
    ways = {
        "lambda": LambdaTimes(),
        "lambda, low discrepancy": LowDiscrepancy(LambdaTimes()),
        "importance of the weight (i-DODE)": closed.times,
        "importance of the weight, low discrepancy": closed,
        "importance measured": measured.times,
        "importance measured, low discrepancy": measured,
    }
    figures = {name: spread(dataclasses.replace(plain, times=times), network, data) for name, times in ways.items()}
    first = figures["lambda"]
    return {
        name: {
            "loss": row["loss"],
            "loss_stderr": row["loss_stderr"],
            "variance_of_loss": row["variance"] / first["variance"],
            "variance_of_gradient": row["gradient"] / first["gradient"],
        }
        for name, row in figures.items()
    }


def spread(objective: DenoisingLoss, network: nn.Module, data: dict[str, Tensor]) -> dict[str, float]:
    generator, losses, gradients = torch.Generator().manual_seed(0), [], []
    for k in range(120):
        rows = torch.randint(len(data["x"]), (32,), generator=generator)
        wanted = k < 40
        with torch.set_grad_enabled(wanted):
            loss = objective(network, {"x": data["x"][rows]}, generator)[0]
        losses.append(float(loss.detach()))
        if wanted:
            found = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
            gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    every = torch.stack(gradients)
    return {
        "loss": float(np.mean(losses)),
        "loss_stderr": float(np.std(losses, ddof=1) / math.sqrt(len(losses))),
        "variance": float(np.var(losses, ddof=1)),
        "gradient": float(every.var(0).sum()),
    }


def of_order() -> dict[str, Any]:
    """One element, one noisy state, the posterior by quadrature; `uncorrected` is the third moment about the wrong mean alone."""
    schedule, t, x_t = VPLinear(), 0.3, torch.tensor([[0.1]], dtype=torch.float64)
    exact = fs.exact.GaussianMixture(schedule, [[-0.8], [0.7]], [0.2, 0.1], [0.4, 0.6])
    objective = DenoisingLoss(schedule, "velocity")
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    kappa = alpha / sigma**2
    a, b = (float(v) for v in data_coefficients("velocity", np.asarray(alpha), np.asarray(sigma)))
    x_0 = torch.linspace(-4, 4, 4001, dtype=torch.float64)[:, None]
    log = exact.log_density(x_0, 0.0) - (x_t - alpha * x_0).square().sum(1) / (2 * sigma**2)
    probability = log.softmax(0)[:, None]
    noised = objective.noised(x_0, (x_t - alpha * x_0) / sigma, np.full(4001, t), np.ones(4001), {})
    deltas = [0.1 / 2**k for k in range(6)]
    off: dict[str, list[float]] = {"second": [], "third": [], "third, uncorrected": []}
    for delta in deltas:
        found = residuals(
            objective,
            lambda x, time, d=delta: (exact(x, t) + d * torch.sin(1.5 * x + 0.4) - a * x) / b,
            noised,
            torch.ones(1, 4001, 1, dtype=torch.float64),
        )
        slope = float(1.5 * delta * torch.cos(1.5 * x_t + 0.4))
        bend = float(-2.25 * delta * torch.sin(1.5 * x_t + 0.4))
        off["second"].append(abs(slope - float((found.second[0][:, None].detach() * probability).sum())))
        off["third"].append(abs(bend - float((found.third[0].detach() * probability).sum())))
        z = found.first.detach()
        centred = x_0 - exact(x_t, t)
        off["third, uncorrected"].append(abs(float((kappa**2 * (z**3 - centred**3) * probability).sum())))
    orders = {name: math.log2(values[-2] / values[-1]) for name, values in off.items()}
    return {"delta": deltas, "off": off, "order": orders}


def of_fine_tuning() -> dict[str, Any]:
    """Two seeds; the likelihood's weights with importance times; 32 held-out digits, truncated normal at t = 0.01."""
    schedule, data, x = VPLinear(), {"x": digits("train")["x"]}, digits("held_out")["x"][:32]
    config = SmallUNetConfig(1, 8, channels=(32, 64), blocks=(1, 1))
    plain = DenoisingLoss(schedule, "velocity", "noise", "lambda")
    first = dataclasses.replace(plain, times=importance_of_weight(plain))
    ways = {
        "first order": first,
        "second order": HighOrderLoss(first, second=0.1),
        "one probe": HighOrderLoss(first, second=0.1, probes=1),
    }
    figures: dict[str, Any] = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        start = SmallUNet(config)
        averages = fit(first, start, data, steps=400, batch_size=64, learning_rate=2e-3, ema=0.99, seed=seed).averages[0.99]
        for name, objective in {"start": None, **ways}.items():
            network = SmallUNet(config)
            network.load_state_dict(averages)
            began = time.process_time()
            if objective is not None:
                result = fit(objective, network, data, steps=80, batch_size=64, learning_rate=5e-4, warmup=10, ema=0.98, seed=seed)
                network.load_state_dict(result.averages[0.98])
            seconds = time.process_time() - began
            found = bits_per_dim(fs.Denoiser(network.eval(), schedule, "velocity"), x, Levels(17), t=0.01, tol=1e-3, draws=2)
            row = {
                "seed": seed,
                "bits_per_dim": found.value,
                "evaluations": float(found.calls.mean()),
                "cpu_seconds": round(seconds, 1),
            }
            figures.setdefault(name, []).append(row)
    return figures


PARTS = {
    "mixture": of_mixture,
    "byte": of_byte,
    "order": of_order,
    "variance": of_variance,
    "digits": of_digits,
    "fine_tuning": of_fine_tuning,
}

if __name__ == "__main__":
    raise SystemExit(main())
