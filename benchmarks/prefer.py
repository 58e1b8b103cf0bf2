"""What preference learning of a distilled model is worth: ``python benchmarks/prefer.py`` writes ``benchmarks/results/prefer.json``.

The student of ``steer_student.py`` (digits, latent consistency distillation) in 4 calls, three of which draw noise. The reward is ink, the
mean brightness; a *gain* of 1 is one standard deviation of the student's own samples. FD is Frechet's distance in the features of the
classifier that comes along, of 4,000 samples from as many of the untuned student; its floor is that of two sets of the student. HF is the
power beyond half the Nyquist radius, relative to that of the winners.

- *PSO*, online, and with the sign of beta flipped.
- *winners*: from 2,000 pairs of the student's samples the one with more ink. Offline PSO learns from both; "naive" by the denoising loss on
  winners alone, at the plan's times, as many steps. Naive fine-tuning is expected to blur.
- *SPO* with a step-aware preference model, which is trained on the same pairs, beside the labels of whole runs (PSO's), at equal network
  calls of the student; the preference model's pairs and training cost more, which is recorded. Of each, the learning rate (and of the
  latter beta) is the one with the largest gain at an FD of at most LIMIT, on a seed of its own. Ablation: the resampler takes the best
  candidate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import distill_teacher
import steer_student
import torch
from distill_teacher import labels_of, sampled
from torch import Tensor

import fewstep as fs
from fewstep.evaluate import Frechet, digit_features
from fewstep.steer import PSO, SPO, OfflinePSO, Policy, StepPreference, best, fit_preference, make_reward, prefer, uniform
from fewstep.steer.policy import network_of, trained_copy, with_network
from fewstep.train.watched import Spent

RESULTS = Path(__file__).parent / "results" / "prefer.json"
COUNT, PAIRS, CALLS = 4000, 2000, 4
REFERENCE_SEED, JUDGE_SEED, PAIR_SEED = 6_000_000, 7_000_000, 8_000_000
STEPS, FEWER = 80, 40
BATCH, BATCH_SPO = 30, 38
"""Conditions in a step: 32 evaluations each for PSO, 25 for SPO with four candidates, a backward pass counted as two."""
RATES, BETAS, LIMIT = (3e-5, 1e-4, 3e-4), (10.0, 50.0), 0.1
PARTS = ("model", "methods")
INK = make_reward("ink")


class Judge:
    """The untuned student's samples, and what is measured against them."""

    def __init__(self, student: Any, teacher: Any):
        self.student, self.plan = student.denoiser, student.plan(CALLS)
        self.reference = sampled(self.student, self.plan, COUNT, REFERENCE_SEED)
        self.features, ink = digit_features(self.reference), INK(self.reference)
        self.mean, self.deviation = float(ink.mean()), float(ink.std())
        self.other = sampled(self.student, self.plan, COUNT, JUDGE_SEED)
        self.floor = self.fd(self.other)
        plan = fs.make_plan("auto", teacher.schedule, 20, final="zero")
        self.teacher_features = digit_features(sampled(teacher, plan, COUNT, 0))
        self.base = Frechet()(digit_features(self.other), self.teacher_features)

    def fd(self, samples: Tensor) -> float:
        return Frechet()(digit_features(samples), self.features)

    def gain(self, samples: Tensor) -> float:
        return (float(INK(samples).mean()) - self.mean) / self.deviation

    def __call__(self, denoiser: Any, winners: Tensor) -> dict[str, float]:
        x = sampled(denoiser, self.plan, COUNT, JUDGE_SEED)
        features = digit_features(x)
        within = sum(float(features[k::10].var(0).sum()) for k in range(10)) / 10
        found = {"gain": self.gain(x), "fd": self.fd(x), "fd_teacher": Frechet()(features, self.teacher_features)}
        return {key: round(v, 4) for key, v in {**found, "hf": power(x) / power(winners), "variance": within}.items()}


def power(x: Tensor) -> float:
    """Beyond half the Nyquist radius."""
    down, right = torch.fft.fftfreq(8)[:, None], torch.fft.rfftfreq(8)[None, :]
    return float(torch.fft.rfft2(x, norm="ortho").abs().square()[..., (down**2 + right**2).sqrt() > 0.25].mean())


def pairs_of(judge: Judge) -> dict[str, Tensor]:
    """Two samples of every condition, the one with more ink first."""
    a, b = (sampled(judge.student, judge.plan, PAIRS, PAIR_SEED + k * PAIRS) for k in (0, 1))
    first = (INK(a) > INK(b)).reshape(-1, 1, 1, 1)
    return {"x": torch.where(first, a, b), "worse": torch.where(first, b, a), "label": labels_of(PAIRS)}


