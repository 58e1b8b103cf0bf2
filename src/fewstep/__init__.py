"""fewstep: the samples you want from a diffusion or flow model, in as few network calls as possible.

Everything public is loaded when it is first used, so that ``fewstep --help`` starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fewstep.version import __version__

if TYPE_CHECKING:
    from fewstep import (
        denoisers,
        diffusers,
        distill,
        evaluate,
        exact,
        grids,
        guidance,
        likelihood,
        recipes,
        schedules,
        solvers,
        statistics,
        steer,
        train,
        tuners,
    )
    from fewstep.denoisers import Denoiser, ModelInfo
    from fewstep.errors import FewstepError
    from fewstep.integrate import adaptive, invert, reference
    from fewstep.loading import check, load
    from fewstep.noise import add_noise, draw_noise
    from fewstep.plan import Plan
    from fewstep.sampler import Hooks, sample
    from fewstep.solvers import make_plan, solver_names
    from fewstep.train.trainer import fit
    from fewstep.tuners.auto import tune

__all__ = [
    "Denoiser",
    "FewstepError",
    "Hooks",
    "ModelInfo",
    "Plan",
    "__version__",
    "adaptive",
    "add_noise",
    "check",
    "denoisers",
    "diffusers",
    "distill",
    "draw_noise",
    "evaluate",
    "exact",
    "fit",
    "grids",
    "guidance",
    "invert",
    "likelihood",
    "load",
    "make_plan",
    "recipes",
    "reference",
    "sample",
    "schedules",
    "solver_names",
    "solvers",
    "statistics",
    "steer",
    "train",
    "tune",
    "tuners",
]

HOMES = {
    "Denoiser": "denoisers",
    "FewstepError": "errors",
    "Hooks": "sampler",
    "ModelInfo": "denoisers",
    "Plan": "plan",
    "add_noise": "noise",
    "adaptive": "integrate",
    "check": "loading",
    "draw_noise": "noise",
    "fit": "train.trainer",
    "invert": "integrate",
    "load": "loading",
    "make_plan": "solvers",
    "reference": "integrate",
    "sample": "sampler",
    "solver_names": "solvers",
    "tune": "tuners.auto",
}
"""Where each public name lives; the public modules live under their own names."""


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(importlib.import_module(f"fewstep.{HOMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"fewstep.{name}")
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
