r"""Trajectory distribution matching (TDM): a student of K deterministic calls, each of which ends in the teacher's distribution.

"Learning Few-Step Diffusion Models by Trajectory Distribution Matching" (arXiv 2503.06674). Times $0 = t_0 < t_1 < \dots < t_K$ (sigma is
0 at $t_0$); the student goes from $t_i$ to $t_{i-1}$ by DDIM, that is with its own noise prediction. No data are needed.

In every step of training each sample draws an interval i and, from the state at $t_i$ that the student's own earlier calls led to, one call
gives $x_0$ and $\varepsilon$, and the state $x_{mid} = \alpha_{mid} x_0 + \sigma_{mid}\varepsilon$ at $t_{i-1}$. It is noised to a time
$\tau$ in $(t_{i-1}, t_i)$,

$$ x_\tau = \tfrac{\alpha_\tau}{\alpha_{mid}} x_{mid} + \beta z, \qquad
   \beta^2 = \sigma_\tau^2 - \bigl(\tfrac{\alpha_\tau}{\alpha_{mid}} \sigma_{mid}\bigr)^2, $$

where the frozen teacher and the fake network are compared: $x_0$ moves along $g = D_\text{teacher}(x_\tau) - D_\text{fake}(x_\tau)$, by
the pseudo-Huber loss of $x_0 - \operatorname{sg}(x_0 + g)$ divided by $\operatorname{mean}|x_0 - D_\text{teacher}|$. Intervals do not
overlap, so $\tau$ tells the one fake network which of the K distributions is meant.

The fake network learns $x_0$ from $x_\tau$, with the weight $\min(\alpha_\tau^2/\sigma_\tau^2, 5)\,w$, where
$w = e^{-\operatorname{mean} e^2 / 2} / e^{-\operatorname{mean} z^2 / 2}$ and $e = (x_\tau - \alpha_\tau x_0)/\sigma_\tau$ accounts for the
noise in $x_\tau$ not being independent of $x_0$.

*Steps-aware*: a student of several K is told 1/K, and so is its fake network.

Note. In w the published code takes the mean over elements, where the ratio of the densities has the sum; the sum leaves one sample of a
batch in many dimensions. Gradients do not pass through $x_\tau$, as there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fewstep.distill.method import STUDENT, Training
from fewstep.distill.networks import copy_of, read_as, schedule_of
from fewstep.distill.states import call_times, column, conditions, draw_fractions, randn, start_noise, time_of
from fewstep.distill.told import Told
from fewstep.errors import PlanError
from fewstep.plan import Plan
from fewstep.schedules import NoiseSchedule
from fewstep.solvers.ddim import DDIM
from fewstep.train.stages import Stage

__all__ = ["TDM", "Landing", "trajectory_loss"]

FAKE = "fake"
FLOOR, GAP = 0.02, 0.01
"""Lowest fraction of the schedule's way at which distributions are matched, and how far below the upper end: 20 and 10 of 1,000 steps."""
MIN_SNR_GAMMA = 5.0
OPTIMIZER = functools.partial(torch.optim.AdamW, betas=(0.9, 0.999), weight_decay=0.01)


