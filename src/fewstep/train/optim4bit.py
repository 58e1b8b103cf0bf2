r"""Optimizers whose states take four bits a number: `AdamW4bit` and `SGD4bit`.

AdamW keeps two numbers a parameter, the averages m of the gradient and v of its square. Here both are kept in 4 bits between the steps: one
byte a parameter and a few percent for scales, instead of eight bytes. A step makes full numbers of the states of one parameter tensor, does
what AdamW does, with these full numbers, and rounds them again:

$$ m \leftarrow \beta_1 \hat m + (1 - \beta_1) g , \quad v \leftarrow \beta_2 \hat v + (1 - \beta_2) g^2 , \quad
   \theta \leftarrow (1 - \eta\lambda)\,\theta - \frac{\eta}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} , \quad
   \hat m = Q_m(m) , \; \hat v = Q_v(v) . $$

- *m*: blocks of 128, `fewstep.train.quantization.SIGNED_DYNAMIC`.
- *v*: a codebook without zero (`LINEAR`). A v that is rounded to zero divides by epsilon alone, and its parameter is thrown far off. The
  scale is ``"rank1"``, one number for every index of every axis, or ``"block"``, as for m; ``"auto"`` takes what has fewer numbers. Or v is
  not rounded but ``"factored"`` into row means R and column means C of the squares, as in Adafactor:
  $v_{ij} = R_i C_j / \operatorname{mean} R$.

Parameters and gradients are not rounded. Small tensors keep full states; see `optimizer_state_bytes` for what is saved on a model.

Bytes for n quantised parameters: m takes n/2 + 4n/128; v takes n/2 + 4 (rows + columns), or n/2 + 4n/128, or 4 (rows + columns).

Source: "Memory Efficient Optimizers with 4-bit States" (arXiv 2309.01507), algorithm 1 and sections 3 and 4; AdamW: arXiv 1711.05101.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fewstep.errors import ArtefactError, UnknownNameError
from fewstep.train.quantization import LINEAR, PACKING, SIGNED_DYNAMIC, BlockScale, Codebook, Layout, Quantizer, Rank1Scale

__all__ = ["AdamW4bit", "SGD4bit", "StateBytes", "optimizer_state_bytes"]

LARGER_THAN = 4096
"""Tensors of so many numbers keep full states in the paper; larger ones are rounded."""
BUCKET = 1 << 17
"""Numbers that are worked on together, so that small tensors share the cost of calls, and what lies between stays in the cache."""
ROUNDINGS = ("nearest", "stochastic")
Kept = Mapping[str, Tensor]


# ---- how a moment is kept ----------------------------------------------------------------------------------------------------------


class Storage(abc.ABC):
    """How moments are kept between the steps: as named tensors, of every parameter or of one shard of it.

    Parameters are worked on in buckets; `kept` are the named tensors of every one in a bucket, moments are flat tensors in the order of
    `layout`.
    """

    @abc.abstractmethod
    def tensors(self, shape: Sequence[int], unit: int) -> dict[str, tuple[int, torch.dtype]]:
        """Name -> length and type of the flat tensors that keep a moment of that shape."""

    @abc.abstractmethod
    def advance(self, kept: Sequence[Kept], layout: Layout, decay: float, fresh: Sequence[Tensor], weight: float) -> Tensor:
        """The averages ``decay * old + weight * fresh``; what is fresh comes as it is, or as two factors."""

    @abc.abstractmethod
    def keep(self, kept: Sequence[Kept], layout: Layout, moment: Tensor, uniform: Tensor | None) -> None:
        """Keep what `advance` gave."""


@dataclass(frozen=True)
class Full(Storage):
    """Not rounded at all."""

    def tensors(self, shape: Sequence[int], unit: int) -> dict[str, tuple[int, torch.dtype]]:
        raise AssertionError("full moments have the shape of their parameter")

    def advance(self, kept: Sequence[Kept], layout: Layout, decay: float, fresh: Sequence[Tensor], weight: float) -> Tensor:
        return _add_(layout.join([tensors[""] for tensors in kept]) * decay, fresh, weight)

    def keep(self, kept: Sequence[Kept], layout: Layout, moment: Tensor, uniform: Tensor | None) -> None:
        for tensors, value in zip(kept, layout.split(moment), strict=True):
            tensors[""].copy_(value)


@dataclass(frozen=True)
class Quantized(Storage):
    """Rounded to four bits."""

    quantizer: Quantizer

    def tensors(self, shape: Sequence[int], unit: int) -> dict[str, tuple[int, torch.dtype]]:
        (places,) = Layout((tuple(shape),), unit).places()
        return {"_codes": (places // 2, torch.uint8), "_scales": (self.quantizer.scale.count(shape), torch.float32)}

    def advance(self, kept: Sequence[Kept], layout: Layout, decay: float, fresh: Sequence[Tensor], weight: float) -> Tensor:
        codes = torch.cat([tensors["_codes"] for tensors in kept]) if len(kept) > 1 else kept[0]["_codes"]
        old = self.quantizer.dequantize_flat(codes, [tensors["_scales"] for tensors in kept], layout)
        return _add_(old.to(fresh[0].dtype).mul_(decay), [x.view(old.shape) for x in fresh], weight).view(-1)

    def keep(self, kept: Sequence[Kept], layout: Layout, moment: Tensor, uniform: Tensor | None) -> None:
        codes, scales = self.quantizer.quantize_flat(moment.float(), layout, uniform=uniform)
        pieces = codes.split([places // 2 for places in layout.places()]) if len(kept) > 1 else (codes,)
        for tensors, piece, scale in zip(kept, pieces, scales, strict=True):
            tensors["_codes"].copy_(piece)
            tensors["_scales"].copy_(scale)


@dataclass(frozen=True)
class Factored(Storage):
    """As the means of rows and columns. A tensor of more axes is seen as the matrix that has the fewest of these."""

    def matrix(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns."""
        splits = [(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape))]
        return min(splits, key=sum)

    def tensors(self, shape: Sequence[int], unit: int) -> dict[str, tuple[int, torch.dtype]]:
        rows, columns = self.matrix(shape)
        return {"_rows": (rows, torch.float32), "_columns": (columns, torch.float32)}

    def advance(self, kept: Sequence[Kept], layout: Layout, decay: float, fresh: Sequence[Tensor], weight: float) -> Tensor:
        moments = []
        for tensors, value in zip(kept, layout.split(math.prod(fresh[1:], start=fresh[0])), strict=True):
            matrix = value.view(self.matrix(value.shape))
            rows = tensors["_rows"].mul_(decay).add_(matrix.mean(1), alpha=weight)
            columns = tensors["_columns"].mul_(decay).add_(matrix.mean(0), alpha=weight)
            total = rows.mean()
            moments.append(torch.outer(rows / torch.where(total == 0.0, 1.0, total), columns))
        return layout.join(moments)

    def keep(self, kept: Sequence[Kept], layout: Layout, moment: Tensor, uniform: Tensor | None) -> None:
        pass  # `advance` did


