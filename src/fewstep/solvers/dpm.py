r"""DPM-Solver and DPM-Solver++: multistep and single-step, of order 1, 2 and 3, for the ODE and, from data predictions, the SDE.

Sources: "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps" (arXiv 2206.00927; proposition 3.1,
algorithms 1 and 2; how calls are split is that of DPM-Solver-fast in the authors' code) for noise predictions; "DPM-Solver++: Fast
Solver for Guided Sampling of Diffusion Probabilistic Models" (arXiv 2211.01095; eq. 8 and algorithms 1 and 2 for the ODE,
SDE-DPM-Solver++ for the SDE) for data predictions.

The prediction is interpolated in lambda by a polynomial m, and the rest is integrated exactly. With $h = \lambda_t - \lambda_s$,
$\eta \ge 0$ (0: probability-flow ODE, 1: reverse SDE) and $z = (1 + \eta) h$, from data predictions

$$ x_t = \frac{\sigma_t}{\sigma_s} e^{-\eta h} x_s + \alpha_t \int_0^1 z\,e^{-z(1-u)}\, m(\lambda_s + u h)\,du
         + \sigma_t \sqrt{1 - e^{-2\eta h}}\;\xi . $$

From noise predictions alpha and sigma change places, and with them the sign of lambda: the ODE is

$$ x_t = \frac{\alpha_t}{\alpha_s} x_s - \sigma_t \int_0^1 h\,e^{h(1-u)}\, m(\lambda_s + u h)\,du . $$

Multistep methods take the values of m from earlier steps, single-step methods from states between s and t.

First-order steps are the same in both forms and are written without logarithms, so alpha_s = 0 and sigma_t = 0 are legal. Next to an
infinite lambda a step is first order, and that node stays out of later histories.

Left out: the SDE in noise-prediction form ("sde-dpmsolver" in libraries), whose noise is infinite at alpha = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UnknownNameError
from fewstep.grids import GridRule, Karras, Lambda, Power
from fewstep.multistep import trapezoidal_end
from fewstep.numerics import decaying_moments, exponential_weights, lagrange_polynomials, noise_clock
from fewstep.plan import Interval, Row
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver, check_order

__all__ = ["DPMSolver", "DPMSolverPP", "DPMSolverPPSinglestep", "DPMSolverSinglestep"]

Floats = NDArray[np.float64]
VARIANTS = ("midpoint", "taylor")
INNER: dict[str, GridRule] = {"lambda": Lambda(), "time": Power(1.0), "quadratic": Power(2.0), "karras": Karras()}
"""How single-step methods may space the states between two outer ones."""


@dataclass(frozen=True)
class DPMSolverPP(Solver):
    """DPM-Solver++ multistep ("2M" at order 2, "3M" at order 3), from data predictions.

    Args:
        order: 1, 2 or 3. The first steps have as many stored values as there are, so they are of lower order.
        variant: of every second-order step. ``"midpoint"`` is the published 2M; ``"taylor"`` integrates the linear interpolant exactly
            (``"heun"`` in some libraries). Both are of order 2; their errors differ at a given number of calls.
        eta: 0 the probability-flow ODE; 1 the reverse SDE (SDE-DPM-Solver++); any value of at least 0 has the same marginals.
        lower_order_final: in plans of fewer than this many calls, the last steps drop to order 2 and 1. The authors' code has 10; 0 never
            does. Steps into sigma = 0 are first order in any case.
        compat: ``"exact"``; ``"official"`` for the published third-order step; ``"diffusers"`` for that of diffusers up to 0.42, which
            differs from the published one for eta > 0.

    Raises:
        ValueError: for an order, variant, eta or compat that does not exist.

    Note:
        The first step of a multistep method has one stored value and is of order 1, which would cap the third order at 2 wherever the
        data prediction already changes at the start. At order 3 that step is therefore corrected when the second prediction is known
        (by the interpolant through both, as UniC does, arXiv 2302.04867; on the way back, where that overshoots, by the trapezoidal rule
        in the velocity eps - x_0), at no call. So order 3 with ``variant="taylor"`` is UniP-3 with its first step, and no other, corrected;
        ``"midpoint"`` differs from that in the second step alone, which is of order 2.

        The authors' code, and the libraries that follow it, leave out a factor 2 in the second difference of the third-order step,
        which then converges at order 2. The default is the step that converges at order 3; ``compat="official"`` reproduces the
        published one, start included. For the SDE diffusers has another error in that step, a sign, and converges at order 1;
        ``compat="diffusers"`` reproduces it.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> DPMSolverPP(order=3).plan(VPLinear(), nfe=8, grid="lambda").nfe
        8
    """

    source: ClassVar[str] = "DPM-Solver++, arXiv 2211.01095"

    order: int = 2
    variant: str = "midpoint"
    eta: float = 0.0
    lower_order_final: int = 0
    compat: str = "exact"

    def __post_init__(self) -> None:
        _check("DPM-Solver++", self.order, self.variant, self.eta)
        _check_name("compat", self.compat, ("exact", "official", "diffusers"))

    @property
    def claimed_order(self) -> int:
        if self.compat == "exact" or self.order < 3:
            return self.order
        return 1 if self.compat == "diffusers" and self.eta else 2

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        flaw = "none" if self.compat == "exact" else "sign" if self.compat == "diffusers" and self.eta else "half"
        return _multistep(_Nodes(schedule, times, self.eta), self.order, self.variant, self.lower_order_final, flaw)


@dataclass(frozen=True)
class DPMSolver(Solver):
    """DPM-Solver multistep, from noise predictions.

    Args:
        order: 1, 2 or 3; order 1 is DDIM.
        variant, lower_order_final: as of `DPMSolverPP`.
        compat: ``"exact"``, or ``"official"`` for the published third-order step, which lacks the same factor 2, start included.

    Raises:
        ValueError: for an order, variant or compat that does not exist.

    Note:
        At order 3 the first step, which is of order 1, is corrected when the second prediction is known, at no call: by the trapezoidal
        rule in the velocity eps - x_0. (The polynomial in lambda, as UniC takes it, has the same order; from near alpha = 0, where the
        noise prediction is steep, it overshoots.) With ``variant="taylor"`` every order is `DEIS` in ``"logrho"``, step for step;
        ``"midpoint"`` differs from it in the steps of order 2, of which order 3 has one, the second.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> DPMSolver(order=2).plan(VPLinear(), nfe=8, grid="lambda").nfe
        8
    """

    source: ClassVar[str] = "DPM-Solver, arXiv 2206.00927"

    order: int = 2
    variant: str = "midpoint"
    lower_order_final: int = 0
    compat: str = "exact"

    def __post_init__(self) -> None:
        _check("DPM-Solver", self.order, self.variant)
        _check_name("compat", self.compat, ("exact", "official"))

    @property
    def claimed_order(self) -> int:
        return self.order if self.compat == "exact" else min(self.order, 2)

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        flaw = "none" if self.compat == "exact" else "half"
        return _multistep(_Nodes(schedule, times, of_noise=True), self.order, self.variant, self.lower_order_final, flaw)


@dataclass(frozen=True)
class DPMSolverPPSinglestep(Solver):
    """DPM-Solver++ single-step ("2S" at order 2, "3S" at order 3), from data predictions: `order` calls a step, nothing remembered.

    Args:
        order: 1, 2 or 3, the calls of a step.
        variant: of the last combination in a step. ``"midpoint"`` is the published 2S and 3S, which uses the first and the last
            prediction; ``"taylor"`` integrates the polynomial through all of them exactly.
        eta: as of `DPMSolverPP`. The states inside a step get their share of the step's noise, so that both orders hold weakly too.
        inner: where the states inside a step lie: ``"lambda"`` spaces them evenly in lambda as the paper does (r = 1/2; r = 1/3 and
            2/3), ``"time"``, ``"quadratic"`` and ``"karras"`` as the grid of that name does, which is what the authors' code does.
        budget: how an order-3 plan spends its calls. ``"order"``: on steps of order 3, after one or two of order 2 if 3 does not divide
            the calls; it converges at order 3. ``"fast"``: DPM-Solver-fast, the paper's rule, which always ends with a step of order
            1 or 2, or 2 and 1; it converges at order 2, but with 16 calls or fewer its error is the smaller one more often than not.
        compat: ``"exact"``, or ``"diffusers"`` for its third-order step up to 0.42: another second state, as good as the paper's, and
            for eta > 0 with ``variant="taylor"`` an error of sign that lets it converge at order 1.

    Raises:
        ValueError: for an option that does not exist.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> solver = DPMSolverPPSinglestep(order=3, budget="fast")
        >>> solver.split(9), solver.split(10), solver.split(11)
        ([3, 3, 2, 1], [3, 3, 3, 1], [3, 3, 3, 2])
        >>> solver.plan(VPLinear(), nfe=8, grid="lambda").nfe
        8
    """

    source: ClassVar[str] = "DPM-Solver++, arXiv 2211.01095"
    cost: ClassVar[str] = "`order` calls a step"

    order: int = 2
    variant: str = "midpoint"
    eta: float = 0.0
    inner: str = "lambda"
    budget: str = "order"
    compat: str = "exact"

    def __post_init__(self) -> None:
        _check("DPM-Solver++", self.order, self.variant, self.eta)
        _check_singlestep(self.inner, self.budget, self.compat)

    @property
    def claimed_order(self) -> int:
        if self.order == 3 and self.eta and self.compat == "diffusers" and self.variant == "taylor":
            return 1
        return 2 if self.order == 3 and self.budget == "fast" else self.order

    @property
    def stages(self) -> int:
        return self.order

    def split(self, budget: int) -> list[int]:
        return _split(self.order, self.budget, budget)

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        nodes = _Nodes(schedule, _with_inner(schedule, times, calls, self.inner), self.eta)
        return _singlestep(nodes, calls, self.variant, self.compat)


@dataclass(frozen=True)
class DPMSolverSinglestep(Solver):
    """DPM-Solver single-step ("DPM-Solver-2", "DPM-Solver-3"), from noise predictions: `order` calls a step, nothing remembered.

    Args:
        order, variant, inner, budget: as of `DPMSolverPPSinglestep`; ``budget="fast"`` at order 3 is DPM-Solver-fast.
        compat: ``"exact"``, or ``"diffusers"`` for its third-order step, whose second state differs.

    Raises:
        ValueError: for an option that does not exist.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> DPMSolverSinglestep(order=3).plan(VPLinear(), nfe=10, grid="lambda").nfe
        10
    """

    source: ClassVar[str] = "DPM-Solver, arXiv 2206.00927"
    cost: ClassVar[str] = "`order` calls a step"

    order: int = 3
    variant: str = "midpoint"
    inner: str = "lambda"
    budget: str = "order"
    compat: str = "exact"

    def __post_init__(self) -> None:
        _check("DPM-Solver", self.order, self.variant)
        _check_singlestep(self.inner, self.budget, self.compat)

    @property
    def claimed_order(self) -> int:
        return 2 if self.order == 3 and self.budget == "fast" else self.order

    @property
    def stages(self) -> int:
        return self.order

    def split(self, budget: int) -> list[int]:
        return _split(self.order, self.budget, budget)

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        nodes = _Nodes(schedule, _with_inner(schedule, times, calls, self.inner), of_noise=True)
        return _singlestep(nodes, calls, self.variant, self.compat)


# ---- what both families share ------------------------------------------------------------------------------------------------------


class _Nodes:
    """The times of all states of a run, and one step of the linear part and the noise between two of them.

    In both forms a step is x_t = carry x_s + scale (integral of z e^{-z(1-u)} m) + noise.
    """

    def __init__(self, schedule: NoiseSchedule, times: Floats, eta: float = 0.0, of_noise: bool = False):
        self.times = times.tolist()
        self.lam, self.alpha, self.sigma = (f(times).tolist() for f in (schedule.lam, schedule.alpha, schedule.sigma))
        self.eta = eta
        self.of_noise = of_noise
        self.first = int(math.isinf(self.lam[0]))  # the first node that histories may hold

    def h(self, i: int, j: int) -> float:
        return self.lam[j] - self.lam[i]

    def z(self, i: int, j: int) -> float:
        return -self.h(i, j) if self.of_noise else (1.0 + self.eta) * self.h(i, j)

    def scale(self, j: int) -> float:
        return self.sigma[j] if self.of_noise else self.alpha[j]

    def carry(self, i: int, j: int) -> float:
        if self.of_noise:
            return self.alpha[j] / self.alpha[i]
        return self.sigma[j] / self.sigma[i] * (math.exp(-self.eta * self.h(i, j)) if self.eta else 1.0)

    def noise(self, i: int, j: int) -> Interval | None:
        if not self.eta or self.sigma[j] == 0.0:
            return None
        scale = self.sigma[j] * math.sqrt(-math.expm1(-2.0 * self.eta * self.h(i, j)))
        return Interval(scale, *(noise_clock(self.lam[k], self.eta) for k in (i, j)))

    def row(self, i: int, carry: Sequence[float] | Floats, weights: Sequence[float] | Floats) -> Row:
        """The row from node i to the next, weights on predictions of this form."""
        gains = (1.0 / self.sigma[i], -self.alpha[i] / self.sigma[i]) if self.of_noise else (0.0, 1.0)
        return Row(self.times[i], tuple(map(float, carry)), tuple(map(float, weights)), *gains, noise=self.noise(i, i + 1))

    def end_row(self, i: int) -> Row:
        """First order without logarithms, from the data prediction: the same numbers, finite at both ends."""
        carry = self.sigma[i + 1] / self.sigma[i] * (math.exp(-self.eta * self.h(i, i + 1)) if self.eta else 1.0)
        weight = self.alpha[i + 1] - self.alpha[i] * carry
        return Row(self.times[i], (carry,), (weight,), noise=self.noise(i, i + 1))


def _multistep(nodes: _Nodes, order: int, variant: str, lower_order_final: int, flaw: str) -> Iterator[Row]:
    nfe, first, lam = len(nodes.times) - 1, nodes.first, np.array(nodes.lam)
    for i in range(nfe):
        h = nodes.h(i, i + 1)
        if math.isinf(h):
            yield nodes.end_row(i)
            continue
        p = min(order, i - first + 1, nfe - i if nfe < lower_order_final else order)
        past = (lam[i + 1 - p : i + 1][::-1] - lam[i]) / h
        weights = nodes.scale(i + 1) * _interpolant(past, nodes.z(i, i + 1), variant, flaw)
        carry = np.array([nodes.carry(i, i + 1)])
        if i == first + 1 and p > 1 and order == 3 and flaw == "none":
            states, outputs = _late_correction(nodes, first)
            weights, carry = weights + carry * outputs, carry * states
        yield nodes.row(i, carry, weights)


def _late_correction(nodes: _Nodes, first: int) -> tuple[Floats, Floats]:
    """The end of the first step once the second prediction is there: weights of the states and of the newest two predictions.

    Where predictions weigh the more the nearer they are to the end of the step, so for noise and on the way back, the interpolant in
    lambda overshoots over a long step.
    """
    z = nodes.z(first, first + 1)
    if nodes.of_noise or z < 0.0:
        ends = slice(first, first + 2)
        return trapezoidal_end("noise" if nodes.of_noise else "data", np.array(nodes.alpha[ends]), np.array(nodes.sigma[ends]))
    return np.ones(1), nodes.scale(first + 1) * (exponential_weights([1.0, 0.0], z) - [0.0, -math.expm1(-z)])


def _interpolant(places: Floats, z: float, variant: str, flaw: str = "none") -> Floats:
    """Weights of the predictions at these places (in units of the step, 0 its begin) in a multistep step.

    `flaw`, of the third order: "half" the quadratic term, or half and a wrong "sign" of 1/2 in its integral.
    """
    if len(places) == 2 and variant == "midpoint":
        return _midpoint(float(places[1]), z)[::-1]
    if len(places) == 3 and flaw != "none":
        moments = decaying_moments(z, 3) * [1.0, 1.0, 0.5]
        return lagrange_polynomials(places) @ (moments - [0.0, 0.0, float(flaw == "sign")])
    return exponential_weights(places, z)


def _midpoint(place: float, z: float) -> Floats:
    """Weights of the prediction at `place` and of that at the begin: the slope, times half of the integral of m."""
    slope = 0.5 / place
    return -math.expm1(-z) * np.array([slope, 1.0 - slope])


def _singlestep(nodes: _Nodes, calls: Sequence[int], variant: str, compat: str) -> Iterator[Row]:
    """Every state of a step is carry(s, .) x_s + weights; written from the state before, so that noise is carried along."""
    begin = 0
    for count in calls:
        end = begin + count
        if math.isinf(nodes.h(begin, end)):
            yield nodes.end_row(begin)
        else:
            before = np.zeros(0)
            for i in range(begin, end):
                after = nodes.scale(i + 1) * _stage(nodes, begin, i + 1, end, variant, compat)
                carry = nodes.carry(i, i + 1)
                yield nodes.row(i, [carry], after - carry * np.concatenate([[0.0], before]))
                before = after
        begin = end


def _stage(nodes: _Nodes, begin: int, stage: int, end: int, variant: str, compat: str) -> Floats:
    """Weights over `scale` of the step's predictions, newest first, in the state at node `stage`."""
    z, h = nodes.z(begin, stage), nodes.h(begin, stage)
    places = np.array([nodes.h(begin, k) / h for k in range(stage - 1, begin - 1, -1)])
    if len(places) == 1:
        return exponential_weights(places, z)
    inner = stage < end
    if len(places) == 2:
        # the second state of a third-order step integrates its straight line exactly, in the paper as in the Taylor variant
        as_midpoint = variant == "midpoint" and (not inner or compat == "diffusers")
        return _midpoint(float(places[0]), z) if as_midpoint else exponential_weights(places, z)
    if variant == "midpoint":
        newest, oldest = exponential_weights(places[[0, 2]], z)
        return np.array([newest, 0.0, oldest])
    if compat == "diffusers" and nodes.eta:
        return lagrange_polynomials(places) @ (decaying_moments(z, 3) - [0.0, 0.0, 2.0])
    return exponential_weights(places, z)


