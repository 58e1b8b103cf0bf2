r"""Distribution matching distillation (DMD2): a student of few calls whose samples have the teacher's distribution, noised to every level.

"Improved Distribution Matching Distillation for Fast Image Synthesis" (arXiv 2405.14867); the gradient is that of "One-step Diffusion with
Distribution Matching Distillation" (arXiv 2311.18828). With x a sample of the student, $x_t = \alpha x + \sigma\varepsilon$, and D the data
predictions of the frozen teacher and of a *fake* network that is trained on the student's samples all along, samples move along

$$ g = \frac{D_\text{teacher}(x_t) - D_\text{fake}(x_t)}{\operatorname{mean}|x - D_\text{teacher}(x_t)|}. $$

By Tweedie's formula $D_\text{teacher} - D_\text{fake} = \frac{\sigma^2}{\alpha}(\nabla\log p_t - \nabla\log q_t)(x_t)$, so $-g$ is, up to a
positive weight of every sample, the gradient of $KL(q_t \| p_t)$ by the noised sample. The student's loss is
$\tfrac12 \operatorname{mean}(x - \operatorname{sg}(x + g))^2$.

*Two time scales*: the fake network is updated in every step, the student in every `update_ratio`-th, so the fake network keeps up.

*Several calls*: at a time of each sample's own, among those of the student, the student is called on a state that its own earlier calls
led to, without gradients (*backward simulation*): predict data, noise them anew to the next time. So is it sampled.

*Adversary*, with real data: a head on features of the fake network tells noised real data from noised samples; its loss trains the head
and the fake network, and the student is trained to be taken for real. Then the student may be better than the teacher.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fewstep.denoisers import Denoiser
from fewstep.distill.method import STUDENT, Training
from fewstep.distill.networks import Features, Head, bottleneck, copy_of, layer_of, read_as, schedule_of
from fewstep.distill.states import call_times, column, conditions, draw_fractions, noised, randn, start_noise, time_of, whole_times
from fewstep.errors import PlanError, UnknownNameError
from fewstep.plan import Plan, StartTransform
from fewstep.predictions import PREDICTIONS, data_coefficients
from fewstep.schedules import NoiseSchedule
from fewstep.solvers.consistency import LCM
from fewstep.train.stabilize import Stabilizer, judge
from fewstep.train.stages import Stage

__all__ = ["DMD2", "FAKE_WEIGHTINGS", "Adversary", "fake_weight", "matching_gradient", "matching_loss"]

FAKE, HEAD = "fake", "head"
"""Names of the modules that are trained beside the student."""
SIGMA_DATA = 0.5
FAKE_WEIGHTINGS = ("own", "edm", "min_snr", *PREDICTIONS)
"""How the squared error of the fake network's data prediction is weighed, see `fake_weight`."""
MIN_SNR_GAMMA = 5.0
OPTIMIZER = functools.partial(torch.optim.AdamW, betas=(0.9, 0.999), weight_decay=0.01)
"""That of the official code."""


@dataclass(frozen=True)
class Adversary:
    """The adversarial term of `DMD2`.

    Args:
        weight: of the student's loss, softplus(-logit of its samples): 3e-3 for ImageNet, 1e-3 and 5e-3 for Stable Diffusion in the paper.
        head_weight: of the loss of head and fake network, softplus(logit of samples) + softplus(-logit of data).
        at: name of the fake network's module whose output the head sees; left out, the middle of the network.
        channels: of that output, where its last layer does not say.
        noise: lowest and highest fraction of the schedule's way at which both are noised; (0, 0): hardly at all.
        stabilizer: a term added to the loss of the head, of `fewstep.train.stabilize`.
    """

    weight: float = 3e-3
    head_weight: float = 1e-2
    at: str | None = None
    channels: int | None = None
    noise: tuple[float, float] = (0.0, 1.0)
    stabilizer: Stabilizer | None = None

    def __post_init__(self) -> None:
        if not (self.weight >= 0.0 and self.head_weight > 0.0):
            raise ValueError(f"Adversary needs weight >= 0 and head_weight > 0, got {self.weight} and {self.head_weight}.")
        if not 0.0 <= self.noise[0] <= self.noise[1] <= 1.0:
            raise ValueError(f"Adversary needs noise between 0 and 1, the lower one first, got {self.noise}.")