def _add_(x: Tensor, fresh: Sequence[Tensor], weight: float) -> Tensor:
    return x.add_(fresh[0], alpha=weight) if len(fresh) == 1 else x.addcmul_(fresh[0], fresh[1], value=weight)


@functools.cache
def _blocks(codebook: Codebook, size: int) -> Storage:
    return Quantized(Quantizer(codebook, BlockScale(size)))


@functools.cache
def _rank1() -> Storage:
    return Quantized(Quantizer(LINEAR, Rank1Scale()))


def _fewest(shape: Sequence[int], size: int) -> Storage:
    """Rank-1, unless its scale has more numbers than that by blocks."""
    return _rank1() if Rank1Scale().count(shape) <= BlockScale(size).count(shape) else _blocks(LINEAR, size)


SECOND_MOMENTS: dict[str, Callable[[Sequence[int], int], Storage]] = {
    "auto": _fewest,
    "rank1": lambda shape, size: _rank1(),
    "block": lambda shape, size: _blocks(LINEAR, size),
    "factored": lambda shape, size: Factored(),
}
"""Name -> how the second moment of a tensor with at least two axes is kept: a function of its shape and the size of blocks."""


# ---- one step of one tensor --------------------------------------------------------------------------------------------------------


class AdamWNumbers(NamedTuple):
    """The numbers of a step; the last three change from step to step, and are tensors when it is compiled."""

    beta1: float
    weight1: float
    beta2: float
    weight2: float
    epsilon: float
    gain: Any
    """One over the root of what corrects the second moment."""
    step: Any
    """What the parameter is moved by, with its sign."""
    shrink: Any


class SGDNumbers(NamedTuple):
    """The numbers of a step; the last one changes."""

    weight_decay: float
    momentum: float
    weight: float
    through: float
    """How much of the gradient goes directly into the step, and of the momentum: (0, 1), or Nesterov's (1, momentum)."""
    along: float
    step: Any


