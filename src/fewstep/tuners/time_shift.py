r"""The window and the cutoff of a time shift, and the factor of epsilon scaling, chosen for a model, a plan and a number of calls.

Sources: "Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps" (arXiv 2305.15583), whose authors
search both on a grid for every data set, solver and number of calls, by FID; "Elucidating the Exposure Bias in Diffusion Models" (arXiv
2308.15321, section 5.1), whose authors do so with the factor. Here every choice is judged by the distance of the samples from the exact
ones of the same noise, or by any function of the samples; the best few are compared once more, with noise that the search did not see
among it; and the choice is none if it does not do better than none on a third part, for the distance by more than a standard error of
the gain. (Three times, because these corrections seldom gain much, and the best of many noisy figures is too good.)

Exact paths are those of the network itself, for which what is gained is discretisation error. The bias of a network shows against data
only: pass ``objective``, or paths of a better network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from fewstep.errors import MissingExtraError
from fewstep.grids import GridRule
from fewstep.plan import Plan
from fewstep.sampler import Hooks, sample
from fewstep.solver import Solver
from fewstep.solvers import EpsilonScale, TimeShift
from fewstep.tuners.judge import Judge, Objective
from fewstep.tuners.paths import Paths
from fewstep.tuners.task import Counted, distances

__all__ = ["ChosenScale", "ChosenShift", "epsilon_scale", "time_shift"]

WINDOWS = (0.005, 0.01, 0.02, 0.04, 0.08)
CUTOFFS = (0.0, 0.3, 0.6)
"""Shares of the schedule's interval of time; published windows are 0.01 to 0.03, cutoffs 0.3 to 0.9."""
SCALES = (0.98, 1.06)
"""Between which a factor is searched; published are 1.0012 to 1.017, for a hundred calls."""
TRIALS, PRECISE = 14, 2e-4
FINALISTS = 4
HELD_OUT = 0.25
"""Share of the paths that have the last word."""


class ChosenShift(NamedTuple):
    """What was chosen.

    Attributes:
        hook: for ``Hooks(time=...)``; None for none.
        report: JSON values: the losses on the paths searched on (``tried``), on the next (``decided``) and on the rest (``held_out``)
            with the choice and without.
    """

    hook: TimeShift | None
    report: dict[str, Any]

    @property
    def hooks(self) -> Hooks:
        """For `fewstep.sample`."""
        return Hooks(time=self.hook)


class ChosenScale(NamedTuple):
    """What was chosen.

    Attributes:
        solver: with the factor; the given one itself if none is better.
        scale: the factor; 1 for none.
        report: as of `ChosenShift`.
    """

    solver: Solver
    scale: float
    report: dict[str, Any]


def time_shift(
    denoiser: Callable[..., Tensor],
    plan: Plan,
    *,
    paths: Paths,
    windows: Sequence[float] = WINDOWS,
    cutoffs: Sequence[float] = CUTOFFS,
    data_variance: float | None = None,
    objective: Objective | None = None,
    block: int = 256,
) -> ChosenShift:
    """Choose the window, the cutoff and the criterion of a time shift, or none.

    Args:
        denoiser: ``D(x, t, **cond)``, which takes one time a sample.
        plan: without noise of its own.
        paths: exact paths, see `fewstep.tuners.trace_paths`, of at least 64 elements a sample. On 9/16 of them all choices are
            compared, on 12/16, these included, the best few and none, and the rest has the last word.
        windows, cutoffs: shares of the schedule's interval of time; each is tried with each.
        data_variance: mean over the data of the variance over a sample's elements, for the corrected criterion; left out, that of
            the exact samples. The paper's criterion is tried as well.
        objective: of samples ``"batch *shape"``, less is better; the distance from the exact ones when left out.
        block: the most samples of a network call.

    Raises:
        ValueError: for a plan that draws noise, fewer than 8 paths, or samples of fewer than 64 elements.

    Example:
        >>> import torch, fewstep as fs
        >>> exact = fs.exact.Gaussian(fs.schedules.VPLinear(), torch.zeros(64), 0.1)
        >>> paths = fs.tuners.trace_paths(exact, fs.draw_noise((64,), range(16)), exact.schedule, calls=16)
        >>> plan = fs.make_plan("ddim", exact.schedule, 4)
        >>> chosen = time_shift(exact, plan, paths=paths, windows=(0.02,), cutoffs=(0.3,))
        >>> chosen.report["held_out"]["chosen"] <= chosen.report["held_out"]["none"]
        True
        >>> samples = fs.sample(exact, paths.noise, plan, hooks=chosen.hooks)
    """
    schedule = plan.schedule
    span, clean = abs(schedule.t_start - schedule.t_end), min(schedule.t_start, schedule.t_end)
    variance = float(paths.target.flatten(1).double().var(1).mean()) if data_variance is None else data_variance
    tried: dict[Any, TimeShift | None] = {(0.0, 0.0, "none"): None}
    for window in windows:
        for cutoff in cutoffs:
            for name, value in (("paper", None), ("corrected", variance)):
                tried[window, cutoff, name] = TimeShift(schedule, window * span, clean + cutoff * span, value)
    runs, rest = _runs(denoiser, paths, lambda hook: (plan, Hooks(time=hook)), block, plan.stochastic)
    judge = Judge(runs, objective, len(tried))
    none = next(iter(tried))
    for key, hook in tried.items():
        judge(key, lambda hook=hook: hook)
    key, told = _decided(judge, dict.fromkeys([none, *judge.best(FINALISTS)]), tried, none, rest)
    losses = [{"window": w, "cutoff": c, "criterion": name, "loss": loss} for (w, c, name), loss in judge.losses.items()]
    chosen = {"window": key[0] * span, "cutoff": key[1], "criterion": key[2], "data_variance": variance}
    return ChosenShift(tried[key], {**chosen, "tried": losses, **told, "evaluations": runs.denoiser.evaluations})


