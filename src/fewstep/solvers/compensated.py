r"""Dynamic compensation (DC-Solver) around a multistep solver, and cascade polynomial regression of its ratios.

Source: "DC-Solver: Improving Predictor-Corrector Diffusion Sampler via Dynamic Compensation" (arXiv 2409.03755,
section 3), and its official code. A corrector changes the state, but not the stored prediction m_i that was made before. Call
i therefore replaces what it stores by the polynomial through the last three stored values, taken at another place,

$$ o_i = w_0 m_i + w_1 o_{i-1} + w_2 o_{i-2}, \qquad w_k = l_k(t'), \quad t' = \rho_i t_i + (1 - \rho_i)\, t_{i-1}, $$

before the predictor uses it; later steps see the replaced value too. The corrector at call i uses m_i itself. The *ratios* rho_i are
found for one model, grid and guidance scale; rho = 1 changes nothing. The first two calls have too few stored values and are not
compensated.

Regression. For other guidance scales w and numbers of calls N, the ratio of step i = 1, 2, ... is predicted by

$$ \rho = \sum_{c=0}^{3} x^c \sum_{b=0}^{2} u^b \sum_{a=0}^{2} n^a\, \phi_{cba}, \qquad x = i/N, \quad u = w/12, \quad n = N/50 . $$
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fewstep.artefacts import Artefact, frozen_json, json_value, read_as
from fewstep.errors import ArtefactError, PlanError, UnknownNameError
from fewstep.multistep import Multistep, Step, added
from fewstep.numerics import lagrange_polynomials
from fewstep.plan import Row
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver, Wrapper, check_order

__all__ = ["CascadePolynomial", "Compensated"]

Floats = NDArray[np.float64]
KIND = "compensation-regression"
SMALLEST_SHARE = 1e-3
"""A ratio that leaves a prediction a smaller weight than this in what is stored is refused: the corrector divides by it."""
UNCOMPENSATED = 2
"""The first calls, whose ratios are 1 in the regression."""
SCALE_UNIT, CALLS_UNIT = 12.0, 50.0


@dataclass(frozen=True)
class Compensated(Wrapper):
    """DC-Solver: a multistep solver with compensation ratios.

    Args:
        solver: any solver of one call a step. A corrector is told from the predictor for `UniPC` and `DPMSolverV3`; of other solvers a
            step is taken as a predictor as a whole.
        ratios: one a call. 1 where fewer than degree + 1 values at finite lambda are stored, so at the first calls.
        degree: of the polynomial; 2 in the paper.
        variable: what it is a polynomial in, ``"time"`` as published, or ``"lambda"``.

    Raises:
        ValueError: for a degree or variable that does not exist.
        TypeError: for a solver that is not of this kind.
        PlanError: when planning, if there are not as many ratios as calls, or a ratio is not 1 where it must be, or is so that the
            prediction would have next to no weight in what is stored.

    Note: the ratios are fitted step by step to a reference trajectory. A smaller error in every step can still be a larger one at the end:
        compare with ratios of 1 on samples of their own.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> from fewstep.solvers import UniPC
        >>> Compensated(UniPC(order=2), (1.0, 1.0, 0.9, 1.1)).plan(VPLinear(), nfe=4, grid="time").nfe
        4
    """

    source: ClassVar[str] = "DC-Solver, arXiv 2409.03755"

    solver: Solver
    ratios: tuple[float, ...]
    degree: int = 2
    variable: str = "time"

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver) or self.solver.stages != 1:
            raise TypeError(f"compensation needs a solver of one call a step, got {self.solver!r:.80}.")
        check_order(self.degree, (1, 2, 3), "the polynomial of the compensation has degree 1, 2 or 3")
        if self.variable not in ("time", "lambda"):
            raise UnknownNameError("variable", self.variable, ("time", "lambda"))
        object.__setattr__(self, "ratios", tuple(float(ratio) for ratio in self.ratios))

    @property
    def claimed_order(self) -> int:
        """That of the solver if nothing is compensated, else 1: a ratio moves a prediction by a share of its change over a step."""
        return self.solver.claimed_order if all(ratio == 1.0 for ratio in self.ratios) else 1

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        rows = list(self.solver.rows(schedule, times, calls))
        if len(self.ratios) != len(rows):
            raise PlanError(f"there are {len(self.ratios)} compensation ratios for a plan of {len(rows)} calls.")
        if all(ratio == 1.0 for ratio in self.ratios):
            return iter(rows)
        return self._compensated_rows(schedule, self.steps(schedule, times))

    def steps(self, schedule: NoiseSchedule, times: Floats) -> list[Step]:
        """The parts of the inner solver's steps on a checked grid, not compensated.

        Raises:
            TypeError: if its steps carry more than one state or store combined outputs.
        """
        if isinstance(self.solver, Multistep):
            return list(self.solver.steps(schedule, times))
        steps = []
        for row in self.solver.rows(schedule, times, [1] * (len(times) - 1)):
            (carry, *others) = row.carry
            if row.memory or others:
                raise TypeError(
                    f"compensation needs steps that carry one state and store plain outputs; {self.solver!r:.80} does not."
                )
            kind = "data" if isinstance(row.state_gain, float) and row.state_gain == 0.0 else "other"
            gains = {"state_gain": row.state_gain, "output_gain": row.output_gain}
            steps.append(Step(row.tau, carry, row.weights, stores=kind, offset=row.offset, noise=row.noise, **gains))
        return steps

    def polynomials(self, schedule: NoiseSchedule, steps: Sequence[Step]) -> list[Floats | None]:
        """For every call, ``"degree+1 degree+1"``: the weights of the stored values, newest first, as polynomials of the ratio minus 1,
        constant term first; None for a call that cannot be compensated.
        """
        levels = np.array([step.tau for step in steps])
        lam = schedule.lam(levels)
        places = levels if self.variable == "time" else lam
        kinds = [step.stores if math.isfinite(lam[i]) else "" for i, step in enumerate(steps)]
        found: list[Floats | None] = []
        for i, step in enumerate(steps):
            near = slice(max(0, i - self.degree), i + 1)
            if i < self.degree or set(kinds[near]) != {step.stores}:
                found.append(None)
                continue
            nodes = places[near][::-1]
            found.append(lagrange_polynomials((nodes - nodes[0]) / (nodes[0] - nodes[1])))
        return found

    def _compensated_rows(self, schedule: NoiseSchedule, steps: list[Step]) -> Iterator[Row]:
        polynomials = self.polynomials(schedule, steps)
        for i, (step, ratio, polynomial) in enumerate(zip(steps, self.ratios, polynomials, strict=True)):
            if ratio == 1.0:
                yield step.row()
            elif polynomial is None:
                raise PlanError(
                    f"ratio {i} is {ratio:g}, but call {i} has fewer than {self.degree + 1} stored values of its kind at finite lambda, "
                    f"so it cannot be compensated. Make this ratio 1."
                )
            else:
                yield _compensated(step, _shares(polynomial, ratio, i))


def _shares(polynomials: Floats, ratio: float, call: int) -> Floats:
    """The weights of the stored values, newest first, in the compensated one."""
    shares = polynomials @ (ratio - 1.0) ** np.arange(len(polynomials))
    if abs(shares[0]) < SMALLEST_SHARE:
        raise PlanError(
            f"ratio {call} is {ratio:g}, which leaves the prediction of call {call} a weight of {shares[0]:.1g}: no use."
        )
    return shares


def _compensated(step: Step, shares: Floats) -> Row:
    """The row that stores the compensated value; the corrector's part uses the plain one, m = (o - w_1 o_{-1} - ...) / w_0."""
    newest, earlier = float(shares[0]), tuple(shares[1:].tolist())
    correction = step.correction
    if correction:
        plain = correction[0] / newest
        correction = added((plain, *correction[1:]), (0.0, *(-plain * w for w in earlier)))
    row = dataclasses.replace(step, correction=correction).row()
    return dataclasses.replace(row, state_gain=newest * row.state_gain, output_gain=newest * row.output_gain, memory=earlier)