@dataclass(frozen=True)
class TDM:
    """Trajectory distribution matching.

    Args:
        steps: calls of the student; or several numbers for one student that knows how many it has: its network is then
            `TDM.wrapped`.
        update_ratio: steps of the fake network to one of the student. With 1 the fake network does not keep up: on digits, samples were
            six times as far from the teacher's.
        separate: intervals that do not overlap. Else tau is drawn up to the start for every one of them, and the fake network cannot know
            which distribution is meant: to see what that costs.
        importance: weigh the fake network's samples by w.
        huber: c of the pseudo-Huber loss, of each element.

    Example:
        >>> from fewstep.denoisers import Denoiser
        >>> from fewstep.schedules import Flow
        >>> plan = TDM(steps=4).plan(Denoiser(lambda x, time: x, Flow(t_end=0.0), "flow"), 4)
        >>> plan.grid.tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    steps: int | tuple[int, ...] = 4
    update_ratio: int = 3
    separate: bool = True
    importance: bool = True
    huber: float = 1e-3

    def __post_init__(self) -> None:
        if not all(type(number) is int for number in self.numbers):
            raise ValueError(f"TDM needs whole numbers of steps, got {self.steps!r}.")
        if not self.numbers or min(self.numbers) < 1 or len(set(self.numbers)) != len(self.numbers) or self.update_ratio < 1:
            raise ValueError(
                f"TDM needs numbers of steps, each once and at least 1, and update_ratio of at least 1, got {self.steps} "
                f"and {self.update_ratio}."
            )
        if not self.huber > 0.0:
            raise ValueError(f"TDM needs a positive huber, got {self.huber}.")

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of calls that the student is made for."""
        return tuple(self.steps) if isinstance(self.steps, (tuple, list)) else (self.steps,)

    def wrapped(self, network: nn.Module) -> nn.Module:
        """What the student's network is, of one like the teacher's: told the number of calls if there are several."""
        return Told(network) if len(self.numbers) > 1 else network

    def sampled(self, student: nn.Module, nfe: int) -> Callable[..., Tensor]:
        """The network that is called when a student makes so many calls."""
        return functools.partial(student, **self.told(nfe))

    def told(self, steps: int) -> dict[str, float]:
        """What the networks are told of the number of calls."""
        return {"told": 1.0 / steps} if len(self.numbers) > 1 else {}

    @property
    def needs_data(self) -> bool:
        """Whether batches must hold clean data."""
        return False

    def training(self, teacher: Callable[..., Tensor], student: nn.Module) -> Training:
        """The student and the fake network, each with its stage.

        Raises:
            TypeError: if a student of several numbers of calls cannot be told which.
        """
        network = student
        if len(self.numbers) > 1:
            if not isinstance(student, Told):
                raise TypeError(
                    f"a student for {self.numbers} calls is told how many: pass TDM(steps={self.steps}).wrapped(network)."
                )
            network = student.network
        fake = self.wrapped(copy_of(teacher, network))
        stages = (
            Stage(FakeLoss(self, teacher), FAKE, optimizer=OPTIMIZER, averaged=False),
            Stage(StudentLoss(self, teacher), STUDENT, optimizer=OPTIMIZER, every=self.update_ratio),
        )
        return Training({STUDENT: student, FAKE: fake}, stages)

    def plan(self, teacher: Callable[..., Tensor], nfe: int) -> Plan:
        """DDIM over the student's times, to sigma = 0.

        Raises:
            PlanError: for another number of calls than the student is trained for.
        """
        if nfe not in self.numbers:
            made = " or ".join(map(str, self.numbers))
            raise PlanError(f"this student is made for {made} calls, not {nfe}: train another with TDM(steps={nfe}).")
        schedule = schedule_of(teacher)
        return DDIM().plan(schedule, grid=[*call_times(schedule, nfe), schedule.t_zero])


# ---- one interval ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Landing:
    """Where one call on each sample leads, noised again.

    Attributes:
        x_0: the student's data prediction, ``"batch *shape"``; gradients pass through it.
        x_tau: the state at the end of the interval, noised.
        tau: to which time, ``"batch"``.
        weight: w, ``"batch"``.
    """

    x_0: Tensor
    x_tau: Tensor
    tau: NDArray[np.float64]
    weight: Tensor


def land(
    schedule: NoiseSchedule,
    state: tuple[Tensor, NDArray[np.float64]],
    x_0: Tensor,
    ends: tuple[NDArray[np.float64], NDArray[np.float64]],
    z: Tensor,
) -> Landing:
    """From a student's call to the state that is compared.

    Args:
        schedule: noise schedule.
        state: the state that the student was called on, and its times.
        x_0: what it predicted.
        ends: the times of the interval's end, and tau.
        z: noise of unit variance.
    """
    (x, t), (middle, tau) = state, ends
    levels = {
        name: (column(schedule.alpha(s), x), column(schedule.sigma(s), x)) for name, s in zip("gmt", (t, middle, tau), strict=True)
    }
    (alpha, sigma), (alpha_m, sigma_m), (alpha_t, sigma_t) = levels["g"], levels["m"], levels["t"]
    with torch.no_grad():
        eps = (x - alpha * x_0) / sigma
        kept = alpha_t / alpha_m
        beta = (sigma_t.square() - (kept * sigma_m).square()).clamp_min(0.0).sqrt()
        x_tau = kept * (alpha_m * x_0 + sigma_m * eps) + beta * z
        mixed = (kept * sigma_m * eps + beta * z) / sigma_t
        weight = (0.5 * (z.square() - mixed.square()).flatten(1).mean(1)).exp()
    return Landing(x_0, x_tau, tau, weight)


