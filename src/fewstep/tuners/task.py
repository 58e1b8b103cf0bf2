"""What every tuner works on: a denoiser that counts, exact paths to fit, others to validate on, and what untuned solvers reach there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.denoisers import innermost
from fewstep.plan import Plan
from fewstep.sampler import sample
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver
from fewstep.solvers import make_solver
from fewstep.tuners.paths import Paths, take_rows, trace_paths
from fewstep.tuners.sliced import sliced_distance

if TYPE_CHECKING:
    from fewstep.tuners.draws import Draws

__all__ = ["GRIDS", "UNTUNED", "Candidate", "Counted", "Errors", "Task", "errors_of"]

UNTUNED: dict[str, Solver] = {
    "auto": make_solver("flow_adams"),
    **{name: make_solver(name) for name in ("dpmpp_2m", "dpmpp_3m", "unipc", "deis", "ipndm_3", "flow_adams_2", "flow_adams_3")},
}
"""The untuned solvers that a tuned plan has to beat: those that are best in some cell of ``benchmarks/solvers.py`` or ``auto.py``."""
SCREENED, FINALISTS = 16, 4
"""Untuned settings are tried on so many noises, and so many of them on all."""
SAFE = "auto, auto"
"""The untuned setting that is tried on all of them whatever it does on a few."""
GRIDS = ("auto", "time", "quadratic", "lambda", "karras")


class Counted:
    """A denoiser that counts network evaluations, one a sample and call, and splits large batches into blocks.

    Args:
        denoiser: ``D(x, t, **cond)`` with a schedule.
        block: the most samples of a network call.

    Attributes:
        evaluations: how many so far. A guided pair counts as one.
    """

    def __init__(self, denoiser: Callable[..., Tensor], block: int):
        self.denoiser, self.block, self.evaluations = denoiser, block, 0
        self.schedule: NoiseSchedule = denoiser.schedule  # type: ignore[attr-defined]
        self.info = getattr(denoiser, "info", None)

    @property
    def rounds_times(self) -> bool:
        """Whether the network gets integer times."""
        return bool(innermost(self.denoiser, "integer_time"))

    @property
    def network_time(self) -> Callable[[np.ndarray], Any]:
        """From the schedule's times to the network's."""
        return innermost(self.denoiser, "network_time") or self.schedule.network_time

    @property
    def device(self) -> torch.device | None:
        """Where the network lies, if that is known."""
        network = innermost(self.denoiser, "network")
        found = next(network.parameters(), None) if isinstance(network, torch.nn.Module) else None
        return None if found is None else found.device

    @property
    def precision(self) -> torch.dtype | None:
        """The precision of the network, if it is known."""
        return innermost(self.denoiser, "network_dtype")

    @property
    def jumps(self) -> tuple[float, ...]:
        """Times at which the prediction jumps."""
        return tuple(getattr(self.denoiser, "jumps", ()))

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        """The data prediction ``"batch *shape"``."""
        self.evaluations += len(x)
        if len(x) <= self.block:
            return self.denoiser(x, t, **cond)
        each = isinstance(t, (Tensor, np.ndarray)) and t.ndim > 0
        parts = [slice(k, k + self.block) for k in range(0, len(x), self.block)]
        return torch.cat([self.denoiser(x[part], t[part] if each else t, **take_rows(cond, part)) for part in parts])


@dataclass(frozen=True)
class Errors:
    """Distances of samples from the exact ones, each the root mean square over a sample's elements.

    Attributes:
        rms: root mean square over the samples.
        median: over the samples.
    """

    rms: float
    median: float


def errors_of(samples: Tensor, exact: Tensor, weights: NDArray[np.float64] | None = None) -> Errors:
    """Compare samples ``"batch *shape"`` with the exact ones.

    Args:
        samples: of a plan.
        exact: from the same noise.
        weights: ``"batch"``: how many samples each one stands for; 1 when left out.

    Example:
        >>> errors_of(torch.tensor([[3.0], [1.0], [1.0]]), torch.zeros(3, 1)).median
        1.0
    """
    each = distances(samples, exact)
    if not np.isfinite(each).all():
        return Errors(math.inf, math.inf)
    shares = np.ones(len(each)) if weights is None else weights
    shares = shares / shares.sum()
    order = np.argsort(each)
    middle = order[np.searchsorted(np.cumsum(shares[order]), 0.5)]
    return Errors(float(np.sqrt(shares @ each**2)), float(each[middle]))


def distances(samples: Tensor, exact: Tensor) -> np.ndarray:
    """``"batch"``: the root mean square difference of every sample."""
    return (samples - exact).double().reshape(len(exact), -1).square().mean(1).sqrt().cpu().numpy()


@dataclass(frozen=True)
class Candidate:
    """A plan, and how it did on the validation noise.

    Attributes:
        name: what made it.
        plan: the plan.
        errors: on the validation noise.
        distance: of the distributions there: sliced Wasserstein between its samples and the exact ones.
        gain: in mean squared error over the untuned plan, in standard errors of the difference; 0 for an untuned plan.
        tuned: whether it was fitted to the model.
        challenge: root mean square errors of this plan and of the untuned one on noise that is hard for one of them; see
            `fewstep.tuners.hard`. None if it was not challenged.
    """

    name: str
    plan: Plan
    errors: Errors
    distance: float
    gain: float = 0.0
    tuned: bool = True
    challenge: tuple[float, float] | None = None

    @property
    def told(self) -> dict[str, Any]:
        """All but the plan, as JSON values."""
        told = {"name": self.name, "tuned": self.tuned, "distance": self.distance, "gain": self.gain, **asdict(self.errors)}
        return {**told, "challenge": None if self.challenge is None else list(self.challenge)}


@dataclass
class Task:
    """One model, one guidance, one set of conditions, exact paths.

    Attributes:
        denoiser: counts.
        fit: paths to fit to; not a fair sample of the noise, see `fewstep.tuners.draws.sensitive`.
        held_out: paths of noise that nothing is fitted to, with weights that make them a fair sample.
        final: where plans end, ``"t_end"`` or ``"zero"``.
        seed: of whatever is drawn at random.
        draw: more noise like that of the paths, and conditions.
        reference_calls: of an exact path.
        report: called with a line about what goes on.
        kept: what a method computes once for all numbers of calls, by the method's name.
        starts: number of calls -> a plan that learning may start from.
        features: of samples, in which distributions are compared; the samples themselves when left out.
    """

    denoiser: Counted
    schedule: NoiseSchedule
    fit: Paths
    held_out: Paths
    final: str
    seed: int
    draw: Draws
    reference_calls: int
    report: Callable[[str], None] = field(default=lambda line: None)
    began: float = field(default_factory=time.perf_counter)
    kept: dict[str, Any] = field(default_factory=dict)
    starts: dict[int, Plan] = field(default_factory=dict)
    features: Callable[[Tensor], Tensor] | None = None
    _untuned: dict[int, Candidate] = field(default_factory=dict)
    _squares: dict[int, np.ndarray] = field(default_factory=dict)

    @torch.no_grad()
    def judge(self, name: str, plan: Plan, *, tuned: bool = True) -> Candidate:
        """Run a plan on the validation noise."""
        samples, exact, weights = self.run(plan, self.held_out), self.held_out.target, self.held_out.weights
        each = distances(samples, exact)
        seen = self.features or (lambda images: images)
        distance = sliced_distance(seen(samples), seen(exact), weights)
        if not tuned:
            self._squares[id(plan)] = each**2
        gain = self._gain(each, plan.nfe) if tuned else 0.0
        return Candidate(name, plan, errors_of(samples, exact, weights), distance, gain, tuned)

    def _gain(self, errors: np.ndarray, nfe: int) -> float:
        """Of a plan with these errors over the best untuned one; one sample alone can make it 1."""
        base = self._squares[id(self.untuned(nfe).plan)]
        gains = self.held_out.shares * (base - errors**2)
        if not np.isfinite(gains).all():
            return -math.inf
        spread = float(gains.std()) / math.sqrt(len(gains))
        return float(gains.mean()) / spread if spread > 0.0 else 0.0

    def run(self, plan: Plan, paths: Paths) -> Tensor:
        """The samples that a plan makes of the paths' noise; NaN where the network fails."""
        return sample(self.denoiser, paths.noise, plan, cond=paths.cond, check=False)

    def trace(self, noise: Tensor, cond: dict[str, Any]) -> Paths:
        """Exact paths of other noise, on the grid of those to fit to."""
        return trace_paths(self.denoiser, noise, self.schedule, calls=self.reference_calls, cond=cond, final=self.final)

    def untuned(self, nfe: int) -> Candidate:
        """The best of the untuned solvers and grids at this number of calls, on the validation noise; found once."""
        if nfe in self._untuned:
            return self._untuned[nfe]
        plans = {
            f"{name}, {grid}": solver.plan(self.schedule, nfe, grid, final=self.final)
            for name, solver in UNTUNED.items()
            for grid in GRIDS
        }
        self._untuned[nfe] = min(self.screened(plans, tuned=False), key=lambda found: found.errors.rms)
        kept = {id(found.plan) for found in self._untuned.values()}
        self._squares = {key: squares for key, squares in self._squares.items() if key in kept}
        return self._untuned[nfe]

    def screened(self, plans: Mapping[str, Plan], *, tuned: bool = True) -> list[Candidate]:
        """The best few of some plans by name: all are tried on some of the validation noise, and the best few on the whole."""
        some = self.held_out.take(slice(SCREENED))
        order = sorted(plans, key=lambda name: errors_of(self.run(plans[name], some), some.target, some.weights).rms)
        safe = [name for name in order[FINALISTS:] if name == SAFE]  # few noises may hide how well it does
        return [self.judge(name, plans[name], tuned=tuned) for name in order[:FINALISTS] + safe]
