"""Other libraries' solvers behind two interfaces, for the benchmarks.

`Setting`: a solver with its own grid, ``run(denoiser, noise, nfe, cond) -> samples``. The network is asked at the exact noise level that
the scheduler is at, and its tables are fine samplings of the model's own schedule, so what is measured is the solver and its grid, not a
rounding of times.

`Stepper`: a solver on any noise levels it is handed, ``run(predict, levels, noise) -> samples``, to measure its order of convergence.

diffusers comes with the extra `dev`. azula, k-diffusion and the papers' own code are used where they are found:
``pip install --no-deps azula k-diffusion einops torchdiffeq torchsde trampoline``, and files of the papers' repositories in a folder.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.schedules import Flow, NoiseSchedule

__all__ = ["Levels", "Setting", "Stepper", "diffusers_settings", "steppers"]

COUNT = 1000
Denoiser = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """A peer's solver with its options.

    Attributes:
        solver: who and what.
        options: what was chosen, in words.
        final: ``"t_end"`` or ``"zero"``, where it ends.
        make: the peer's scheduler for a number of calls.
        levels: alpha and sigma at its i-th call, from the scheduler.
        flow: whether it wants the flow's velocity instead of the noise.
    """

    solver: str
    options: str
    final: str
    make: Callable[[int], Any]
    levels: Callable[[Any, int], tuple[float, float]]
    schedule: NoiseSchedule
    flow: bool = False

    @torch.no_grad()
    def run(self, denoiser: Denoiser, noise: Tensor, nfe: int, cond: Mapping[str, Any]) -> Tensor:
        """Samples ``"batch *shape"`` from unit noise ``"batch *shape"`` in exactly `nfe` calls."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = self.make(nfe)
            if len(scheduler.timesteps) != nfe:
                raise ValueError(f"{self.solver} made {len(scheduler.timesteps)} calls of {nfe}.")
            x = noise
            for i, time in enumerate(scheduler.timesteps):
                alpha, sigma = self.levels(scheduler, i)
                d = denoiser(x, float(self.schedule.t_of_lam(np.log(alpha) - np.log(sigma))), **cond)
                output = (x - d) / sigma if self.flow else (x - alpha * d) / sigma
                x = scheduler.step(output, time, x, return_dict=False)[0].to(noise.dtype)
        return x


def diffusers_settings(schedule: NoiseSchedule) -> list[Setting]:
    """DDIM and DPM-Solver++ 2M and 3M of diffusers, with every spacing of times they offer, on a variance-preserving or flow schedule."""
    return _flow(schedule) if isinstance(schedule, Flow) else _preserving(schedule)


def _preserving(schedule: NoiseSchedule) -> list[Setting]:
    diffusers = importlib.import_module("diffusers")
    times = np.linspace(schedule.t_end, schedule.t_start, COUNT)
    alphas = schedule.alpha(times) ** 2
    betas = 1.0 - alphas / np.concatenate([[1.0], alphas[:-1]])
    settings = []

    def ddim(nfe: int, **options: Any) -> Any:
        scheduler = diffusers.DDIMScheduler(trained_betas=betas, clip_sample=False, **options)
        scheduler.set_timesteps(nfe)
        return scheduler

    def at_entry(scheduler: Any, i: int) -> tuple[float, float]:
        t = times[int(scheduler.timesteps[i])]
        return float(schedule.alpha(t)), float(schedule.sigma(t))

    for spacing in ("leading", "trailing", "linspace"):
        for final, one in (("t_end", False), ("zero", True)):
            make = _bind(ddim, timestep_spacing=spacing, set_alpha_to_one=one)
            settings.append(Setting("diffusers DDIM", spacing, final, make, at_entry, schedule))

    def multistep(nfe: int, **options: Any) -> Any:
        scheduler = diffusers.DPMSolverMultistepScheduler(trained_betas=betas, **options)
        scheduler.set_timesteps(nfe)
        return scheduler

    def at_ratio(scheduler: Any, i: int) -> tuple[float, float]:
        ratio = float(scheduler.sigmas[i])
        return 1.0 / float(np.hypot(1.0, ratio)), ratio / float(np.hypot(1.0, ratio))

    spacings: dict[str, dict[str, Any]] = {
        "linspace": {},
        "trailing": {"timestep_spacing": "trailing"},
        "leading": {"timestep_spacing": "leading"},
        "karras": {"use_karras_sigmas": True},
        "lu_lambdas": {"use_lu_lambdas": True},
        "exponential": {"use_exponential_sigmas": True},
        "beta": {"use_beta_sigmas": True},
    }
    for order, kinds in ((2, ("midpoint", "heun")), (3, ("heun",))):
        for kind in kinds:
            for spacing, extra in spacings.items():
                for final, ends in (("zero", "zero"), ("t_end", "sigma_min")):
                    if ends == "sigma_min" and any(key.startswith("use_") for key in extra):
                        continue  # their grid already ends there: the last step would be of length 0, a call for nothing
                    make = _bind(multistep, solver_order=order, solver_type=kind, final_sigmas_type=ends, **extra)
                    told = f"{spacing}, {kind}" if order == 2 else spacing
                    settings.append(Setting(f"diffusers DPM++ {order}M", told, final, make, at_ratio, schedule))
    return settings


