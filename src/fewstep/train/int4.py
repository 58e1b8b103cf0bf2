r"""Linear layers that are trained with products of 4-bit integers: a Hadamard quantiser forwards, split bits and sampled rows backwards.

For $Y = X W^\top$ with rows of tokens $X$ (``"N D"``) and weights $W$ (``"C D"``):

*Forwards*, with an orthogonal, symmetric, block-diagonal Hadamard matrix $H$, which spreads outliers over their block,

$$ Y = s_X s_W\, \hat X \hat W^\top, \qquad \hat X = \operatorname{clamp}(\operatorname{round}(X H / s_X), -8, 7), \quad
   \hat W = \operatorname{clamp}(\operatorname{round}(W H / s_W), -8, 7) . $$

The steps $s$ are parameters. With $v = x / s$ the gradient goes straight through to $x$ where $-8 \le v \le 7$, and that of the step is
$\sum_i g_i u_i / \sqrt{7 n}$ over the n entries, $u = \hat x - v$ inside and $\hat x$ outside. Then H, its own inverse, leads back.

*Backwards*, the gradient $G$ (``"N C"``) is split into two matrices of codes between -7 and 7. With $x = 98\, G / \max|G|$,

$$ G^{high} = \operatorname{round}(x / 14), \qquad G^{low} = \text{stochastic round}(x - 14\, G^{high}), \qquad
   \mathbb E\,(14\, G^{high} + G^{low}) = x . $$

These are 2 N rows of codes; both products of the backward pass are sums over rows, and keep N of them in the mean: row i with
probability $p_i = \min(1, \tau c_i)$, $\sum_i p_i = N$, then divided by $p_i$, so that the mean is right. The score $c_i$ is
$\lVert G_i \rVert$ for the gradient of X, and $\lVert G_i \rVert \lVert \hat X_i \rVert$ for that of W.

Where this is not the authors' code: (1) there, rows of the gradient of W are not sampled at all (the lines are switched off), and codes are
clamped to 6 while they reach 7, which biases the largest gradients by 8 %. (2) In the gradient of W the factor $1/p_i$ stands inside the
sum, where an integer product has no place for it. Here these $p_i$ are powers of two, with the same sum: the rows of one probability are
one integer product, shifted. Any probabilities leave the mean as it is.

*What is emulated.* PyTorch has no product of 4-bit integers, so the codes are multiplied as floats, which is exact: the sums are integers
below $2^{24}$ (or float64 takes over). Nothing here is faster than an ordinary layer; what is saved is counted (`Operations`).

Sources: "Training Transformers with 4-bit Integers" (arXiv 2306.11987), sections 3 and 4; the steps: "Learned Step Size Quantization"
(arXiv 1902.08153), eqs. 3 and 5.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Int4Conversion", "Int4Linear", "Operations", "convert_to_int4_training"]

LOW, HIGH = -8, 7
"""Codes of activations and weights."""
SPLIT = 14
"""One unit of the high half of a gradient, in units of the low half."""
LARGEST_BLOCK = 1024
SMALLEST_STEP = 1e-10
STEP_RATE = 2e-4
"""Learning rate of the steps, as in the authors' code."""
EXACT = 2**24
"""Integers up to here are exact in float32."""


@dataclass
class Operations:
    """Multiply-adds and additions that were done, since the layer was made.

    Attributes:
        integer: multiply-adds of pairs of 4-bit codes, both passes.
        dense: multiply-adds that an ordinary layer would have done in floating point.
        rotation: additions in floating point of fast Hadamard transforms, of both passes where a backward one can follow.
    """

    integer: int = 0
    dense: int = 0
    rotation: int = 0

    def __add__(self, other: Operations) -> Operations:
        return Operations(*(getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)))


# ---- the Hadamard quantiser --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Entries of 1 and -1, without the factor 1 / sqrt(size)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix.to(device, dtype)