class Noise(NamedTuple):
    """Random numbers to round with, where that is asked for: of the moments, and of every parameter."""

    moments: Sequence[Tensor | None]
    parameters: Sequence[Tensor | None]


class Bucket(NamedTuple):
    """Tensors that are worked on together: `kept` has, for every moment, the named tensors of every parameter."""

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    kept: Sequence[Sequence[Kept]]
    noise: Noise


def adamw(bucket: Bucket, numbers: AdamWNumbers, storages: Sequence[Storage], layout: Layout) -> None:
    """A step of AdamW, in place. Eager and compiled."""
    first, second = storages
    g = layout.join([_working(gradient) for gradient in bucket.gradients])
    m = first.advance(bucket.kept[0], layout, numbers.beta1, (g,), numbers.weight1)
    v = second.advance(bucket.kept[1], layout, numbers.beta2, (g, g), numbers.weight2)
    shapes = [parameter.shape for parameter in bucket.parameters]
    means, denominators = layout.split(m, shapes), layout.split(v.sqrt().mul_(numbers.gain).add_(numbers.epsilon), shapes)
    for i, (mean, denominator) in enumerate(zip(means, denominators, strict=True)):
        x = _working(bucket.parameters[i]).mul_(numbers.shrink)
        moved = (
            x.addcdiv_(mean, denominator, value=numbers.step)
            if isinstance(numbers.step, float)
            else x + mean / denominator * numbers.step
        )
        _write(bucket.parameters[i], moved, bucket.noise.parameters[i])
    first.keep(bucket.kept[0], layout, m, bucket.noise.moments[0])
    second.keep(bucket.kept[1], layout, v, bucket.noise.moments[1])


def sgd(bucket: Bucket, numbers: SGDNumbers, storages: Sequence[Storage], layout: Layout) -> None:
    """A step of stochastic gradient descent with momentum, in place. Eager and compiled."""
    (first,) = storages
    working = [_working(parameter) for parameter in bucket.parameters]
    g = layout.join(
        [torch.add(gradient, x, alpha=numbers.weight_decay) for gradient, x in zip(bucket.gradients, working, strict=True)]
    )
    m = first.advance(bucket.kept[0], layout, numbers.momentum, (g,), numbers.weight)
    moves = (m * numbers.along).add_(g, alpha=numbers.through).mul_(numbers.step)
    moves = layout.split(moves, [parameter.shape for parameter in bucket.parameters])
    for parameter, x, move, noise in zip(bucket.parameters, working, moves, bucket.noise.parameters, strict=True):
        _write(parameter, x.add_(move), noise)
    first.keep(bucket.kept[0], layout, m, bucket.noise.moments[0])


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient, spread over the processes as the parameter is."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise TypeError(f"optimizers with states of four bits take dense gradients, got a gradient of layout {gradient.layout}.")
    return _placed(gradient, parameter)


