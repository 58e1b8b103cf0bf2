r"""Numbers in 4 bits: codebooks, scales, and two codes in a byte.

A quantiser divides a tensor by a *scale*, replaces what is left by the nearest value of a *codebook* of 16, and keeps the number of that
value, 4 bits, and the scale. With codes q, codebook T and a scale S that is broadcast over the tensor,

$$ x \approx T(q) \odot S , \qquad q = \arg\min_j \left| x / S - T(j) \right| . $$

- `Codebook`: T. `SIGNED_DYNAMIC` has most of its values near zero, `LINEAR` equal steps and no zero.
- `BlockScale`: the largest absolute value of every 128 numbers that follow each other.
- `Rank1Scale`: for every axis the largest absolute values over all other axes; the scale of an entry is the least of those that it
  belongs to. A matrix has a number a row and a number a column: $S_{ij} = \min(r_i, c_j)$.

Where a scale is zero, all that it belongs to is zero, and comes back as exact zeros. Numbers that are not finite make scales that are not
finite, and come back as such.

What is compiled for a processor is written so that PyTorch's compiler makes loops of vectors of it, which it does not of look-ups in a
table and of numbers that lie two apart: codes are found and turned into values by choices, and packed eight at a time. Everything that
has a number of its own for every entry is seen as ``"units unit"``, so that loops over the same units become one.

Sources: "Memory Efficient Optimizers with 4-bit States" (arXiv 2309.01507): rank-1 scales and the map without zero; the signed map is that
of "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861) in 4 bits.
"""

from __future__ import annotations

import abc
import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "LINEAR",
    "PACKING",
    "SIGNED_DYNAMIC",
    "BlockScale",
    "Codebook",
    "Layout",
    "Quantizer",
    "Rank1Scale",
    "Scale",
    "pack",
    "unpack",
]

PACKING = "low nibble first"
"""How two codes share a byte: the even one in its low four bits. Other libraries may have it the other way round."""
CODES = 16
FINEST = 1 << 16
"""Most cells in an interval of length 1 that a codebook's table may have."""
BITS = (8, 4, 2, 1)
"""Of a code, the highest first."""
APART = ((16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, 0x0F0F0F0F0F0F0F0F))
"""Eight codes in 32 bits move apart into eight bytes: by how much, and what is kept then."""
TOGETHER = ((4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF), (16, 0x00000000FFFFFFFF))
"""Back."""
ROWS = 16
"""Compiled, the largest values of columns are found in as many rows at a time: whole columns are too far apart in memory."""
TINY = 1e-33
"""A smaller scale is divided by as if it were this, so that one over it is a number. Zero among them; there is nothing to divide then."""


# ---- two codes in a byte -----------------------------------------------------------------------------------------------------------


def pack(codes: Tensor) -> Tensor:
    """Codes below 16, ``"n"`` of uint8, two in a byte: ``"(n+1)//2"``. An odd one out shares its byte with 0.

    Example:
        >>> pack(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist()
        [33, 15]
    """
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    if sys.byteorder == "little" and not torch.compiler.is_compiling():  # both at once
        pairs = codes.view(torch.int16)
        return (pairs | (pairs >> 4)).to(torch.uint8)
    if _for_processor(codes) and len(codes) % 8 == 0:
        eights = codes.view(torch.int64)
        for shift, mask in TOGETHER:
            eights = (eights | (eights >> shift)) & mask
        return eights.to(torch.int32).view(torch.uint8)
    even, odd = codes.view(-1, 2).unbind(1)
    return even | (odd << 4)


