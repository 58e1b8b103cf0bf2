r"""Sub-networks: which residual blocks a network leaves out at which call, and a denoiser that does so, without a change of the model.

A residual block is $h \mapsto h + F(h)$, perhaps divided by a number; left out, it is $h \mapsto h$ and F is not computed. Blocks are
modules of the network, known by their names. While a denoiser of a sub-network runs, the ``forward`` of these modules is replaced by one
that hands its input back; what is left out is kept for each thread, so other threads may use the same network, whole or with other blocks
left out, at the same time, and when the last of them has gone the modules are as they were.

What is residual is found in the graph of automatic differentiation of one traced call: from the output there is a way to the input through
at least one addition and nothing but additions, factors and changes of shape.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fewstep.artefacts import Artefact, frozen_json, json_value, read_as
from fewstep.denoisers import innermost
from fewstep.errors import FewstepError, PlanError
from fewstep.identity import identity
from fewstep.plan import Plan

__all__ = ["LayerSkips", "Skipping", "network_of", "skippable", "without"]

KIND = "layer-skips"
ADDITIONS = {"Add", "Sub", "Addcmul"}
PASSING = {"View", "ReshapeAlias", "UnsafeView", "Alias", "Clone", "ToCopy", "Permute", "Transpose", "Unsqueeze", "Squeeze"}
SCALINGS = {"Mul", "Div"}
"""Names of nodes of the graph, without what follows: ``AddBackward0``."""


@dataclass(frozen=True, eq=False)
class LayerSkips:
    """What a network leaves out, for one model and one plan.

    Args:
        blocks: ``K`` names of modules of the network that may be left out.
        times: ``"U"``: the times at which the plan calls the network, each once, in the order of the calls.
        table: bool ``"U K"``: whether a block is left out at the call, or calls, of a time.
        model: of what model, see `fewstep.identity.identity`.
        plan: digest of the plan.
        calls: number of calls of the plan.
        report: JSON values: how it was found and what was measured.

    Raises:
        ValueError: if the shapes do not fit, or a time or a name is there twice.

    Example:
        >>> skips = LayerSkips(("a", "b"), [1.0, 0.5], [[True, False], [False, False]], {}, "0" * 64, 2)
        >>> skips.skips, skips.share
        ((('a',), ()), 0.25)
    """

    blocks: tuple[str, ...]
    times: NDArray[np.float64]
    table: NDArray[np.bool_]
    model: Mapping[str, Any]
    plan: str
    calls: int
    report: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        for name, kind in (("times", np.float64), ("table", np.bool_)):
            array = np.array(getattr(self, name), kind)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        for name in ("model", "report"):
            object.__setattr__(self, name, frozen_json(getattr(self, name)))
        if self.times.ndim != 1 or self.table.shape != (len(self.times), len(self.blocks)):
            raise ValueError(
                f"{len(self.blocks)} blocks and times {self.times.shape} need a table of their sizes, got {self.table.shape}."
            )
        if len(set(self.times.tolist())) < len(self.times) or len(set(self.blocks)) < len(self.blocks):
            raise ValueError("a time or a block is there twice.")

    @property
    def skips(self) -> tuple[tuple[str, ...], ...]:
        """For every time the names of what is left out."""
        return tuple(tuple(name for name, out in zip(self.blocks, row, strict=True) if out) for row in self.table)

    @property
    def share(self) -> float:
        """Of all blocks at all times, so many are left out."""
        return float(self.table.mean())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return self._artefact().digest()

    def check_model(self, denoiser: object) -> None:
        """Refuse another model or guidance; what has no fingerprint is not refused.

        Raises:
            PlanError: names both.
        """
        mine, found = json_value(self.model), json_value(identity(denoiser))
        known = [each.get("fingerprint") for each in (mine, found)]
        if mine.get("guidance") != found["guidance"] or (None not in known and known[0] != known[1]):
            raise PlanError(f"these skips were found for {_told(mine)}, but the denoiser is {_told(found)}: search them anew.")

    def check_plan(self, plan: Plan) -> None:
        """Refuse another plan.

        Raises:
            PlanError: names both, and their numbers of calls.
        """
        if plan.digest != self.plan:
            raise PlanError(
                f"these skips were found for the plan {self.plan[:12]} of {self.calls} calls, but this is {plan.digest[:12]} of "
                f"{plan.nfe} calls: search them anew."
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Write them to one ``.safetensors`` file with a checksum."""
        self._artefact().save(path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LayerSkips:
        """Read what `save` wrote.

        Raises:
            ArtefactError: if the file is damaged or holds something else.
        """

        def unpack(artefact: Artefact) -> LayerSkips:
            meta, tensors = artefact.meta, artefact.tensors
            told = (meta[name] for name in ("model", "plan", "calls", "report"))
            return cls(tuple(meta["blocks"]), tensors["times"], tensors["table"], *told)

        return read_as(path, kind=KIND, what="skips of layers", unpack=unpack, pack=lambda value: value._artefact())

    def _artefact(self) -> Artefact:
        meta = {name: json_value(getattr(self, name)) for name in ("blocks", "model", "plan", "calls", "report")}
        return Artefact(KIND, meta, {"times": self.times, "table": self.table})


def _told(model: Mapping[str, Any]) -> str:
    mark = "" if model.get("fingerprint") is None else f" ({model['fingerprint'][:12]})"
    guidance = "" if model.get("guidance") is None else f" with guidance {model['guidance']}"
    return f"{model.get('name', 'a model')}{mark}{guidance}"


class Skipping:
    """A denoiser that leaves blocks of its network out, at every call those that were found for it.

    Under guidance, wrap the guided denoiser: both predictions of a pair leave out the same.

    Args:
        denoiser: ``D(x, t, **cond)``, at whose core is a `fewstep.Denoiser` of a ``torch.nn.Module``.
        skips: what is left out; the call is known by its time. `fewstep.sample` also compares the plan.

    Raises:
        PlanError: if the skips are those of another model or guidance; when called, at a time that the plan does not have.
        FewstepError: if there is no module at the core.

    Example:
        >>> import fewstep as fs
        >>> denoiser, noise = fs.load("digits"), fs.draw_noise((1, 8, 8), range(2))
        >>> plan = fs.make_plan("auto", denoiser.schedule, 2)
        >>> table = [[True], [False]]
        >>> skips = LayerSkips(("bottom.blocks.1",), plan.tau, table, identity(denoiser), plan.digest, 2)
        >>> fs.sample(Skipping(denoiser, skips), noise, plan).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, denoiser: Callable[..., Tensor], skips: LayerSkips):
        skips.check_model(denoiser)
        modules = dict(network_of(denoiser).named_modules())
        self.denoiser, self.skips = denoiser, skips
        self.schedule = denoiser.schedule  # type: ignore[attr-defined]
        self.info = getattr(denoiser, "info", None)
        self.check_plan = skips.check_plan
        self._out = {
            t: tuple(_module(modules, name) for name in names) for t, names in zip(skips.times.tolist(), skips.skips, strict=True)
        }

    def __repr__(self) -> str:
        return f"Skipping({self.denoiser!r}, {100 * self.skips.share:.0f} % of {len(self.skips.blocks)} blocks)"

    @property
    def calls(self) -> int:
        """Of the denoiser."""
        return self.denoiser.calls  # type: ignore[attr-defined]

    def __call__(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        """The data prediction ``"batch *shape"`` of the sub-network for the call at time t, one number."""
        out = self._out.get(float(t)) if np.ndim(t) == 0 else None
        if out is None:
            times = ", ".join(f"{time:.6g}" for time in self._out)
            raise PlanError(
                f"these skips were found for a plan of {self.skips.calls} calls at {times}, but the network is called at {t!r:.40}."
            )
        with without(out):
            return self.denoiser(x, t, **cond)


def network_of(denoiser: object) -> nn.Module:
    """The module at the core of a denoiser.

    Raises:
        FewstepError: if there is none.

    Example:
        >>> import fewstep as fs
        >>> network_of(fs.load("digits")).__class__.__name__
        'SmallUNet'
    """
    network = innermost(denoiser, "network")
    if not isinstance(network, nn.Module):
        raise FewstepError("blocks can be left out of a torch.nn.Module only: wrap the module itself in fewstep.Denoiser.")
    return network


def _module(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name not in modules or not name:
        raise ValueError(f"the network has no module {name!r}; see its named_modules().")
    return modules[name]


# ---- leaving out -------------------------------------------------------------------------------------------------------------------

_out: ContextVar[frozenset[int]] = ContextVar("left out", default=frozenset())
_detours: dict[int, _Detour] = {}
_lock = threading.Lock()


class _Detour:
    """What stands in for the ``forward`` of a module as long as somebody may leave it out."""

    def __init__(self, module: nn.Module):
        self.users, self.own, forward = 0, module.__dict__.get("forward"), module.forward

        def detour(*args: Any, **kwargs: Any) -> Any:
            return _first(args, kwargs) if id(module) in _out.get() else forward(*args, **kwargs)

        self.detour = detour

    def remove(self, module: nn.Module) -> None:
        if module.__dict__.get("forward") is not self.detour:
            return
        if self.own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = self.own


@contextlib.contextmanager
def without(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, and in this thread, these modules hand their first tensor back instead of being computed.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> with without([layer]):
        ...     layer(torch.tensor([3.0])).item()
        3.0
        >>> "forward" in layer.__dict__
        False
    """
    modules = tuple(modules)
    with _lock:
        for module in modules:
            if id(module) not in _detours:
                _detours[id(module)] = _Detour(module)
                module.__dict__["forward"] = _detours[id(module)].detour
            _detours[id(module)].users += 1
    token = _out.set(_out.get() | {id(module) for module in modules})
    try:
        yield
    finally:
        _out.reset(token)
        with _lock:
            for module in modules:
                _detours[id(module)].users -= 1
                if not _detours[id(module)].users:
                    _detours.pop(id(module)).remove(module)


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The first floating-point tensor among the arguments."""
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()), None)


# ---- what can be left out ----------------------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """A module's first call: the shapes of its input and output, and whether it is residual."""

    shapes: tuple[tuple[int, ...], tuple[int, ...] | None]
    residual: bool


def skippable(
    denoiser: Callable[..., Tensor],
    noise: Tensor,
    cond: Mapping[str, Any] | None = None,
    *,
    blocks: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """The residual blocks of a network: modules whose output has their input's shape and is the input plus something, and that hold no
    smaller one. Found by one traced call, on the first sample.

    Args:
        denoiser: ``D(x, t, **cond)``, at whose core is a ``torch.nn.Module``.
        noise: ``"batch *shape"``.
        cond: its conditions.
        blocks: check these names instead: any modules that keep the shape.

    Returns:
        names of modules of the network, in the order of the calls.

    Raises:
        ValueError: for a name that is no module of the network, or one that is not called or changes the shape.
        FewstepError: if no residual block is found, or there is no module.

    Example:
        >>> import fewstep as fs
        >>> found = skippable(fs.load("digits"), fs.draw_noise((1, 8, 8), range(1)))
        >>> found[:3]
        ('down.0.blocks.0', 'down.0.blocks.1', 'bottom.blocks.0')
    """
    from fewstep.tuners.paths import take_rows

    network = network_of(denoiser)
    seen = _trace(network, lambda: _one_call(denoiser, noise[:1], take_rows(cond or {}, slice(1))))
    if blocks is not None:
        for name in blocks:
            _module(dict(network.named_modules()), name)
            told = seen.get(name)
            if told is None or told.shapes[0] != told.shapes[1]:
                shapes = "is not called" if told is None else f"takes {told.shapes[0]} and returns {told.shapes[1]}"
                raise ValueError(f"{name!r} cannot be left out: it {shapes}.")
        return tuple(blocks)
    residual = [name for name, told in seen.items() if told.residual]
    found = tuple(name for name in residual if not any(other.startswith(f"{name}.") for other in residual) and name)
    if not found:
        raise FewstepError("no residual blocks were found in the network: name those that may be left out in blocks=.")
    return found


def _one_call(denoiser: Callable[..., Tensor], noise: Tensor, cond: Mapping[str, Any]) -> None:
    schedule = denoiser.schedule  # type: ignore[attr-defined]
    denoiser(noise, 0.5 * (schedule.t_start + schedule.t_end), **cond)


def _trace(network: nn.Module, call: Callable[[], None]) -> dict[str, _Seen]:
    """What every module does at its first call, by name, in the order of the calls."""
    names = {module: name for name, module in network.named_modules()}
    begun: dict[str, tuple[Tensor, Any]] = {}
    seen: dict[str, _Seen] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        h = _first(args, kwargs)
        if h is None or names[module] in begun:
            return None
        marked = (h if h.requires_grad else h.detach().requires_grad_() * 1.0).view_as(h)
        begun[names[module]] = (marked, marked.grad_fn)
        return (
            tuple(marked if value is h else value for value in args),
            {name: marked if value is h else value for name, value in kwargs.items()},
        )

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = names[module]
        if name in begun and name not in seen:
            whole = isinstance(output, Tensor)
            same = whole and output.shape == begun[name][0].shape
            residual = same and _is_added(output.grad_fn, begun[name][1])
            seen[name] = _Seen((tuple(begun[name][0].shape), tuple(output.shape) if whole else None), bool(residual))

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in names]
    handles += [module.register_forward_hook(after, with_kwargs=True) for module in names]
    try:
        with torch.enable_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen[name] for name in begun if name in seen}


def _is_added(node: Any, wanted: Any) -> bool:
    """Whether a way leads from a node of the graph to another through an addition and nothing that is not linear."""
    left, known = [(node, False)], set()
    while left:
        node, added = left.pop()
        if node is None or (node, added) in known:
            continue
        if node is wanted:
            if added:
                return True
            continue
        known.add((node, added))
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        name = type(node).__name__.partition("Backward")[0].lstrip("_")
        if name in ADDITIONS:
            left += [(parent, True) for parent in parents]
        elif name in PASSING or (name in SCALINGS and len(parents) == 1):
            left += [(parent, added) for parent in parents]
    return False
