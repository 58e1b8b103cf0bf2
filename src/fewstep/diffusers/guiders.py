"""diffusers' guiders around any network: `GuidedNetwork`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.guidance import check_null, null_like

__all__ = ["GuidedNetwork"]


class GuidedNetwork(torch.nn.Module):
    """A network under one of diffusers' guiders, for `fewstep.Denoiser`: ``network(x, time, **cond)``.

    A guider mixes what the network itself returns, so it belongs around the network and not around the denoiser. It calls the network once
    for each of its predictions; the denoiser counts that as one call.

    Args:
        network: ``network(x, time, **cond)``. Guiders that change its layers (skip-layer, perturbed-attention) need a model of diffusers.
        guider: of ``diffusers.guiders``.
        null: for every condition to be guided, its name and the value that stands for "no condition", as of
            `fewstep.guidance.ClassifierFree`.
        nfe: how many calls a run has. A guider that acts on some of the steps only, or that remembers the step before, is told the call's
            number as its step.

    Raises:
        TypeError: for something that is no such guider, or a null that is neither a number nor a tensor.
        ValueError: for an empty `null`, or `nfe` below 1.

    Note:
        Calls are counted. After a run that was interrupted say `reset`. Noise levels decide nothing here: for guidance on an interval of
        them there is `fewstep.guidance.ClassifierFree`, and plans that are tuned under that know it.

    Example:
        >>> import fewstep as fs
        >>> from diffusers import ClassifierFreeGuidance
        >>> network = fs.load("digits").network
        >>> guided = GuidedNetwork(network, ClassifierFreeGuidance(guidance_scale=3.0), {"label": 10}, nfe=8)
        >>> den = fs.load(guided, schedule=fs.schedules.VPLinear(), predicts="velocity")
        >>> plan = fs.make_plan("auto", den.schedule, nfe=8)
        >>> fs.sample(den, fs.draw_noise((1, 8, 8), [0]), plan, cond={"label": torch.tensor([7])}).shape
        torch.Size([1, 1, 8, 8])
    """

    def __init__(self, network: Callable[..., Tensor], guider: Any, null: Mapping[str, float | Tensor], *, nfe: int):
        super().__init__()
        if not hasattr(guider, "prepare_inputs_from_block_state"):
            raise TypeError(f"guider must be one of diffusers.guiders, of a recent diffusers, got {type(guider).__name__}.")
        if nfe < 1:
            raise ValueError(f"a run has at least 1 call, got nfe={nfe}.")
        self.network, self.guider, self.nfe = network, guider, nfe
        self.null = check_null(null)
        self.step = 0

    def reset(self) -> None:
        """The next call is the first of a run."""
        self.step = 0

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """The guided output of the network, ``"batch *shape"``.

        Raises:
            ValueError: if a condition of `null` is missing, is no tensor, or its shape does not fit.
        """
        pairs = {name: self._pair(name, cond, len(x)) for name in self.null}
        self.guider.set_state(step=self.step, num_inference_steps=self.nfe, timestep=time)
        self.step = (self.step + 1) % self.nfe
        batches = self.guider.prepare_inputs(pairs)
        for batch in batches:
            self.guider.prepare_models(self.network)
            batch.noise_pred = self.network(x, time, **{**cond, **{name: getattr(batch, name) for name in pairs}})
            self.guider.cleanup_models(self.network)
        return self.guider(batches)[0]

    def _pair(self, name: str, cond: Mapping[str, Any], count: int) -> tuple[Tensor, Tensor]:
        value = cond.get(name)
        if not isinstance(value, Tensor):
            raise ValueError(f"guidance needs the condition {name!r} as a tensor, got {type(value).__name__}.")
        null = self.null[name]
        on = null.to(value.device, value.dtype) if isinstance(null, Tensor) else null
        return value, null_like(name, on, value, count)