def _working(x: Tensor) -> Tensor:
    """In float32, or float64 if it is: squares of half precision underflow."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _write(parameter: Tensor, x: Tensor, bits: Tensor | None) -> None:
    if bits is not None:  # to bfloat16: cut off the low 16 bits, after a random number below 2^16 was added to them
        x = ((x.contiguous().view(torch.int32) + bits.view(x.shape)) & -65536).view(torch.float32)
    if x is not parameter:
        parameter.copy_(x)


@functools.cache
def _compiled(step: Callable[..., None], storages: tuple[Storage, ...], layout: Layout) -> Callable[..., None]:
    """The step of one tensor, as one graph. Each has code of its own: PyTorch compiles the same code for a few shapes only."""

    def run(bucket: Bucket, numbers: Any) -> None:
        step(bucket, numbers, storages, layout)

    own = types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False)


def _in_units(x: Tensor, layout: Layout) -> Tensor:
    """As ``"units unit"``, where moments are: compiled for a processor, what is done with x becomes one loop with their rounding."""
    return x.detach().view(-1, layout.unit) if x.is_cpu and x.is_contiguous() and layout.in_rows() else x


# ---- the optimizers ----------------------------------------------------------------------------------------------------------------


class Optimizer4bit(Optimizer, abc.ABC):
    """What the optimizers share: states are made, kept, saved and loaded. Group options decide; see `AdamW4bit`."""

    moments: tuple[str, ...]
    nonnegative: tuple[str, ...]
    """Options that are numbers of at least 0."""

    def __init__(self, params: Iterable[Any], own: Mapping[str, Any], **shared: Any):
        super().__init__(params, {**own, **shared, "packing": PACKING})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own.

        Raises:
            ValueError: for an option that makes no sense.
            TypeError: for complex parameters.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in self.nonnegative:
            if not float(group[name]) >= 0.0:
                raise ValueError(f"{name} is a number of at least 0, got {group[name]}.")
        for name in ("rounding", "round_bfloat16"):
            if group[name] not in ROUNDINGS:
                raise UnknownNameError(f"value of {name}", group[name], ROUNDINGS)
        BlockScale(group["block_size"])
        if any(parameter.is_complex() for parameter in group["params"]):
            raise TypeError("complex parameters have no states of four bits; train torch.view_as_real of them.")
        self._check(group)

    @abc.abstractmethod
    def _check(self, group: Mapping[str, Any]) -> None:
        """Raise for options of this optimizer alone."""

    @abc.abstractmethod
    def _storages(self, parameter: Tensor, group: Mapping[str, Any]) -> tuple[Storage, ...]:
        """How every moment of a parameter that is large enough is kept."""

    @abc.abstractmethod
    def _numbers(self, group: Mapping[str, Any], step: int) -> AdamWNumbers | SGDNumbers:
        """The numbers of a step."""

    @abc.abstractmethod
    def _function(self) -> Callable[..., None]:
        """The step of one tensor."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step.

        Args:
            closure: computes the loss again, with gradients, and returns it.

        Returns:
            what the closure returned, or None.

        Raises:
            TypeError: for gradients that are sparse, and parameters that are complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            buckets: dict[Any, list[_Work]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    work = self._work(parameter, group, index)
                    buckets.setdefault(work.key(), []).append(work)
                index += 1
            for works in buckets.values():
                self._advance(works, group)
        return loss

    def _work(self, parameter: Tensor, group: dict[str, Any], index: int) -> _Work:
        state, storages = self.state[parameter], self._chosen(parameter, group)
        if not state:
            self._begin(parameter, state, group, storages)
        state["step"] += 1
        return _Work(parameter, _local(parameter), state, storages, int(state["step"]), index)

    def _advance(self, works: Sequence[_Work], group: Mapping[str, Any]) -> None:
        """A step of tensors that are kept alike, bucket by bucket. Compiled, a bucket is one tensor."""
        numbers, storages, function = self._numbers(group, works[0].step), works[0].storages, self._function()
        unit = _unit(group, storages)
        compiled = group["compiled"] and not all(isinstance(storage, Full) for storage in storages)
        if compiled:
            changing = {name: torch.tensor(getattr(numbers, name)) for name in ("gain", "step", "shrink") if hasattr(numbers, name)}
            numbers = numbers._replace(**changing)
        for some in _bucketed(works, 0 if compiled else BUCKET):
            layout = Layout(tuple(tuple(work.local.shape) for work in some), unit)
            bucket = self._bucket(some, group, unit)
            if compiled:
                parameters, gradients = (
                    [_in_units(x, layout) for x in tensors] for tensors in (bucket.parameters, bucket.gradients)
                )
                bucket = bucket._replace(parameters=parameters, gradients=gradients)
                _compiled(function, storages, layout)(bucket, numbers)
            else:
                function(bucket, numbers, storages, layout)

    def _bucket(self, works: Sequence[_Work], group: Mapping[str, Any], unit: int) -> Bucket:
        gradients = [_local(_gradient(work.parameter)) for work in works]
        return Bucket(
            [work.local for work in works],
            [-gradient for gradient in gradients] if group["maximize"] else gradients,
            [[_kept(work.state, name, storage, work.local, unit) for work in works] for name, storage in self._moments(works[0])],
            _draw(works, group, unit),
        )

    def _moments(self, work: _Work) -> list[tuple[str, Storage]]:
        return list(zip(self.moments, work.storages, strict=True))

    def _chosen(self, parameter: Tensor, group: Mapping[str, Any]) -> tuple[Storage, ...]:
        if parameter.numel() < group["min_quantized_numel"]:
            return (Full(),) * len(self.moments)
        return self._storages(parameter, group)

    def _begin(self, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any], storages: Sequence[Storage]) -> None:
        state["step"] = torch.tensor(0.0)
        unit = _unit(group, storages)
        for name, storage in zip(self.moments, storages, strict=True):
            if isinstance(storage, Full):
                state[name] = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
                continue
            for suffix, (count, dtype) in storage.tensors(_largest_shard(parameter), unit).items():
                state[name + suffix] = _zeros(parameter, count, dtype)

    def moment(self, parameter: Tensor, name: str) -> Tensor:
        """A moment as full numbers, of a parameter or of this process's shard of it.

        Args:
            parameter: one that has done a step.
            name: ``"exp_avg"``, ``"exp_avg_sq"`` or ``"momentum_buffer"``.

        Raises:
            UnknownNameError: for another name.
        """
        if name not in self.moments:
            raise UnknownNameError("moment", name, self.moments)
        group = next(group for group in self.param_groups if any(parameter is other for other in group["params"]))
        storages, local = self._chosen(parameter, group), _local(parameter)
        unit, storage = _unit(group, storages), storages[self.moments.index(name)]
        kept = {key: tensor.clone() for key, tensor in _kept(self.state[parameter], name, storage, local, unit).items()}
        layout = Layout((tuple(local.shape),), unit)
        zeros = layout.join([torch.zeros_like(_working(local), memory_format=torch.contiguous_format)])
        return layout.split(storage.advance([kept], layout, 1.0, (zeros,), 0.0))[0]

    # ---- saving and loading: PyTorch would cast codes and scales to the type of the parameter

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, bit for bit. That of 32-bit `torch.optim.AdamW` or `torch.optim.SGD` is rounded.

        Raises:
            ArtefactError: if its codes are packed otherwise, or it does not fit a parameter.
        """
        hook = self.register_load_state_dict_pre_hook(_hold)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            for parameter in group["params"]:
                if parameter in self.state:
                    self.state[parameter] = self._taken(parameter, group, self.state[parameter])

    def _taken(self, parameter: Tensor, group: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a parameter out of what was loaded, on its device."""
        found = {name: value.tensor if isinstance(value, _Held) else value for name, value in loaded.items()}
        state: dict[str, Any] = {
            "step": torch.tensor(float(found.get("step", 1.0)))
        }  # torch.optim.SGD keeps none: it is past the first
        for name, storage in zip(self.moments, self._chosen(parameter, group), strict=True):
            wanted = [name] if isinstance(storage, Full) else [name + suffix for suffix in storage.tensors(parameter.shape, 2)]
            if isinstance(found.get(name), Tensor) and name not in wanted:
                state.update(_rounded(parameter, name, storage, found[name], _unit(group, (storage,))))
                continue
            for key in wanted:
                if not isinstance(found.get(key), Tensor):
                    raise ArtefactError(
                        f"the state for a parameter of shape {tuple(parameter.shape)} has {sorted(found)}, but {key!r} is wanted. "
                        "Load it with the optimizer and the options that it was saved with."
                    )
                state[key] = found[key].to(device=parameter.device, copy=True)
        fresh: dict[str, Any] = {}
        self._begin(parameter, fresh, group, self._chosen(parameter, group))
        for key, tensor in fresh.items():
            if state[key].shape != tensor.shape or state[key].dtype != tensor.dtype:
                raise ArtefactError(
                    f"{key} for a parameter of shape {tuple(parameter.shape)} has {state[key].dtype} of shape {tuple(state[key].shape)}, "
                    f"wanted {tensor.dtype} of shape {tuple(tensor.shape)}. Load it with the same model, options and number of processes."
                )
        return state