def epsilon_scale(
    denoiser: Callable[..., Tensor],
    solver: Solver,
    *,
    paths: Paths,
    nfe: int | None = None,
    grid: str | GridRule | ArrayLike = "auto",
    final: str = "t_end",
    objective: Objective | None = None,
    bounds: tuple[float, float] = SCALES,
    block: int = 256,
) -> ChosenScale:
    """Search the factor of epsilon scaling by Brent's method, or choose none.

    Args:
        denoiser: ``D(x, t, **cond)``.
        solver: what is scaled.
        paths: exact paths, divided as for `time_shift`.
        nfe, grid, final: of the plan, see `fewstep.solver.Solver.plan`.
        objective: of samples ``"batch *shape"``, less is better; the distance from the exact ones when left out.
        bounds: between which factors is searched.
        block: the most samples of a network call.

    Raises:
        ValueError: for a solver that draws noise, or fewer than 8 paths.
        MissingExtraError: without SciPy.

    Example:
        >>> import torch, fewstep as fs
        >>> exact = fs.exact.Gaussian(fs.schedules.VPLinear(), torch.zeros(2), 0.1)
        >>> paths = fs.tuners.trace_paths(exact, fs.draw_noise((2,), range(16)), exact.schedule, calls=32)
        >>> chosen = epsilon_scale(exact, fs.solvers.DDIM(), paths=paths, nfe=8)  # DDIM leaves too much noise
        >>> 1.0 < chosen.scale < 1.06
        True
        >>> plan = chosen.solver.plan(exact.schedule, nfe=8)
    """
    try:
        from scipy.optimize import minimize_scalar
    except ImportError as error:
        raise MissingExtraError("SciPy", "tune", "Searching a factor by Brent's method") from error

    def planned(scale: float) -> Plan:
        return (solver if scale == 1.0 else EpsilonScale(solver, scale)).plan(paths.schedule, nfe, grid, final=final)

    runs, rest = _runs(denoiser, paths, lambda scale: (planned(scale), None), block, planned(1.0).stochastic)
    judge = Judge(runs, objective, TRIALS + 2)
    options = {"maxiter": TRIALS, "xatol": PRECISE}
    judge(1.0, lambda: 1.0)
    minimize_scalar(lambda scale: judge(float(scale), lambda: float(scale)), bounds=bounds, method="bounded", options=options)
    scales = {scale: scale for scale in judge.losses}
    scale, told = _decided(judge, dict.fromkeys([1.0, *judge.best(FINALISTS)]), scales, 1.0, rest)
    losses = [{"scale": tried, "loss": loss} for tried, loss in judge.losses.items()]
    report = {"scale": scale, "tried": losses, **told, "evaluations": runs.denoiser.evaluations}
    return ChosenScale(solver if scale == 1.0 else EpsilonScale(solver, scale), scale, report)


@dataclass(frozen=True)
class _Runs:
    """Runs a model with what is tried."""

    denoiser: Counted
    settings: Callable[[Any], tuple[Plan, Hooks | None]]
    fit: Paths

    def run(self, plan: Any, paths: Paths) -> Tensor:
        """The samples."""
        numbers, hooks = self.settings(plan)
        return sample(self.denoiser, paths.noise, numbers, cond=paths.cond, hooks=hooks, check=False)


def _runs(
    denoiser: Callable[..., Tensor],
    paths: Paths,
    settings: Callable[[Any], tuple[Plan, Hooks | None]],
    block: int,
    stochastic: bool,
) -> tuple[_Runs, Paths]:
    """What runs, with the paths to search and to decide on; and the others."""
    if stochastic:
        raise ValueError("the plan draws noise, so its samples are not to be compared with the ends of exact paths.")
    if paths.count < 8:
        raise ValueError(f"{paths.count} paths are too few to search on some, to decide on others and to check on the rest.")
    cut = paths.count - max(2, round(HELD_OUT * paths.count))
    counted = denoiser if isinstance(denoiser, Counted) else Counted(denoiser, block)
    return _Runs(counted, settings, paths.take(slice(cut))), paths.take(slice(cut, None))


def _decided(
    judge: Judge, finalists: Mapping[Any, Any], settings: Mapping[Any, Any], none: Any, rest: Paths
) -> tuple[Any, dict[str, Any]]:
    """The best of the finalists on what the search did not see, or none if it does not help on the rest; and what to report of it."""
    key, loss = judge.decide({key: settings[key] for key in finalists})
    last = {name: judge.loss(settings[each], rest) for name, each in (("none", none), ("chosen", key))}
    if not last["chosen"] < last["none"] or (judge.objective is None and not _helps(judge, settings[none], settings[key], rest)):
        key, last["refused"], last["chosen"] = none, last["chosen"], last["none"]
    return key, {"decided": loss, "held_out": last}


def _helps(judge: Judge, none: Any, chosen: Any, paths: Paths) -> bool:
    """Whether the samples come nearer to the exact ones by more than a standard error of what is gained."""
    before, after = (distances(judge.task.run(each, paths), paths.target) for each in (none, chosen))
    gains = before - after
    return bool(gains.mean() > gains.std() / np.sqrt(len(gains)))