@dataclass(frozen=True, eq=False)
class CascadePolynomial:
    """Compensation ratios as a function of guidance scale and number of calls, fitted to ratios that were searched.

    Args:
        coefficients: phi, ``"4 3 3"``: for every power of x (constant first), u (highest first) and n (highest first), which is the order
            of the official files of 36 numbers.
        scales, calls: least and greatest guidance scale and number of calls of the fit. Beyond them nothing is predicted.
        provenance: JSON values: model fingerprint, solver, grid.

    Raises:
        ArtefactError: for coefficients of another shape or that are not finite.

    Note: fits to a few searched pairs have large coefficients that cancel, so nothing here extrapolates.

    Example:
        >>> found = {(scale, nfe): [1.0, 1.0] + [1.0 + 0.1 * scale / nfe] * (nfe - 2) for scale in (2.0, 4.0, 6.0) for nfe in (5, 8, 10)}
        >>> regression = CascadePolynomial.fit(found)
        >>> [round(ratio, 2) for ratio in regression.ratios(4.0, 8)[:4]]
        [1.0, 1.0, 1.05, 1.05]
    """

    coefficients: Floats
    scales: tuple[float, float]
    calls: tuple[int, int]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        coefficients = np.array(self.coefficients, np.float64)
        if coefficients.shape not in ((36,), (4, 3, 3)) or not np.isfinite(coefficients).all():
            raise ArtefactError(f"the regression has finite coefficients of shape (4, 3, 3), got {coefficients.shape}.")
        coefficients = coefficients.reshape(4, 3, 3)
        coefficients.setflags(write=False)
        object.__setattr__(self, "coefficients", coefficients)
        object.__setattr__(self, "provenance", frozen_json(self.provenance))

    @classmethod
    def fit(
        cls, found: Mapping[tuple[float, int], Sequence[float]], *, provenance: Mapping[str, Any] | None = None
    ) -> CascadePolynomial:
        """Least squares over all searched ratios at once; where they leave coefficients open, the smallest ones.

        Args:
            found: (guidance scale, number of calls) -> the ratio of every call.
            provenance: see above.

        Raises:
            ValueError: if a pair has not as many ratios as calls, or there is none with a ratio beyond the first two.
        """
        design, target = [], []
        for (scale, nfe), ratios in found.items():
            if len(ratios) != nfe:
                raise ValueError(f"{nfe} calls have {nfe} ratios, got {len(ratios)} at guidance scale {scale:g}.")
            for step, ratio in list(enumerate(ratios, start=1))[UNCOMPENSATED:]:
                design.append(_features(scale, nfe, step).ravel())
                target.append(ratio)
        if not target:
            raise ValueError(f"there are no ratios to fit: every plan needs more than {UNCOMPENSATED} calls.")
        solution = np.linalg.lstsq(np.array(design), np.array(target), rcond=None)[0]
        scales, calls = ([pair[k] for pair in found] for k in (0, 1))
        return cls(solution, (min(scales), max(scales)), (int(min(calls)), int(max(calls))), provenance or {})

    def ratios(self, guidance_scale: float, nfe: int) -> tuple[float, ...]:
        """The ratio of every call.

        Raises:
            ValueError: outside of what was fitted.
        """
        if not (self.scales[0] <= guidance_scale <= self.scales[1] and self.calls[0] <= nfe <= self.calls[1]):
            raise ValueError(
                f"the regression holds for guidance scales {self.scales[0]:g} to {self.scales[1]:g} and {self.calls[0]} to "
                f"{self.calls[1]} calls, not for {guidance_scale:g} and {nfe}. Search the ratios there."
            )
        predicted = (float((_features(guidance_scale, nfe, step) * self.coefficients).sum()) for step in range(1, nfe + 1))
        return tuple(1.0 if call < UNCOMPENSATED else ratio for call, ratio in enumerate(predicted))

    def save(self, path: str | PathLike[str]) -> None:
        """Write it to one ``.safetensors`` file with a checksum."""
        self._artefact().save(path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> CascadePolynomial:
        """Read what `save` wrote.

        Raises:
            ArtefactError: if the file is truncated, damaged, foreign or of a newer format.
        """

        def unpack(artefact: Artefact) -> CascadePolynomial:
            (low, high), (few, many) = artefact.meta["scales"], artefact.meta["calls"]
            return cls(artefact.tensors["coefficients"], (low, high), (few, many), artefact.meta["provenance"])

        return read_as(path, kind=KIND, what="regression", unpack=unpack, pack=lambda value: value._artefact())

    def _artefact(self) -> Artefact:
        meta = {"scales": list(self.scales), "calls": list(self.calls), "provenance": json_value(self.provenance)}
        return Artefact(KIND, meta, {"coefficients": self.coefficients})


def _features(scale: float, nfe: int, step: int) -> Floats:
    """``"4 3 3"``: x^c u^b n^a, the powers of u and n falling, as the coefficients have them."""
    x, u, n = step / nfe, scale / SCALE_UNIT, nfe / CALLS_UNIT
    return np.einsum("c,b,a->cba", x ** np.arange(4), u ** np.arange(2, -1, -1), n ** np.arange(2, -1, -1))