class AdamW4bit(Optimizer4bit):
    """AdamW with states of four bits; takes the place of `torch.optim.AdamW`. Every option may differ between parameter groups.

    Args:
        params: parameters, or groups of them.
        lr, betas, eps, weight_decay: of AdamW, with its defaults.
        maximize: ascend.
        second_moment: how the second moment of a tensor with at least two axes is kept: ``"rank1"``, as in the paper, ``"block"``,
            ``"factored"``, or ``"auto"``, the first unless the second has fewer scales. Of a vector, by blocks.
        block_size: numbers that share a scale.
        min_quantized_numel: smaller tensors keep full states; ``math.inf`` for none that is rounded.
        rounding: ``"nearest"``, as published, or ``"stochastic"``: up or down at random, so that what is kept is right on average.
        round_bfloat16: how parameters in bfloat16 are written, ``"nearest"`` or ``"stochastic"``. Rounded to nearest, small steps are lost.
        seed: of everything that is random; with the number of the step and the place of the parameter it decides all draws.
        compiled: run the step of a tensor as one fused function of `torch.compile`. For every shape the first step takes seconds, and a
            C++ compiler or, on a GPU, Triton. Results differ from those of the eager step by rounding.

    Raises:
        ValueError: for an option that makes no sense.

    Note:
        A small matrix has many rank-1 scales a number: 1.11 bytes of state a parameter for 96 x 96, where blocks take 1.06, and 1.05 for
        512 x 512. Keep embeddings out, as the paper does, by a group with ``"min_quantized_numel": math.inf``: their rare
        rows learn slower.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(128, 64))
        >>> optimizer = AdamW4bit([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> round(weight[0, 0].item(), 3)  # as torch.optim.AdamW
        0.899
        >>> round(optimizer_state_bytes(optimizer).per_quantized_parameter, 3)
        1.062
    """

    moments = ("exp_avg", "exp_avg_sq")
    nonnegative = ("lr", "eps", "weight_decay")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        second_moment: str = "auto",
        block_size: int = 128,
        min_quantized_numel: float = LARGER_THAN + 1,
        rounding: str = "nearest",
        round_bfloat16: str = "nearest",
        seed: int = 0,
        compiled: bool = False,
    ):
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "second_moment": second_moment,
        }
        super().__init__(
            params,
            own,
            maximize=maximize,
            block_size=block_size,
            min_quantized_numel=min_quantized_numel,
            rounding=rounding,
            round_bfloat16=round_bfloat16,
            seed=seed,
            compiled=compiled,
        )

    def _check(self, group: Mapping[str, Any]) -> None:
        if not all(0.0 <= float(beta) < 1.0 for beta in group["betas"]) or len(group["betas"]) != 2:
            raise ValueError(f"betas are two numbers in [0, 1), got {group['betas']}.")
        if group["second_moment"] not in SECOND_MOMENTS:
            raise UnknownNameError("way to keep the second moment", group["second_moment"], SECOND_MOMENTS)

    def _storages(self, parameter: Tensor, group: Mapping[str, Any]) -> tuple[Storage, ...]:
        size = group["block_size"]
        vector = sum(length > 1 for length in parameter.shape) < 2
        second = _blocks(LINEAR, size) if vector else SECOND_MOMENTS[group["second_moment"]](parameter.shape, size)
        return _blocks(SIGNED_DYNAMIC, size), second

    def _numbers(self, group: Mapping[str, Any], step: int) -> AdamWNumbers:
        (beta1, beta2), lr = (float(beta) for beta in group["betas"]), float(group["lr"])
        gain, shrink = 1.0 / math.sqrt(1.0 - beta2**step), 1.0 - lr * float(group["weight_decay"])
        return AdamWNumbers(beta1, 1.0 - beta1, beta2, 1.0 - beta2, group["eps"], gain, -lr / (1.0 - beta1**step), shrink)

    def _function(self) -> Callable[..., None]:
        return adamw


