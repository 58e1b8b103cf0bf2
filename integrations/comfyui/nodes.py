"""Nodes and registered names. ComfyUI is imported when it asks, so that the file can be read without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from fewstep import Plan, solver_names
from fewstep.kdiffusion import KDiffusionSampler, kdiffusion_sampler

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "HostedSampler", "register"]

PREFIX = "fewstep_"
CATEGORY = "sampling/custom_sampling/samplers"


class HostedSampler:
    """A sampler function that asks the model how its states are made, noised data or, for flow models, between data and noise.

    Args:
        make: ``(space)`` -> the function for states of that kind; see `kdiffusion_sampler`.
        name: what ComfyUI calls it.
    """

    def __init__(self, make: Callable[[str], KDiffusionSampler], name: str):
        self.samplers = {space: make(space) for space in ("ve", "flow")}
        self.__name__ = f"sample_{name}"

    def __call__(self, model: Any, x: Any, sigmas: Any, *args: Any, **kwargs: Any) -> Any:
        space = _space(model.inner_model.inner_model.model_sampling)  # KSamplerX0Inpaint, CFGGuider, BaseModel
        return self.samplers[space](model, x, sigmas, *args, **kwargs)


def _space(model_sampling: object) -> str:
    from comfy.model_sampling import CONST

    return "flow" if isinstance(model_sampling, CONST) else "ve"


class FewstepSampler:
    """A SAMPLER from the name of a solver; it steps through whatever SIGMAS it is given."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  (ComfyUI's name)
        return {
            "required": {
                "solver": (solver_names(), {"default": "dpmpp_2m"}),
                "options": ("STRING", {"default": "{}", "tooltip": 'options of the solver as JSON, e.g. {"eta": 0.5}'}),
            }
        }

    def get_sampler(self, solver: str, options: str = "{}") -> tuple[Any]:
        """The node's output."""
        from comfy.samplers import KSAMPLER

        given = json.loads(options or "{}")
        return (KSAMPLER(HostedSampler(lambda space: kdiffusion_sampler(solver, space=space, **given), PREFIX + solver)),)


class FewstepPlan:
    """A SAMPLER and its SIGMAS from a plan file, as `fewstep tune` and `fewstep plan make` write it."""

    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    FUNCTION = "get_sampler"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"model": ("MODEL",), "file": ("STRING", {"default": "plan.safetensors"})}}

    @classmethod
    def IS_CHANGED(cls, model: Any, file: str) -> float:  # noqa: N802
        return Path(file).stat().st_mtime

    def get_sampler(self, model: Any, file: str) -> tuple[Any, Any]:
        """The node's outputs."""
        from comfy.samplers import KSAMPLER

        plan = Plan.load(file)
        sampler = HostedSampler(lambda space: kdiffusion_sampler(plan, space=space), f"{PREFIX}plan")
        sigmas = sampler.samplers[_space(model.get_model_object("model_sampling"))].sigmas
        assert sigmas is not None
        return KSAMPLER(sampler), sigmas.float()


class _Lists:
    """The lists of names that ComfyUI's menus are made of; some are the same one."""

    WHERE: ClassVar[tuple[str, ...]] = ("KSAMPLER_NAMES", "SAMPLER_NAMES")

    @classmethod
    def all(cls) -> list[list[str]]:
        from comfy import samplers

        found = [getattr(samplers, name, None) for name in cls.WHERE]
        return [names for names in [*found, samplers.KSampler.SAMPLERS] if isinstance(names, list)]


def register() -> list[str]:
    """Give every solver a name among ComfyUI's own samplers, ``fewstep_...``; the KSampler nodes list them then.

    Returns:
        the names.
    """
    from comfy.k_diffusion import sampling

    names = []
    for solver in solver_names():
        name = PREFIX + solver
        setattr(sampling, f"sample_{name}", HostedSampler(lambda space, s=solver: kdiffusion_sampler(s, space=space), name))
        for known in _Lists.all():
            if name not in known:
                known.append(name)
        names.append(name)
    return names


NODE_CLASS_MAPPINGS = {"FewstepSampler": FewstepSampler, "FewstepPlan": FewstepPlan}
NODE_DISPLAY_NAME_MAPPINGS = {"FewstepSampler": "Sampler (fewstep)", "FewstepPlan": "Sampler and Sigmas of a Plan (fewstep)"}
