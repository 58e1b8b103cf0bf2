"""Plans in diffusers pipelines: `PlanScheduler`, a diffusers scheduler that runs the plan of any solver, or of a tuner.

    pipe.scheduler = fs.diffusers.PlanScheduler.from_config(pipe.scheduler.config, solver="unipc")

The host owns the loop: it calls the network and hands the output to `step`. A step is a row of a plan. The conversion of the network's
output to the data prediction, a x + b f, is folded into the rows when the plan is made: a row stores o = p z + q d = (p + q a) z + q b f,
and, divided by q b, one operation makes it.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fewstep.artefacts import json_value
from fewstep.denoisers import Clipped, DynamicThreshold
from fewstep.diffusers.config import (
    CURVE_SETTINGS,
    FOLLOWED,
    OF_THE_MODEL,
    ORIGINAL_STEPS,
    betas_of,
    betas_of_bars,
    check_config,
    final_of,
    rule_of,
    same_noise,
    schedule_of,
    times_of,
    unsaid,
)
from fewstep.diffusers.guiders import GuidedNetwork
from fewstep.diffusers.networks import network_of
from fewstep.diffusers.rows import Run, plan_on, tail, version, working
from fewstep.errors import ArtefactError, MissingExtraError, PlanError
from fewstep.grids import check_grid_name, grid_names
from fewstep.plan import Plan
from fewstep.sampler import advance, transform_start
from fewstep.schedules import EDM, Flow, FromAlphasCumprod, FromBetas, NoiseSchedule
from fewstep.solvers import make_solver, name_of

try:
    import diffusers.schedulers
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
except ImportError as missing:
    raise MissingExtraError("diffusers", "diffusers", "fewstep.diffusers") from missing

__all__ = ["GuidedNetwork", "PlanScheduler"]

Floats = NDArray[np.float64]
PLAN_FILE = "plan.safetensors"
"""The plan's file, beside the scheduler's JSON."""
OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""Arguments of `from_pretrained` that say where on the hub, or how."""
KNOWN: WeakValueDictionary[str, Plan] = WeakValueDictionary()
"""Plans of living schedulers by their digest, so that a config, which is JSON, can name one."""
NEAR = 1e-6
"""Relative difference below which two lists of times are the same."""
DEFAULT_SOLVER = "dpmpp_2m"