class SGD4bit(Optimizer4bit):
    """Stochastic gradient descent with a momentum of four bits; takes the place of `torch.optim.SGD` with momentum.

    Args:
        params: parameters, or groups of them.
        lr, momentum, dampening, weight_decay, nesterov, maximize: of `torch.optim.SGD`; the momentum must be positive.
        block_size, min_quantized_numel, rounding, round_bfloat16, seed, compiled: of `AdamW4bit`.

    Raises:
        ValueError: for an option that makes no sense.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(128, 64))
        >>> optimizer = SGD4bit([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> round(weight[0, 0].item(), 3)
        0.8
        >>> round(optimizer_state_bytes(optimizer).per_quantized_parameter, 3)
        0.531
    """

    moments = ("momentum_buffer",)
    nonnegative = ("lr", "weight_decay")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        block_size: int = 128,
        min_quantized_numel: float = LARGER_THAN + 1,
        rounding: str = "nearest",
        round_bfloat16: str = "nearest",
        seed: int = 0,
        compiled: bool = False,
    ):
        own = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(
            params,
            own,
            maximize=maximize,
            block_size=block_size,
            min_quantized_numel=min_quantized_numel,
            rounding=rounding,
            round_bfloat16=round_bfloat16,
            seed=seed,
            compiled=compiled,
        )

    def _check(self, group: Mapping[str, Any]) -> None:
        if not group["momentum"] > 0.0:
            raise ValueError(
                f"SGD4bit keeps a momentum, which must be positive, got {group['momentum']}. Without: torch.optim.SGD."
            )
        if group["nesterov"] and group["dampening"]:
            raise ValueError(f"Nesterov's momentum has no dampening, got {group['dampening']}.")

    def _storages(self, parameter: Tensor, group: Mapping[str, Any]) -> tuple[Storage, ...]:
        return (_blocks(SIGNED_DYNAMIC, group["block_size"]),)

    def _numbers(self, group: Mapping[str, Any], step: int) -> SGDNumbers:
        momentum = float(group["momentum"])
        weight = 1.0 if step == 1 else 1.0 - group["dampening"]
        through, along = (1.0, momentum) if group["nesterov"] else (0.0, 1.0)
        return SGDNumbers(float(group["weight_decay"]), momentum, weight, through, along, -float(group["lr"]))

    def _function(self) -> Callable[..., None]:
        return sgd


