r"""Latent consistency distillation (LCM), and its adapters (LCM-LoRA).

The student becomes a consistency function: from every state of a path of the teacher's ODE it predicts the path's end,

$$ f(x, t) = c_\text{skip}(t)\, x + c_\text{out}(t)\, D_\theta(x, t), \qquad f(x, t_0) = x . $$

Of N solver times $t_1 < \dots < t_N$ one is drawn, the data are noised to it, $x_t = \alpha x_0 + \sigma\varepsilon$, and one step of DDIM
with the (guided) teacher leads to the time before, $t' = t_{n-1}$: the *skipping step*. Student and target must agree,

$$ L = \rho\big( f_\theta(x_t, t) - \operatorname{sg} f_{\theta^-}(\hat x_{t'}, t') \big), \qquad
   \hat x_{t'} = \tfrac{\sigma'}{\sigma} x_t + \big(\alpha' - \alpha \tfrac{\sigma'}{\sigma}\big) D_w(x_t, t), $$

with $\rho$ the mean over elements of $\sqrt{u^2 + c^2} - c$ ("huber") or $u^2$ ("l2"), and $\theta^-$ a running average of $\theta$, or
$\theta$ itself.

*Tables* (discrete times): $t_n$ has the index $nk - 1$ with k = T / N, so 19, 39, ..., 999 for T = 1000 and N = 50; the time before is
k earlier, but at least index 0, where $c_\text{skip} = 1$ and $c_\text{out} = 0$. With u ten times the index and $\sigma_d = 0.5$,
$c_\text{skip} = \sigma_d^2 / (u^2 + \sigma_d^2)$ and $c_\text{out} = u / \sqrt{u^2 + \sigma_d^2}$, as in the authors' code. At the first
solver time $c_\text{skip}$ is 7e-6: the boundary is a switch, not a blend.

*Continuous schedules*: N intervals from t_end to t_start, equal in the schedule's own time, but Karras' levels for `EDM`. The boundary is
at t_end, and a switch: (1, 0) there, (0, 1) at every later solver time. The blend's two factors do not add up to 1 between.

*Guidance.* A teacher with classifier-free guidance of one scale bakes it in. With ``guidance=(low, high)``, a range of the scale s of
`fewstep.guidance` (the papers write w = s - 1), every sample is taught under a scale of its own, and a student that is told the scale
(``embedded``) can be asked for any of them; one that is not learns their average, as LCM-LoRA does.

Sources: "Latent Consistency Models" (arXiv 2310.04378); "LCM-LoRA: A Universal Stable-Diffusion Acceleration Module" (arXiv 2311.05556).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fewstep.denoisers import without_limits
from fewstep.distill.method import RESERVED, STUDENT, Training
from fewstep.distill.networks import read_as
from fewstep.distill.states import column
from fewstep.distill.student_network import GuidanceEmbedded, sharing_copy
from fewstep.errors import PlanError, UnknownNameError
from fewstep.grids import make_grid
from fewstep.identity import identity
from fewstep.plan import Plan
from fewstep.schedules import EDM, FromAlphasCumprod, FromBetas, NoiseSchedule
from fewstep.solvers import make_solver
from fewstep.train.stages import Stage

__all__ = ["LCM", "SolverTimes", "solver_times"]

Floats = NDArray[np.float64]
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
"""Of an index of a table, in the boundary conditions of the authors' code."""
LOSSES = ("huber", "l2")
NOISE, INDEX, SCALE = "lcm.noise", "lcm.index", "lcm.guidance"
"""What is drawn for a batch."""


@dataclass(frozen=True)
class SolverTimes:
    """The N solver times, least noisy first, and the times before them.

    Attributes:
        time, before: ``"N"``.
        skip, out: ``"2 N"``: c_skip and c_out at the times, and at the times before.
    """

    time: Floats
    before: Floats
    skip: Floats
    out: Floats


def solver_times(schedule: NoiseSchedule, count: int) -> SolverTimes:
    """The times of a schedule between which the student learns to agree.

    Raises:
        ValueError: if a table has fewer entries than that.

    Example:
        >>> import numpy as np
        >>> from fewstep.schedules import Flow
        >>> schedule = FromBetas(np.linspace(1e-4, 0.02, 1000))
        >>> times = solver_times(schedule, 50)
        >>> schedule.network_time(times.time)[[0, 1, -1]].tolist(), schedule.network_time(times.before)[[0, 1, -1]].tolist()
        ([19.0, 39.0, 999.0], [0.0, 19.0, 979.0])
        >>> solver_times(Flow(t_end=0.0), 4).before.tolist()
        [0.0, 0.25, 0.5, 0.75]
    """
    if isinstance(schedule, (FromBetas, FromAlphasCumprod)):
        size = len(schedule.betas if isinstance(schedule, FromBetas) else schedule.alphas_cumprod)
        skipped = size // count
        if not skipped:
            raise ValueError(f"a table of {size} times has no {count} solver times; take fewer solver_steps.")
        index = np.arange(1, count + 1) * skipped - 1
        index = index[(index + 1.0) / size <= schedule.t_start + 1e-9]
        both = np.stack([index, np.maximum(index - skipped, 0)])
        u = (TIMESTEP_SCALING * both).astype(np.float64)
        squared = np.square(u) + SIGMA_DATA**2
        time, before = (both + 1.0) / size
        return SolverTimes(time, before, SIGMA_DATA**2 / squared, u / np.sqrt(squared))
    times = make_grid("karras" if isinstance(schedule, EDM) else "time", schedule, count)[::-1]
    skip = np.zeros((2, count))
    skip[1, 0] = 1.0
    return SolverTimes(times[1:], times[:-1], skip, 1.0 - skip)