def _flow(schedule: Flow) -> list[Setting]:
    diffusers = importlib.import_module("diffusers")
    settings = []

    def euler(nfe: int, **options: Any) -> Any:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
        scheduler.set_timesteps(nfe)
        return scheduler

    def multistep(nfe: int, **options: Any) -> Any:
        scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", **options)
        scheduler.set_timesteps(nfe)
        return scheduler

    def at_sigma(scheduler: Any, i: int) -> tuple[float, float]:
        sigma = min(float(scheduler.sigmas[i]), 1.0 - 1e-7)
        return 1.0 - sigma, sigma

    for shift in (1.0, 1.5, 2.0, 3.0):
        make = _bind(euler, shift=shift)
        settings.append(Setting("diffusers flow Euler", f"shift {shift:g}", "zero", make, at_sigma, schedule, flow=True))
        for order, kinds in ((2, ("midpoint", "heun")), (3, ("heun",))):
            for kind in kinds:
                make = _bind(multistep, solver_order=order, solver_type=kind, flow_shift=shift)
                told = f"shift {shift:g}, {kind}" if order == 2 else f"shift {shift:g}"
                settings.append(Setting(f"diffusers DPM++ {order}M", told, "zero", make, at_sigma, schedule, flow=True))
    for spacing in ("karras", "exponential", "beta"):
        make = _bind(euler, **{f"use_{spacing}_sigmas": True})
        settings.append(Setting("diffusers flow Euler", spacing, "zero", make, at_sigma, schedule, flow=True))
    return settings


def _bind(function: Callable[..., Any], **options: Any) -> Callable[[int], Any]:
    return lambda nfe: function(nfe, **options)


# ---- solvers on given noise levels -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Levels:
    """The noise levels of a run, noisiest first: float64 ``"N+1"`` each."""

    schedule: NoiseSchedule
    times: np.ndarray

    @property
    def alpha(self) -> np.ndarray:
        return self.schedule.alpha(self.times)

    @property
    def sigma(self) -> np.ndarray:
        return self.schedule.sigma(self.times)

    @property
    def ratio(self) -> np.ndarray:
        """sigma / alpha."""
        return np.exp(-self.schedule.lam(self.times))


Predict = Callable[[Tensor, float, float], Tensor]
"""(x, alpha, sigma) -> data prediction."""


@dataclass(frozen=True)
class Stepper:
    """A peer's solver.

    Attributes:
        library, solver: whose, and which with its options.
        claim: the order it is published or documented with.
        run: ``(predict, levels, noise) -> samples``.
        stages: calls a step; the levels of its steps are every `stages`-th one, so the calls are as many as the levels less one.
    """

    library: str
    solver: str
    claim: int
    run: Callable[[Predict, Levels, Tensor], Tensor]
    stages: int = 1