def _with_inner(schedule: NoiseSchedule, times: Floats, calls: Sequence[int], inner: str) -> Floats:
    """The times of all states: those of the grid, and those inside the steps."""
    nodes = [times[:1]]
    for (s, t), count in zip(pairwise(times.tolist()), calls, strict=True):
        between = INNER[inner](schedule, count, s, t)[1:-1] if count > 1 else []
        nodes.append(np.array([*between, t]))
    return np.concatenate(nodes)


def _split(order: int, rule: str, budget: int) -> list[int]:
    """The calls of every step. Two steps of order 2 cost a third-order method nothing of its order, one of order 1 does."""
    full, rest = divmod(budget, order)
    if order == 3 and full and rest == 0 and rule == "fast":
        return [3] * (full - 1) + [2, 1]
    if order == 3 and full and rule == "order":
        return {0: [], 1: [2, 2], 2: [2]}[rest] + [3] * (full - (rest == 1))
    return [order] * full + [rest] * (rest > 0)


def _check(name: str, order: int, variant: str, eta: float = 0.0) -> None:
    check_order(order, (1, 2, 3), f"{name} has orders 1, 2 and 3")
    if not 0.0 <= eta <= 10.0:
        raise ValueError(f"eta must lie in [0, 10], got {eta:g}.")
    _check_name("variant", variant, VARIANTS)


def _check_singlestep(inner: str, budget: str, compat: str) -> None:
    _check_name("inner", inner, tuple(INNER))
    _check_name("budget", budget, ("order", "fast"))
    _check_name("compat", compat, ("exact", "diffusers"))


def _check_name(kind: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise UnknownNameError(kind, name, names)
