"""Which model is this? A digest of its weights and its guidance, so that what was computed for one model is not used with another."""

from __future__ import annotations

import hashlib
import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.artefacts import json_value
from fewstep.errors import PlanError

__all__ = ["check_identity", "digest_of", "identity"]

MOST_ELEMENTS = 1 << 16
"""Of a tensor of weights so many elements are read, evenly spread: a digest of billions would take minutes."""

TUNE_ANEW = "tune it anew, or use an untuned plan."
PROBES = 16
"""Numbers of a tensor that are looked at to see whether it has changed."""

_known: weakref.WeakKeyDictionary[torch.nn.Module, tuple[tuple[object, ...], str]] = weakref.WeakKeyDictionary()


def identity(denoiser: object, nfe: int | None = None) -> dict[str, Any]:
    """What tells this model from others, as JSON values.

    Args:
        denoiser: a `fewstep.Denoiser`, a guided one, an exact one, or any callable.
        nfe: number of calls of the run, for what has ``denoisers``, another one for every number.

    Returns:
        ``name``, ``fingerprint`` (None if the model has no weights and no fingerprint of its own), ``predicts`` (what the network's output
        is taken for, None for other denoisers), ``guidance`` (None for none, and for scale 1, which is none) and ``limits`` (of the
        prediction, None for none).

    Example:
        >>> from fewstep.exact import Gaussian
        >>> from fewstep.schedules import Flow
        >>> identity(Gaussian(Flow(), [0.0], 1.0)) == identity(Gaussian(Flow(), [0.0], 2.0))
        False
    """
    guidance, limits, inner = [], [], denoiser
    while True:
        settings = _own(inner, "guidance")
        if settings is not None and settings.get("guidance_scale") != 1.0:
            guidance.append(settings)
        if (limit := _own(inner, "limits")) is not None:
            limits.append(limit)
        if not hasattr(inner, "denoiser"):
            break
        each = _own(inner, "denoisers")
        inner = each[nfe] if isinstance(each, Mapping) and nfe in each else inner.denoiser  # type: ignore[attr-defined]
    name = getattr(getattr(inner, "info", None), "name", type(inner).__name__)
    reading = getattr(inner, "predicts", None)
    known = {"name": name, "fingerprint": _fingerprint(inner), "predicts": reading}
    return {**known, "guidance": _single(guidance), "limits": _single(limits)}


def _own(denoiser: object, name: str) -> Any:
    """An attribute of a denoiser, but not that of one within."""
    return getattr(denoiser, name, None) if inspect.getattr_static(denoiser, name, None) is not None else None


def _single(found: list[Any]) -> Any:
    """None for none, one for one."""
    return found[0] if len(found) == 1 else found or None


def check_identity(made_for: Mapping[str, Any], denoiser: object, nfe: int | None = None) -> None:
    """Refuse a model or a guidance that something was not made for. What has no fingerprint is not refused.

    Args:
        made_for: what `identity` said then.
        denoiser, nfe: of `identity`, now.

    Raises:
        PlanError: names both.
    """
    found = identity(denoiser, nfe)
    wanted, given = made_for["fingerprint"], found["fingerprint"]
    if wanted is not None and given is not None and wanted != given:
        raise PlanError(
            f"this plan was tuned for the model {made_for['name']} ({wanted[:12]}), but the denoiser is {found['name']} ({given[:12]}): "
            f"{TUNE_ANEW}"
        )
    mine, theirs = (json_value(told["guidance"]) for told in (made_for, found))
    if mine != theirs:
        before, now = _told(mine), _told(theirs)
        now = "another null condition, such as a negative prompt" if now == before else now
        raise PlanError(f"this plan was tuned for {before}, but the denoiser has {now}: {TUNE_ANEW}")
    limits = made_for.get("limits")
    if json_value(limits) != json_value(found["limits"]):
        raise PlanError(
            f"this plan was tuned for {_told_limits(limits)}, but the denoiser has {_told_limits(found['limits'])}: {TUNE_ANEW}"
        )
    read, reads = made_for.get("predicts"), found["predicts"]
    if read is not None and reads is not None and read != reads:
        raise PlanError(f"this plan was tuned for a network that predicts {read}, but the denoiser takes it to predict {reads}.")


def _told(guidance: Any) -> str:
    if guidance is None:
        return "no guidance"
    if isinstance(guidance, Mapping) and "guidance_scale" in guidance:
        where = "" if guidance.get("interval") is None else f" within {list(guidance['interval'])}"
        return f"{guidance.get('kind', '')} guidance of scale {guidance['guidance_scale']:g}{where}".strip()
    return f"guidance {guidance}"


def _told_limits(limits: Any) -> str:
    return "no limits of its prediction" if limits is None else f"its prediction limited ({limits})"


def _fingerprint(inner: object) -> str | None:
    given = getattr(getattr(inner, "info", None), "fingerprint", None) or getattr(inner, "fingerprint", None)
    if given is not None:
        return str(given)
    network = getattr(inner, "network", None)
    return _digest(network) if isinstance(network, torch.nn.Module) else None


def _digest(network: torch.nn.Module) -> str | None:
    """A SHA-256 over names, shapes and numbers of the weights, remembered until they change."""
    tensors = dict(network.state_dict(keep_vars=True))
    if not tensors:
        return None
    versions = _versions(tensors)
    known = _known.get(network)
    if known is not None and known[0] == versions:
        return known[1]
    digest = digest_of({name: value for name, value in tensors.items() if isinstance(value, Tensor)})
    _known[network] = (versions, digest)
    return digest


def _versions(tensors: Mapping[str, object]) -> tuple[object, ...]:
    """What changes with the weights: versions and addresses, and a few numbers, as writing to ``.data`` changes neither."""
    known = [value.detach() for value in tensors.values() if isinstance(value, Tensor) and value.numel()]
    probes = [value.reshape(-1)[:: max(1, value.numel() // PROBES)][:PROBES].double().sum() for value in known]
    return (*((value._version, value.data_ptr()) for value in known), *(torch.stack(probes).tolist() if probes else ()))


def digest_of(tensors: dict[str, Tensor]) -> str:
    """A SHA-256 over names, shapes and evenly spread numbers of tensors."""
    hasher = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        flat = value.detach().reshape(-1)
        picked = flat[:: max(1, -(-flat.numel() // MOST_ELEMENTS))].cpu()
        hasher.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        hasher.update(np.ascontiguousarray(picked.double().numpy()).tobytes())
    return hasher.hexdigest()