@dataclass(frozen=True)
class LCM:
    """Latent consistency distillation, for latents and pixels, and networks of any kind of prediction.

    Args:
        solver_steps: N, solver times between which the student must agree.
        loss: ``"huber"`` or ``"l2"``.
        huber_c: c of the Huber loss.
        guidance: lowest and highest guidance scale that samples are taught under; left out, the teacher's own. The paper's range of w,
            2 to 14, is (3, 15).
        embedded: the student is told the scale.
        target_decay: of the running average that is the target; None: the student itself.

    Raises:
        UnknownNameError: for another loss.
        ValueError: for options that make no sense.

    Note:
        Settings of the paper: w from 2 to 14, a decay of 0.999943, Huber. Of the script that most students were made with: w from 5 to 15,
        0.95, l2 by default and Huber with c = 0.001 in its guide; for adapters, the student itself as target. The defaults here are Huber,
        0.001, and 0.95, for adapters too: with itself as target, the one that was measured drifted away.

        With more calls samples can become worse: each adds its error to what is noised again. See the method's page.

    Example:
        >>> import fewstep as fs
        >>> LCM().plan(fs.load("digits"), 4).tau.round(2).tolist()
        [1.0, 0.76, 0.5, 0.26]
    """

    solver_steps: int = 50
    loss: str = "huber"
    huber_c: float = 1e-3
    guidance: tuple[float, float] | None = None
    embedded: bool = False
    target_decay: float | None = 0.95

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UnknownNameError("loss of LCM", self.loss, LOSSES)
        if type(self.solver_steps) is not int or not isinstance(self.huber_c, (int, float)):
            raise ValueError(
                f"LCM needs a whole number of solver_steps and a number huber_c, got {self.solver_steps!r}, {self.huber_c!r}."
            )
        if self.solver_steps < 1 or not self.huber_c > 0.0:
            raise ValueError(
                f"LCM needs solver_steps of at least 1 and a positive huber_c, got {self.solver_steps}, {self.huber_c}."
            )
        if self.target_decay is not None and not 0.0 <= self.target_decay < 1.0:
            raise ValueError(f"target_decay is in [0, 1), or None for no average, got {self.target_decay}.")
        if self.guidance is not None:
            if not isinstance(self.guidance, (tuple, list)) or len(self.guidance) != 2:
                raise ValueError(
                    f"guidance is a range (lowest scale, highest scale), got {self.guidance!r}; for one scale, leave it out and guide the "
                    "teacher."
                )
            low, high = self.guidance
            if not low <= high:
                raise ValueError(f"guidance is the lowest and the highest scale, got {self.guidance}.")
            object.__setattr__(self, "guidance", (float(low), float(high)))
        elif self.embedded:
            raise ValueError("a student that is told the guidance scale needs a range to learn, such as guidance=(3, 15).")

    def wrapped(self, network: nn.Module) -> nn.Module:
        """The network of the student, from a copy of the teacher's."""
        return GuidanceEmbedded(network) if self.embedded else network

    @property
    def needs_data(self) -> bool:
        """Whether batches must hold clean data."""
        return True

    def training(self, teacher: Callable[..., Tensor], student: nn.Module) -> Training:
        """What is trained.

        Raises:
            TypeError: for a range of guidance, and a teacher without guidance whose scale could be another.
        """
        if self.guidance is not None and not hasattr(teacher, "with_scale"):
            raise TypeError(
                "guidance=(low, high) needs a teacher with guidance, whose scale it draws: fewstep.guidance.ClassifierFree(...)."
            )
        target = None if self.target_decay is None else sharing_copy(student).requires_grad_(False).eval()
        schedule = read_as(teacher, student).schedule
        objective = Consistency(self, schedule, str(identity(teacher)), teacher, target, solver_times(schedule, self.solver_steps))
        return Training({STUDENT: student}, (Stage(objective, trains=STUDENT),))

    def plan(self, teacher: Callable[..., Tensor], nfe: int) -> Plan:
        """Every S-th of the solver times from the noisiest, each called once; after a call, noise of the next is drawn anew.

        For a table of 1000 and S = 4 the network is told 999, 759, 499 and 259.
        """
        if not 1 <= nfe <= self.solver_steps:
            raise PlanError(f"this student is sampled in 1 to {self.solver_steps} calls, the solver times it learns, not in {nfe}.")
        schedule: NoiseSchedule = teacher.schedule  # type: ignore[attr-defined]
        times = solver_times(schedule, self.solver_steps).time[::-1]
        chosen = times[np.floor(np.linspace(0, len(times), nfe, endpoint=False)).astype(int)]
        scaling = TIMESTEP_SCALING if isinstance(schedule, (FromBetas, FromAlphasCumprod)) else None
        return make_solver("lcm", timestep_scaling=scaling).plan(schedule, grid=[*chosen, schedule.t_zero], final="zero")