def steppers(official: Path | None = None) -> tuple[list[Stepper], list[str]]:
    """Every peer that can be imported, and what could not, in words."""
    found, missing = _diffusers_steppers(), []
    for what, make in (("azula", _azula_steppers), ("k_diffusion", _k_diffusion_steppers)):
        if importlib.util.find_spec(what) is None:
            missing.append(f"{what} (not installed)")
        else:
            found += make()
    if official is None:
        missing.append("the papers' own code (no --official folder)")
    else:
        found += _official_steppers(official)
    return found, missing


def _diffusers_steppers() -> list[Stepper]:
    diffusers = importlib.import_module("diffusers")
    diffusers.logging.set_verbosity_error()
    names = {
        "DPMSolverMultistep": diffusers.DPMSolverMultistepScheduler,
        "DPMSolverSinglestep": diffusers.DPMSolverSinglestepScheduler,
        "UniPCMultistep": diffusers.UniPCMultistepScheduler,
        "DEISMultistep": diffusers.DEISMultistepScheduler,
        "SASolver": diffusers.SASolverScheduler,
    }

    def preserving(name: str, options: dict[str, Any]) -> Callable[[Predict, Levels, Tensor], Tensor]:
        def run(predict: Predict, levels: Levels, x: Tensor) -> Tensor:
            count = len(levels.times) - 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler = names[name](num_train_timesteps=max(1000, 2 * count), **options)
                scheduler.set_timesteps(count)
            scheduler.sigmas = torch.from_numpy(levels.ratio)
            scheduler.timesteps = torch.arange(count, 0, -1)
            scheduler.set_begin_index(0)
            for i, t in enumerate(scheduler.timesteps):
                alpha, sigma = float(levels.alpha[i]), float(levels.sigma[i])
                output = (x - alpha * predict(x, alpha, sigma)) / sigma
                x = scheduler.step(output, t, x, return_dict=False)[0].double()
            return x

        return run

    def exploding(make: Callable[[], Any], stages: int) -> Callable[[Predict, Levels, Tensor], Tensor]:
        """Classes that step in x / alpha and sigma / alpha."""

        def run(predict: Predict, levels: Levels, x: Tensor) -> Tensor:
            ratio = levels.ratio[::stages]
            y = x / float(levels.alpha[0])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler = make()
                scheduler.set_timesteps(len(ratio) - 1)
            sigmas = torch.from_numpy(
                np.repeat(ratio, stages)[stages - 1 : len(ratio) * stages - (stages - 1)] if stages > 1 else ratio
            )
            scheduler.sigmas, scheduler.is_scale_input_called = sigmas, True  # the state is scaled here, not by its method
            scheduler.timesteps = torch.arange(len(sigmas) - 1, 0, -1, dtype=torch.float64)
            scheduler.set_begin_index(0)
            for i, t in enumerate(scheduler.timesteps):
                sigma = float(sigmas[i])
                y = scheduler.step((y - _scaled(predict, levels, y, sigma)) / sigma, t, y, return_dict=False)[0].double()
            return y * float(levels.alpha[-1])

        return run

    found = []

    def add(claim: int, name: str, words: str, **options: Any) -> None:
        found.append(Stepper("diffusers", f"{name} {words}", claim, preserving(name, options)))

    plain = {"lower_order_final": False}
    for order in (1, 2, 3):
        for algorithm in ("dpmsolver++", "dpmsolver"):
            kind = {"solver_order": order, "algorithm_type": algorithm, "final_sigmas_type": "sigma_min"}
            kind |= {"solver_type": "heun"} if order == 3 else {}
            add(order, "DPMSolverMultistep", f"{algorithm} order {order}", **kind, **plain)
            if order > 1:
                add(order, "DPMSolverSinglestep", f"{algorithm} order {order}", **kind)
        for kind_of in ("bh1", "bh2"):
            add(order + 1, "UniPCMultistep", f"{kind_of} order {order}", solver_order=order, solver_type=kind_of, **plain)
        add(order, "DEISMultistep", f"order {order}", solver_order=order, **plain)
    add(4, "SASolver", "tau 0, predictor 3, corrector 4", predictor_order=3, corrector_order=4, tau_func=lambda t: 0, **plain)
    for name, claim, make, stages in (
        ("EulerDiscrete", 1, diffusers.EulerDiscreteScheduler, 1),
        ("LMSDiscrete order 4", 4, diffusers.LMSDiscreteScheduler, 1),
        ("HeunDiscrete", 2, diffusers.HeunDiscreteScheduler, 2),
    ):
        found.append(Stepper("diffusers", name, claim, exploding(make, stages), stages))
    return found


