"""The networks of a distillation: read as the teacher's is, copied from it, told more than it.

`read_as` makes a denoiser of any network by the teacher's conventions; `copy_of` gives the network that a fake score begins as. `Told` adds
one more number to what a network is told, such as the length of a step, through a branch that begins at zero: at first nothing changes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.denoisers import Denoiser, innermost
from fewstep.schedules import NoiseSchedule

__all__ = ["Features", "Told", "bottleneck", "copy_of", "layer_of", "read_as", "schedule_of"]

TIME_EMBEDDINGS = ("time_embedding", "time_embed", "time_embedder", "time_text_embed", "t_embedder", "time_mlp", "time")
"""How networks call the module that embeds their time."""
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


def copy_of(teacher: object, student: nn.Module) -> nn.Module:
    """A copy of the teacher's network, all of it to be trained; of the student if the teacher's network is a function without weights."""
    network = innermost(teacher, "network")
    return copy.deepcopy(network if isinstance(network, nn.Module) else student).requires_grad_(True)


def layer_of(module: nn.Module) -> nn.Module:
    """The last layer in a module that says how many channels it puts out.

    Raises:
        ValueError: if there is none.
    """
    layers = [inner for inner in module.modules() if isinstance(inner, LAYERS)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no linear layer and no convolution, so its number of channels is not known.")
    return layers[-1]


def _channels(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def bottleneck(network: nn.Module) -> str:
    """The name of the module in the middle of a network: of a U-Net the coarsest level, else the middle one of the longest list of blocks.

    Raises:
        ValueError: if there is nothing of that kind.

    Example:
        >>> blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        >>> bottleneck(nn.ModuleDict({"blocks": blocks}))
        'blocks.1'
    """
    named = dict(network.named_modules())
    for name in BOTTLENECKS:
        if name in named:
            return name
    lists = {
        name: len(module) for name, module in named.items() if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
    if not lists:
        raise ValueError(f"{type(network).__name__} has no list of blocks, whose middle could be looked at. Name a module: at=...")
    longest = max(lists, key=lambda name: lists[name])
    children = [name for name, _ in named[longest].named_children()]
    return ".".join(filter(None, (longest, children[lists[longest] // 2])))


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


class Told(nn.Module):
    r"""A network that is told one more number in about [0, 1]: ``network(x, time, told=number, **cond)``.

    The number d is embedded as $(\cos \omega_k d, \sin \omega_k d)$ with low angular frequencies, from 1 to `highest`: so the output is
    smooth in d, and can be differentiated by it. Two layers, the second of which begins at zero, turn that into as many channels as a
    module of the network puts out, and are added there: the network begins as it was.

    Args:
        network: any network.
        at: name of the module to whose output it is added. Left out: the last layer of what embeds the time, if that has a usual name,
            else the first linear layer or convolution.
        default: the number where none is given.
        highest: the highest angular frequency.
        size: number of cosines and sines, and half the width of the branch.

    Raises:
        ValueError: if there is no such module, or nothing to add to.

    Example:
        >>> network = Told(nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 2)), at="0")
        >>> network.network.forward = lambda x, time: network.network[2](network.network[1](network.network[0](x)))
        >>> x, time = torch.ones(3, 2), torch.ones(3)
        >>> bool((network(x, time, told=0.3) == network(x, time, told=0.7)).all())
        True
    """

    omega: Tensor

    def __init__(self, network: nn.Module, at: str | None = None, *, default: float = 1.0, highest: float = 10.0, size: int = 32):
        super().__init__()
        self.network, self.at, self.default = network, _place(network) if at is None else at, float(default)
        self.highest, self.size = float(highest), int(size)
        found = dict(network.named_modules())
        if self.at not in found:
            raise ValueError(
                f"there is no module {self.at!r} in {type(network).__name__}; it has {', '.join(list(found)[1:9])}, ..."
            )
        layer = layer_of(found[self.at])
        self.behind = isinstance(layer, nn.Linear)  # whether channels are the last dimension
        last = nn.Linear(2 * size, _channels(layer))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.branch = nn.Sequential(nn.Linear(size, 2 * size), nn.SiLU(), last)
        weight = next(network.parameters())
        self.branch.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        exponents = torch.linspace(0.0, 1.0, size // 2, dtype=torch.float64, device="cpu")
        self.register_buffer("omega", (highest**exponents).to(weight.device), persistent=False)

    def forward(self, x: Tensor, time: Tensor, *, told: float | Tensor | None = None, **cond: Any) -> Tensor:
        """The network's output.

        Args:
            x, time, **cond: what the network takes.
            told: the number, or one a sample ``"batch"``.
        """
        number, like = self.default if told is None else told, next(self.branch.parameters())
        numbers = number if isinstance(number, Tensor) else like.new_full((len(x),), number)
        angle = numbers.to(like.dtype)[:, None] * self.omega.to(like.dtype)
        added = self.branch(torch.cat([angle.cos(), angle.sin()], 1))

        used: list[bool] = []

        def add(module: nn.Module, inputs: Any, output: Any) -> Any:
            used.append(True)
            if isinstance(output, (tuple, list)):
                return type(output)((self._added(output[0], added), *output[1:]))
            return self._added(output, added)

        handle = self.network.get_submodule(self.at).register_forward_hook(add)
        try:
            output = self.network(x, time, **cond)
        finally:
            handle.remove()
        if not used:
            raise ValueError(
                f"module {self.at!r} of {type(self.network).__name__} is not called as such; name a layer in it: at=..."
            )
        return output

    @property
    def options(self) -> dict[str, Any]:
        """What makes such a network of another, as JSON values."""
        return {"at": self.at, "default": self.default, "highest": self.highest, "size": self.size}

    def _added(self, output: Tensor, added: Tensor) -> Tensor:
        if len(output) != len(added):
            if len(output) > 1 and len(output) % len(added):
                raise ValueError(f"module {self.at!r} puts out {len(output)} rows for {len(added)} samples; name another: at=...")
            added = added.repeat(len(output) // len(added), 1) if len(output) > 1 else added
        inner = [1] * (output.ndim - 2)
        shape = (len(added), *inner, added.shape[1]) if self.behind else (len(added), added.shape[1], *inner)
        return output + added.to(output.dtype).reshape(shape)


def _place(network: nn.Module) -> str:
    """Where a network takes in its time."""
    named = dict(network.named_modules())
    for name in TIME_EMBEDDINGS:
        inside = [inner for inner, module in named.items() if isinstance(module, LAYERS) and f"{inner}.".startswith(f"{name}.")]
        if inside:
            return inside[-1]
    for name, module in named.items():
        if isinstance(module, LAYERS):
            return name
    raise ValueError(
        f"{type(network).__name__} has no linear layer and no convolution that a number could be added to. Name a module: at=..."
    )


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
        self.channels = _channels(layer) if channels is None else channels
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