# ---- buckets -----------------------------------------------------------------------------------------------------------------------


class _Work(NamedTuple):
    """A parameter that has a gradient, and what is known of it."""

    parameter: Tensor
    local: Tensor
    state: dict[str, Any]
    storages: tuple[Storage, ...]
    step: int
    place: int
    """Among all parameters of the optimizer."""

    def key(self) -> tuple[Any, ...]:
        """What has this in common can be worked on together."""
        return self.storages, self.step, self.local.dtype == torch.float64, self.local.device


def _bucketed(works: Sequence[_Work], most: int) -> Iterator[list[_Work]]:
    """In order, as many at a time as have together at most so many numbers, and at least one."""
    bucket: list[_Work] = []
    count = 0
    for work in works:
        size = work.local.numel()
        if not size:  # a rank's share of a small tensor
            continue
        if bucket and count + size > most:
            yield bucket
            bucket, count = [], 0
        bucket.append(work)
        count += size
    if bucket:
        yield bucket


def _unit(group: Mapping[str, Any], storages: Sequence[Storage]) -> int:
    """What room for tensors is measured in: whole blocks if any moment is rounded."""
    return group["block_size"] if any(isinstance(storage, Quantized) for storage in storages) else 1


def _kept(state: Mapping[str, Any], name: str, storage: Storage, local: Tensor, unit: int) -> dict[str, Tensor]:
    """The tensors that keep a moment of a parameter, as far as this process's part of it needs them."""
    if isinstance(storage, Full):
        return {"": _local(state[name])}
    found = {}
    for suffix, count in _lengths(storage, local.shape, unit):
        tensor = _local(state[name + suffix])
        found[suffix] = tensor if len(tensor) == count else tensor[:count]
    return found


@functools.cache
def _lengths(storage: Storage, shape: Sequence[int], unit: int) -> list[tuple[str, int]]:
    return [(suffix, count) for suffix, (count, _) in storage.tensors(shape, unit).items()]


def _rounded(parameter: Tensor, name: str, storage: Storage, value: Tensor, unit: int) -> dict[str, Any]:
    """A moment in 32 bits, as it is kept here."""
    state: dict[str, Any] = {}
    for suffix, (count, dtype) in storage.tensors(_largest_shard(parameter), unit).items():
        state[name + suffix] = _zeros(parameter, count, dtype)
    local = _local(_placed(value.to(parameter.device), parameter))
    layout = Layout((tuple(local.shape),), unit)
    kept = [_kept(state, name, storage, local, unit)]
    storage.keep(kept, layout, storage.advance(kept, layout, 0.0, (layout.join([local.float()]),), 1.0), None)
    return state


# ---- loading -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """A tensor that PyTorch's loading does not recognise, and so does not cast."""

    tensor: Tensor


