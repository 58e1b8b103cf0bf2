"""What a diffusers scheduler's config says: its noise schedule, and the times at which it calls the network.

A config is a mapping with the names that diffusers' schedulers share. Everything here is float64 on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.errors import GridError, MissingExtraError, PlanError, UnknownNameError
from fewstep.schedules import EDM, Flow, FromAlphasCumprod, FromBetas, NoiseSchedule

__all__ = [
    "CURVE_SETTINGS",
    "FOLLOWED",
    "OF_THE_MODEL",
    "ORIGINAL_STEPS",
    "PREDICTS",
    "Rule",
    "betas_of",
    "betas_of_bars",
    "check_config",
    "final_of",
    "is_edm",
    "is_flow",
    "is_flow_match",
    "rule_of",
    "same_noise",
    "schedule_of",
    "sigma_data_of",
    "sigma_of_told",
    "times_of",
    "told_of_sigma",
    "unsaid",
]

Floats = NDArray[np.float64]
PREDICTS = {"epsilon": "noise", "sample": "data", "v_prediction": "velocity", "flow_prediction": "flow"}
"""diffusers' names of the predictions, and ours."""
ALMOST_ZERO = 2.0**-24
"""What diffusers puts in place of a last alpha_cumprod of 0; here only for a noise prediction, which says nothing there."""
HIGHEST_RATIO = (1.0 / ALMOST_ZERO - 1.0) ** 0.5
"""Sigma / alpha there, where Karras and other curves of sigmas begin if the table ends at infinity."""
LARGEST_BETA = 0.999
SPACINGS = ("linspace", "leading", "trailing")
FINALS = ("zero", "sigma_min")
TIMESTEPS = ("discrete", "continuous", "arctangent")
"""What networks are told of sigma / alpha: an index of a table, log(sigma) / 4, or the angle over a right angle."""
SHAPES = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas"}
"""How the schedulers for preconditioned networks call the spacings of sigmas, and how the others do."""
CURVE_SETTINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Settings that exclude each other."""
RHO, BETA = 7.0, 0.6
"""The exponent of Karras sigmas, and both parameters of the Beta distribution of "beta" sigmas."""
ORIGINAL_STEPS = 50
"""On how many timesteps latent consistency models are distilled, if the config does not say."""
EULERS = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
"""Schedulers with their own rule for times: Karras sigmas lie between those of their timesteps, which need not be whole numbers."""
FOR_EULERS = (
    *("ddim", "ddpm", "edm_euler", "edm_heun", "lms", "dpm_2s", "dpmpp_2s_sde"),
    *("euler_ancestral", "dpm_2s_ancestral", "dpmpp_2s_ancestral"),
)
"""Solvers that take the place of one of them."""
ENDING_ABOVE = {"DEISMultistepScheduler": "deis", "SASolverScheduler": "sa"}
"""Schedulers that end at the least noisy entry of the table, and how the names of solvers begin that take their place."""
FOLLOWED = (*EULERS, *ENDING_ABOVE)
OF_THE_MODEL = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "snr_shift_scale",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "sigma_data",
)
"""Settings that say what the model is, which a class's defaults say as well."""
UNSERVED = {
    "consistency models": ("CMStochasticIterativeScheduler", "SCMScheduler", "ConsistencyDecoderScheduler"),
    "networks that predict more than a noisy state's data": (
        "FlowMapEulerDiscreteScheduler",
        "PiflowScheduler",
        "HeliosScheduler",
        "HeliosDMDScheduler",
        "RFD4ProteinaScheduler",
    ),
    "networks on a schedule of their own": (
        "IPNDMScheduler",
        "DDPMWuerstchenScheduler",
        "MiniMaxH3Scheduler",
        "KarrasVeScheduler",
        "ScoreSdeVeScheduler",
        "ScoreSdeVpScheduler",
    ),
    "discrete tokens": (
        "AmusedScheduler",
        "BlockRefinementScheduler",
        "DiscreteDDIMScheduler",
        "EntropyBoundScheduler",
        "VQDiffusionScheduler",
    ),
}
"""What schedulers are for whose networks are asked in other ways than any that is served."""
ONLY_THEIRS = {"clip_denoised": "consistency models", "scaler": "networks on a schedule of their own"}
"""Settings by which such a config is known that does not say its class."""
ENOUGH_ALIKE = 1e-3
"""By how much lambda of two tables may differ that are the same but for rounding to single precision."""


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether this is the config of a rectified-flow model."""
    asked = bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"
    return asked or is_flow_match(config)


def is_flow_match(config: Mapping[str, Any]) -> bool:
    """Whether this is the config of a FlowMatch scheduler, which is for flows alone and has no need to say so."""
    named = str(config.get("_class_name", "")).startswith(("FlowMatch", "LTXEuler"))
    return named or (bool({"shift", "s_noise"} & config.keys()) and "beta_schedule" not in config)


def is_edm(config: Mapping[str, Any]) -> bool:
    """Whether this is the config of a scheduler for networks in EDM's preconditioning, which has no table."""
    return {"sigma_data", "sigma_min"} <= config.keys() and "beta_schedule" not in config


