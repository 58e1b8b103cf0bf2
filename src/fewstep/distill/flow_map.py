r"""FreeFlow: the teacher's whole path in one call, learned from noise alone, by predicting and correcting.

"Flow Map Distillation Without Data" (arXiv 2511.19428). On the straight path $y_r = (1 - r) x_0 + r\varepsilon$ the teacher's velocity
from noise to data is $u(y, r) = x_0 - \varepsilon$, read off its data prediction D as $(D - y)/r$. Any noise schedule is one of these
paths, with $r = \sigma/(\alpha + \sigma)$ and $y = x/(\alpha + \sigma)$; it begins at the R of its start: 1 for rectified flow, 0.94 for
Stable Diffusion. The student is the map $f(z, \delta) = z + \delta R\, F(z, \delta)$ from the start z to the path's point at
$r = R(1 - \delta)$. It is right if

$$ F + \delta\, \partial_\delta F = u\big(f(z, \delta),\, R(1 - \delta)\big) \quad \text{for all } z, \delta . $$

*Predict*: with $\Delta = F + \delta\,\partial_\delta F - u$ the gradient is $\operatorname{sg}(w \Delta)$ by F, where
$w = 1/(\operatorname{mean}\Delta^2 + 10^{-3})^k$. Errors add up along the path, and nothing of this sees it; hence

*correct*: samples $f(z, 1)$, noised to r, must have the teacher's distribution. A fake network is trained on them all along, and the
gradient by $F(z, 1)$ is $\operatorname{sg}(u_\text{fake} - u)$ at the noised samples, scaled to the size of the other.

The student's network begins as the teacher's at the start time, for every delta: delta enters by a branch that begins at zero, as a code of
low frequencies, for it is differentiated (`fewstep.distill.Told`). Sampling is one call with delta = 1.

Note. Written from two independent accounts of the paper that agree; the authors' code was not at hand. The distribution of r (logistic of a
normal of mean 1.4 and deviation 1) stands for "biased to 0.8".
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.distill.method import STUDENT, Training
from fewstep.distill.networks import copy_of, read_as, schedule_of
from fewstep.distill.states import column, conditions, randn, start_noise
from fewstep.distill.told import Told
from fewstep.errors import PlanError
from fewstep.plan import Plan
from fewstep.schedules import NoiseSchedule
from fewstep.solvers.ddim import DDIM
from fewstep.train.stages import Stage

__all__ = ["Derivative", "FiniteDifference", "FlowMap", "ForwardMode", "FreeFlow", "velocity"]

FAKE = "fake"
SMALLEST = 1e-3
"""Added to the mean square of an error before it divides."""
OPTIMIZER = functools.partial(torch.optim.AdamW, betas=(0.9, 0.999), weight_decay=0.0)

Function = Callable[[Tensor], Tensor]
Derivative = Callable[[Function, Tensor], tuple[Tensor, Tensor]]
"""``derivative(function, delta)`` -> the value, with gradients, and the derivative by delta, without."""


@dataclass(frozen=True)
class FiniteDifference:
    """Symmetric difference: two more calls, of any network, in the precision of the weights, also where others are called in less: the
    difference of numbers in half precision is mostly their rounding. In single precision not below h = 1e-3.

    Example:
        >>> value, slope = FiniteDifference(0.01)(lambda delta: delta**2, torch.tensor([3.0], dtype=torch.float64))
        >>> float(value), round(float(slope), 9)
        (9.0, 6.0)
    """

    h: float = 0.01

    def __post_init__(self) -> None:
        if not self.h > 0.0:
            raise ValueError(f"FiniteDifference needs a positive h, got {self.h}.")

    def __call__(self, function: Function, delta: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.autocast(delta.device.type, enabled=False):
            slope = (function(delta + self.h) - function(delta - self.h)) / (2.0 * self.h)
        return function(delta), slope


@dataclass(frozen=True)
class ForwardMode:
    """Forward-mode differentiation: exact; not for every attention kernel.

    Example:
        >>> value, slope = ForwardMode()(lambda delta: delta**2, torch.tensor([3.0]))
        >>> float(value), float(slope)
        (9.0, 6.0)
    """

    def __call__(self, function: Function, delta: Tensor) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # PyTorch's own, at its first use
            value, slope, *_ = torch.func.jvp(function, (delta,), (torch.ones_like(delta),))
        return value, slope.detach()


@dataclass(frozen=True)
class FreeFlow:
    """Flow map distillation without data.

    Args:
        correct: share of a batch that corrects; 0: none, and no fake network.
        strength: size of the correction's gradient beside the other's; 0.3 to 3 make little difference.
        power: k of the prediction's weight.
        derivative: by delta.
        update_ratio: steps of the fake network to one of the student.
        noise: mean and deviation of the normal whose logistic is r / R, for the noise on corrected samples.

    Example:
        >>> from fewstep.denoisers import Denoiser
        >>> from fewstep.schedules import Flow
        >>> FreeFlow().plan(Denoiser(lambda x, time: x, Flow(t_end=0.0), "flow"), 1).grid.tolist()
        [1.0, 0.0]
    """

    correct: float = 0.25
    strength: float = 1.0
    power: float = 1.0
    derivative: Derivative = FiniteDifference()
    update_ratio: int = 1
    noise: tuple[float, float] = (1.4, 1.0)

    def __post_init__(self) -> None:
        if not 0.0 <= self.correct <= 1.0 or self.update_ratio < 1:
            raise ValueError(
                f"FreeFlow needs correct in [0, 1] and update_ratio of at least 1, got {self.correct} and {self.update_ratio}."
            )
        if not (self.strength > 0.0 and self.power >= 0.0 and self.noise[1] > 0.0):
            raise ValueError(
                f"FreeFlow needs strength and the deviation of noise positive, and power >= 0, got {self.strength}, {self.noise} "
                f"and {self.power}."
            )

    def wrapped(self, network: nn.Module) -> nn.Module:
        """The student's network, of one like the teacher's: it is told delta, 1 if nothing is said."""
        return Told(network)

    @property
    def needs_data(self) -> bool:
        """Whether batches must hold clean data."""
        return False

    def training(self, teacher: Callable[..., Tensor], student: nn.Module) -> Training:
        """The student and, unless nothing is corrected, the fake network, each with its stage.

        Raises:
            TypeError: if the student cannot be told delta.
        """
        if not isinstance(student, Told):
            raise TypeError("FreeFlow's student is told how far to go: pass FreeFlow().wrapped(network).")
        # the correction's error begins at zero: no level to be watched
        first = Stage(StudentLoss(self, teacher), STUDENT, optimizer=OPTIMIZER, every=self.update_ratio, watched=self.correct < 1.0)
        if self.correct == 0.0:
            return Training({STUDENT: student}, (first,))
        fake = copy_of(teacher, student.network)
        second = Stage(FakeLoss(self, teacher), FAKE, optimizer=OPTIMIZER, averaged=False)
        return Training({STUDENT: student, FAKE: fake}, (first, second))

    def plan(self, teacher: Callable[..., Tensor], nfe: int) -> Plan:
        """One call.

        Raises:
            PlanError: for more.
        """
        if nfe != 1:
            raise PlanError(f"FreeFlow's student makes one call, not {nfe}: it leads from noise to data at once.")
        schedule = schedule_of(teacher)
        return DDIM().plan(schedule, grid=[schedule.t_start, schedule.t_zero])


# ---- the straight path of a schedule -----------------------------------------------------------------------------------------------


class FlowMap:
    """The student's map on the straight path that a schedule is.

    Args:
        teacher: denoiser.
        network: the student's, told delta.
    """

    def __init__(self, teacher: Callable[..., Tensor], network: Callable[..., Tensor]):
        self.schedule = schedule_of(teacher)
        self.student = read_as(teacher, network)
        self.start = ratio(self.schedule, self.schedule.t_start)
        self.scale = float(sum(levels(self.schedule, self.schedule.t_start)))

    def average(self, z: Tensor, delta: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """F(z, delta), the average velocity over the first part delta of the path; z at the scale of the straight path."""
        x_0 = self.student(self.scale * z, self.schedule.t_start, told=delta, **cond)
        return (x_0 - z) / self.start

    def end(self, z: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """f(z, 1) and F(z, 1)."""
        average = self.average(z, z.new_ones(len(z)), cond)
        return z + self.start * average, average


def levels(schedule: NoiseSchedule, t: Any) -> tuple[float, float]:
    """Alpha and sigma as numbers."""
    return float(schedule.alpha(t)), float(schedule.sigma(t))


def ratio(schedule: NoiseSchedule, t: float) -> float:
    """The share of noise, sigma / (alpha + sigma)."""
    alpha, sigma = levels(schedule, t)
    return sigma / (alpha + sigma)


def velocity(denoiser: Callable[..., Tensor], y: Tensor, r: Any, cond: Mapping[str, Any]) -> Tensor:
    """u(y, r), from noise to data, of a denoiser with any schedule. Below the schedule's last noise level: as at that level.

    Args:
        denoiser: ``D(x, t, **cond)``.
        y: points of the straight path, ``"batch *shape"``.
        r: their shares of noise, float64 ``"batch"``.
        cond: conditions.

    Example:
        >>> from fewstep.exact import Gaussian
        >>> from fewstep.schedules import Flow, VPLinear
        >>> y, r = torch.ones(1, 1, dtype=torch.float64), np.array([0.5])
        >>> a, b = (velocity(Gaussian(schedule, [3.0], 0.0), y, r, {}) for schedule in (Flow(), VPLinear()))
        >>> round(float(a), 9), round(float(b), 9)
        (4.0, 4.0)
    """
    schedule = schedule_of(denoiser)
    r = np.clip(r, ratio(schedule, schedule.t_end), ratio(schedule, schedule.t_start))
    with np.errstate(divide="ignore"):
        t = schedule.t_of_lam(np.log1p(-r) - np.log(r))
    scale = schedule.alpha(t) + schedule.sigma(t)
    return (denoiser(column(scale, y) * y, t, **cond) - y) / column(r, y)


# ---- objectives --------------------------------------------------------------------------------------------------------------------


def along(value: Tensor, gradient: Tensor) -> Tensor:
    """A loss of value ½ mean gradient², whose gradient by `value` is `gradient` over the number of elements."""
    return 0.5 * (value - (value - gradient).detach()).square().mean()


def part(cond: Mapping[str, Any], rows: slice, count: int) -> dict[str, Any]:
    """The conditions of some samples."""
    return {name: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == count else v for name, v in cond.items()}


@dataclass(frozen=True)
class StudentLoss:
    """The student's objective."""

    method: FreeFlow
    teacher: Callable[..., Tensor]

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        flow, cond = FlowMap(self.teacher, model[STUDENT]), conditions(batch)
        z = flow.start * start_noise(self.teacher, batch, generator)
        count, corrected = len(z), round(self.method.correct * len(z))
        rows, others = slice(corrected, count), slice(0, corrected)
        info: dict[str, Any] = {}
        loss, size = z.new_zeros(()), z.new_ones(())
        if corrected < count:
            average, error = self.predicted(flow, z[rows], part(cond, rows, count), generator)
            weight = 1.0 / (error.square().flatten(1).mean(1) + SMALLEST) ** self.method.power
            weighted = weight.reshape(-1, *[1] * (z.ndim - 1)) * error
            loss, size = len(average) / count * along(average, weighted), weighted.square().flatten(1).mean(1).sqrt().mean()
            info["prediction"] = error.square().mean()
        if corrected:
            average, error = self.corrected(flow, model[FAKE], z[others], part(cond, others, count), generator)
            found = error.square().flatten(1).mean(1).sqrt().mean()
            loss = loss + len(average) / count * along(average, self.method.strength * size / (found + 1e-8) * error)
            info["correction"] = error.square().mean()
        told = info.get("prediction", info.get("correction", loss.detach()))
        return told + (loss - loss.detach()), info  # the gradient of one, and the value of the other, which shows a divergence

    def predicted(self, flow: FlowMap, z: Tensor, cond: Mapping[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """F, and its error."""
        delta = torch.rand(len(z), generator=generator, dtype=torch.float64, device=generator.device).to(z.device)
        return prediction_error(flow, self.teacher, z, delta, cond, self.method.derivative)

    def corrected(
        self, flow: FlowMap, network: nn.Module, z: Tensor, cond: Mapping[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """F, and the difference of the distributions' velocities at noised samples."""
        x_0, average = flow.end(z, cond)
        y, r = noised_end(self.method, flow.start, x_0.detach(), generator)
        with torch.no_grad():
            return average, velocity(read_as(self.teacher, network), y, r, cond) - velocity(self.teacher, y, r, cond)


def prediction_error(
    flow: FlowMap, teacher: Callable[..., Tensor], z: Tensor, delta: Tensor, cond: Mapping[str, Any], derivative: Derivative
) -> tuple[Tensor, Tensor]:
    """F with gradients, and Delta = F + delta dF/ddelta - u without, both of z's shape."""
    average, slope = derivative(lambda d: flow.average(z, d, cond), delta.to(z.dtype))
    with torch.no_grad():
        step = delta.to(z.dtype).reshape(-1, *[1] * (z.ndim - 1))
        reached = z + flow.start * step * average
        r = flow.start * (1.0 - delta.double().cpu().numpy())
        return average, average + step * slope - velocity(teacher, reached, r, cond)


def noised_end(method: FreeFlow, start: float, x_0: Tensor, generator: torch.Generator) -> tuple[Tensor, Any]:
    """Samples on the straight path at random places, and these."""
    mean, deviation = method.noise
    normal = torch.randn(len(x_0), generator=generator, dtype=torch.float64, device=generator.device)
    r = start * torch.sigmoid(mean + deviation * normal).cpu().numpy()
    return column(1.0 - r, x_0) * x_0 + column(r, x_0) * randn(x_0, generator), r


@dataclass(frozen=True)
class FakeLoss:
    """The fake network's objective: the velocity of the student's samples, noised."""

    method: FreeFlow
    teacher: Callable[..., Tensor]

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        flow, cond = FlowMap(self.teacher, model[STUDENT]), conditions(batch)
        z = flow.start * start_noise(self.teacher, batch, generator)
        with torch.no_grad():
            x_0, _ = flow.end(z, cond)
        y, r = noised_end(self.method, flow.start, x_0, generator)
        # u = (D - y) / r and the target x_0 - eps = (x_0 - y) / r
        found = velocity(read_as(self.teacher, model[FAKE]), y, r, cond)
        return (found - (x_0 - y) / column(r, y)).square().mean(), {}
