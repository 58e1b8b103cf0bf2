r"""Mixed sparsity training: most of a pre-training with a small share of the weights, whose places move, and a dense model at the end.

*Sparsity variation.* A `SparsitySchedule` is a step function of the training step in three phases: the warm-up from dense to ultra-sparse,
training at the highest sparsity, and the restoration back to dense. At sparsity s layer l, of r rows and c columns, keeps the share
$d_l = \epsilon (r + c) / (r c)$ of its weights (Erdos-Renyi), at most 1, with $\epsilon$ such that the shares add up to 1 - s of all.

*Topology evolution.* Every ``interval`` steps, and where the schedule changes, each layer drops weights and grows others. With $n$ weights
now, $n'$ wanted and stage $[t_0, t_1)$ of the schedule,

$$ n_{drop} = \max\!\Big(\Big\lfloor \tfrac{\zeta}{2} \Big(1 + \cos \pi \tfrac{t - t_0}{t_1 - t_0}\Big) n \Big\rfloor,\; n - n'\Big), \qquad
   n_{grow} = n_{drop} - (n - n') . $$

The smallest are dropped. *Mixed growing*: three quarters of the new ones have the largest gradient, one quarter is drawn. They begin at
zero, and so does what the optimizer knows of them. That one step needs the gradient of all weights, and only it: the optimizer's step is
left out.

*Hybrid sparse attention.* In the ultra-sparse phase a query sees the keys within a band, and those at multiples of a stride.

What is saved is counted: 2 n operations for a token in the forward pass, as many for each of the two gradients (that of all weights on a
step of evolution), and attention by the pairs that are kept. The weights that are left out are zeros in a dense matrix, so that **no time
is saved**: no common hardware multiplies such matrices faster.

Two decisions: all moments of new weights are zeroed (in the authors' code only the momentum of SGD, and they train with AdamW); a weight
that is tied to another module's, as a head's to an embedding, is left dense (there it is masked, and the embedding with it). The
breakpoints of the paper's schedule are not in its code; here they are arguments.

Sources: "Mixed Sparsity Training" (arXiv 2408.11746); the shares and the drop fraction: "Rigging the Lottery" (arXiv 1911.11134).
"""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fewstep.errors import UnknownNameError
from fewstep.train.int4 import check_patterns, matches, shared_weights

__all__ = ["GROWTH", "HybridSparseAttention", "MixedSparsity", "SparsitySchedule", "layer_counts"]

GROWTH = {"mixed": 0.75, "gradient": 1.0, "random": 0.0}
"""Name -> the share of the new weights that the gradient chooses. ``"gradient"`` is RigL, ``"random"`` SET."""
MASK, STATE = "sparsity_mask", "sparsity_state"
"""Names of the buffers: of each layer, and of the model."""