def rotate(x: Tensor, block: int) -> Tensor:
    """The rows of x times the block-diagonal orthonormal Hadamard matrix H = H^T = H^-1.

    Args:
        x: ``Float[Tensor, "*batch d"]``.
        block: size of the blocks, a power of two that divides d; 1 changes nothing.

    Example:
        >>> rotate(torch.tensor([[3.0, 1.0, 0.0, 2.0]]), 4)
        tensor([[3., 0., 1., 2.]])
    """
    if block == 1:
        return x
    outer = 2 ** (int(math.log2(block)) // 2)  # H of size ab is the Kronecker product of those of sizes a and b
    first, second = (_hadamard(size, x.dtype, x.device) for size in (outer, block // outer))
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // block, len(first), len(second))
    return ((first @ parts @ second) / math.sqrt(block)).reshape(x.shape)


class _LearnedStep(torch.autograd.Function):
    """(step * codes, codes) of a tensor, with the gradients of learned step size quantisation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        ratio = x / step
        codes = ratio.round().clamp(low, high)
        ctx.save_for_backward(ratio)
        ctx.range = low, high
        ctx.mark_non_differentiable(codes)
        return codes * step, codes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (ratio,), (low, high), gradient = ctx.saved_tensors, ctx.range, gradients[0]
        inside = (ratio >= low) & (ratio <= high)
        codes = ratio.round().clamp(low, high)
        slope = torch.where(inside, codes - ratio, codes)
        scale = 1.0 / math.sqrt(max(ratio.numel(), 1) * high)
        return gradient * inside, scale * (gradient * slope).sum(), None, None


def quantise(x: Tensor, step: Tensor, low: int = LOW, high: int = HIGH) -> tuple[Tensor, Tensor]:
    """``(step * codes, codes)`` with codes = clamp(round(x / step), low, high); differentiable in x (straight through) and in the step."""
    return _LearnedStep.apply(x, step, low, high)  # type: ignore[return-value]


def first_step(x: Tensor) -> Tensor:
    """Where a step begins: 2 mean|x| / sqrt(7) + 1e-10."""
    return 2.0 * x.abs().mean() / math.sqrt(HIGH) + SMALLEST_STEP


def search_block(x: Tensor, weight: Tensor) -> int:
    """The size of Hadamard blocks with the least product of the two quantisation errors, out of 1, 2, 4, ... that divide the width."""
    largest = math.gcd(x.shape[-1], LARGEST_BLOCK)
    sizes = [2**k for k in range(int(math.log2(largest)) + 1)]

    def error(y: Tensor, block: int) -> Tensor:
        turned = rotate(y, block)  # H is orthogonal, so errors have their size before the way back
        return (quantise(turned, first_step(turned))[0] - turned).norm().clamp_min(torch.finfo(y.dtype).tiny)

    return sizes[int(torch.stack([error(x, size).log() + error(weight, size).log() for size in sizes]).argmin())]


# ---- the backward products ---------------------------------------------------------------------------------------------------------


def split_bits(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices of 4-bit codes whose weighted sum is the gradient in the mean.

    Args:
        gradient: ``Float[Tensor, "n c"]``.

    Returns:
        ``(codes, unit)``: ``Float[Tensor, "2n c"]`` of integers between -7 and 7, the n high rows first; and the value of a low unit,
        ``""``: gradient = E[unit * (14 codes[:n] + codes[n:])], over the ambient generator.
    """
    unit = gradient.abs().amax() / (SPLIT * HIGH) if gradient.numel() else gradient.new_zeros(())
    x = gradient / torch.where(unit > 0.0, unit, 1.0)
    high = (x / SPLIT).round().clamp(-HIGH, HIGH)
    rest = x - SPLIT * high
    low = (rest + torch.rand_like(rest)).floor().clamp(-HIGH, HIGH)
    return torch.cat([high, low]), unit


def keep_probabilities(scores: Tensor, count: float) -> Tensor:
    """p_i = min(1, tau c_i) with the sum ``count``; 1 wherever the score is not 0 if no more than ``count`` are not.

    Example:
        >>> keep_probabilities(torch.tensor([8.0, 1.0, 1.0, 0.0]), 2.0)
        tensor([1.0000, 0.5000, 0.5000, 0.0000])
    """
    return (scores * _rate(scores, count)).clamp(max=1.0)


def dyadic_probabilities(scores: Tensor, count: float) -> Tensor:
    """The same as powers of two: 2^floor(log2 min(1, tau c_i)), with the largest tau for which their sum is at most ``count``.

    Example:
        >>> dyadic_probabilities(torch.tensor([8.0, 1.2, 1.0, 0.0]), 2.0)
        tensor([1.0000, 0.5000, 0.5000, 0.0000])
    """
    logs = (
        scores * _rate(scores, count)
    ).log2()  # rounded down, at most `count`; at twice the rate all below 1 have doubled, so more
    floors = logs.floor().clamp(max=0.0)
    chance = torch.exp2(floors)
    grows = (logs < 0.0) & (chance > 0.0)
    order = torch.where(grows, floors - logs, math.inf).argsort()  # those that double first come first
    total = chance.double().sum() + (chance * grows)[order].double().cumsum(0)
    doubled = grows[order] & (total <= count * (1.0 + 1e-9))
    return chance.index_copy(0, order, chance[order] * (1.0 + doubled.to(chance.dtype)))


def _rate(scores: Tensor, count: float) -> float:
    """tau: with the k largest scores clamped to 1, (count - k) over the sum of the others, for the smallest k that leaves these below 1."""
    ordered = torch.cat([scores.double().sort(descending=True).values, scores.new_zeros(1).double()])
    rest = ordered.flip(0).cumsum(0).flip(0)
    clamped = int(((count - torch.arange(len(ordered), device=scores.device)) * ordered <= rest).to(torch.int8).argmax())
    if (others := float(rest[clamped])) > 0.0:
        return (count - clamped) / others
    smallest = [float(score) for score in ordered[ordered > 0.0][-1:]]
    return 2.0 / smallest[0] if smallest else 0.0


def integer_product(a: Tensor, b: Tensor, bound: float) -> Tensor:
    """The matrix product of tensors of integers, exactly: in float32 if every sum stays within ``bound`` <= 2^24, in float64 otherwise."""
    exact = torch.float64 if bound > EXACT or a.dtype == torch.float64 else torch.float32
    return a.to(exact) @ b.to(exact)


class _Int4Product(torch.autograd.Function):
    """x w^T from codes; the gradients of x and w from split bits and sampled rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, codes: Sequence[Tensor], steps: Sequence[Tensor], kept: float, counted: Operations
    ) -> Tensor:
        x_codes, weight_codes = codes
        (rows, width), columns = x_codes.shape, len(weight_codes)
        counted.integer += rows * width * columns
        counted.dense += rows * width * columns
        ctx.save_for_backward(x_codes.to(torch.int8), weight_codes.to(torch.int8), *(step.detach() for step in steps))
        ctx.kept, ctx.counted, ctx.dtype = kept, counted, x.dtype
        product = integer_product(x_codes, weight_codes.T, LOW * LOW * width)
        return (product * (steps[0] * steps[1])).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, weight_codes, x_step, weight_step = ctx.saved_tensors
        with torch.autocast(x_codes.device.type, enabled=False):
            codes, unit = split_bits(gradients[0].to(ctx.dtype))
            parts = _Rows(codes, unit, len(x_codes), ctx.kept)
            of_x = parts.times(weight_codes, ctx.counted) * weight_step if ctx.needs_input_grad[0] else None
            of_weight = parts.transposed_times(x_codes, ctx.counted) * x_step if ctx.needs_input_grad[1] else None
        ctx.counted.dense += sum(ctx.needs_input_grad[:2]) * len(x_codes) * weight_codes.numel()
        return of_x, of_weight, None, None, None, None


@dataclass(frozen=True)
class _Rows:
    """The 2 n rows of codes of a gradient, and its products with other codes, over sampled rows."""

    codes: Tensor
    unit: Tensor
    n: int
    kept: float

    def times(self, other: Tensor, counted: Operations) -> Tensor:
        """E = G @ other. High and low rows are sampled apart and added up again."""
        index, weight = self._sample(self._norms(), keep_probabilities)
        product = integer_product(self.codes[index], other, HIGH * -LOW * len(other)).to(self.codes.dtype)
        counted.integer += len(index) * other.numel()
        target = self.codes.new_zeros(self.n, other.shape[1])
        return target.index_add_(0, index % max(self.n, 1), product * (weight * self.unit)[:, None])

    def transposed_times(self, other: Tensor, counted: Operations) -> Tensor:
        """E = G^T @ other. The weights 14 and 2^k stand inside the sum, and are integers."""
        norms = self._norms() * other.to(self.codes.dtype).norm(dim=1).repeat(2)
        index, weight = self._sample(norms, dyadic_probabilities)
        bound = HIGH * -LOW * float(weight.sum())
        product = integer_product((self.codes[index] * weight[:, None]).T, other[index % max(self.n, 1)], bound)
        counted.integer += len(index) * self.codes.shape[1] * other.shape[1]
        return product.to(self.codes.dtype) * self.unit

    def _norms(self) -> Tensor:
        return self.codes.norm(dim=1) * self._units()

    def _units(self) -> Tensor:
        return torch.cat([self.codes.new_full((self.n,), SPLIT), self.codes.new_ones(self.n)])

    def _sample(self, scores: Tensor, probabilities: Callable[[Tensor, float], Tensor]) -> tuple[Tensor, Tensor]:
        """Which rows are kept, and their weights: 14 or 1, over the probability."""
        chance = probabilities(scores, self.kept * len(scores))
        index = (torch.rand_like(chance) < chance).nonzero()[:, 0]
        return index, (self._units() / chance)[index]


# ---- the layer ---------------------------------------------------------------------------------------------------------------------


class Int4Linear(nn.Linear):
    """A linear layer whose three products, of the forward and the backward pass, are those of 4-bit integers (emulated, exactly).

    The first batch that is not zero chooses the size of the Hadamard blocks and where the steps begin. Of several processes
    (`torch.distributed`) the first one's batch chooses for all, at a call in training that all must make; until then the layer is an
    ordinary one when it is evaluated. The weight itself stays in floating
    point; state: ``weight``, ``bias``, the steps ``input_step`` and ``weight_step``, and ``hadamard_block`` (0: not yet chosen).

    Args:
        in_features, out_features, bias: as of `torch.nn.Linear`.
        block: size of the Hadamard blocks (the largest power of two in it that divides ``in_features`` is taken); 1 is no rotation; None
            tries 1, 2, ..., 1024 on the first batch.
        kept: share of the 2 N rows of codes that a product of the backward pass keeps in the mean; 1 keeps all, and does twice the work.

    Example:
        >>> layer = Int4Linear(64, 8)
        >>> x = torch.randn(256, 64, requires_grad=True)
        >>> layer(x).square().sum().backward()
        >>> layer.weight.grad.shape, layer.operations.dense == 3 * 256 * 64 * 8
        (torch.Size([8, 64]), True)
    """

    hadamard_block: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block: int | None = None,
        kept: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if block is not None and block < 1:
            raise ValueError(f"block is the size of the Hadamard blocks, at least 1, or None to search it; got {block}.")
        if not 0.0 < kept <= 1.0:
            raise ValueError(f"kept is the share of rows that the backward pass keeps, in (0, 1]; got {kept}.")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.block = None if block is None else math.gcd(block, in_features & -in_features)
        self.kept, self.operations = kept, Operations()
        self.input_step, self.weight_step = (nn.Parameter(torch.ones((), device=device)) for _ in range(2))
        self.register_buffer("hadamard_block", torch.zeros((), dtype=torch.int64, device=device))
        self._chosen = 0  # the same number, where no device has to be asked

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, block: int | None = None, kept: float = 0.5) -> Int4Linear:
        """The layer with the parameters, not copies of them, of an ordinary one."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, block=block, kept=kept, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        device = linear.weight.device
        layer.input_step, layer.weight_step = (nn.Parameter(torch.ones((), device=device)) for _ in range(2))
        layer.hadamard_block = torch.zeros((), dtype=torch.int64, device=device)
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch gives it
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        with torch.autocast(kind, enabled=False):
            working = torch.promote_types(input.dtype, torch.float32)
            x, weight = input.reshape(-1, self.in_features).to(working), self.weight.to(working)
            if not self._chosen:
                if _several() and not self.training:
                    bias = None if self.bias is None else self.bias.to(working)
                    return functional.linear(input.to(working), weight, bias).to(dtype)
                self._choose(x.detach(), weight.detach())
            block = self._chosen or 1
            turned = sum(y.numel() * (1 + (torch.is_grad_enabled() and y.requires_grad)) for y in (x, weight))
            self.operations.rotation += turned * int(math.log2(block))
            steps = [(step.abs() + SMALLEST_STEP).to(working) for step in (self.input_step, self.weight_step)]
            pairs = [quantise(rotate(y, block), step) for y, step in zip((x, weight), steps, strict=True)]
            (x_hat, x_codes), (weight_hat, weight_codes) = pairs
            y = _Int4Product.apply(x_hat, weight_hat, (x_codes, weight_codes), steps, self.kept, self.operations)
            y = y.reshape(*input.shape[:-1], self.out_features)  # type: ignore[union-attr]
            if self.bias is not None:
                y = y + self.bias
        return y.to(dtype)

    @torch.no_grad()
    def quantised_weight(self) -> Tensor:
        """The weight as the products see it, ``"out in"``; before the first batch, the weight as it is."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        if not self._chosen:
            return weight
        step = (self.weight_step.abs() + SMALLEST_STEP).to(weight)
        return rotate(quantise(rotate(weight, self._chosen), step)[0], self._chosen)

    @torch.no_grad()
    def _choose(self, x: Tensor, weight: Tensor) -> None:
        """Blocks and steps from a batch; one of zeros says nothing, and a weight of zeros begins as if it had torch's first values."""
        found = torch.zeros(3, device=x.device)  # the block, and both steps
        if bool(x.any()):
            block = search_block(x, weight) if self.block is None else self.block
            turned, start = rotate(weight, block), 1.0 / math.sqrt(HIGH * self.in_features)
            steps = first_step(rotate(x, block)), first_step(turned) if bool(weight.any()) else turned.new_tensor(start)
            found = torch.stack([found.new_tensor(float(block)), *(step.to(found) for step in steps)])
        if _several():
            dist.broadcast(found, 0)
        if found[0] > 0:
            self._chosen = int(found[0])
            self.hadamard_block.fill_(self._chosen)
            self.input_step.copy_(found[1])
            self.weight_step.copy_(found[2])

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._chosen = int(self.hadamard_block)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block={self._chosen or self.block or 'searched'}, kept={self.kept}"


def _several() -> bool:
    """Whether this process trains among others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# ---- whole models ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Int4Conversion:
    """What `convert_to_int4_training` did.

    Attributes:
        model: the model, now with `Int4Linear` layers.
        layers: name -> layer.
        left: name of a linear layer that was left as it is -> why.
        options: ``block`` and ``kept`` of all layers.
    """

    model: nn.Module
    layers: dict[str, Int4Linear] = field(repr=False)
    left: dict[str, str]
    options: dict[str, Any]

    def optimizer(
        self, make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, *, step_rate: float = STEP_RATE
    ) -> Callable[..., torch.optim.Optimizer]:
        """For ``fit(..., optimizer=)``: a function ``(parameters, lr) -> optimizer`` with the steps in a group of their own.

        Args:
            make: called as ``make(groups, lr=lr)``.
            step_rate: learning rate of the steps, which have no weight decay.
        """

        def made(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
            steps = {id(step) for layer in self.layers.values() for step in (layer.input_step, layer.weight_step)}
            every = list(parameters)
            chosen = [parameter for parameter in every if id(parameter) in steps]
            others = {"params": [parameter for parameter in every if id(parameter) not in steps], "int4": str(self.options)}
            return make([others, {"params": chosen, "lr": step_rate, "weight_decay": 0.0}], lr=lr)

        return made

    def operations(self) -> Operations:
        """All layers' together."""
        return sum((layer.operations for layer in self.layers.values()), Operations())

    def revert(self, *, quantised: bool = False) -> nn.Module:
        """Put ordinary linear layers back, with the weights that were trained; the steps are dropped.

        Args:
            quantised: give the weights the values that the products used, those of their codes turned back, which is nearer to the model
                that was trained. Inputs are no longer rounded either way.
        """
        if quantised:
            for layer in self.layers.values():
                layer.weight.data.copy_(layer.quantised_weight())
        plain: dict[int, nn.Module] = {}
        for layer in self.layers.values():
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta")
            linear.weight, linear.bias = layer.weight, layer.bias
            plain[id(layer)] = linear.train(layer.training)
        _replace(self.model, plain)
        return self.model

    def __str__(self) -> str:
        told, done = f"{len(self.layers)} linear layers with 4-bit products, {len(self.left)} as they were", self.operations()
        share = f"; {done.integer:.3g} integer multiply-adds in place of {done.dense:.3g} in floating point" if done.dense else ""
        rates = "Train with this object's `optimizer`: another gives the learned steps the weights' learning rate and decay"
        return f"{told}{share}. Emulated: counted operations, not time. {_hardware(self.model)} {rates}."


def convert_to_int4_training(
    model: nn.Module, skip: Iterable[str] = (), *, block: int | None = None, kept: float = 0.5
) -> Int4Conversion:
    """Replace a model's linear layers by `Int4Linear`, in place; their parameters stay the same objects.

    Left as they are: layers whose weight another module has too (a head that is tied to an embedding), those that are no plain
    `torch.nn.Linear`, and those that PyTorch's own attention and encoder layers read without calling them.

    Args:
        model: any module, one of diffusers for example.
        skip: names of layers to leave, or of modules that hold them, or patterns (``"head"``, ``"blocks.0"``, ``"*.proj_out"``).
        block, kept: of `Int4Linear`.

    Raises:
        ValueError: if a name of ``skip`` is that of nothing, or no layer is left to convert.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
        >>> conversion = convert_to_int4_training(model, skip=["2"])
        >>> sorted(conversion.layers), conversion.left
        (['0'], {'2': 'skip'})
    """
    patterns = [skip] if isinstance(skip, str) else list(skip)
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    check_patterns(patterns, list(found))
    tied = shared_weights(model)
    left = {name: why for name, linear in found.items() if (why := _why_left(model, name, linear, patterns, tied))}
    layers = {name: Int4Linear.from_linear(found[name], block=block, kept=kept) for name in found if name not in left}
    if not layers or "" in layers:
        raise ValueError(
            f"{type(model).__name__} is itself a linear layer: use Int4Linear.from_linear(model)."
            if layers
            else f"{type(model).__name__} has no linear layer to convert: {left or 'it has none at all'}."
        )
    _replace(model, {id(found[name]): layer for name, layer in layers.items()})
    return Int4Conversion(model, layers, left, {"block": block, "kept": kept})


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module, or one that holds it, has a name that one of the patterns has."""
    parts = name.split(".")
    holders = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatchcase(holder, pattern) for pattern in patterns for holder in holders)


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raise ValueError for a pattern that is the name of none."""
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"skip={pattern!r} is the name of no linear layer or of a module with one. There are: {shown}.")


def shared_weights(model: nn.Module) -> set[int]:
    """The ids of parameters that more than one module has."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    return {parameter for parameter, modules in owners.items() if len(modules) > 1}


def _why_left(model: nn.Module, name: str, linear: nn.Linear, patterns: list[str], tied: set[int]) -> str:
    if matches(name, patterns):
        return "skip"
    if id(linear.weight) in tied:
        return "its weight is tied to another module's"
    if isinstance(linear, Int4Linear):
        return "has 4-bit products already"
    holder = model.get_submodule(name.rpartition(".")[0])
    if isinstance(holder, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f"nn.{type(holder).__name__} reads its weight without calling it"
    if type(linear) is not nn.Linear and type(linear).forward is not nn.Linear.forward:
        return f"{type(linear).__name__} is no plain nn.Linear"
    return ""


def _replace(model: nn.Module, new: dict[int, Any]) -> None:
    """Put modules in the place, or places, of those whose id is given."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in new:
            holder, _, last = name.rpartition(".")
            setattr(model.get_submodule(holder), last, new[id(module)])


def _hardware(model: nn.Module) -> str:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        return f"A {device.type} device has no 4-bit products."
    major, minor = torch.cuda.get_device_capability(device)
    has = (7, 5) <= (major, minor) < (9, 0)
    return (
        f"This GPU (compute capability {major}.{minor}) has {'' if has else 'no '}tensor cores for 4-bit integers; none are used."
    )