@dataclass(frozen=True)
class Consistency:
    """The objective of `LCM`."""

    method: LCM
    schedule: NoiseSchedule
    made_for: str
    teacher: Callable[..., Tensor] = field(repr=False)
    target: nn.Module | None = field(repr=False)
    times: SolverTimes = field(repr=False)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The target, which checkpoints keep."""
        return {} if self.target is None else {"target": self.target}

    def draw_whole(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Noise, the solver time and the guidance scale of every sample."""
        x = batch["x"]
        drawn = {NOISE: torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device)}
        drawn[INDEX] = torch.randint(len(self.times.time), (len(x),), generator=generator, device=generator.device)
        if self.method.guidance is not None:
            low, high = self.method.guidance
            drawn[SCALE] = low + (high - low) * torch.rand(len(x), generator=generator, device=generator.device)
        return {**batch, **{name: value.to(x.device) for name, value in drawn.items()}}

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch that `draw_whole` gave, and ``{"difference"}``: the root mean square of what it is the loss of."""
        x_0, index, student = batch["x"], batch[INDEX].cpu().numpy(), model[STUDENT]
        cond = {name: value for name, value in batch.items() if name not in (*RESERVED, NOISE, INDEX, SCALE)}
        told = {"guidance": batch[SCALE]} if self.method.embedded else {}
        t, before = self.times.time[index], self.times.before[index]
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x = column(alpha, x_0) * x_0 + column(sigma, x_0) * batch[NOISE]
        online = self._end(student, x, t, 0, index, {**cond, **told})
        with torch.no_grad():
            there = self.skipped(x, index, cond, batch.get(SCALE))
            target = self._end(student if self.target is None else self.target, there, before, 1, index, {**cond, **told})
        difference = online - target
        return self._measured(difference), {"difference": difference.detach().square().mean().sqrt()}

    def updated(self, model: Any, step: int) -> None:
        """Let the target follow the student."""
        if self.target is None:
            return
        follows = dict(self.target.named_parameters())
        with torch.no_grad():
            for name, value in model[STUDENT].named_parameters():
                if value.requires_grad:
                    follows[name].lerp_(value, 1.0 - self.method.target_decay)  # type: ignore[operator]

    def skipped(self, x: Tensor, index: NDArray[np.int64], cond: Mapping[str, Tensor], scale: Tensor | None = None) -> Tensor:
        """The states at the times before: one step of DDIM with the teacher from x ``"batch *shape"`` at the solver times."""
        t, before = self.times.time[index], self.times.before[index]
        kept = self.schedule.sigma(before) / self.schedule.sigma(t)
        rest = self.schedule.alpha(before) - self.schedule.alpha(t) * kept
        return column(kept, x) * x + column(rest, x) * self._teach(x, t, cond, scale)

    def _end(self, network: nn.Module, x: Tensor, t: Floats, row: int, index: Any, cond: Mapping[str, Tensor]) -> Tensor:
        """f(x, t)."""
        skip, out = (column(values[row, index], x) for values in (self.times.skip, self.times.out))
        return skip * x + out * read_as(self.teacher, network)(x, torch.from_numpy(t), **cond)

    def _teach(self, x: Tensor, t: Floats, cond: Mapping[str, Tensor], scale: Tensor | None) -> Tensor:
        """The teacher's data prediction, under the scale of every sample."""
        time = torch.from_numpy(t)
        if scale is None:
            return self.teacher(x, time, **cond)
        plain, limit = without_limits(self.teacher)  # a limited teacher limits the guided prediction, not the two it is made of
        free, full = (plain.with_scale(s)(x, time, **cond) for s in (0.0, 1.0))
        return limit(free + scale.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) * (full - free))

    def _measured(self, difference: Tensor) -> Tensor:
        if self.method.loss == "l2":
            return difference.square().mean()
        c = self.method.huber_c
        return ((difference.square() + c**2).sqrt() - c).mean()