def _scaled(predict: Predict, levels: Levels, y: Tensor, ratio: float) -> Tensor:
    """The data prediction of y = x / alpha at sigma / alpha = `ratio`."""
    t = levels.schedule.t_of_lam(-np.log(ratio))
    alpha, sigma = float(levels.schedule.alpha(t)), float(levels.schedule.sigma(t))
    return predict(y * alpha, alpha, sigma)


def _azula_steppers() -> list[Stepper]:
    azula_sample = importlib.import_module("azula.sample")
    denoise = importlib.import_module("azula.denoise")

    def stepper(name: str, claim: int, stages: int = 1, **options: Any) -> Stepper:
        def run(predict: Predict, levels: Levels, x: Tensor) -> Tensor:
            times = levels.times[::stages]
            span = np.linspace(1.0, 0.0, len(times))

            def schedule(s: Tensor) -> tuple[Tensor, Tensor]:
                lams = np.interp(
                    s.numpy(), span[::-1], levels.schedule.lam(times)[::-1]
                )  # exact at the levels, and lambda is uniform
                t = levels.schedule.t_of_lam(lams)
                return torch.as_tensor(levels.schedule.alpha(t)), torch.as_tensor(levels.schedule.sigma(t))

            class Wrapped(denoise.Denoiser):
                def __init__(self) -> None:
                    super().__init__()
                    self.schedule = schedule

                def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Any:
                    alpha, sigma = schedule(t)
                    return denoise.DiracPosterior(mean=predict(x_t, float(alpha), float(sigma)))

            sampler = getattr(azula_sample, name)(Wrapped(), steps=len(times) - 1, silent=True, dtype=torch.float64, **options)
            return sampler(x)

        words = f"{name} order {claim}" if "order" in options else name
        return Stepper("azula", words, claim, run, stages)

    found = [stepper("DDIMSampler", 1), stepper("EulerSampler", 1), stepper("HeunSampler", 2, stages=2)]
    for name in ("zABSampler", "vABSampler", "zEABSampler", "xEABSampler", "REABSampler"):
        found += [stepper(name, order, order=order) for order in (2, 3) if hasattr(azula_sample, name)]
    return found


def _k_diffusion_steppers() -> list[Stepper]:
    sampling = _k_diffusion_sampling()

    def stepper(name: str, claim: int, stages: int = 1, **options: Any) -> Stepper:
        def run(predict: Predict, levels: Levels, x: Tensor) -> Tensor:
            def model(y: Tensor, sigma: Tensor) -> Tensor:
                return _scaled(predict, levels, y, float(sigma.flatten()[0]))

            sigmas = torch.from_numpy(levels.ratio[::stages].copy())
            y = getattr(sampling, name)(model, x / float(levels.alpha[0]), sigmas, disable=True, **options)
            return y * float(levels.alpha[-1])

        return Stepper("k-diffusion", name, claim, run, stages)

    return [
        stepper("sample_euler", 1),
        stepper("sample_heun", 2, 2),
        stepper("sample_dpm_2", 2, 2),
        stepper("sample_lms", 4),
        stepper("sample_dpmpp_2s_ancestral", 2, 2, eta=0.0),
        stepper("sample_dpmpp_2m", 2),
        stepper("sample_dpmpp_2m_sde", 2, eta=0.0),
        stepper("sample_dpmpp_3m_sde", 3, eta=0.0),
    ]