def tuned(
    judge: Judge, method: Any, steps: int, batch: int, rate: float, seed: int, data: Any = None
) -> tuple[Any, dict[str, Any]]:
    """Tune, and say what it cost."""
    began = time.process_time()
    given = {"data": data} if data is not None else {"cond": {"label": torch.arange(10)}, "reward": INK}
    options = {"steps": steps, "batch_size": batch, "learning_rate": rate, "seed": seed, "judged": None, "log_every": steps}
    made = prefer(judge.student, judge.plan, method=method, **given, **options)
    told = {key: round(value, 4) for key, value in made.log[-1].items() if key.startswith(("kept", "clipped", "ties"))}
    return made.denoiser, {"evaluations": made.report["evaluations"], "cpu_seconds": round(time.process_time() - began, 1), **told}


def naive(judge: Judge, pairs: Mapping[str, Tensor], steps: int, rate: float, seed: int) -> Any:
    """Fine-tuned on winners by the denoising loss at the plan's times."""
    network = trained_copy(network_of(judge.student))
    denoiser, schedule, times = with_network(judge.student, network), judge.plan.schedule, judge.plan.tau

    def loss(model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        x, t = batch["x"], times[torch.randint(len(times), (len(batch["x"]),), generator=generator).numpy()]
        alpha, sigma = (torch.as_tensor(f(t), dtype=x.dtype).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
        state = alpha * x + sigma * torch.randn(x.shape, generator=generator)
        error = (denoiser(state, t, label=batch["label"]) - x).square().flatten(1).mean(1)
        return (error / sigma.flatten() ** 2).mean(), {}

    data = {"x": pairs["x"], "label": pairs["label"]}
    options = {"steps": steps, "batch_size": BATCH, "learning_rate": rate, "warmup": steps // 10, "decay": "constant", "ema": 0.9}
    network.load_state_dict(fs.fit(loss, network, data, seed=seed, **options).averages[0.9])
    return with_network(judge.student, network.eval())


def preference_model(judge: Judge, pairs: Mapping[str, Tensor]) -> tuple[StepPreference, dict[str, Any]]:
    """The step-aware preference model, and how often it is right at the plan's times on other pairs."""
    torch.manual_seed(0)
    network, began = StepPreference(1, classes=10, width=32), time.process_time()
    given = {"better": pairs["x"], "worse": pairs["worse"], "label": pairs["label"]}
    spent = Spent()
    fit_preference(network, judge.student, given, steps=300, batch_size=64, learning_rate=2e-3, spent=spent)
    fresh = (
        sampled(judge.student, judge.plan, 1000, PAIR_SEED + 10 * PAIRS),
        sampled(judge.student, judge.plan, 1000, PAIR_SEED + 11 * PAIRS),
    )
    label, right, sure = labels_of(1000), {}, {}
    with torch.no_grad():
        for t in [*judge.plan.tau, float(judge.plan.schedule.t_end)]:
            alpha, sigma, noise = (
                float(judge.plan.schedule.alpha(t)),
                float(judge.plan.schedule.sigma(t)),
                torch.randn(1000, 1, 8, 8),
            )
            scores = [
                network(judge.student(alpha * x + sigma * noise, float(t), label=label), float(t), label=label) for x in fresh
            ]
            right[f"{t:.3g}"] = round(float(((scores[0] > scores[1]) == (INK(fresh[0]) > INK(fresh[1]))).float().mean()), 4)
            sure[f"{t:.3g}"] = round(
                float(((0.5 * (scores[0] - scores[1])).abs().tanh() > SPO(network).threshold).float().mean()), 4
            )
    runs = {choose.__name__: runs_variance(judge, network, choose) for choose in (uniform, best)}
    return network, {
        "accuracy": right,
        "sure": sure,
        "variance of runs": runs,
        "evaluations": 2 * len(given["label"]) * judge.plan.nfe + spent.evaluations,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def runs_variance(judge: Judge, score: Any, choose: Any) -> float:
    """Variance of features within classes, of the ends of the runs that SPO learns from under a resampler."""
    policy = Policy(judge.student, judge.student, judge.plan, distill_teacher.SHAPE, None, torch.zeros(1, 1, 8, 8))
    objective, generator = SPO(score, choose=choose).objective(policy), torch.Generator().manual_seed(0)
    with torch.no_grad():
        noise = objective.steps.start(1000, policy.shape, generator, like=policy.like)
        features = digit_features(objective.draw(noise, {"label": labels_of(1000)}, generator)[0][-1])
    return round(sum(float(features[k::10].var(0).sum()) for k in range(10)) / 10, 4)


def chosen(judge: Judge, winners: Tensor, ways: Mapping[str, tuple[Any, int, float]]) -> tuple[str, dict[str, Any]]:
    """The way with the largest gain at an FD of at most LIMIT."""
    found = {}
    for name, (method, batch, rate) in ways.items():
        denoiser, cost = tuned(judge, method, FEWER, batch, rate, seed=100)
        found[name] = judge(denoiser, winners) | cost
        print("  ", name, found[name], flush=True)
    near = [name for name in found if found[name]["fd"] <= LIMIT] or list(found)
    return max(near, key=lambda name: found[name]["gain"]), found


def measured(judge: Judge, seeds: int) -> dict[str, Any]:
    pairs = pairs_of(judge)
    winners = pairs["x"]
    score, model = preference_model(judge, pairs)
    print("preference model", model, flush=True)
    runs_ways = {f"beta={b:g}, rate={r:g}": (PSO(beta=b), BATCH, r) for b in BETAS for r in RATES}
    step_ways = {f"rate={r:g}": (SPO(score), BATCH_SPO, r) for r in RATES}
    runs, runs_tried = chosen(judge, winners, runs_ways)
    step, step_tried = chosen(judge, winners, step_ways)
    greedy = SPO(score, choose=best)
    parts: dict[str, Callable[[int], tuple[Any, dict[str, Any]]]] = {
        "PSO": lambda seed: tuned(judge, PSO(), STEPS, BATCH, 1e-4, seed),
        "PSO, beta flipped": lambda seed: tuned(judge, PSO(beta=-50.0), FEWER, BATCH, 1e-4, seed),
        "offline PSO": lambda seed: tuned(judge, OfflinePSO(), STEPS, BATCH, 1e-4, seed, pairs),
        "naive": lambda seed: (naive(judge, pairs, STEPS, 1e-4, seed), {}),
        "labels of runs": lambda seed: tuned(judge, runs_ways[runs][0], FEWER, BATCH, runs_ways[runs][2], seed),
        "SPO": lambda seed: tuned(judge, step_ways[step][0], FEWER, BATCH_SPO, step_ways[step][2], seed),
        "SPO, best candidate": lambda seed: tuned(judge, greedy, FEWER, BATCH_SPO, step_ways[step][2], seed),
    }
    found: dict[str, Any] = {"untuned": [judge(judge.student, winners)]}
    for name, make in parts.items():
        found[name] = []
        for seed in range(seeds):
            denoiser, cost = make(seed)
            found[name].append(judge(denoiser, winners) | cost)
            print(name, found[name][-1], flush=True)
    tried = {"labels of runs": {"best": runs, "all": runs_tried}, "SPO": {"best": step, "all": step_tried}}
    return {"parts": found, "preference_model": model, "tried": tried}


def medians(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {key: round(statistics.median(c[key] for c in cells), 4) for key in cells[0]} for name, cells in parts.items()}


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Medians over seeds, and the bars."""
    rows = medians(report["parts"])
    floor, base, model = report["floor"], report["base"], report["preference_model"]
    sure, runs = list(model["sure"].values()), model["variance of runs"]
    blur = {name: 1.0 - rows[name]["hf"] / rows["untuned"]["hf"] for name in ("PSO", "offline PSO", "naive")}
    bars = {
        "PSO: gain >= 1": _bar(rows["PSO"]["gain"], 1.0),
        "PSO: FD <= 2 floors": _bar(rows["PSO"]["fd"] / floor, 2.0, most=True),
        "PSO, beta flipped: gain < 0": _bar(rows["PSO, beta flipped"]["gain"], 0.0, most=True),
        "naive blurs: HF loss >= 3 times PSO's": _bar(blur["naive"] / max(abs(blur["PSO"]), 1e-3), 3.0),
        "SPO: gain >= 1.2 times that of labels of runs": _bar(rows["SPO"]["gain"] / rows["labels of runs"]["gain"], 1.2),
        "SPO: FD to the teacher <= 1.5 times the untuned student's": _bar(rows["SPO"]["fd_teacher"] / base, 1.5, most=True),
        "preference model: surer of a pair at each less noisy time": _bar(min(b - a for a, b in itertools.pairwise(sure)), 0.0),
        "best candidate: variance within classes of the runs drops": _bar(runs["best"] / runs["uniform"], 1.0, most=True),
        "best candidate: variance within classes of the tuned model drops": _bar(
            rows["SPO, best candidate"]["variance"] / rows["SPO"]["variance"], 1.0, most=True
        ),
    }
    return {"medians": rows, "hf_loss": {k: round(v, 4) for k, v in blur.items()}, "preference model": model, "bars": bars}


def _bar(value: float, bar: float, *, most: bool = False) -> dict[str, Any]:
    return {"value": round(value, 4), "bar": bar, "holds": bool(value <= bar if most else value >= bar)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Preference learning of a distilled model of four calls.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--seeds", type=int, default=3, help="of training")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure; of the rest, results that are there are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    judge = Judge(steer_student.load(), distill_teacher.load())
    report: dict[str, Any] = {"command": "python benchmarks/prefer.py", "machine": "one core of a 2-core machine", "count": COUNT}
    report |= {"floor": round(judge.floor, 5), "base": round(judge.base, 5), "deviation": round(judge.deviation, 5), "limit": LIMIT}
    print({key: report[key] for key in ("floor", "base", "deviation")}, flush=True)
    wanted = options.parts.split(",")
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    report = {**{name: value for name, value in before.items() if name != "summary"}, **report}
    if "methods" in wanted:
        report |= measured(judge, options.seeds)
    elif "model" in wanted:
        report["preference_model"] = preference_model(judge, pairs_of(judge))[1]
    report["summary"] = summary(report)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
