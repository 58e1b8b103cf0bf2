"""Students in pipelines of diffusers: an adapter or weights, and a scheduler that runs the plan.

What a student is told beside the time is one number for a number of calls. So what its branch adds to a layer is constant, and is part of
that layer's bias.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.adapt.lora import FILE, save_adapter
from fewstep.distill.networks import LAYERS
from fewstep.distill.student_network import AdaptedNetwork, GuidanceEmbedded, core, part_of
from fewstep.distill.told import Told
from fewstep.plan import Plan

__all__ = ["put_into", "scheduler_of"]


def scheduler_of(plan: Plan, pipeline: Any) -> Any:
    """A scheduler for a pipeline that runs a plan."""
    from fewstep.diffusers import PlanScheduler

    return PlanScheduler.from_plan(plan, pipeline.scheduler.config)


def put_into(
    pipeline: Any, network: nn.Module, plan: Plan, ask: Callable[[nn.Module], Tensor], number: float | None, name: str
) -> None:
    """Change a pipeline: its network, or the adapters on it, and its scheduler.

    Args:
        pipeline: of diffusers.
        network: the student's.
        plan: that the scheduler runs.
        ask: calls the student with another core; see `fewstep.adapt.save_adapter`.
        number: what a network is told that is told more than the time; None: its default.
        name: of the adapter; one of this name that is there already is replaced.

    Raises:
        TypeError: for a network that is no pipeline's, or that is told what no network of diffusers can be told.
    """
    part = part_of(network)
    if part is None:
        raise TypeError(f"the student's network is a {type(network).__name__}, not a part of a diffusers pipeline.")
    if isinstance(network, AdaptedNetwork):
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(core(network), folder, ask=ask, part=part)
            if any(name in names for names in pipeline.get_list_adapters().values()):
                pipeline.delete_adapters(name)
            pipeline.load_lora_weights(folder, adapter_name=name, weight_name=FILE)
    else:
        setattr(pipeline, part, _model(network, getattr(pipeline, part), number))
    pipeline.scheduler = scheduler_of(plan, pipeline)


def _model(network: nn.Module, like: Any, number: float | None) -> Any:
    """A model of diffusers with a student's weights: with a projection of the guidance scale, if it is told that."""
    state, options = dict(core(network).state_dict()), {}
    if isinstance(network, GuidanceEmbedded):
        state = dict(core(network.network).state_dict())
        options = {"time_cond_proj_dim": network.project.in_features}
        state["time_embedding.cond_proj.weight"] = network.project.weight
    if isinstance(network, Told):
        name, added = _added(network, number)
        state[name] = state[name] + added.to(state[name])
    made = type(like).from_config(like.config, **options)
    made.load_state_dict(state)
    first = next(like.parameters())
    return made.to(first.device, like.dtype).eval()


@torch.no_grad()
def _added(network: Told, number: float | None) -> tuple[str, Tensor]:
    """The name of a bias, and what the branch adds to it for a number."""
    layer = network.network.get_submodule(network.at)
    place = next((name for name, part in core(network).named_modules() if part is layer), None)
    if place is None or not isinstance(layer, LAYERS) or layer.bias is None:
        raise TypeError(
            f"the student is told a number at {network.at!r}, a {type(layer).__name__}; in a pipeline that is part of a bias, which only a "
            "linear layer or a convolution within the pipeline's network has. Train it with such a layer: Told(network, at=...)."
        )
    numbers = next(network.branch.parameters()).new_full((1,), network.default if number is None else number)
    return f"{place}.bias", network.added(numbers)[0]