@dataclass(frozen=True)
class DMD2:
    """Distribution matching distillation with two time scales.

    Args:
        steps: calls of the student.
        update_ratio: steps of the fake network to one of the student: 5 for ImageNet and SDXL, 10 for Stable Diffusion 1.5 in the paper.
        adversary: an adversarial term, which needs real data.
        times: of the calls, noisiest first; left out, evenly spaced from the schedule's start. Networks whose output is multiplied by
            sigma / alpha (noise predictions) do better in one call if they are told an earlier one: SDXL's is 0.4 of the way. A student
            whose first time is not the start begins from noise as large as a state is there, of data of unit variance: for
            variance-preserving schedules of unit variance, which is what pipelines draw and what the published code does.
        simulate: whether states of later calls come from the student's own earlier calls; else they are noised real data.
        levels: lowest and highest fraction of the schedule's way at which distributions are matched.
        weighting: of the fake network's loss, one of `FAKE_WEIGHTINGS`.
        clip: largest norm of a gradient.

    Note:
        The published code draws one step for the whole batch; here every sample has its own, which has less variance.

    Example:
        >>> DMD2(steps=2).needs_data, DMD2(adversary=Adversary()).needs_data
        (False, True)
    """

    steps: int = 1
    update_ratio: int = 5
    adversary: Adversary | None = None
    times: tuple[float, ...] | None = None
    simulate: bool = True
    levels: tuple[float, float] = (0.02, 0.98)
    weighting: str = "own"
    clip: float = 10.0

    def __post_init__(self) -> None:
        if not isinstance(self.adversary, (Adversary, NoneType)):
            raise ValueError(
                f"adversary is an object with its options, fewstep.distill.Adversary(...), or None, not {self.adversary!r}; "
                "on the command line, --adversary."
            )
        if not isinstance(self.steps, int):
            raise ValueError(f"DMD2 makes a student of one number of calls, got steps={self.steps}: make one for each.")
        if self.steps < 1 or self.update_ratio < 1:
            raise ValueError(f"DMD2 needs steps and update_ratio of at least 1, got {self.steps} and {self.update_ratio}.")
        if self.times is not None and len(self.times) != self.steps:
            raise ValueError(f"DMD2 needs one time a call: {len(self.times)} times were given for steps={self.steps}.")
        if not 0.0 <= self.levels[0] < self.levels[1] <= 1.0:
            raise ValueError(f"DMD2 needs levels between 0 and 1, the lower one first, got {self.levels}.")
        if self.weighting not in FAKE_WEIGHTINGS:
            raise UnknownNameError("weighting of the fake network", self.weighting, FAKE_WEIGHTINGS)

    @property
    def needs_data(self) -> bool:
        """Whether batches must hold clean data."""
        return self.adversary is not None or (self.steps > 1 and not self.simulate)

    def training(self, teacher: Callable[..., Tensor], student: nn.Module) -> Training:
        """The student, the fake network and, with an adversary, its head; the student's stage and that of the others."""
        fake = copy_of(teacher, student)
        modules: dict[str, nn.Module] = {STUDENT: student, FAKE: fake}
        at = ""
        if self.adversary is not None:
            at = bottleneck(fake) if self.adversary.at is None else self.adversary.at
            modules[HEAD] = Head(layer_of(Features(fake, at).module), self.adversary.channels).to(next(fake.parameters()).device)
        steady = self.adversary is None
        stages = (
            Stage(
                StudentLoss(self, teacher, at),
                STUDENT,
                optimizer=OPTIMIZER,
                clip=self.clip,
                every=self.update_ratio,
                watched=steady,
            ),
            Stage(
                FakeLoss(self, teacher, at), tuple(modules)[1:], optimizer=OPTIMIZER, clip=self.clip, averaged=False, watched=steady
            ),
        )
        return Training(modules, stages)

    def call_times(self, schedule: NoiseSchedule) -> tuple[float, ...]:
        """The times of the student's calls."""
        return call_times(schedule, self.steps) if self.times is None else whole_times(schedule, self.times)

    def start_scale(self, schedule: NoiseSchedule) -> float:
        """The factor of the noise at the schedule's start with which the student begins."""
        first, start = self.call_times(schedule)[0], schedule.t_start
        if first >= start:
            return 1.0
        here, there = (np.hypot(float(schedule.alpha(t)), float(schedule.sigma(t))) for t in (first, start))
        return float(here / there)

    def plan(self, teacher: Callable[..., Tensor], nfe: int) -> Plan:
        """The stochastic sampler of consistency models at the student's times, down to sigma = 0.

        Raises:
            PlanError: for another number of calls than the student is trained for.
        """
        if nfe != self.steps:
            raise PlanError(f"this student is made for {self.steps} calls, not {nfe}: train another with DMD2(steps={nfe}).")
        schedule = schedule_of(teacher)
        times = self.call_times(schedule)
        plan = LCM().plan(schedule, grid=[*times, schedule.t_zero])
        if times[0] >= schedule.t_start:
            return plan
        return dataclasses.replace(plan, start=StartTransform(self.start_scale(schedule), time=schedule.t_start))