def _hold(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    codes = any(name.endswith("_codes") for entries in state_dict["state"].values() for name in entries)
    found = {group.get("packing") for group in state_dict["param_groups"]}
    if codes and found != {PACKING}:
        raise ArtefactError(f"the state's codes are packed as {found}, wanted {PACKING!r}: it is of another library or version.")
    held = {
        index: {name: _Held(value) if isinstance(value, Tensor) else value for name, value in entries.items()}
        for index, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": held}


# ---- shards ------------------------------------------------------------------------------------------------------------------------


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[attr-defined]


def _placed(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A gradient or moment, spread over the processes as its parameter is."""
    if not hasattr(parameter, "to_local"):
        return tensor
    if not hasattr(tensor, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    if tensor.placements == parameter.placements:  # type: ignore[attr-defined]
        return tensor
    return tensor.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]


def _largest_shard(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the largest part of a parameter that a process has: states have the same size everywhere."""
    shape = list(parameter.shape)
    if hasattr(parameter, "to_local"):
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        for axis, placement in enumerate(placements):
            if placement.is_shard():
                shape[placement.dim] = -(-shape[placement.dim] // mesh.size(axis))
    return tuple(shape)


def _zeros(parameter: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """A flat state: every process that has a part of the parameter has so many numbers of it."""
    zeros = torch.zeros(count, dtype=dtype, device=_local(parameter).device)
    if not hasattr(parameter, "to_local"):
        return zeros
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return DTensor.from_local(zeros, mesh, [Shard(0) if p.is_shard() else Replicate() for p in placements], run_check=False)


# ---- randomness --------------------------------------------------------------------------------------------------------------------


def _draw(works: Sequence[_Work], group: Mapping[str, Any], unit: int) -> Noise:
    """Random numbers for a step of a bucket, on its device. Those of a tensor are the same whenever that step of it is done."""
    storages, local = works[0].storages, works[0].local
    rounded = [group["rounding"] == "stochastic" and isinstance(storage, Quantized) for storage in storages]
    written = [group["round_bfloat16"] == "stochastic" and work.local.dtype == torch.bfloat16 for work in works]
    if not any(rounded + written):
        return Noise([None] * len(storages), [None] * len(works))
    uniform: list[list[Tensor]] = [[] for _ in storages]
    bits: list[Tensor | None] = []
    for work, cut in zip(works, written, strict=True):
        text = f"{group['seed']} {work.step} {work.place} {_coordinates(work.parameter)}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        generator = torch.Generator(local.device).manual_seed(seed)
        (places,) = Layout((tuple(work.local.shape),), unit).places()
        for draws, wanted in zip(uniform, rounded, strict=True):
            if wanted:
                draws.append(torch.rand(places, generator=generator, device=local.device))
        bits.append(
            torch.randint(1 << 16, (work.local.numel(),), generator=generator, device=local.device, dtype=torch.int32)
            if cut
            else None
        )
    return Noise([torch.cat(draws) if draws else None for draws in uniform], bits)


def _coordinates(parameter: Tensor) -> list[int]:
    """Which shard this process has; copies of one shard are rounded alike."""
    if not hasattr(parameter, "to_local"):
        return []
    here = parameter.device_mesh.get_coordinate() or []  # type: ignore[attr-defined]
    return [place for place, kind in zip(here, parameter.placements, strict=False) if kind.is_shard()]  # type: ignore[attr-defined]


# ---- what it takes -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateBytes:
    """What an optimizer's states take, on this process.

    Attributes:
        total: bytes of all states, the counters of steps left out.
        parameters: how many parameters have states.
        quantized: bytes of those states that are rounded or factored, with their scales.
        quantized_parameters: how many parameters these belong to.
    """

    total: int
    parameters: int
    quantized: int
    quantized_parameters: int

    @property
    def per_parameter(self) -> float:
        """Bytes a parameter."""
        return self.total / max(self.parameters, 1)

    @property
    def per_quantized_parameter(self) -> float:
        """Bytes a parameter whose states are rounded."""
        return self.quantized / max(self.quantized_parameters, 1)


def optimizer_state_bytes(optimizer: Optimizer) -> StateBytes:
    """Count the bytes of an optimizer's states, as they lie in memory; also for optimizers of others.

    Args:
        optimizer: one that has done a step.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(256, 256))
        >>> optimizer = AdamW4bit([weight, bias := torch.nn.Parameter(torch.ones(256))])
        >>> (weight.sum() + bias.sum()).backward()
        >>> optimizer.step()
        >>> found = optimizer_state_bytes(optimizer)
        >>> found.total, found.parameters, found.quantized_parameters
        (71680, 65792, 65536)
    """
    total = parameters = quantized = quantized_parameters = 0
    for parameter, state in optimizer.state.items():
        size = sum(_bytes(value) for name, value in state.items() if isinstance(value, Tensor) and name != "step")
        count = _local(parameter).numel()
        total, parameters = total + size, parameters + count
        if any(name.endswith("_codes") for name in state):
            quantized, quantized_parameters = quantized + size, quantized_parameters + count
    return StateBytes(total, parameters, quantized, quantized_parameters)


def _bytes(tensor: Tensor) -> int:
    """Bytes in memory; of tensors that are made of others, those of their parts."""
    tensor = _local(tensor)
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