def trajectory_loss(
    teacher: Callable[..., Tensor], fake: Callable[..., Tensor], landing: Landing, cond: Mapping[str, Any], huber: float
) -> Tensor:
    """The student's loss for one call.

    Args:
        teacher, fake: denoisers.
        landing: where the call led.
        cond: conditions.
        huber: c, of each element.
    """
    x_0 = landing.x_0
    with torch.no_grad():
        real = teacher(landing.x_tau, landing.tau, **cond)
        target = x_0 + real - fake(landing.x_tau, landing.tau, **cond)
        size = (x_0 - real).abs().flatten(1).mean(1).reshape(-1, *[1] * (x_0.ndim - 1))
        scale = torch.where(size > 0.0, 1.0 / size, 0.0)
    return (scale * (((x_0 - target).square() + huber**2).sqrt() - huber)).mean()


# ---- objectives --------------------------------------------------------------------------------------------------------------------


def landed(
    method: TDM, teacher: Callable[..., Tensor], model: Any, batch: Mapping[str, Tensor], generator: torch.Generator
) -> tuple[Landing, dict[str, float]]:
    """A call on a state of each sample's own; and what the networks are told."""
    schedule, cond = schedule_of(teacher), conditions(batch)
    steps = method.numbers[int(torch.randint(len(method.numbers), (), generator=generator, device=generator.device))]
    told = method.told(steps)
    student = read_as(teacher, model[STUDENT])
    times = np.array([*call_times(schedule, steps), schedule.t_zero])
    alpha, sigma = schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
    states = [sigma[0] * start_noise(teacher, batch, generator)]
    with torch.no_grad():
        for k in range(steps - 1):
            x = states[-1]
            x_0 = student(x, float(times[k]), **cond, **told)
            states.append(alpha[k + 1] * x_0 + sigma[k + 1] * (x - alpha[k] * x_0) / sigma[k])
    count = len(states[0])
    which = torch.randint(steps, (count,), generator=generator, device=generator.device).cpu()
    x = torch.stack(states)[which.to(states[0].device), torch.arange(count, device=states[0].device)]
    number = which.numpy()
    t, middle = times[number], times[number + 1]
    upper = (steps - number) / steps if method.separate else np.ones(count)
    low = np.maximum(FLOOR, (steps - number - 1) / steps)
    tau = time_of(schedule, draw_fractions(count, low, np.maximum(upper - GAP, low), generator))
    x_0 = student(x, t, **cond, **told)
    return land(schedule, (x, t), x_0, (middle, tau), randn(x, generator)), told


@dataclass(frozen=True)
class StudentLoss:
    """The student's objective."""

    method: TDM
    teacher: Callable[..., Tensor]

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        landing, told = landed(self.method, self.teacher, model, batch, generator)
        fake = functools.partial(read_as(self.teacher, model[FAKE]), **told)
        return trajectory_loss(self.teacher, fake, landing, conditions(batch), self.method.huber), {}


@dataclass(frozen=True)
class FakeLoss:
    """The fake network's objective."""

    method: TDM
    teacher: Callable[..., Tensor]

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        with torch.no_grad():
            landing, told = landed(self.method, self.teacher, model, batch, generator)
        schedule, tau = schedule_of(self.teacher), landing.tau
        found = read_as(self.teacher, model[FAKE])(landing.x_tau, tau, **conditions(batch), **told)
        error = (found - landing.x_0).square().flatten(1).mean(1)
        weight = torch.as_tensor(np.minimum(np.exp(2.0 * schedule.lam(tau)), MIN_SNR_GAMMA)).to(error)
        if self.method.importance:
            weight = weight * landing.weight
        return (weight * error).mean(), {"error": error.detach().mean()}