# ---- losses ------------------------------------------------------------------------------------------------------------------------


State = tuple[Tensor, Any]


def matching_gradient(
    teacher: Callable[..., Tensor], fake: Callable[..., Tensor], x: Tensor, state: tuple[Tensor, Any], cond: Any
) -> Tensor:
    """Minus the direction g that samples x should move in, of x's shape, without gradients.

    Args:
        teacher, fake: denoisers.
        x: the student's samples.
        state: x, noised, and the times.
        cond: conditions.
    """
    x_t, t = state
    with torch.no_grad():
        real, wrong = teacher(x_t, t, **cond), fake(x_t, t, **cond)
        size = (x - real).abs().flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
        return torch.nan_to_num((wrong - real) / size, nan=0.0, posinf=0.0, neginf=0.0)


def matching_loss(
    teacher: Callable[..., Tensor], fake: Callable[..., Tensor], x: Tensor, state: tuple[Tensor, Any], cond: Any
) -> Tensor:
    """The loss whose gradient by x is `matching_gradient`, divided by the number of elements."""
    gradient = matching_gradient(teacher, fake, x.detach(), state, cond)
    return 0.5 * (x - (x - gradient).detach()).square().mean()


def fake_weight(weighting: str, predicts: str, alpha: Any, sigma: Any) -> Any:
    """The weight of the squared error of a data prediction.

    Args:
        weighting: a kind of prediction: the error of such a network; ``"own"``: of the network's own kind, but ``"edm"`` for data
            predictions; ``"edm"``: $1/sigma_d^2 + alpha^2 / sigma^2$, with sigma_d = 0.5; ``"min_snr"``: min(alpha^2 / sigma^2, 5).
        predicts: the network's kind.
        alpha, sigma: levels.

    Example:
        >>> fake_weight("own", "flow", 0.5, 0.5), fake_weight("edm", "data", 1.0, 1.0)
        (4.0, 5.0)
    """
    kind = ("edm" if predicts == "data" else predicts) if weighting == "own" else weighting
    if kind == "edm":
        return 1.0 / SIGMA_DATA**2 + (alpha / sigma) ** 2
    if kind == "min_snr":
        return np.minimum((alpha / sigma) ** 2, MIN_SNR_GAMMA)
    if kind == "noise":  # finite also where alpha is 0
        return (alpha / sigma) ** 2
    return 1.0 / data_coefficients(kind, alpha, sigma)[1] ** 2


@dataclass(frozen=True)
class StudentLoss:
    """The student's objective."""

    method: DMD2
    teacher: Callable[..., Tensor]
    at: str

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        schedule, cond = schedule_of(self.teacher), conditions(batch)
        x = generated(self.method, self.teacher, model[STUDENT], batch, generator)
        t = time_of(schedule, draw_fractions(len(x), *self.method.levels, generator))
        fake = read_as(self.teacher, model[FAKE])
        x_t = noised(schedule, x.detach(), t, randn(x, generator))
        matching = matching_loss(self.teacher, fake, x, (x_t, t), cond)
        if self.method.adversary is None:
            return matching, {}
        state = disturbed(self.method.adversary, schedule, x, generator)
        fooling = softplus(-logits(self.at, model, fake, state, cond)).mean()
        return matching + self.method.adversary.weight * fooling, {"matching": matching.detach(), "fooling": fooling.detach()}