@dataclass(frozen=True)
class SparsitySchedule:
    """Sparsity at every step: rises in ``levels`` equal stages, stays at its peak, falls in as many.

    Args:
        warmup: the last step of the warm-up; 0 begins at the peak.
        peak: the highest sparsity.
        restore: the first step of the restoration, and the first that is dense again; None never restores.
        start: the sparsity of the first stage.
        levels: stages of the warm-up, and of the restoration.

    Example:
        >>> schedule = SparsitySchedule(warmup=20, peak=0.9, restore=(80, 90), levels=2)
        >>> [schedule.sparsity(step) for step in (1, 11, 21, 79, 80, 85, 90)]
        [0.0, 0.45, 0.9, 0.9, 0.6, 0.3, 0.0]
    """

    warmup: int
    peak: float
    restore: tuple[int, int] | None
    start: float = 0.0
    levels: int = 4

    def __post_init__(self) -> None:
        if not (0.0 <= self.start <= self.peak < 1.0):
            raise ValueError(f"SparsitySchedule needs 0 <= start <= peak < 1, got start={self.start} and peak={self.peak}.")
        if self.warmup < 0 or self.levels < 1 or not (self.restore is None or self.warmup < self.restore[0] <= self.restore[1]):
            raise ValueError(
                f"SparsitySchedule needs 0 <= warmup < restore[0] <= restore[1] and levels of at least 1, got warmup={self.warmup}, "
                f"restore={self.restore} and levels={self.levels}."
            )

    @functools.cached_property
    def stages(self) -> tuple[tuple[int, float], ...]:
        """(first step, sparsity) of every stage."""
        rise = {
            1 + -(-k * self.warmup // self.levels): self.start + (self.peak - self.start) * k / self.levels
            for k in range(self.levels)
        }
        found = {**(rise if self.warmup else {}), self.warmup + 1: self.peak}
        if self.restore is not None:
            first, dense = self.restore
            fall = [1.0 - (k + 1) / (self.levels + 1) for k in range(self.levels)]
            found |= {first + -(-k * (dense - first) // self.levels): self.peak * share for k, share in enumerate(fall)} | {
                dense: 0.0
            }
        return tuple((step, round(found[step], 12)) for step in sorted(found))

    def sparsity(self, step: int) -> float:
        """At a step, which is 1 or more."""
        return self.stages[self._index(step)][1]

    def stage(self, step: int) -> tuple[int, float]:
        """First step of the stage that a step is in, and of the next (infinite if there is none)."""
        index = self._index(step)
        after = self.stages[index + 1][0] if index + 1 < len(self.stages) else math.inf
        return self.stages[index][0], after

    def _index(self, step: int) -> int:
        return max(sum(first <= step for first, _ in self.stages) - 1, 0)


def layer_counts(shapes: Sequence[tuple[int, int]], sparsity: float) -> list[int]:
    """How many weights each layer keeps: Erdos-Renyi shares, full layers capped, whole numbers with the sum round((1 - s) n).

    Example:
        >>> layer_counts([(100, 100), (100, 300), (4, 4)], 0.9)
        [1329, 2657, 16]
    """
    sizes = [rows * columns for rows, columns in shapes]
    wanted = round((1.0 - sparsity) * sum(sizes))
    full: set[int] = set()
    while True:
        others = [i for i in range(len(shapes)) if i not in full]
        rest = wanted - sum(sizes[i] for i in full)
        epsilon = rest / sum(sum(shapes[i]) for i in others) if others else 0.0
        over = {i for i in others if epsilon * sum(shapes[i]) >= sizes[i]}
        if not over:
            break
        full |= over
    exact = [float(sizes[i]) if i in full else epsilon * sum(shapes[i]) for i in range(len(shapes))]
    counts = [math.floor(share) for share in exact]
    for i in sorted(others, key=lambda i: counts[i] - exact[i])[: wanted - sum(counts)]:
        counts[i] += 1
    return counts


@dataclass(frozen=True)
class HybridSparseAttention:
    """Keys that a query sees: those nearer than ``width``, and those at a distance that ``stride`` divides.

    On images whose tokens run row by row, a stride of one row is the column.

    Args:
        width: of the band: distances 0 to width - 1, to both sides unless attention is causal.
        stride: of the others.
        steps: first step with it and first without; None: from the end of the warm-up to the restoration.

    Example:
        >>> HybridSparseAttention(2, 3).mask(6, causal=True).int()
        tensor([[1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [0, 1, 1, 0, 0, 0],
                [1, 0, 1, 1, 0, 0],
                [0, 1, 0, 1, 1, 0],
                [0, 0, 1, 0, 1, 1]], dtype=torch.int32)
        >>> HybridSparseAttention(2, 3).pairs(6, causal=True)
        14
    """

    width: int = 128
    stride: int = 128
    steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.width < 1 or self.stride < 1:
            raise ValueError(f"HybridSparseAttention needs width and stride of at least 1, got {self.width} and {self.stride}.")

    def active(self, step: int, schedule: SparsitySchedule) -> bool:
        """Whether it holds at a step."""
        end = math.inf if schedule.restore is None else schedule.restore[0]
        first, after = (schedule.warmup + 1, end) if self.steps is None else self.steps
        return first <= step < after

    def mask(self, length: int, *, causal: bool, device: torch.device | None = None) -> Tensor:
        """``Bool[Tensor, "length length"]``, queries first."""
        place = torch.arange(length, device=device)
        distance = place[:, None] - place
        kept = (distance.abs() < self.width) | (distance % self.stride == 0)
        return kept & (distance >= 0) if causal else kept

    def pairs(self, length: int, *, causal: bool) -> int:
        """How many pairs the mask keeps."""
        below = sum(length - d for d in range(1, length) if d < self.width or d % self.stride == 0)
        return length + (below if causal else 2 * below)


class MixedSparsity:
    """Makes the training of a model mixed-sparse, through hooks of its optimizer.

    Masks are buffers of the linear layers, and the number of the step is one of the model, so that a checkpoint of the model has
    everything; what is drawn comes from the seed, the layer's name and the step. Workers that train one model on averaged gradients
    therefore have one topology without exchanging it.

    Args:
        model: any module with `torch.nn.Linear` layers.
        optimizer: the model's optimizer, or what makes one, ``(parameters, lr) -> optimizer``; then hand ``build`` to `fewstep.train.fit`.
        schedule: of the sparsity.
        grow: how new weights are chosen, one of `GROWTH`.
        attention: sparse attention, or None for dense.
        interval: steps between evolutions of the topology.
        drop: share zeta of the weights that an evolution at the beginning of a stage exchanges; 0 keeps a topology as it is.
        skip: names of layers that stay dense, or of modules that hold them, or patterns.
        seed: of everything that is drawn.

    Raises:
        ValueError: for a name in ``skip`` that is none, an optimizer without the model's weights, or one whose states have other shapes.
        UnknownNameError: for another ``grow``.

    Note:
        Attention is reached where the model calls ``torch.nn.functional.scaled_dot_product_attention`` in its forward pass, on as many keys
        as queries, as diffusers' models do with their native backend. Not reached: cross-attention, other backends and kernels,
        `torch.nn.MultiheadAttention`, and what gradient checkpointing computes again. Text and image in one sequence are taken as one.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 16))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> sparse = MixedSparsity(model, optimizer, schedule=SparsitySchedule(0, 0.9, restore=(40, 60)), interval=10)
        >>> for step in range(80):
        ...     optimizer.zero_grad()
        ...     loss = (model(torch.randn(8, 16)) - 1.0).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     if step == 30:
        ...         print(f"{float((model[0].weight != 0).float().mean()):.2f} of the weights")
        0.10 of the weights
        >>> int((model[0].weight == 0).sum()), sparse.counted < 0.5 * sparse.dense
        (0, True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer],
        *,
        schedule: SparsitySchedule,
        grow: str = "mixed",
        attention: HybridSparseAttention | None = None,
        interval: int = 100,
        drop: float = 0.3,
        skip: Iterable[str] = (),
        seed: int = 0,
    ):
        if grow not in GROWTH:
            raise UnknownNameError("way to grow", grow, GROWTH)
        if interval < 1 or not 0.0 <= drop < 1.0:
            raise ValueError(f"MixedSparsity needs an interval of at least 1 and drop in [0, 1), got {interval} and {drop}.")
        self.model, self.schedule, self.attention, self.seed = model, schedule, attention, seed
        self.by_gradient, self.interval, self.drop = GROWTH[grow], interval, drop
        skip = [skip] if isinstance(skip, str) else list(skip)
        self._told = f"{schedule}, {grow}, {attention}, interval {interval}, drop {drop}, skip {skip}, seed {seed}"
        if hasattr(model, STATE):
            raise ValueError(
                f"{type(model).__name__} is trained with mixed sparsity already. Call `remove` of the other MixedSparsity first."
            )
        self.layers = _sparse_layers(model, skip)
        self._known: dict[float, list[int]] = {}
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no linear layer that could be sparse.")
        self.step, self.counted, self.dense = 0, 0, 0
        self._seen = False
        self._modes: list[TorchFunctionMode] = []
        self._make_masks()
        self._handles = [*self._hooks_of_the_model()]
        self.optimizer: torch.optim.Optimizer | None = None
        self._make: Callable[..., torch.optim.Optimizer] | None = None
        if isinstance(optimizer, torch.optim.Optimizer):
            self._attach(optimizer)
        else:
            self._make = optimizer

    def build(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Make the optimizer and train with it: what `fewstep.train.fit` takes as ``optimizer``."""
        if self._make is None:
            raise ValueError(
                "MixedSparsity has its optimizer already. Give it what makes one to use `build`: MixedSparsity(model, AdamW)."
            )
        optimizer = self._make(parameters, lr=lr)
        self._attach(optimizer)
        self._make = None
        return optimizer

    def densities(self) -> dict[str, float]:
        """Name of a layer -> the share of its weights that are in use."""
        return {name: float(mask.float().mean()) for name, mask in zip(self.layers, self._masks(), strict=True)}

    def remove(self) -> nn.Module:
        """Take all hooks and buffers away; the weights stay as they are, zeros included.

        Warns with the share of zeros where the schedule would have restored these weights, but training ended before.
        """
        used = sum(int(mask.sum()) for mask in self._masks()) / sum(mask.numel() for mask in self._masks())
        if self.schedule.restore is not None and used < 1.0:
            warnings.warn(
                f"the model is still sparse: {1.0 - used:.1%} of the weights of {len(self.layers)} layers are 0 after step {self.step}, "
                f"and the schedule is dense from step {self.schedule.restore[1]} on. Train on before `remove`, or keep it as it is.",
                RuntimeWarning,
                stacklevel=2,
            )
        for handle in self._handles:
            handle.remove()
        for layer in self.layers.values():
            delattr(layer, MASK)
        delattr(self.model, STATE)
        if self.optimizer is not None:
            self.optimizer.param_groups[0].pop("mixed_sparsity", None)
        return self.model

    def __str__(self) -> str:
        ratio = f", {self.dense / self.counted:.2f} times fewer" if self.counted else ""
        told = f"step {self.step}, sparsity {self.schedule.sparsity(self.step):.3f} in {len(self.layers)} layers"
        counts = f"counted {self.counted:.4g} floating-point operations of {self.dense:.4g} in dense training"
        return f"{told}; {counts}{ratio}; no time is saved"

    # ---- set-up --------------------------------------------------------------------------------------------------------------------

    def _make_masks(self) -> None:
        """Masks of the first stage, drawn."""
        weight = next(iter(self.layers.values())).weight
        self.model.register_buffer(STATE, torch.zeros(3, dtype=torch.int64, device=weight.device))
        for (name, layer), count in zip(self.layers.items(), self._counts(1), strict=True):
            mask = torch.zeros(layer.weight.numel(), dtype=torch.bool)
            mask[torch.randperm(len(mask), generator=_generator(self.seed, name, 0))[:count]] = True
            layer.register_buffer(MASK, mask.reshape(layer.weight.shape).to(layer.weight.device))
        self._apply_masks()

    def _hooks_of_the_model(self) -> list[Any]:
        """Each does nothing in a copy of the model, which would bring it along."""

        def loaded(module: nn.Module, incompatible: Any) -> None:
            if module is self.model:
                self._read_state()

        def entered(module: nn.Module, inputs: Any) -> None:
            if module is self.model:
                self._modes.append(_Attention(self))
                self._modes[-1].__enter__()

        def left(module: nn.Module, inputs: Any, output: Any) -> None:
            if module is self.model and self._modes:
                self._modes.pop().__exit__(None, None, None)

        handles: list[Any] = [
            self.model.register_load_state_dict_post_hook(loaded),
            self.model.register_forward_pre_hook(entered),
            self.model.register_forward_hook(left, always_call=True),
        ]
        names = {id(layer): name for name, layer in self.layers.items()}
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                handles += [module.register_forward_hook(self._counter(module, names.get(id(module))))]
        masked = [layer.weight.register_hook(functools.partial(self._mask_gradient, name)) for name, layer in self.layers.items()]
        return handles + masked

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, layer in self.layers.items() if id(layer.weight) not in held]
        if missing:
            raise ValueError(
                f"the optimizer does not have the weights of {', '.join(missing[:5])}. Give it model.parameters(), or skip these."
            )
        self.optimizer = optimizer
        optimizer.param_groups[0]["mixed_sparsity"] = self._told  # so that a checkpoint made with other options is refused
        self._handles += [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    # ---- the training step ---------------------------------------------------------------------------------------------------------

    def _before(self, optimizer: torch.optim.Optimizer, arguments: Any, options: Any) -> None:
        """On a step of evolution: evolve, and leave nothing for the optimizer to do."""
        if self.attention is not None and not self._seen:
            raise ValueError(
                "HybridSparseAttention saw no call of torch.nn.functional.scaled_dot_product_attention with as many keys as queries in the "
                "model's forward pass. Use attention=None, or a model (in diffusers: a backend) that calls it."
            )
        changes = self._changes(self.step + 1)
        for name, (dropped, grown) in changes.items():
            self._evolve(name, dropped, grown)
        if changes:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, arguments: Any, options: Any) -> None:
        self._apply_masks()
        self.step += 1
        counts = torch.tensor([self.counted, self.dense], dtype=torch.float64).view(
            torch.int64
        )  # bits: averages leave whole numbers alone
        state = getattr(self.model, STATE)
        state.copy_(torch.cat([torch.tensor([self.step]), counts]).to(state.device))

    def _read_state(self) -> None:
        state = getattr(self.model, STATE).cpu()
        self.step = int(state[0])
        self.counted, self.dense = (int(value) for value in state[1:].contiguous().view(torch.float64).tolist())
        self._apply_masks()

    def _changes(self, step: int) -> dict[str, tuple[int, int]]:
        """Name -> how many weights a layer drops and grows at a step. Empty: no step of evolution."""
        first, after = self.schedule.stage(step)
        due = step > 1 and (step - first) % self.interval == 0
        if not due:
            return {}
        share = 0.5 * self.drop * (1.0 + math.cos(math.pi * (step - first) / (after - first)))
        sizes = [layer.weight.numel() for layer in self.layers.values()]
        found = {}
        for name, now, wanted, size in zip(self.layers, self._counts(step - 1), self._counts(step), sizes, strict=True):
            dropped = 0 if wanted == size else max(int(share * now), now - wanted)
            if dropped or wanted > now:
                found[name] = dropped, dropped - now + wanted
        return found

    def _counts(self, step: int) -> list[int]:
        """Weights of every layer after a step."""
        sparsity = self.schedule.sparsity(step)
        if sparsity not in self._known:
            self._known[sparsity] = layer_counts(
                [(layer.out_features, layer.in_features) for layer in self.layers.values()], sparsity
            )
        return self._known[sparsity]

    @torch.no_grad()
    def _evolve(self, name: str, dropped: int, grown: int) -> None:
        """Drop the smallest, grow others at zero."""
        layer = self.layers[name]
        mask, weight, gradient = getattr(layer, MASK), layer.weight, layer.weight.grad
        kept = mask.flatten().clone()
        kept[weight.abs().flatten().masked_fill(~kept, math.inf).topk(dropped, largest=False).indices] = False
        new = kept.clone()
        if gradient is not None:
            best = gradient.abs().flatten().masked_fill(kept, -1.0).topk(round(self.by_gradient * grown)).indices
            new[best] = True
            grown -= len(best)
        free = (~new).nonzero()[:, 0]
        drawn = torch.randperm(len(free), generator=_generator(self.seed, name, self.step + 1))[:grown]
        new[free[drawn.to(free.device)]] = True
        mask.copy_(new.reshape(mask.shape))
        survived = kept.reshape(mask.shape)
        weight.mul_(survived)
        assert self.optimizer is not None
        for key, value in self.optimizer.state.get(weight, {}).items():
            if not isinstance(value, Tensor) or value.numel() == 1:
                continue
            if value.shape != weight.shape:
                raise ValueError(
                    f"{key} of the optimizer has the shape {tuple(value.shape)}, not that of its weight {tuple(weight.shape)}."
                )
            value.mul_(survived)

    def _mask_gradient(self, name: str, gradient: Tensor) -> Tensor:
        """Dense on steps of evolution, which need it."""
        return gradient if self._changes(self.step + 1) else gradient * getattr(self.layers[name], MASK)

    @torch.no_grad()
    def _apply_masks(self) -> None:
        for layer, mask in zip(self.layers.values(), self._masks(), strict=True):
            layer.weight.mul_(mask)

    def _masks(self) -> list[Tensor]:
        return [getattr(layer, MASK) for layer in self.layers.values()]

    # ---- counting ------------------------------------------------------------------------------------------------------------------

    def _counter(self, counted: nn.Linear, name: str | None) -> Callable[..., None]:
        size = counted.in_features * counted.out_features
        place = None if name is None else list(self.layers).index(name)

        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if module is not counted or not torch.is_grad_enabled():
                return
            tokens = output.numel() // counted.out_features
            used = size if place is None else self._counts(self.step)[place]
            of_weight = size if self._changes(self.step + 1) else used
            self.counted += 2 * tokens * (2 * used + of_weight)
            self.dense += 2 * tokens * 3 * size

        return count

    def attend(
        self, attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
    ) -> Tensor:
        """Attention, sparse where it is to be, and counted."""
        told = dict(zip(("attn_mask", "dropout_p", "is_causal"), arguments, strict=False)) | options
        queries, keys, causal = query.shape[-2], key.shape[-2], bool(told.get("is_causal"))
        pairs = kept = sum(min(i + 1, keys) for i in range(queries)) if causal else queries * keys
        if self.attention is not None and queries == keys:
            self._seen = True
            if self.attention.active(self.step + 1, self.schedule):
                kept = self.attention.pairs(queries, causal=causal)
                mask = self.attention.mask(queries, causal=causal, device=query.device)
                told |= {"attn_mask": _both(mask, told.get("attn_mask")), "is_causal": False}
        if torch.is_grad_enabled():
            each = 3 * 2 * query.shape[:-2].numel() * (query.shape[-1] + value.shape[-1])
            self.counted += each * kept
            self.dense += each * pairs
        return attention(query, key, value, **told)


class _Attention(TorchFunctionMode):
    """While it is entered, calls of scaled dot-product attention go through `MixedSparsity.attend`."""

    def __init__(self, sparse: MixedSparsity):
        super().__init__()
        self.sparse = sparse

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self.sparse.attend(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _both(kept: Tensor, given: Tensor | None) -> Tensor:
    """A mask and the caller's; where they leave a query nothing, the caller's alone."""
    if given is None:
        return kept
    allowed = given if given.dtype == torch.bool else given > -math.inf
    kept = torch.where((kept & allowed).any(-1, keepdim=True), kept, True)
    return kept & given if given.dtype == torch.bool else given.masked_fill(~kept, -math.inf)


def _sparse_layers(model: nn.Module, skip: list[str]) -> dict[str, nn.Linear]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    check_patterns(skip, list(found))
    tied = shared_weights(model)
    return {
        name: layer
        for name, layer in found.items()
        if layer.weight.requires_grad and id(layer.weight) not in tied and not matches(name, skip)
    }


def _generator(seed: int, name: str, step: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} topology {name} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