def unpack(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack`: the first `count` codes.

    Example:
        >>> unpack(torch.tensor([33, 15], dtype=torch.uint8), 3).tolist()
        [1, 2, 15]
    """
    if _for_processor(packed) and len(packed) % 4 == 0:
        eights = packed.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        for shift, mask in APART:
            eights = (eights | (eights << shift)) & mask
        return eights.view(torch.uint8)[:count]
    return torch.stack([packed & 15, packed >> 4], 1).view(-1)[:count]


def _for_processor(x: Tensor) -> bool:
    """Whether what is done with a tensor is being compiled for a processor on which the first byte of a number is its lowest."""
    return torch.compiler.is_compiling() and x.is_cpu and sys.byteorder == "little"


# ---- codebooks ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codebook:
    """Sixteen values in [-1, 1], and the nearest of them.

    Args:
        values: ascending decimal numbers.

    Raises:
        ValueError: if they are not sixteen, do not ascend, lie outside [-1, 1] or have too many digits for a table.

    Example:
        >>> LINEAR.encode(torch.tensor([0.0, 0.5, 0.99])).tolist()
        [0, 7, 15]
    """

    values: tuple[float, ...]
    fractions: tuple[Fraction, ...] = field(init=False, repr=False, compare=False)
    """The values, exactly as they are meant."""
    midpoints: tuple[Fraction, ...] = field(init=False, repr=False, compare=False)
    """Where the nearest value changes."""
    cells: int = field(init=False, repr=False, compare=False)
    """The least n so that all values and midpoints are multiples of 1 / n."""
    step: float | None = field(init=False, repr=False, compare=False)
    """The distance of neighbours, if it is always the same."""
    grid: float = field(init=False, repr=False, compare=False)
    """What 1 is multiplied by before a code is looked for."""
    borders: tuple[tuple[float, ...], ...] = field(init=False, repr=False, compare=False)
    """On that grid: where the nearest value changes, and where the last one below does."""

    def __post_init__(self) -> None:
        if len(self.values) != CODES or any(a >= b for a, b in itertools.pairwise(self.values)):
            raise ValueError(f"a codebook of 4 bits has {CODES} ascending values, got {self.values}.")
        if self.values[0] < -1.0 or self.values[-1] > 1.0:
            raise ValueError(f"the values of a codebook lie in [-1, 1], got {self.values}.")
        fractions = tuple(Fraction(value).limit_denominator(FINEST) for value in self.values)
        midpoints = tuple((a + b) / 2 for a, b in itertools.pairwise(fractions))
        cells = math.lcm(*(number.denominator for number in (*fractions, *midpoints)))
        if cells > FINEST:
            raise ValueError(f"values and midpoints of a codebook must be multiples of 1 / n for an n up to {FINEST}, got {cells}.")
        gaps = {b - a for a, b in itertools.pairwise(fractions)}
        if self.values[0] >= 0.0 and self.values[-1] != 1.0:
            raise ValueError(f"the last value of a codebook for positive numbers is 1, got {self.values[-1]}.")
        step = float(gaps.pop()) if len(gaps) == 1 else None
        grid = cells if step is None else 1.0 / step
        borders = tuple(tuple(float(border) * grid for border in found) for found in (midpoints, fractions[1:-1]))
        found = {
            "fractions": fractions,
            "midpoints": midpoints,
            "cells": cells,
            "step": step,
            "grid": float(grid),
            "borders": borders,
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def signed(self) -> bool:
        """Whether there are negative values."""
        return self.values[0] < 0.0

    def encode(self, x: Tensor, factor: Tensor | None = None, *, uniform: Tensor | None = None) -> Tensor:
        """The code of the nearest value, or at random that of the one below or above, so that the expectation is kept.

        Args:
            x: ``"*shape"``, float32, never negative if no value is.
            factor: `grid` over the scale, broadcast over x, if x is not in [-1, 1] yet.
            uniform: numbers in [0, 1) of the same shape, to round at random. What lies outside the values goes to the first or last.

        Returns:
            ``"*shape"``, uint8. Within rounding (a few 1e-7) of a midpoint it may be either neighbour's. Of NaN comes any code.
        """
        gridded = x * (self.grid if factor is None else factor)
        if uniform is not None:
            return self._encode_at_random(gridded, uniform)
        if self.step is not None:
            place = gridded.add_(0.5 - self.values[0] / self.step)  # cut off, it is the code; below 0 is at most half a step
            return (place.clamp_(0.0, CODES - 1.0) if self.signed else place).to(torch.uint8)
        if torch.compiler.is_compiling():  # comparisons are fused and vectorised; a look-up in a table is not
            return _count(gridded, self.borders[0])
        return self._cell(_nearest(self, x.device), gridded)

    def _encode_at_random(self, gridded: Tensor, uniform: Tensor) -> Tensor:
        below = self._below(gridded)
        low, high = self.decode(below), self.decode(below + 1)
        return below + (uniform < (gridded / self.grid - low) / (high - low)).to(torch.uint8)

    def _below(self, gridded: Tensor) -> Tensor:
        """The code of the last value that is not larger; at most the last but one."""
        if torch.compiler.is_compiling() or self.step is not None:
            return _count(gridded, self.borders[1])
        return self._cell(_lower(self, gridded.device), gridded.clone())

    def _cell(self, table: Tensor, gridded: Tensor) -> Tensor:
        """The entry of a table that has one for every cell of [-1, 1]. Takes the memory of `gridded`."""
        cell = gridded.add_(self.cells).int().clamp_(0, 2 * self.cells)  # clamped last: of NaN comes any integer
        return table.index_select(0, cell.view(-1)).view(gridded.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """The values of codes, float32."""
        if self.step is not None:
            return codes.float() * self.step + self.values[0]
        if _for_processor(codes):
            numbers = codes.int()
            return _chosen([(numbers & bit) != 0 for bit in BITS], self.values)
        return torch.tensor(self.values, device=codes.device)[codes.long()]

    def decode_packed(self, packed: Tensor) -> Tensor:
        """The values of codes two in a byte, without the steps between where that is faster."""
        if torch.compiler.is_compiling():
            return self.decode(unpack(packed, 2 * len(packed)))
        return _pairs(self, packed.device).index_select(0, packed.int()).view(torch.float32)


def _count(x: Tensor, borders: Sequence[float]) -> Tensor:
    """How many borders are not larger than x, at most 15."""
    if _for_processor(x):
        return _searched(x, borders)
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for border in borders:
        codes = codes + (x >= border).to(torch.uint8)
    return codes


def _searched(x: Tensor, borders: Sequence[float]) -> Tensor:
    """The same by halves, bit after bit: fewer steps."""
    full, bits = [*borders, *([math.inf] * (CODES - 1 - len(borders)))], []
    for bit in BITS:
        bits.append(x >= _chosen(bits, full[bit - 1 :: 2 * bit]))
    codes = bits[0].int()
    for found in bits[1:]:
        codes = codes + codes + found.int()
    return codes.to(torch.uint8)


def _chosen(bits: Sequence[Tensor], values: Sequence[float]) -> Any:
    """Of 2^n values that whose number has these n bits, the highest first."""
    if not bits:
        return values[0]
    half = len(values) // 2
    return torch.where(bits[0], _chosen(bits[1:], values[half:]), _chosen(bits[1:], values[:half]))


@functools.cache
def _nearest(codebook: Codebook, device: torch.device) -> Tensor:
    return _table(codebook, codebook.midpoints, device)


@functools.cache
def _lower(codebook: Codebook, device: torch.device) -> Tensor:
    return _table(codebook, codebook.fractions[1:-1], device)


def _table(codebook: Codebook, borders: Sequence[Fraction], device: torch.device) -> Tensor:
    """How many borders lie at or below the lower end of every cell."""
    first = torch.arange(-codebook.cells, codebook.cells + 1)
    edges = torch.tensor([int(border * codebook.cells) for border in borders])
    return torch.searchsorted(edges, first, right=True).to(torch.uint8).to(device)


@functools.cache
def _pairs(codebook: Codebook, device: torch.device) -> Tensor:
    """The two values of every byte, seen as one number of 64 bits, so that one look-up gives both."""
    packed = torch.arange(256)
    values = torch.tensor(codebook.values)
    return torch.stack([values[packed & 15], values[packed >> 4]], 1).contiguous().view(torch.int64).view(-1).to(device)


def _signed_dynamic() -> tuple[float, ...]:
    """Three powers of ten, 1, 2 and 4 equal cells in [0.1, 1] of each; their midpoints with both signs, zero, and one."""
    positive = [Fraction(1 + 9 * Fraction(2 * j + 1, 2 ** (i + 1)), 10) / 10 ** (2 - i) for i in range(3) for j in range(2**i)]
    return tuple(float(value) for value in sorted([*positive, *(-value for value in positive), Fraction(0), Fraction(1)]))


SIGNED_DYNAMIC = Codebook(_signed_dynamic())
"""For signed numbers of very different size: 0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, their negatives, and 1 (not -1)."""
LINEAR = Codebook(tuple((i + 1) / CODES for i in range(CODES)))
"""For positive numbers that must not become zero: 1/16, 2/16, ..., 1."""


# ---- several tensors in a row ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Tensors one behind the other in one flat tensor, each filled up with zeros to whole units.

    Args:
        shapes: of the tensors.
        unit: numbers in a unit.

    Example:
        >>> layout = Layout(((3,), (1, 2)), unit=2)
        >>> flat = layout.join([torch.ones(3), torch.zeros(1, 2)])
        >>> flat.tolist(), [tuple(part.shape) for part in layout.split(flat)]
        ([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [(3,), (1, 2)])
    """

    shapes: tuple[tuple[int, ...], ...]
    unit: int = 1

    def places(self) -> list[int]:
        """How much room every tensor has."""
        return [-(-math.prod(shape) // self.unit) * self.unit for shape in self.shapes]

    def in_rows(self) -> bool:
        """Whether there is one tensor, and every index of its first axis has whole units."""
        return len(self.shapes) == 1 and len(self.shapes[0]) > 1 and math.prod(self.shapes[0][1:]) % self.unit == 0

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The flat tensor."""
        parts = []
        for tensor, places in zip(tensors, self.places(), strict=True):
            parts.append(tensor.reshape(-1))
            if places != tensor.numel():
                parts.append(tensor.new_zeros(places - tensor.numel()))
        return _joined(parts)

    def split(self, flat: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
        """The tensors, as views; of other shapes that have as many numbers, if given."""
        pieces = flat.split(self.places()) if len(self.shapes) > 1 else (flat,)
        parts = []
        for piece, shape in zip(pieces, self.shapes if shapes is None else shapes, strict=True):
            count = math.prod(shape)
            parts.append((piece if len(piece) == count else piece[:count]).view(shape))
        return parts


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


# ---- scales ------------------------------------------------------------------------------------------------------------------------


class Scale(abc.ABC):
    """What tensors are divided by: of every tensor some numbers, in one flat tensor, float32."""

    @abc.abstractmethod
    def count(self, shape: Sequence[int]) -> int:
        """How many numbers the scale of a tensor has."""

    @abc.abstractmethod
    def check(self, layout: Layout) -> None:
        """Raise if the tensors cannot be measured as they lie."""

    @abc.abstractmethod
    def measure(self, flat: Tensor, layout: Layout) -> list[Tensor]:
        """The scales of tensors that are not negative."""

    @abc.abstractmethod
    def spread(self, scales: Sequence[Tensor], layout: Layout, least: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The scales as a tensor ``"n"``, or ``"units #unit"``. `least` is the minimum, or the maximum if one over the scales came."""


@dataclass(frozen=True)
class BlockScale(Scale):
    """The largest absolute value of every block of numbers that follow each other in memory; the last is filled up with zeros.

    Args:
        size: numbers in a block, even.

    Raises:
        ValueError: for another size.

    Example:
        >>> codes, scales = Quantizer(SIGNED_DYNAMIC, BlockScale(2)).quantize(torch.tensor([0.1, 4.0, -3.0]))
        >>> scales.tolist()
        [4.0, 3.0]
    """

    size: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 2 or self.size % 2:
            raise ValueError(f"a block has an even number of entries, at least 2; got {self.size!r}.")

    def count(self, shape: Sequence[int]) -> int:
        return -(-math.prod(shape) // self.size)

    def check(self, layout: Layout) -> None:
        if layout.unit != self.size:
            raise ValueError(f"blocks of {self.size} need tensors that are filled up to whole blocks, got units of {layout.unit}.")

    def measure(self, flat: Tensor, layout: Layout) -> list[Tensor]:
        scales = flat.view(-1, self.size).amax(1)
        return list(scales.split([self.count(shape) for shape in layout.shapes])) if len(layout.shapes) > 1 else [scales]

    def spread(self, scales: Sequence[Tensor], layout: Layout, least: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return _joined(scales)[:, None]


@dataclass(frozen=True)
class Rank1Scale(Scale):
    """The least, over the axes, of the largest absolute values along all other axes (arXiv 2309.01507, section 4.2).

    A tensor of shape (n, m, ...) has n + m + ... numbers, axis by axis.

    Example:
        >>> codes, scales = Quantizer(LINEAR, Rank1Scale()).quantize(torch.tensor([[1.0, 2.0], [8.0, 4.0]]))
        >>> scales.tolist()
        [2.0, 8.0, 8.0, 4.0]
    """

    def count(self, shape: Sequence[int]) -> int:
        return sum(shape)

    def check(self, layout: Layout) -> None:
        pass

    def measure(self, flat: Tensor, layout: Layout) -> list[Tensor]:
        if _for_processor(flat) and layout.in_rows():
            return [_largest_from_units(flat, layout.shapes[0], layout.unit)]
        return [_largest_along_axes(x) for x in layout.split(flat)]

    def spread(self, scales: Sequence[Tensor], layout: Layout, least: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if torch.compiler.is_compiling():
            if scales[0].is_cpu and layout.in_rows():
                return _least_in_units(scales[0], layout.shapes[0], least, layout.unit)
            return layout.join(
                [_least_of_axes(part, shape, least, None) for part, shape in zip(scales, layout.shapes, strict=True)]
            )
        flat = scales[0].new_zeros(sum(layout.places()))
        for part, shape, place in zip(scales, layout.shapes, layout.split(flat), strict=True):
            _least_of_axes(part, shape, least, place)
        return flat


def _largest_along_axes(x: Tensor) -> Tensor:
    """For every axis, one after the other, the largest values along all other axes."""
    parts = []
    while x.ndim > 1:  # the last axes stay together, for long rows are reduced fastest
        rows = x.flatten(1) if x.ndim > 2 else x
        parts.append(rows.amax(1))
        x = _largest_of_columns(rows) if x.ndim == 2 else _largest_of_columns(rows).view(x.shape[1:])
    return torch.cat([*parts, x])


def _largest_of_columns(matrix: Tensor) -> Tensor:
    if _for_processor(matrix) and len(matrix) > ROWS and len(matrix) % ROWS == 0:
        return matrix.view(-1, ROWS, matrix.shape[1]).amax(1).amax(0)
    return matrix.amax(0)


def _largest_from_units(flat: Tensor, shape: Sequence[int], unit: int) -> Tensor:
    """The same, from ``"units unit"``."""
    rows = flat.view(-1, unit).amax(1).view(shape[0], -1).amax(1)
    return torch.cat([rows, _largest_along_axes(_largest_of_columns(flat.view(shape[0], -1)).view(shape[1:]))])


def _least_of_axes(scales: Tensor, shape: Sequence[int], least: Callable[..., Tensor], place: Tensor | None) -> Tensor:
    """A flat tensor of that many numbers; made in `place` if there is one."""
    first, *others = scales.split(list(shape))
    total = others.pop() if others else first
    for part in reversed(others):
        total = least(part[:, None], total).view(-1)
    if total is first:
        return first if place is None else place.copy_(first)
    return least(first[:, None], total, out=None if place is None else place.view(shape[0], -1)).view(-1)


def _least_in_units(scales: Tensor, shape: Sequence[int], least: Callable[..., Tensor], unit: int) -> Tensor:
    """The same, as ``"units unit"``."""
    first, others = scales.split([shape[0], len(scales) - shape[0]])
    others = _least_of_axes(others, shape[1:], least, None)
    return least(first[:, None, None], others.view(1, -1, unit)).view(-1, unit)


# ---- quantisers --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantizer:
    """A codebook and a scale.

    Example:
        >>> quantizer = Quantizer(LINEAR, Rank1Scale())
        >>> x = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 1.0]))
        >>> codes, scales = quantizer.quantize(x)
        >>> quantizer.dequantize(codes, scales, x.shape).tolist()
        [[4.0, 1.0], [8.0, 2.0]]
    """

    codebook: Codebook
    scale: Scale

    def layout(self, shape: Sequence[int]) -> Layout:
        """How one tensor lies in memory."""
        return Layout((tuple(shape),), self.scale.size if isinstance(self.scale, BlockScale) else 2)

    def quantize(self, x: Tensor, *, uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes and scales of one tensor.

        Args:
            x: ``"*shape"``, any floating type; the work is done in float32. Never empty; never negative if the codebook is not.
            uniform: numbers in [0, 1), one for every place of its `layout`, to round at random; see `Codebook.encode`.

        Returns:
            codes of uint8, two in a byte, and scales of float32; both flat.
        """
        layout = self.layout(x.shape)
        codes, (scales,) = self.quantize_flat(layout.join([x.float()]), layout, uniform=uniform)
        return codes, scales

    def dequantize(self, codes: Tensor, scales: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor, ``"*shape"``, float32, in memory of its own."""
        layout = self.layout(shape)
        return layout.split(self.dequantize_flat(codes, [scales], layout).view(-1))[0]

    def quantize_flat(self, flat: Tensor, layout: Layout, *, uniform: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Codes of tensors one behind the other, and the scales of each."""
        self.scale.check(layout)
        scales = self.scale.measure(flat.abs() if self.codebook.signed else flat, layout)
        factor = _finished(self.codebook.grid / _joined(scales).clamp(min=TINY))
        factors = factor.split([len(part) for part in scales]) if len(scales) > 1 else (factor,)
        spread = self.scale.spread(factors, layout, torch.maximum)
        shape = (len(spread), -1) if spread.ndim == 2 else (-1,)
        codes = self.codebook.encode(flat.view(shape), spread, uniform=None if uniform is None else uniform.view(shape))
        return pack(codes.view(-1)), scales

    def dequantize_flat(self, codes: Tensor, scales: Sequence[Tensor], layout: Layout) -> Tensor:
        """The tensors one behind the other, in memory of their own, ``"n"`` or, if the scales are spread over rows, as these."""
        spread = self.scale.spread(scales, layout, torch.minimum)
        values = self.codebook.decode_packed(codes)
        return (values.view(len(spread), -1) if spread.ndim == 2 else values).mul_(spread)


def _finished(x: Tensor) -> Tensor:
    """What is compiled for a processor divides once, and not again wherever x is used: a stride that is given needs x in memory."""
    return x.as_strided(x.shape, x.stride()) if _for_processor(x) else x