@dataclass(frozen=True)
class FakeLoss:
    """The objective of the fake network, and of the adversary's head."""

    method: DMD2
    teacher: Callable[..., Tensor]
    at: str

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        schedule, cond = schedule_of(self.teacher), conditions(batch)
        with torch.no_grad():
            x = generated(self.method, self.teacher, model[STUDENT], batch, generator)
        fake = read_as(self.teacher, model[FAKE])
        t = time_of(schedule, draw_fractions(len(x), 0.0, 1.0, generator))
        error = fake(noised(schedule, x, t, randn(x, generator)), t, **cond) - x
        weight = fake_weight(self.method.weighting, fake.predicts, schedule.alpha(t), schedule.sigma(t))
        loss = (column(weight, x) * error.square()).mean()
        if self.method.adversary is None:
            return loss, {}
        telling, info = self._telling(model, fake, x, batch, generator)
        return loss + self.method.adversary.head_weight * telling, {"score": loss.detach(), "telling": telling.detach(), **info}

    def _telling(
        self, model: Any, fake: Denoiser, x: Tensor, batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        """The head's loss, with its stabilizer."""
        adversary = self.method.adversary
        assert adversary is not None
        schedule, cond = schedule_of(self.teacher), conditions(batch)
        times: dict[int, Any] = {}
        pair = []
        for samples in (batch["x"], x):
            x_t, t = disturbed(adversary, schedule, samples, generator)
            times[len(pair)] = t
            pair.append(x_t)
        judged = judge(lambda x_t, k: logits(self.at, model, fake, (x_t, times[k]), cond), *pair)
        loss = softplus(judged.fake_logits).mean() + softplus(-judged.real_logits).mean()
        if adversary.stabilizer is not None:
            loss = loss + adversary.stabilizer(judged, generator)
        return loss, {"real_logit": judged.real_logits.detach().mean(), "fake_logit": judged.fake_logits.detach().mean()}


# ---- samples and logits ------------------------------------------------------------------------------------------------------------


def generated(
    method: DMD2, teacher: Callable[..., Tensor], network: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator
) -> Tensor:
    """Samples of the student at a call of each sample's own, with gradients through that call only."""
    schedule, student, cond = schedule_of(teacher), read_as(teacher, network), conditions(batch)
    times = method.call_times(schedule)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    x = (
        float(schedule.sigma(max(times[0], schedule.t_start)))
        * method.start_scale(schedule)
        * start_noise(teacher, batch, generator)
    )
    if method.steps == 1:
        return student(x, times[0], **cond)
    which = torch.randint(method.steps, (len(x),), generator=generator, device=generator.device).cpu()
    states = [x]
    with torch.no_grad():
        for k in range(1, method.steps):
            clean = student(states[-1], times[k - 1], **cond) if method.simulate else batch["x"]
            states.append(float(alpha[k]) * clean + float(sigma[k]) * randn(x, generator))
    state = torch.stack(states)[which.to(x.device), torch.arange(len(x), device=x.device)]
    return student(state, np.array(times)[which.numpy()], **cond)


def disturbed(adversary: Adversary, schedule: NoiseSchedule, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Any]:
    """Samples, noised as the adversary sees them, and the times."""
    t = time_of(schedule, draw_fractions(len(x), *adversary.noise, generator))
    return noised(schedule, x, t, randn(x, generator)), t


def logits(at: str, model: Any, fake: Denoiser, state: tuple[Tensor, Any], cond: Mapping[str, Any]) -> Tensor:
    """The head's logits of noised samples, ``"batch"``."""
    with Features(model[FAKE], at).kept() as outputs:
        fake(*state, **cond)
    if not outputs:
        raise ValueError(f"module {at!r} of the network is not called as such; name another, or a layer in it: Adversary(at=...).")
    found = outputs[-1]
    if len(found) != len(state[0]) or not math.prod(found.shape):
        raise ValueError(
            f"module {at!r} puts out shape {tuple(found.shape)} for {len(state[0])} samples; name another: Adversary(at=...)."
        )
    return model[HEAD](found)