def unsaid(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config leaves to its class, in the words of `PlanScheduler`.

    Example:
        >>> unsaid({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
        {'prediction_type': 'flow_prediction', 'shift': 3.0}
    """
    if is_edm(config):
        return _settings_of_edm(config)
    if is_flow_match(config):
        return {"prediction_type": config.get("prediction_type", "flow_prediction"), "shift": config.get("shift", 1.0)}
    of_cogvideox = config.get("snr_shift_scale") is not None
    return {"clip_sample": False} if of_cogvideox else {}  # whose schedulers do not look at it


def _settings_of_edm(config: Mapping[str, Any]) -> dict[str, Any]:
    same = ("sigma_data", "sigma_min", "sigma_max", "rho", "prediction_type")
    cosine = "solver_order" in config and "algorithm_type" not in config
    settings = {name: config[name] for name in same if name in config}
    shape = SHAPES[config.get("sigma_schedule", "karras")]
    return {**settings, "timestep_type": "arctangent" if cosine else "continuous", shape: True}


def sigma_data_of(config: Mapping[str, Any]) -> float | None:
    """The data's deviation in the preconditioning of the network; None if it has none.

    The input of a network with continuous timesteps and v-prediction is scaled as if it were 1.
    """
    if config.get("sigma_data") is not None:
        return float(config["sigma_data"])
    continuous = config.get("timestep_type", "discrete") != "discrete" and config.get("prediction_type") == "v_prediction"
    return 1.0 if continuous else None


def told_of_sigma(kind: str, sigma: Floats) -> Floats:
    """What a preconditioned network is told.

    Example:
        >>> told_of_sigma("arctangent", np.array([1.0])).tolist()
        [0.5]
    """
    return np.arctan(sigma) / (0.5 * math.pi) if kind == "arctangent" else 0.25 * np.log(sigma)


def sigma_of_told(kind: str, told: Floats) -> Floats:
    """The inverse of `told_of_sigma`."""
    return np.tan(0.5 * math.pi * told) if kind == "arctangent" else np.exp(4.0 * told)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what cannot be served, or does not exist.

    Raises:
        PlanError: for schedulers whose networks are of another kind.
        UnknownNameError: for a name that does not exist.
        ValueError: for settings that exclude each other.
    """
    name = config.get("_class_name")
    other = [what for what, names in UNSERVED.items() if name in names] + [ONLY_THEIRS[key] for key in ONLY_THEIRS if key in config]
    if other:
        raise PlanError(f"this is the config of a scheduler for {other[0]}, which PlanScheduler cannot take the place of.")
    _check_preconditioned(config)
    if config.get("invert_sigmas") and not is_flow(config):
        raise PlanError("invert_sigmas=True is for flow models.")
    for name, known in (
        ("prediction_type", tuple(PREDICTS)),
        ("timestep_spacing", (*SPACINGS, None)),
        ("final_sigmas_type", (*FINALS, None)),
        ("time_shift_type", ("exponential", "linear")),
        ("timestep_type", TIMESTEPS),
        ("sigma_schedule", tuple(SHAPES)),
        ("times_as", (*FOLLOWED, None)),
    ):
        if name in config and config[name] not in known:
            raise UnknownNameError(name, config[name], [known_name for known_name in known if known_name])
    chosen = [name for name in CURVE_SETTINGS if config.get(name)]
    if len(chosen) > 1:
        raise ValueError(f"only one of {', '.join(chosen)} can be used.")


def _check_preconditioned(config: Mapping[str, Any]) -> None:
    data = sigma_data_of(config)
    if data is None:
        return
    if not 0.0 < data < math.inf:
        raise ValueError(f"sigma_data must be positive, got {data:g}.")
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise PlanError(f"a network in EDM's preconditioning predicts 'epsilon' or 'v_prediction', got {kind!r}.")


# ---- the noise schedule ------------------------------------------------------------------------------------------------------------


def schedule_of(config: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of a config.

    Example:
        >>> float(schedule_of({"beta_schedule": "linear"}).alpha(1.0)).__round__(6)
        0.006353
    """
    if is_flow(config):
        return Flow(t_end=0.0)
    table = _table_of(config)
    if sigma_data_of(config) is None:
        return table
    ends = np.exp(-table.lam([1.0 / len(table.alphas_cumprod), 1.0])).tolist()
    low, high = (config.get(name) or end for name, end in zip(("sigma_min", "sigma_max"), ends, strict=True))
    return EDM(float(low), HIGHEST_RATIO if math.isinf(high) else float(high))


def _table_of(config: Mapping[str, Any]) -> FromAlphasCumprod:
    table = np.cumprod(1.0 - betas_of(config))
    if table[-1] <= 0.0:
        table[-1] = min(ALMOST_ZERO, 0.9 * table[-2]) if config.get("prediction_type", "epsilon") == "epsilon" else 0.0
    return FromAlphasCumprod(table.tolist())


def betas_of(config: Mapping[str, Any]) -> Floats:
    """The table of betas ``"num_train_timesteps"``.

    Raises:
        UnknownNameError: for a beta_schedule that does not exist.
    """
    count = int(config.get("num_train_timesteps", 1000))
    low, high = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    given, name = config.get("trained_betas"), config.get("beta_schedule", "linear")
    if given is not None:
        betas = np.asarray(given, np.float64)
    elif name in CURVES:
        bars = np.array([CURVES[name](i / count) for i in range(count + 1)])
        betas = np.minimum(1.0 - bars[1:] / bars[:-1], LARGEST_BETA)
    elif name in RAMPS:
        betas = RAMPS[name](low, high, count)
    else:
        raise UnknownNameError("beta_schedule", name, [*RAMPS, *CURVES])
    scale = config.get("snr_shift_scale")
    betas = betas if scale is None else _with_less_signal(betas, float(scale))
    return _zero_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def betas_of_bars(bars: Floats) -> Floats:
    """The betas ``"N"`` of a table of alpha_cumprod ``"N"``."""
    return 1.0 - np.concatenate([bars[:1], bars[1:] / bars[:-1]])


def _cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2.0) ** 2


def _laplace(t: float) -> float:
    lam = -0.5 * math.copysign(1.0, 0.5 - t) * math.log(1.0 - 2.0 * abs(0.5 - t) + 1e-6)
    return math.sqrt(1.0 / (1.0 + math.exp(-lam)))


CURVES: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": _cosine,
    "exp": lambda t: math.exp(-12.0 * t),
    "laplace": _laplace,
}
"""Schedules that are given by alpha_cumprod as a function of t in [0, 1]."""
RAMPS: dict[str, Callable[[float, float, int], Floats]] = {
    "linear": lambda low, high, count: np.linspace(low, high, count),
    "scaled_linear": lambda low, high, count: np.linspace(low**0.5, high**0.5, count) ** 2,
    "sigmoid": lambda low, high, count: low + (high - low) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, count))),
}
"""Schedules that are given by beta."""


def _with_less_signal(betas: Floats, scale: float) -> Floats:
    """Betas whose signal-to-noise ratio is that of the given ones over `scale` (CogVideoX)."""
    bars = np.cumprod(1.0 - betas)
    return betas_of_bars(bars / (scale + (1.0 - scale) * bars))


def _zero_snr(betas: Floats) -> Floats:
    """Betas whose last alpha_cumprod is 0 ("Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891, alg. 1)."""
    root = np.sqrt(np.cumprod(1.0 - betas))
    return betas_of_bars(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)


def same_noise(a: NoiseSchedule, b: NoiseSchedule) -> bool:
    """Whether both have the same noise levels, as far as a network can tell: tables up to single precision; flows whatever their shift.

    Example:
        >>> same_noise(Flow(shift=3.0), Flow())
        True
    """
    if isinstance(a, Flow) and isinstance(b, Flow):
        return True  # the network is told sigma
    tables = [len(s.network_table) for s in map(_Table, (a, b)) if s.network_table is not None]
    if len(tables) == 2 and tables[0] == tables[1]:
        times = (np.arange(tables[0]) + 1.0) / tables[0]
        with np.errstate(invalid="ignore"):
            return bool(np.all((np.abs(a.lam(times) - b.lam(times)) < ENOUGH_ALIKE) | (a.lam(times) == b.lam(times))))
    return a.same_noise(b)


class _Table:
    """The entries of a schedule that has some."""

    def __init__(self, schedule: NoiseSchedule):
        self.network_table: Sequence[float] | None = None
        if isinstance(schedule, FromBetas):
            self.network_table = schedule.betas
        elif isinstance(schedule, FromAlphasCumprod):
            self.network_table = schedule.alphas_cumprod


# ---- the rule for times ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """By which rule of diffusers times are spaced.

    Attributes:
        name: ``"dpm"``, that of DPM-Solver++ and most others; ``"ddim"``, of DDIM, DDPM and PNDM, whose "leading" times, the default,
            are N // nfe apart instead of N // (nfe + 1); ``"distilled"``, of LCM and TCD: some of the `original_inference_steps` on which a
            model was distilled; ``"euler"``, of Euler's family: that as well, "linspace" times from the last entry to
            the first, and curves of sigmas between the first and the last timestep instead of over the whole table.
        stages: calls a step. Euler's family is asked for steps and puts their ends on the times.
    """

    name: str = "dpm"
    stages: int = 1


DPM_RULE = Rule()
OTHER_RULES = {"ddim": "ddim", "ddpm": "ddim", "pndm": "ddim", "lcm": "distilled", "tcd": "distilled"}
"""Solver -> the rule of the scheduler that it takes the place of."""


def rule_of(config: Mapping[str, Any], stages: int = 1) -> Rule:
    """The rule for the solver of a config of `PlanScheduler`: that of the class that it came from if the solver takes its place, else
    that of the solver.

    Example:
        >>> rule_of({"solver": "ddim"}).name, rule_of({"solver": "ddim", "times_as": "EulerDiscreteScheduler"}).name
        ('ddim', 'euler')
    """
    if config.get("times_as") in EULERS and config.get("solver") in FOR_EULERS:
        return Rule("euler", stages)
    return Rule(OTHER_RULES.get(str(config.get("solver")), "dpm"), stages)


def final_of(config: Mapping[str, Any]) -> str:
    """Where the last step ends if the config does not say it: ``"zero"`` or ``"sigma_min"``."""
    if config.get("final_sigmas_type") is not None:
        return str(config["final_sigmas_type"])
    solver, ending = str(config.get("solver")), ENDING_ABOVE.get(str(config.get("times_as")))
    if ending is not None:
        return "sigma_min" if solver.startswith(ending) and not is_flow(config) else "zero"
    follows = solver in ("ddim", "pndm") and rule_of(config).name == "ddim" and not config.get("set_alpha_to_one", True)
    return "sigma_min" if follows or solver == "tcd" else "zero"


# ---- the times of the calls --------------------------------------------------------------------------------------------------------


def times_of(
    config: Mapping[str, Any],
    schedule: NoiseSchedule,
    nfe: int | None = None,
    *,
    timesteps: ArrayLike | None = None,
    sigmas: ArrayLike | None = None,
    mu: float | None = None,
    final: str = "zero",
    rule: Rule = DPM_RULE,
) -> Floats:
    """The times ``"nfe+1"`` of the states, noisiest first, where a diffusers scheduler of this config has them.

    Args:
        config, schedule: the config and its `schedule_of`.
        nfe, timesteps, sigmas: one of them. `timesteps` are what the network is told. `sigmas` are sigma / alpha of all states, the last
            included, or for a flow model those before the shift, the last (0) left out; as diffusers has it.
        mu: logarithm of the shift of flow models with dynamic shifting. Pipelines hand it to others as well, which ignore it.
        final: ``"zero"``, or ``"sigma_min"`` for the least noisy entry of the table.
        rule: by which times are spaced.

    Raises:
        ValueError: if not one of the three is given, or `mu` is missing.

    Example:
        >>> config = {"timestep_spacing": "trailing"}
        >>> schedule = schedule_of(config)
        >>> (times_of(config, schedule, 4) * 1000 - 1).round(3).tolist()
        [999.0, 749.0, 499.0, 249.0, -0.834]
    """
    if sum(value is not None for value in (nfe, timesteps, sigmas)) != 1:
        raise ValueError("give exactly one of num_inference_steps, timesteps and sigmas.")
    if nfe is not None and (isinstance(nfe, bool) or int(nfe) != nfe or nfe < 1):
        raise GridError(f"num_inference_steps must be a whole number of at least 1, got {nfe!r}.")
    chosen = _curves_of(config)
    if timesteps is not None and chosen:
        raise ValueError(f"timesteps cannot be set with {chosen[0]}=True, which places them itself.")
    if rule.name == "distilled" and nfe is not None and not chosen and not isinstance(schedule, (Flow, EDM)):
        timesteps, nfe = _distilled_indices(config, nfe), None
    given = None if timesteps is None and sigmas is None else _floats(timesteps if sigmas is None else sigmas)  # type: ignore[arg-type]
    if isinstance(schedule, Flow):
        return _flow_times(config, nfe, given, sigmas is None, mu, final)
    if isinstance(schedule, EDM):
        return _levels(config, schedule, nfe, given, sigmas is None, final, rule)
    return _table_times(config, schedule, nfe, given, sigmas is None, final, rule)


def _table_times(
    config: Mapping[str, Any],
    schedule: NoiseSchedule,
    nfe: int | None,
    given: Floats | None,
    are_timesteps: bool,
    final: str,
    rule: Rule,
) -> Floats:
    count = len(_Table(schedule).network_table or ())
    if given is not None and not are_timesteps:
        return _times_of_sigmas(schedule, given)
    end = schedule.t_zero if final == "zero" else 1.0 / count
    clipped = _clipped(config, schedule, count)
    if nfe is not None and _curves_of(config):
        high, low = _ends_of_curve(config, schedule, _indices(config, count, nfe, clipped, rule), clipped, rule)
        endless = math.isinf(high)
        curve = _curve(config, HIGHEST_RATIO if endless else float(high), float(low), nfe + (final == "sigma_min"))
        times = _times_of_sigmas(schedule, curve)
        times[0] = 1.0 if endless else times[0]
        return times if final == "sigma_min" else np.append(times, end)
    if given is not None and not (given.min() >= 0.0 and given.max() <= count - 1.0):
        raise ValueError(f"timesteps lie between 0 and {count - 1}, got {given.min():g} to {given.max():g}.")
    indices = given if given is not None else _indices(config, count, int(nfe or 0), clipped, rule)
    times = (np.clip(indices, 0, count - 1) + 1.0) / count
    # a last call at the least noisy entry already cannot end there: it goes on to zero
    return np.append(times, schedule.t_zero if times[-1] <= end else end)


def _levels(
    config: Mapping[str, Any],
    schedule: EDM,
    nfe: int | None,
    given: Floats | None,
    are_timesteps: bool,
    final: str,
    rule: Rule,
) -> Floats:
    """Sigmas of preconditioned networks, which are the times of `EDM`."""
    if given is not None and not are_timesteps:
        return given
    if given is None and not _curves_of(config):  # where the table has the timesteps
        table = _table_of(config)
        levels = np.exp(-table.lam(_table_times(config, table, nfe, None, False, final, rule)))
        return np.where(np.isinf(levels), HIGHEST_RATIO, levels)
    if given is None:
        high, low = schedule.sigma_max, schedule.sigma_min
        if not is_edm(config):
            table = _table_of(config)
            count = len(table.alphas_cumprod)
            high, low = _ends_of_curve(config, table, _indices(config, count, int(nfe or 0), 0, rule), 0, rule)
        levels = _curve(config, min(high, HIGHEST_RATIO), low, int(nfe or 0) + (final == "sigma_min"))
        return levels if final == "sigma_min" else np.append(levels, 0.0)
    levels = sigma_of_told(str(config.get("timestep_type")), given)
    return np.append(levels, schedule.sigma_min if final == "sigma_min" and levels[-1] > schedule.sigma_min else 0.0)


def _indices(config: Mapping[str, Any], count: int, nfe: int, clipped: int, rule: Rule) -> Floats:
    """The table's entries that are called."""
    spacing = config.get("timestep_spacing") or ("leading" if rule.name == "ddim" else "linspace")
    if rule.name == "euler":
        steps = (nfe + rule.stages - 1) // rule.stages
        return np.interp(np.linspace(0.0, steps - 1.0, nfe), np.arange(steps), _steps_of_euler(config, spacing, count, steps))
    offset, last = int(config.get("steps_offset") or 0), count - clipped
    if spacing == "linspace":
        return _whole(np.linspace(0.0, last - 1.0, nfe + 1)[::-1][:-1])
    if spacing == "trailing":
        return _whole(last - np.arange(nfe, dtype=np.float64) * (count / nfe)) - 1.0
    parts = nfe if rule.name == "ddim" else nfe + 1
    places = np.arange(parts, dtype=np.float64)[::-1][:nfe]
    return places * (last // parts or last / parts) + offset


def _distilled_indices(config: Mapping[str, Any], nfe: int) -> Floats:
    """The table's entries that a consistency model is called at, of those on which it was distilled; evenly spaced, noisiest first."""
    original = int(config.get("original_inference_steps") or ORIGINAL_STEPS)
    if nfe > original:
        raise GridError(
            f"a model distilled on {original} timesteps (original_inference_steps) makes at most as many calls, got {nfe}."
        )
    entries: Floats = np.arange(original, 0.0, -1.0) * (int(config.get("num_train_timesteps", 1000)) // original) - 1.0
    return entries[np.floor(np.linspace(0.0, original, nfe, endpoint=False)).astype(np.int64)]


def _steps_of_euler(config: Mapping[str, Any], spacing: str, count: int, steps: int) -> Floats:
    """The entries at which the steps of Euler's family begin."""
    back = np.arange(steps, dtype=np.float64)
    if spacing == "linspace":  # a single step begins at the noisiest entry, where theirs has the least noisy one
        return np.linspace(count - 1.0, 0.0, steps)
    if spacing == "trailing":
        return _whole(count - back * (count / steps)) - 1.0
    return back[::-1] * (count // steps or count / steps) + int(config.get("steps_offset") or 0)


def _ends_of_curve(
    config: Mapping[str, Any], schedule: NoiseSchedule, indices: Floats, clipped: int, rule: Rule
) -> tuple[float, float]:
    """Sigma / alpha at the first and the last call of a curve, as the config says, or else its rule."""
    count = len(_Table(schedule).network_table or ())
    ends = indices[[0, -1]] + 1.0 if rule.name == "euler" and len(indices) > 1 else np.array([count - clipped, 1.0])
    ratios = np.exp(-schedule.lam(ends / count)).tolist()
    high, low = (config.get(name) or value for name, value in zip(("sigma_max", "sigma_min"), ratios, strict=True))
    return float(high), float(low)


def _whole(indices: Floats) -> Floats:
    """Rounded, unless that repeats one: then there are more calls than entries, and the times lie between them."""
    rounded = np.rint(indices)
    return rounded if (np.diff(rounded) < 0.0).all() else indices


def _clipped(config: Mapping[str, Any], schedule: NoiseSchedule, count: int) -> int:
    """How many of the noisiest entries are left out because lambda is below lambda_min_clipped."""
    least = float(config.get("lambda_min_clipped") or -math.inf)
    return int((schedule.lam((np.arange(count) + 1.0) / count) < least).sum())


def _times_of_sigmas(schedule: NoiseSchedule, sigmas: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return schedule.t_of_lam(-np.log(sigmas))


def _flow_times(
    config: Mapping[str, Any], nfe: int | None, given: Floats | None, are_timesteps: bool, mu: float | None, final: str
) -> Floats:
    count, shift = int(config.get("num_train_timesteps", 1000)), _shift(config, mu)
    if given is not None and are_timesteps:
        sigmas = 1.0 - given / count if config.get("invert_sigmas") else given / count
    else:
        sigmas = shift(_plain_sigmas(config, int(nfe or 0), count) if given is None else given)
        terminal = config.get("shift_terminal")
        if terminal and sigmas[-1] < 1.0:  # a single call has no other sigma to stretch to
            sigmas = 1.0 - (1.0 - sigmas) * (1.0 - terminal) / (1.0 - sigmas[-1])
        if _curves_of(config):
            sigmas = _curve(config, float(sigmas[0]), float(sigmas[-1]), len(sigmas))
    end = 0.0 if final == "zero" else float(shift(np.array([1.0 / count]))[0])
    return sigmas if sigmas[-1] == 0.0 else np.append(sigmas, end if sigmas[-1] > end else 0.0)


def _plain_sigmas(config: Mapping[str, Any], nfe: int, count: int) -> Floats:
    """Before the shift: FlowMatchEuler's, which end at the shifted 1/N; or those of the multistep schedulers."""
    if config.get("shift") is None:
        return np.linspace(1.0, 1.0 / count, nfe + 1)[:-1]
    shift = 1.0 if config.get("use_dynamic_shifting") else float(config["shift"])
    return np.linspace(1.0, _shifted(np.array(1.0 / count), shift), nfe)


def _shift(config: Mapping[str, Any], mu: float | None) -> Callable[[Floats], Floats]:
    if config.get("use_dynamic_shifting"):
        if mu is None:
            raise ValueError("mu must be given when use_dynamic_shifting is True: the logarithm of the shift, for this resolution.")
        factor = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    else:
        factor = (config.get("flow_shift") or 1.0) if config.get("shift") is None else config["shift"]
    return lambda sigmas: _shifted(sigmas, float(factor))


def _shifted(sigmas: Floats, shift: float) -> Floats:
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def _curves_of(config: Mapping[str, Any]) -> list[str]:
    """The settings that place sigmas on a curve, whatever the timesteps."""
    return [name for name in (*CURVE_SETTINGS, "use_lu_lambdas") if config.get(name)]


def _curve(config: Mapping[str, Any], high: float, low: float, nodes: int) -> Floats:
    """Sigmas ``"nodes"`` from `high` to `low`; a single one is `high`."""
    share: Floats = np.linspace(0.0, 1.0, nodes, dtype=np.float64)
    if config.get("use_karras_sigmas"):
        rho = float(config.get("rho") or RHO)
        return (high ** (1.0 / rho) + share * (low ** (1.0 / rho) - high ** (1.0 / rho))) ** rho
    if config.get("use_beta_sigmas"):
        try:
            from scipy.stats import beta
        except ImportError as error:
            raise MissingExtraError("scipy", "tune", "use_beta_sigmas") from error
        return low + (high - low) * np.asarray(beta.ppf(1.0 - share, BETA, BETA), np.float64)
    return np.exp(math.log(high) + share * math.log(low / high))


def _floats(values: ArrayLike) -> Floats:
    if hasattr(values, "detach"):  # a tensor, on any device
        values = values.detach().cpu().double().numpy()  # type: ignore[union-attr]
    return np.array(values, np.float64)
