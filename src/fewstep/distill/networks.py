"""The networks of a distillation: read as the teacher's is, copied from it, looked into.

`read_as` makes a denoiser of any network by the teacher's conventions; `copy_of` gives the network that a fake score begins as;
`bottleneck` and `Head` are for an adversary that looks into a network.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.adapt.trained import trainable
from fewstep.denoisers import Denoiser, innermost
from fewstep.schedules import NoiseSchedule

__all__ = [
    "Features",
    "Head",
    "asked_of",
    "bottleneck",
    "called",
    "channels_of",
    "copy_of",
    "device_of",
    "layer_of",
    "read_as",
    "schedule_of",
]

BOTTLENECKS = ("mid_block", "middle_block", "bottleneck", "bottom")
"""How networks call the middle of a U-Net."""
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def schedule_of(teacher: object) -> NoiseSchedule:
    """The noise schedule of a denoiser.

    Raises:
        TypeError: if it has none.
    """
    schedule = innermost(teacher, "schedule")
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(
            f"a teacher is a denoiser with a noise schedule; {teacher!r:.80} has none. Wrap its network in fewstep.Denoiser."
        )
    return schedule


def read_as(teacher: object, network: Callable[..., Tensor]) -> Denoiser:
    """A denoiser of another network that is called, and whose output is read, as the teacher's network is.

    Guidance and limits around the teacher's denoiser are not around this one. For a teacher without a network, as an exact one is, it
    predicts data.

    Raises:
        TypeError: for a teacher that is no denoiser with a schedule.

    Example:
        >>> from fewstep.schedules import Flow
        >>> teacher = Denoiser(lambda x, time: 0.0 * x, Flow(), "flow")
        >>> float(read_as(teacher, lambda x, time: x)(torch.ones(1, 1), 0.25))
        0.75
    """
    inner = teacher
    while not isinstance(inner, Denoiser) and hasattr(inner, "denoiser"):
        inner = inner.denoiser  # type: ignore[attr-defined]
    if not isinstance(inner, Denoiser):
        return Denoiser(network, schedule_of(teacher), "data")
    other = copy.copy(inner)
    other.network, other.calls, other._remembered = network, 0, {}
    other.info = replace(inner.info, fingerprint=None)
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    other.network_dtype = next((p.dtype for p in parameters if p.is_floating_point()), None)
    return other


def asked_of(teacher: object, x: Tensor, time: float, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a denoiser asks its network about states at a time: ``{"x", "time", **cond}``.

    Example:
        >>> from fewstep.schedules import Flow
        >>> asked_of(Denoiser(lambda x, time: x, Flow(), "flow"), torch.ones(1, 1), 0.25, {})["time"].tolist()
        [0.25]
    """
    asked: dict[str, Tensor] = {}

    def network(x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        asked.update({"x": x, "time": time, **told})
        return x

    read_as(teacher, network)(x, time, **cond)
    return asked


def device_of(teacher: object) -> torch.device:
    """Where the network of a denoiser is; the CPU for one without weights.

    Example:
        >>> from fewstep.schedules import Flow
        >>> device_of(Denoiser(nn.Linear(2, 2, device="meta"), Flow(), "flow")).type
        'meta'
    """
    network = innermost(teacher, "network")
    parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def copy_of(teacher: object, student: nn.Module) -> nn.Module:
    """A copy of the teacher's network, all of it to be trained; of the student if the teacher's network is a function without weights."""
    network = innermost(teacher, "network")
    return trainable(network if isinstance(network, nn.Module) else student)


def layer_of(module: nn.Module) -> nn.Module:
    """The last layer in a module that says how many channels it puts out.

    Raises:
        ValueError: if there is none.
    """
    layers = [inner for inner in module.modules() if isinstance(inner, LAYERS)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no linear layer and no convolution, so its number of channels is not known.")
    return layers[-1]


def channels_of(layer: nn.Module) -> int:
    """How many channels a linear layer or a convolution puts out."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def bottleneck(network: nn.Module) -> str:
    """The name of the module in the middle of a network: of a U-Net the coarsest level, else the middle one of the longest list of blocks.

    Modules are known by the last part of their names: a pipeline's network has its model's within it.

    Raises:
        ValueError: if there is nothing of that kind.

    Example:
        >>> blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        >>> bottleneck(nn.ModuleDict({"blocks": blocks}))
        'blocks.1'
    """
    named = dict(network.named_modules())
    for name in called(named, BOTTLENECKS):
        return name
    lists = {
        name: len(module) for name, module in named.items() if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
    if not lists:
        raise ValueError(f"{type(network).__name__} has no list of blocks, whose middle could be looked at. Name a module: at=...")
    longest = max(lists, key=lambda name: lists[name])
    children = [name for name, _ in named[longest].named_children()]
    return ".".join(filter(None, (longest, children[lists[longest] // 2])))


def called(named: Mapping[str, nn.Module], known: Sequence[str]) -> list[str]:
    """Names whose last part is among those that are known: by the order of these, and of each the outermost first."""
    found = [name for name in named if name.rpartition(".")[2] in known]
    return sorted(found, key=lambda name: (known.index(name.rpartition(".")[2]), name.count(".")))


class Features:
    """What a module inside a network puts out while the network is called.

    Args:
        network: the network, or what an accelerator made of it.
        at: name of a module in it.

    Raises:
        ValueError: if there is no such module.
    """

    def __init__(self, network: nn.Module, at: str):
        inside = getattr(network, "module", network)
        found = dict(inside.named_modules())
        if at not in found:
            raise ValueError(f"there is no module {at!r} in {type(inside).__name__}; it has {', '.join(list(found)[1:9])}, ...")
        self.module = found[at]

    @contextmanager
    def kept(self) -> Iterator[list[Tensor]]:
        """Within it, outputs of the module are appended to the list."""
        outputs: list[Tensor] = []
        handle = self.module.register_forward_hook(lambda module, inputs, output: outputs.append(_first(output)))
        try:
            yield outputs
        finally:
            handle.remove()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


class Head(nn.Module):
    """Logits ``"batch"`` from features of a network: maps ``"batch channels height width"`` or anything with channels in one place.

    That of DMD2 for maps: a convolution 4 x 4 of stride 2, one of stride 4 and one 1 x 1, each but the last with group normalisation and
    SiLU, for maps of 8 x 8, to which others are averaged or repeated. For vectors and tokens: two layers with a normalisation, the mean.

    Args:
        layer: the layer that puts the features out.
        channels: how many; left out, as many as the layer says.
    """

    def __init__(self, layer: nn.Module, channels: int | None = None):
        super().__init__()
        self.channels = channels_of(layer) if channels is None else channels
        self.maps, self.behind = isinstance(layer, nn.Conv2d), isinstance(layer, nn.Linear)
        c, groups = self.channels, math.gcd(32, self.channels)
        if self.maps:
            first = [nn.Conv2d(c, c, 4, stride=2, padding=1), nn.GroupNorm(groups, c), nn.SiLU()]
            second = [nn.Conv2d(c, c, 4, stride=4), nn.GroupNorm(groups, c), nn.SiLU()]
            self.layers = nn.Sequential(*first, *second, nn.Conv2d(c, 1, 1))
        else:
            self.layers = nn.Sequential(nn.Linear(c, c), nn.LayerNorm(c), nn.SiLU(), nn.Linear(c, 1))

    def forward(self, features: Tensor) -> Tensor:
        """The logits."""
        place = features.ndim - 1 if self.behind else 1
        if features.shape[place] != self.channels:
            raise ValueError(
                f"the discriminator was made for {self.channels} channels, but the module puts out {tuple(features.shape)}. "
                f"Say how many: Adversary(channels=...), or name another module: at=..."
            )
        features = features.to(next(self.parameters()).dtype)
        if self.maps:
            return self.layers(nn.functional.adaptive_avg_pool2d(features, 8)).flatten(1).mean(1)
        tokens = features.movedim(place, -1).reshape(len(features), -1, self.channels)
        return self.layers(tokens).flatten(1).mean(1)