class PlanScheduler(SchedulerMixin, ConfigMixin):
    """A diffusers scheduler that runs a fewstep plan.

    Make one with `from_config`, from the config of any other scheduler, or with `from_plan`; the arguments are those that diffusers'
    schedulers share, under their names, and the ones below. States have the scale of DPM-Solver++ in diffusers: alpha x_0 + sigma eps, with
    alpha^2 + sigma^2 = 1 or, for flows, alpha + sigma = 1; and `init_noise_sigma` is 1. Those of networks in EDM's preconditioning are
    x_0 + sigma eps, `scale_model_input` scales them, and `init_noise_sigma` is (1 + sigma^2)^(1/2) at the first sigma.

    Args:
        solver: a name of `fewstep.solver_names`.
        solver_options: of the solver, JSON values; `from_config` takes them as arguments of their own.
        grid: a name of `fewstep.grids.grid_names`; left out, the times are where `timestep_spacing`, `use_karras_sigmas` and so on put
            them.
        plan: a `fewstep.Plan` or the path of its file. It runs when asked for its own number of steps; the solver plans any other number.
            In the saved config this is the plan's digest, and the plan lies beside it.
        timestep_spacing: ``"linspace"``, ``"leading"`` or ``"trailing"``; left out, ``"leading"`` for DDIM, DDPM and PNDM, ``"linspace"``
            else, as with diffusers' own.
        times_as: a class of diffusers whose times are kept by the solvers that take its place: that of Euler's family ("ddim" for Euler,
            "edm_heun" for Heun, ...), or DEIS or SA-Solver, which end at ``"sigma_min"``. `from_config` takes it from the config.
        final_sigmas_type: ``"zero"`` or ``"sigma_min"``; left out, ``"zero"``, but for TCD, for DDIM and PNDM with
            `set_alpha_to_one` False, and as `times_as` says.
        fractional_timesteps: tell the network of a table the exact time, which may lie between two entries, instead of the nearest one: for
            plans that were fitted so. Left out, only the times of Euler's family are told exactly, as its schedulers do.
        timestep_type: ``"discrete"``: the network is told an index of the table. ``"continuous"``, with ``"v_prediction"`` or `sigma_data`:
            log(sigma / alpha) / 4. ``"arctangent"``: the angle over a right angle.
        sigma_data: the data's standard deviation in the preconditioning of an EDM network; None for other networks.
        rho: exponent of Karras sigmas.
        invert_sigmas: the network of a flow is told (1 - sigma) N, and its output points to the data.
        original_inference_steps: on how many timesteps of the table a consistency model was distilled, for ``"lcm"`` and ``"tcd"``, which
            call it at some of them.
        snr_shift_scale: by what the signal-to-noise ratios of the table are divided (CogVideoX).
        clip_sample, thresholding: limit the data prediction, for models of pixels. They cost one more operation a step.

    Raises:
        UnknownNameError: for a name that does not exist.
        PlanError: for a plan of another noise schedule, or a config that cannot be served.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler
        >>> scheduler = PlanScheduler.from_config(DDIMScheduler(clip_sample=False).config, solver="unipc", order=2)
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist()
        [999, 749, 500, 250]
        >>> x = torch.randn(1, 3, 8, 8)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(0.1 * x, t, x).prev_sample
    """

    # all but the one for networks of another kind
    _compatibles = [known.name for known in KarrasDiffusionSchedulers if known.name != "EDMEulerScheduler"]  # noqa: RUF012
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        solver: str = DEFAULT_SOLVER,
        solver_options: dict[str, Any] | None = None,
        grid: str | None = None,
        plan: Plan | str | None = None,
        timestep_spacing: str | None = None,
        steps_offset: int = 0,
        final_sigmas_type: str | None = None,
        set_alpha_to_one: bool = True,
        rescale_betas_zero_snr: bool = False,
        lambda_min_clipped: float = -float("inf"),
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        shift: float | None = None,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        variance_type: str | None = None,
        fractional_timesteps: bool | None = None,
        timestep_type: str = "discrete",
        sigma_data: float | None = None,
        rho: float = 7.0,
        invert_sigmas: bool = False,
        original_inference_steps: int = ORIGINAL_STEPS,
        times_as: str | None = None,
        snr_shift_scale: float | None = None,
    ):
        check_config(self.config)
        self._solver = make_solver(solver, **(solver_options or {}))
        if grid is not None:
            check_grid_name(grid)
        self._schedule = schedule_of(self.config)
        self._fitted = None if plan is None else _plan_of(plan)
        if self._fitted is not None:
            self.register_to_config(plan=self._fitted.digest)
        self._network = network_of(self.config)
        self._limit = _limit_of(self.config)
        self._plans: dict[Any, Plan] = {}
        self._warned = False
        self.num_inference_steps: int | None = None
        self._plan: Plan | None = None
        self._run: Run | None = None
        self._begin_index: int | None = None
        self.betas = torch.from_numpy(betas_of(self.config)).float()
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas.double(), 0).float()
        times = self._training_times()
        self._told = self._network.told(self._schedule, times)
        self.timesteps = torch.from_numpy(self._told)
        self.sigmas = self._ratios(times)

    def __repr__(self) -> str:
        """The config, without the numbers of a table."""
        betas = self.config["trained_betas"]
        text = super().__repr__()
        return text if betas is None else re.sub(r'("trained_betas": )\[.*?\]', rf'\1"{len(betas)} numbers"', text, flags=re.DOTALL)

    # ---- making one ----------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler from the config of any other.

        Args:
            config: ``pipe.scheduler.config``.
            return_unused_kwargs: as in diffusers.
            **kwargs: `solver` and its options (``order=3``; ``solver_order=3`` is the same), `grid`, `plan`, or anything of the config to
                change.

        Example:
            >>> from diffusers import FlowMatchEulerDiscreteScheduler
            >>> flow = PlanScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config, solver="unipc", solver_order=3)
            >>> flow.config.prediction_type, flow.config.solver_options
            ('flow_prediction', {'order': 3})
        """
        if not isinstance(config, dict):
            raise TypeError(
                f"from_config takes a config, e.g. pipe.scheduler.config, got {type(config).__name__}. See from_pretrained."
            )
        _take_options(cls._get_init_keys(cls), config, kwargs)
        if "solver" in kwargs:
            kwargs.setdefault("plan", None)
        if rule_of(kwargs).name == "ddim" and config.get("timestep_spacing") == "linspace":  # also where it is a default
            kwargs.setdefault("timestep_spacing", "linspace")
        was_ours = "solver" in config
        kwargs = {**({} if was_ours else _defaults_of_model(config)), **unsaid(config), **kwargs}
        if config.get("interpolation_type") == "log_linear":
            kwargs = {**_log_linear(config), **kwargs}
        elif not was_ours:
            kwargs.setdefault("times_as", _followed(config))
        check_config({**config, **kwargs})
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_plan(cls, plan: Plan | str | PathLike[str], config: Mapping[str, Any] | None = None, **kwargs: Any) -> PlanScheduler:
        """A scheduler that runs a plan.

        Args:
            plan: a plan, or the path of its file.
            config: of the pipeline's scheduler. Left out, it says what the plan's schedule says; give `prediction_type` then.
            **kwargs: of `from_config`. `solver`, `grid` and `final_sigmas_type` are for other numbers of steps than the plan's; left out,
                they are those of the plan.

        Example:
            >>> import fewstep as fs
            >>> plan = fs.make_plan("unipc", fs.schedules.Flow(t_end=0.0), nfe=5, grid="lambda")
            >>> PlanScheduler.from_plan(plan).config.prediction_type
            'flow_prediction'
        """
        plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        settings = dict(_config_of(plan.schedule) if config is None else config)
        settings.pop("plan", None)
        solver, options = _solver_of(plan)
        if "solver" not in kwargs:
            kwargs = {"solver": solver, "solver_options": options, **kwargs}
        named = plan.provenance.get("grid")
        if "grid" not in kwargs and named in grid_names():
            kwargs["grid"] = named
        ends_clean = float(plan.schedule.sigma(plan.grid[-1])) == 0.0
        kwargs.setdefault("final_sigmas_type", "zero" if ends_clean else "sigma_min")
        made = cls.from_config(settings, plan=plan, **kwargs)
        made._check_fitted(plan)
        return made

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A scheduler from a folder, or an id of the hub, that holds any scheduler's config; with the plan beside it, if it has one.

        Args:
            pretrained_model_name_or_path, subfolder, return_unused_kwargs: as in diffusers.
            **kwargs: of `from_config`, and those of diffusers.

        Raises:
            ArtefactError: if the plan beside it is not the one that the config names.
            FileNotFoundError: if it is missing.
        """
        hub = {name: kwargs[name] for name in OF_THE_HUB if name in kwargs}
        config, kwargs = cls.load_config(pretrained_model_name_or_path, subfolder=subfolder, return_unused_kwargs=True, **kwargs)
        if config.get("plan") is not None and "plan" not in kwargs and "solver" not in kwargs:
            kwargs["plan"] = _plan_beside(pretrained_model_name_or_path, subfolder, config["plan"], hub)
        return cls.from_config(config, return_unused_kwargs, **kwargs)

    def save_config(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the JSON and, beside it, the plan. What `save_pretrained` calls."""
        if self._fitted is not None:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self._fitted.save(Path(save_directory) / PLAN_FILE)
        super().save_config(save_directory, push_to_hub, **kwargs)

    # ---- the times -----------------------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: ArrayLike | None = None,
        sigmas: ArrayLike | None = None,
        mu: float | None = None,
    ) -> None:
        """Plan a run, and forget the one before.

        Args:
            num_inference_steps: number of network calls.
            device: where `timesteps` go.
            timesteps: instead, what the network is told at every call. Nothing is rounded or shifted; the last call ends at
                `final_sigmas_type`.
            sigmas: instead, sigma / alpha of all states, the last included. For a flow model, as its pipelines have it, those before the
                shift and without the last, which is 0.
            mu: logarithm of the shift, for `use_dynamic_shifting`.

        Raises:
            ValueError: if the arguments do not fit each other or the model.
        """
        if timesteps is not None or sigmas is not None:
            length = len(timesteps if sigmas is None else sigmas)  # type: ignore[arg-type]
            if not length:
                raise ValueError("there are no times: a run has at least one call.")
            if num_inference_steps is not None and num_inference_steps != length:
                raise ValueError(f"num_inference_steps={num_inference_steps}, but there are {length} times. Leave it out.")
            num_inference_steps = None
        self._plan = plan = self._planned(num_inference_steps, timesteps, sigmas, mu)
        self._run = None
        self._begin_index = None
        self._transformed = False
        self._told = self._network.told(plan.schedule, plan.tau)
        self.timesteps = torch.from_numpy(self._told).to(device=device)
        self.sigmas = self._ratios(plan.grid)
        self._levels = self._schedule_alpha_sigma(plan.grid)
        self.num_inference_steps = plan.nfe

    def set_begin_index(self, begin_index: int = 0) -> None:
        """At which of the timesteps the host begins."""
        self._begin_index = begin_index

    @property
    def begin_index(self) -> int | None:
        """What `set_begin_index` was told."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The next step; None before the first."""
        return None if self._run is None else self._run.index

    @property
    def plan(self) -> Plan | None:
        """The plan of the last `set_timesteps`."""
        return self._plan

    @property
    def plan_schedule(self) -> NoiseSchedule:
        """The noise schedule of the config, to make plans for."""
        return self._schedule

    @property
    def init_noise_sigma(self) -> float:
        """Deviation of the noise that a run begins with: 1, but for preconditioned networks, whose states are x_0 + sigma eps."""
        return self._network.start_scale(float(self.sigmas[0]))

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network is given: the sample itself, scaled for preconditioned networks; transformed at the first call of a plan with
        a start transform.
        """
        if self._plan is None:
            return sample
        if self._plan.start is not None and self._run is None and self._begin_index in (None, 0):
            self._transformed = True
            sample = transform_start(self._plan, working(sample)).to(sample.dtype)
        return sample * self._scale_at(timestep) if self._network.scales else sample

    def _scale_at(self, timestep: Any) -> float:
        """Of the network's input at the next call."""
        assert self._plan is not None
        index = self._first(timestep) if self._run is None else min(self._run.index, self._plan.nfe - 1)
        return self._network.input_scale(float(self._plan.schedule.sigma(self._plan.tau[index])))

    # ---- the step ------------------------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next sample.

        Args:
            model_output: what the network said of `sample`.
            timestep: of the first step only is it looked at, and only if nobody said `set_begin_index`; after that, steps are counted.
            sample: ``"batch *shape"``. As long as it is the tensor that the last step returned, half precision loses nothing: the state is
                kept in single precision.
            generator: of the noise of stochastic solvers.
            variance_noise: that noise itself, of unit variance.
            eta: of pipelines for DDIM: 0. An eta is an option of the solver.
            use_clipped_model_output: not used; the step is consistent with the limited prediction in any case.
            return_dict: return a `SchedulerOutput`, or a tuple.

        Returns:
            The next sample, in the precision of `sample`.

        Raises:
            ValueError: before `set_timesteps`, after the last step, or for an eta.
        """
        run = self._run
        if run is None:
            run = self._begin(timestep, sample, eta)
        states = run.states
        x = states[0] if sample is run.returned and version(sample) == run.version else run.take(sample)
        i = run.index - run.first
        if i >= len(run.steps):
            raise ValueError(f"all {run.index} steps are done. Call set_timesteps before the next run.")
        step = run.steps[i]
        if model_output.shape != x.shape:
            model_output = self._mean(model_output, x)
        f = model_output if model_output.dtype is x.dtype else model_output.to(x.dtype)
        if run.limited is not None:
            a, b = run.limited[i]
            f = self._limit(torch.mul(f, b).add_(x, alpha=a))
        elif step.gains is None:
            f = f.clone() if f is model_output else f  # it is remembered, and the network may write over its own
        xi = None if step.noise is None else run.noise(i, x, generator, variance_noise)
        x = advance(step, states, run.outputs, f, xi)
        states.appendleft(x)
        run.index += 1
        run.returned = x if x.dtype is sample.dtype else x.to(sample.dtype)
        run.version = version(run.returned)
        return SchedulerOutput(prev_sample=run.returned) if return_dict else (run.returned,)

    def _begin(self, timestep: Any, sample: Tensor, eta: float) -> Run:
        if self._plan is None:
            raise ValueError("call set_timesteps before the first step.")
        if eta:
            raise ValueError(
                f"eta={eta:g} is an option of the solver: PlanScheduler.from_config(config, solver='ddim', eta={eta:g})."
            )
        first = self._first(timestep)
        plan, x = self._plan_from(first), working(sample)
        if plan.start is not None:
            if not self._transformed:
                raise PlanError(
                    "this plan transforms the noise before the first call, in scale_model_input, which this pipeline does not ask."
                )
            x = transform_start(plan, x)
        self._run = run = Run(plan, x, first, self._network, limited=self._limit is not None)
        run.returned, run.version = sample, version(sample)
        return run

    def _mean(self, output: Tensor, x: Tensor) -> Tensor:
        """The prediction without the variance that some networks give as further channels."""
        if output.ndim == x.ndim and output.shape[1] == 2 * x.shape[1] and output.shape[2:] == x.shape[2:]:
            return output[:, : x.shape[1]]
        raise PlanError(f"the network returned shape {tuple(output.shape)} for a sample of shape {tuple(x.shape)}.")

    def _first(self, timestep: Any) -> int:
        """The step at which a run begins."""
        return self._index_of(timestep) if self._begin_index is None else self._begin_index

    def _index_of(self, timestep: Any) -> int:
        """Which of the timesteps this is; the nearest. A view of `timesteps` says its place without being read."""
        if isinstance(timestep, Tensor):
            if timestep.numel() == 1 and timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr():
                return int(timestep.storage_offset() - self.timesteps.storage_offset())
            timestep = timestep.flatten()[0].item()
        return int(np.argmin(np.abs(self._told - float(timestep))))

    # ---- noising -------------------------------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean data noised, alpha x_0 + sigma eps, at the noise level of the timesteps; during a run, at that of the run."""
        alpha, sigma = self._level_at(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, as flow-matching pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity alpha eps - sigma x_0, the target of v-prediction.

        Raises:
            PlanError: for a preconditioned network, the target of which is another.
        """
        if self._network.scales:
            raise PlanError("a network in EDM's preconditioning is not trained on the velocity of its states.")
        alpha, sigma = self._level_at(timesteps, sample)
        return alpha * noise - sigma * sample

    def _level_at(self, timesteps: Tensor, like: Tensor) -> tuple[Any, Any]:
        if self._plan is not None and self._begin_index is not None:
            index = self._begin_index if self._run is None else self._run.index
            return float(self._levels[0][index]), float(self._levels[1][index])
        told = torch.as_tensor(timesteps).detach().double().cpu().numpy().reshape(-1)
        times = self._network.times(self._schedule if self._plan is None else self._plan.schedule, told)
        if self._plan is not None:  # the exact level of a timestep that was rounded for the network
            nearest = np.abs(told[:, None] - self._told[None]).argmin(1)
            times = np.where(np.abs(told - self._told[nearest]) <= NEAR * np.abs(told), self._plan.grid[nearest], times)
        shape = (-1, *[1] * (like.ndim - 1))
        alpha, sigma = (
            torch.from_numpy(v).to(like.dtype).to(like.device).reshape(shape) for v in self._schedule_alpha_sigma(times)
        )
        return alpha, sigma

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    # ---- planning ------------------------------------------------------------------------------------------------------------------

    def _planned(self, nfe: int | None, timesteps: ArrayLike | None, sigmas: ArrayLike | None, mu: float | None) -> Plan:
        own_times = timesteps is not None or (sigmas is not None and not _is_default_flow(self._schedule, sigmas))
        count = nfe if nfe is not None else len(timesteps if sigmas is None else sigmas)  # type: ignore[arg-type]
        if self._fitted is not None:
            if count == self._fitted.nfe and (not own_times or self._are_fitted(timesteps)):
                self._check_fitted(self._fitted)
                return self._fitted
            self._warn(f"the plan has {self._fitted.nfe} calls at its own times")
        if self.config["grid"] is not None and not own_times:
            key: Any = (count,)
            if key not in self._plans:
                schedule = (
                    self._schedule if self._fitted is None else self._fitted.schedule
                )  # with the shift and the end of the plan
                self._plans[key] = self._solver.plan(schedule, count, self.config["grid"], final=self._final_of_grid())
            return self._plans[key]
        times = self._times(nfe, timesteps, sigmas, mu)
        if nfe is not None and self._solver.even:
            times = self._times(len(self._solver.spent(nfe, self._schedule.lam(times))), None, None, mu)
        key = (nfe if self._solver.even else None, *times.tolist())
        if key not in self._plans:
            self._plans[key] = plan_on(self._solver, self._schedule, times, nfe)
        return self._plans[key]

    def _times(self, nfe: int | None, timesteps: ArrayLike | None, sigmas: ArrayLike | None, mu: float | None) -> Floats:
        return times_of(
            self.config,
            self._schedule,
            nfe,
            timesteps=timesteps,
            sigmas=sigmas,
            mu=mu,
            final=final_of(self.config),
            rule=rule_of(self.config, self._solver.stages),
        )

    def _final_of_grid(self) -> str:
        return "zero" if final_of(self.config) == "zero" else "t_end"

    def _are_fitted(self, timesteps: ArrayLike | None) -> bool:
        if timesteps is None or self._fitted is None:
            return False
        mine = self._network.told(self._fitted.schedule, self._fitted.tau)
        theirs = np.asarray(timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps, np.float64)
        return theirs.shape == mine.shape and bool(np.allclose(theirs, mine, rtol=NEAR))

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{what}; here its base solver, {self.config['solver']!r}, plans instead.", stacklevel=4)

    def _plan_from(self, first: int) -> Plan:
        """The plan of a run that begins at step `first`."""
        plan = self._plan
        assert plan is not None
        if not 0 <= first < plan.nfe:
            raise PlanError(f"there are {plan.nfe} steps, so a run cannot begin at step {first}.")
        if first == 0:
            return plan
        key = ("from", first, plan.digest)
        if key not in self._plans:
            solver = self._solver
            if plan is self._fitted:
                self._warn(f"the plan begins at its first call, but the run at call {first}")
                solver = solver if solver.stages == 1 else make_solver(DEFAULT_SOLVER)
            if solver.stages == 1 or (solver.even and (np.diff(plan.schedule.lam(plan.grid[first:])) > 0.0).all()):
                rest = solver.plan(plan.schedule, plan.nfe - first, grid=plan.grid[first:])
                rows = tuple(dataclasses.replace(row, tau=tau) for row, tau in zip(rest.rows, plan.tau[first:], strict=True))
                self._plans[key] = dataclasses.replace(rest, rows=rows)
            else:
                self._plans[key] = tail(plan, first)
        return self._plans[key]

    def _check_fitted(self, plan: Plan) -> None:
        if not same_noise(plan.schedule, self._schedule):
            raise PlanError(
                f"the plan was made for {type(plan.schedule).__name__}, the noise levels of which are not those of this config. Plan for "
                f"the model's own schedule."
            )

    def _training_times(self) -> Floats:
        """Times of the model's noise levels, noisiest first, for the attributes before the first `set_timesteps`."""
        if isinstance(self._schedule, EDM):
            return np.geomspace(self._schedule.sigma_max, self._schedule.sigma_min, self.config["num_train_timesteps"])
        return (np.arange(len(self.betas))[::-1] + 1.0) / len(self.betas)

    def _schedule_alpha_sigma(self, times: Floats) -> tuple[Floats, Floats]:
        schedule = self._schedule if self._plan is None else self._plan.schedule
        return schedule.alpha(times), schedule.sigma(times)

    def _ratios(self, times: Floats) -> Tensor:
        """The attribute `sigmas`: sigma / alpha, or sigma for flows."""
        alpha, sigma = self._schedule_alpha_sigma(np.asarray(times, np.float64))
        if isinstance(self._schedule, Flow):
            return torch.from_numpy(sigma).float()
        with np.errstate(divide="ignore"):
            return torch.from_numpy(sigma / alpha).float()


def _limit_of(config: Mapping[str, Any]) -> Any:
    if config["thresholding"]:
        ceiling = float(config["sample_max_value"])
        return DynamicThreshold(_nothing, config["dynamic_thresholding_ratio"], ceiling=ceiling)._limit
    reach = float(config["clip_sample_range"])
    return Clipped(_nothing, -reach, reach)._limit if config["clip_sample"] else None


def _nothing(x: Tensor, t: float) -> Tensor:
    return x


def _is_default_flow(schedule: NoiseSchedule, sigmas: ArrayLike) -> bool:
    """Whether these are the sigmas that flow pipelines hand to every scheduler when nobody gave any."""
    values = np.asarray(sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas, np.float64)
    return isinstance(schedule, Flow) and bool(np.allclose(values, np.linspace(1.0, 1.0 / len(values), len(values)), atol=NEAR))


# ---- plans and configs -------------------------------------------------------------------------------------------------------------


def _take_options(init: set[str], config: Mapping[str, Any], kwargs: dict[str, Any]) -> None:
    """Gather the options of the solver among the arguments of `from_config`. Another solver starts from its own defaults."""
    name = kwargs.get("solver", config.get("solver", DEFAULT_SOLVER))
    fields = {field.name for field in dataclasses.fields(make_solver(name))}  # type: ignore[arg-type]
    given = dict(kwargs.pop("solver_options", None) or {})
    if "solver_order" in kwargs:
        given["order"] = kwargs.pop("solver_order")
    for key in [key for key in kwargs if key in fields and key not in init]:
        given[key] = kwargs.pop(key)
    if unknown := [key for key in kwargs if key not in init and not key.startswith("_") and key not in config]:
        known = ", ".join(sorted(fields)) or "none"
        raise TypeError(
            f"{unknown[0]} is neither a setting of the scheduler nor an option of the solver {name!r}, which has: {known}."
        )
    kept = {} if "solver" in kwargs else config.get("solver_options") or {}
    options = {**kept, **given} or None
    if options != config.get("solver_options"):
        kwargs["solver_options"] = options


def _defaults_of_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of its model by the defaults of its class, which diffusers does not hand to another class."""
    ours = inspect.signature(PlanScheduler.__init__).parameters
    said = {name: config[name] for name in config.get("_use_default_values", ()) if name in OF_THE_MODEL and name in config}
    return {name: value for name, value in said.items() if name in ours and value != ours[name].default}


def _followed(config: Mapping[str, Any]) -> str | None:
    """The class of a config, if its times are followed.

    One that is not from disk does not say it, but has the settings of its class, those of other classes that are left over behind them.
    """
    if isinstance(config.get("_class_name"), str):
        return config["_class_name"] if config["_class_name"] in FOLLOWED else None
    own = itertools.takewhile(lambda name: name != "_use_default_values", config)
    settings = {name for name in own if not name.startswith("_")}
    found = [getattr(diffusers.schedulers, name, None) for name in FOLLOWED]
    same = [peer for peer in found if isinstance(peer, type) and issubclass(peer, ConfigMixin) and _settings_of(peer) == settings]
    return same[0].__name__ if same else None


def _settings_of(peer: type) -> set[str]:
    return set(inspect.signature(peer.__init__).parameters) - {"self", "kwargs"}


def _log_linear(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings for levels uniform in log sigma that end at the least noisy entry, unless others are chosen."""
    if any(config.get(name) for name in CURVE_SETTINGS):
        return {}
    return {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}


def _plan_of(plan: Any) -> Plan:
    if isinstance(plan, str) and plan in KNOWN:
        return KNOWN[plan]
    if not isinstance(plan, Plan):
        if not Path(plan).is_file():
            raise FileNotFoundError(
                f"there is no plan {plan}. A config says its plan by a digest only; load it with PlanScheduler.from_pretrained, or give "
                f"plan=, a fewstep.Plan or the path of its file."
            )
        plan = Plan.load(plan)
    return KNOWN.setdefault(plan.digest, plan)


def _plan_beside(source: Any, subfolder: str | None, digest: str, hub: Mapping[str, Any]) -> Plan:
    path = Path(source) / (subfolder or "") / PLAN_FILE
    if not path.is_file():
        if Path(source).is_dir() or Path(source).is_file():
            raise FileNotFoundError(f"the scheduler has a plan, but {path} is missing. Give plan=, or another solver=.")
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(str(source), PLAN_FILE, subfolder=subfolder, **hub)
    plan = Plan.load(path)
    if plan.digest != digest:
        raise ArtefactError(f"{path} is not the plan that the scheduler's config names. Save both again with save_pretrained.")
    return plan


def _solver_of(plan: Plan) -> tuple[str, dict[str, Any]]:
    """Name and options of the solver that a plan was made by, without wrappers around it; or the one that is good for anything."""
    told = json_value(plan.provenance).get("solver")
    if not isinstance(told, Mapping):
        return DEFAULT_SOLVER, {}
    options = dict(told.get("options") or {})
    while isinstance(options.get("solver"), Mapping):
        told = options["solver"]
        options = dict(told.get("options") or {})
    return name_of({**told, "options": options}) or (DEFAULT_SOLVER, {})


def _config_of(schedule: NoiseSchedule) -> dict[str, Any]:
    if isinstance(schedule, Flow):
        return {"prediction_type": "flow_prediction"}
    if isinstance(schedule, FromBetas):
        return {"trained_betas": list(schedule.betas), "num_train_timesteps": len(schedule.betas)}
    if isinstance(schedule, FromAlphasCumprod):
        betas = betas_of_bars(np.asarray(schedule.alphas_cumprod))
        return {"trained_betas": betas.tolist(), "num_train_timesteps": len(betas)}
    raise PlanError(f"a plan for {type(schedule).__name__} needs config=, that of the pipeline's scheduler.")
