r"""DPM-Solver-v3: a multistep solver that uses empirical statistics of the model.

Source: "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics" (arXiv 2310.13268, section 3), and its
official code. The statistics l, s and b (`fewstep.statistics`) turn the noise prediction into $f = (\sigma\varepsilon - l x)/\alpha$
and f into $g = e^{S_s - S} f - e^{S_s} \int_s e^{-S} b$, which varies less. With all integrals from $\lambda_s$ on:

$$ x_t = \frac{\alpha_t}{\alpha_s} e^{-L} x_s - \alpha_t e^{-L} \Big( \sum_{k \ge 0} E_k\, g^{(k)}_s + \int_s^t e^{L+S}\, e^{S_s}
         {\textstyle\int_s} e^{-S} b \Big), \qquad E_k = \int_s^t e^{L+S} \frac{(\lambda - \lambda_s)^k}{k!}\,d\lambda . $$

The derivatives of g are those of the polynomial through the last p values; the *pseudo* ones are estimated from as few values as each
needs. A corrector repeats the step with the value at its end as a further node. f is kept as it was at the predicted state.

Next to an infinite lambda a step is first order on the data prediction and not corrected, and that node stays out of later histories.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.errors import UnknownNameError
from fewstep.grids import GridRule, check_grid
from fewstep.multistep import Multistep, Step, added, taylor_weights
from fewstep.plan import Entry
from fewstep.schedules import NoiseSchedule
from fewstep.solver import check_order
from fewstep.statistics import Integrals, ModelStatistics

__all__ = ["DPMSolverV3"]

Floats = NDArray[np.float64]
CORRECTORS = ("none", "same", "pseudo", "raised")


@dataclass(frozen=True)
class DPMSolverV3(Multistep):
    """DPM-Solver-v3 of order 1, 2 or 3.

    Args:
        statistics: of this model, at this guidance scale. They may be scalars, or one number a channel or an element; a plan holds what it
            needs of them at its own nodes.
        order: p. The first steps have as many stored values as there are.
        pseudo: whether the predictor's derivatives are pseudo ones.
        corrector: ``"none"``; ``"same"``, of the predictor's order, so first-order steps have none; ``"pseudo"``, of one more order with
            pseudo derivatives; ``"raised"``, of one more order in earnest, which the paper does not have.
        corrector_above: calls at this time or a cleaner one do not correct. The official ``half`` is 0.5.
        lower_order_final: the last steps drop to orders p-1, ..., 1.
        compat: ``"exact"``, or ``"official"``: the authors' quadrature by trapezoids between the nodes of the statistics, and times moved
            to the nearest nodes.

    Raises:
        ValueError: for an order, corrector or compat that does not exist.

    Note:
        The authors' readme says that ``half`` corrects for t <= 0.5; their code corrects for t > 0.5, and that is what is here.

        Where g already changes at the start, order 2 is the most that holds, since the first step is of order 1; 3 with ``"raised"``, which
        corrects that step in earnest. Pseudo derivatives are accurate to first order, which makes order 2 in all. The defaults are those of
        the authors' readme.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> DPMSolverV3(ModelStatistics.degenerate(VPLinear())).plan(VPLinear(), nfe=5, grid="lambda").nfe
        5
    """

    source: ClassVar[str] = "DPM-Solver-v3, arXiv 2310.13268"

    statistics: ModelStatistics
    order: int = 3
    pseudo: bool = False
    corrector: str = "pseudo"
    corrector_above: float = 0.0
    lower_order_final: bool = True
    compat: str = "exact"

    def __post_init__(self) -> None:
        if not isinstance(self.statistics, ModelStatistics):
            raise TypeError(f"statistics must be a fewstep.statistics.ModelStatistics, got {type(self.statistics).__name__}.")
        check_order(self.order, (1, 2, 3), "DPM-Solver-v3 has orders 1, 2 and 3")
        if self.corrector not in CORRECTORS:
            raise UnknownNameError("corrector", self.corrector, CORRECTORS)
        if self.compat not in ("exact", "official"):
            raise UnknownNameError("compat", self.compat, ("exact", "official"))

    @classmethod
    def published(
        cls, statistics: ModelStatistics, nfe: int, family: str = "pixels", *, guidance_scale: float | None = None
    ) -> DPMSolverV3:
        """The options with which the authors ran a number of calls.

        Args:
            statistics, nfe: see above.
            family: ``"pixels"`` (their CIFAR-10 model in continuous time), ``"edm"``, ``"guided"`` (ImageNet-256 with a classifier) or
                ``"latent"``.
            guidance_scale: of a latent model; None without guidance.

        Example:
            >>> from fewstep.schedules import VPLinear
            >>> solver = DPMSolverV3.published(ModelStatistics.degenerate(VPLinear()), 5)
            >>> solver.pseudo, solver.corrector
            (True, 'same')
        """
        if family == "latent":
            corrected = guidance_scale is None or guidance_scale < 5.0
            return cls(statistics, 3 if guidance_scale is None else 2, corrector="pseudo" if corrected else "none")
        if family == "guided":
            return cls(statistics)
        if family not in ("pixels", "edm"):
            raise UnknownNameError("family", family, ("pixels", "edm", "guided", "latent"))
        corrected = nfe <= 6 if family == "edm" else nfe not in (9, 10)
        lowered = family == "edm" or nfe > 5
        return cls(statistics, pseudo=nfe <= 5, corrector="same" if corrected else "none", lower_order_final=lowered)

    @property
    def claimed_order(self) -> int:
        if self.corrector == "raised" and self.corrector_above <= 0.0:
            order = min(self.order + 1, 3)
        elif self.corrector == "pseudo" and self.corrector_above <= 0.0:
            order = 2
        else:
            order = min(self.order, 2)
        return min(order, 2) if self.lower_order_final else order

    def steps(self, schedule: NoiseSchedule, times: Floats) -> Iterator[Step]:
        lam, alpha, sigma = schedule.lam(times), schedule.alpha(times), schedule.sigma(times)
        self.statistics.check(schedule, lam[np.isfinite(lam)])
        nfe, first = len(times) - 1, int(np.isinf(lam[0]))
        correction: tuple[tuple[Entry, ...], Entry] = ((), 0.0)
        for i in range(nfe):
            if math.isinf(lam[i + 1] - lam[i]):
                carry = float(sigma[i + 1] / sigma[i])
                yield Step(float(times[i]), carry, (float(alpha[i + 1] - alpha[i] * carry),))
                continue
            order = min(self.order, i - first + 1, nfe - i if self.lower_order_final else self.order)
            past = [float(lam[i - k]) for k in range(order)]
            move = _Move.of(self.statistics, past, float(lam[i + 1]), "trapezoid" if self._official else "gauss")
            scale = -alpha[i + 1] * move.decay
            weights, offset = move.combine(self._predictor(order), scale)
            gain = (1.0 - self.statistics.at(past[0])) / alpha[i]  # sigma eps = x - alpha D, so f = (1 - l) x / alpha - D
            yield Step(
                float(times[i]),
                move.decay * (alpha[i + 1] / alpha[i]),
                weights[1:],  # the first is of the value at the end
                state_gain=gain,
                output_gain=-1.0,
                stores="v3",
                correction=correction[0],
                offset=offset,
                correction_offset=correction[1],
            )
            correction = ((), 0.0)
            derivatives = self._corrector(order) if times[i + 1] > self.corrector_above else []
            if derivatives:
                corrected, shift = move.combine(derivatives, scale)
                correction = added(corrected, [-w for w in weights]), shift - offset

    def _provenance(self, grid: Any, start: float | None, final: str) -> dict[str, Any]:
        """With the model of the statistics, if they say it, so that a run with another one is refused."""
        told, model = super()._provenance(grid, start, final), self.statistics.provenance.get("model")
        return {**told, "tuned": {"model": model}} if isinstance(model, Mapping) else told

    @property
    def _official(self) -> bool:
        return self.compat == "official"

    def _predictor(self, order: int) -> list[list[int]]:
        """Which values estimate each derivative: 1 is the one at the end of the step, 2 and on the past before its begin."""
        return [[*range(2, k + 2 if self.pseudo else order + 1)] for k in range(1, order)]

    def _corrector(self, order: int) -> list[list[int]]:
        if self.corrector == "none":
            return []
        highest = order - 1 if self.corrector == "same" else order
        return [[*range(1, k + 1 if self.corrector == "pseudo" else highest + 1)] for k in range(1, highest + 1)]

    def _steps(
        self, schedule: NoiseSchedule, nfe: int | None, grid: str | GridRule | ArrayLike, start: float | None, final: str
    ) -> tuple[Floats, list[int]]:
        times, calls = super()._steps(schedule, nfe, grid, start, final)
        if self._official:
            lam, nodes = schedule.lam(times), self.statistics.lam
            finite = np.isfinite(lam)
            self.statistics.check(schedule, lam[finite])
            nearest = np.abs(lam[finite][:, None] - nodes).argmin(1)
            times[finite] = schedule.t_of_lam(nodes[nearest])
            times = check_grid(times, schedule)
        return times, calls


@dataclass(frozen=True)
class _Move:
    """A step in the variables g of its begin."""

    integrals: Integrals
    offsets: list[float]
    maps: list[tuple[Entry, Entry]]

    @classmethod
    def of(cls, statistics: ModelStatistics, past: Sequence[float], end: float, rule: str) -> _Move:
        """From the newest of the past lambdas to the end; values are ordered: begin, end, the past before the begin."""
        places = [past[0], end, *past[1:]]
        maps: list[tuple[Entry, Entry]] = [statistics.align(place, past[0], rule=rule) for place in places]
        integrals = statistics.integrals(past[0], end, count=len(past) + 1, rule=rule)
        return cls(integrals, [place - past[0] for place in places], maps)

    @property
    def decay(self) -> Floats:
        return np.exp(-self.integrals.L)

    def combine(self, derivatives: list[list[int]], scale: Entry) -> tuple[tuple[Entry, ...], Entry]:
        """Weights of the values f, newest (the end) first, and the offset."""
        on_g = taylor_weights(self.integrals.moments, self.offsets, derivatives)
        on_f = [scale * w * u for w, (u, _) in zip(on_g, self.maps, strict=True)]
        offset = scale * (self.integrals.forcing + sum(w * v for w, (_, v) in zip(on_g, self.maps, strict=True)))
        return (on_f[1], on_f[0], *on_f[2:]), offset