def _k_diffusion_sampling() -> types.ModuleType:
    """Its module of samplers, without the package's own imports, which want vision libraries that sampling does not use."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("not installed")
    package = types.ModuleType("k_diffusion")
    package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
    sys.modules["k_diffusion"] = package
    wanted = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    for name in wanted:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    stand_ins = {name: types.ModuleType(name) for name in wanted if name not in sys.modules}
    if stand_ins:
        stand_ins["torchvision.transforms"].functional = stand_ins["torchvision.transforms.functional"]  # type: ignore[attr-defined]
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in stand_ins:  # others ask whether these are installed
            del sys.modules[name]


def _official_steppers(folder: Path) -> list[Stepper]:
    """The papers' code on VP-linear, uniform in lambda, as their options name it."""
    found = []

    def load(path: str) -> types.ModuleType:
        spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), folder / path)
        if spec is None or spec.loader is None or not (folder / path).is_file():
            raise FileNotFoundError(f"--official needs {folder / path}.")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def noise_of(predict: Predict, levels: Levels) -> Callable[[Tensor, Tensor], Tensor]:
        def model(x: Tensor, t: Tensor) -> Tensor:
            at = float(t.flatten()[0])
            alpha, sigma = float(levels.schedule.alpha(at)), float(levels.schedule.sigma(at))
            return (x - alpha * predict(x.flatten(1), alpha, sigma).reshape(x.shape)) / sigma

        return model

    def add(paper: str, words: str, claim: int, make: Callable[..., Any]) -> None:
        def run(predict: Predict, levels: Levels, x: Tensor) -> Tensor:
            ends = {"t_start": float(levels.times[0]), "t_end": float(levels.times[-1]), "steps": len(levels.times) - 1}
            image = x.reshape(len(x), 1, 1, -1)  # UniPC's code wants images
            torch.set_default_dtype(torch.float64)  # it makes tensors of that
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # and says at length what it does
                    return make(noise_of(predict, levels), image, ends).reshape(x.shape)
            finally:
                torch.set_default_dtype(torch.float32)

        found.append(Stepper("official", f"{paper} {words}", claim, run))

    dpm, unipc, sa = load("dpm-solver/dpm_solver_pytorch.py"), load("UniPC/uni_pc.py"), load("SA-Solver/sa_solver.py")
    options = {"skip_type": "logSNR", "lower_order_final": False}

    def vp(module: types.ModuleType) -> Any:
        return module.NoiseScheduleVP("linear", continuous_beta_0=0.1, continuous_beta_1=20.0, dtype=torch.float64)

    for order in (1, 2, 3):
        for algorithm in ("dpmsolver++", "dpmsolver"):
            for method in ("multistep", "singlestep"):

                def solve(model: Any, x: Tensor, ends: Any, o: int = order, a: str = algorithm, m: str = method) -> Tensor:
                    solver = dpm.DPM_Solver(model, vp(dpm), algorithm_type=a)
                    return solver.sample(x, order=o, method=m, **options, **ends)

                add("DPM-Solver", f"{algorithm} {method} order {order}", order, solve)
        for variant in ("bh1", "bh2", "vary_coeff"):

            def unified(model: Any, x: Tensor, ends: Any, o: int = order, v: str = variant) -> Tensor:
                solver = unipc.UniPC(model, vp(unipc), variant=v)
                return solver.sample(x, order=o, method="multistep", **options, **ends)

            add("UniPC", f"{variant} order {order}", order + 1, unified)

    def adams(model: Any, x: Tensor, ends: Any) -> Tensor:
        solver = sa.SASolver(model, vp(sa))
        return solver.sample("few_steps", x, tau=lambda t: 0.0, skip_type="logSNR", **ends)

    add("SA-Solver", "tau 0, predictor 3, corrector 4", 4, adams)
    return found
