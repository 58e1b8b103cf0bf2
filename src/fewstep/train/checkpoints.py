"""Checkpoints of a training run: any nested state, in one file that is whole or not there.

A state is a tree of dicts, lists and tuples whose leaves are tensors of any dtype, numbers, texts, bools and None: what state dicts of
modules and optimizers are, however nested. The tensors lie in the safetensors file, the tree with the names of its tensors in the header,
beside a checksum over both; reading gives the tree back to the bit. The file is written to another name, synced and renamed. Never
pickle.

Processes whose states differ (each trains weights of its own between the rounds of Local SGD; batch normalisation) write a file each,
``checkpoint-STEP-of-RANK.safetensors``, before the first process renames ``checkpoint.safetensors``, which names their step; older ones are
deleted only then. Processes of equal states, the usual case, have one file for all.

`restore_optimizer` is needed because ``torch.optim.Optimizer.load_state_dict`` turns every tensor of the state into the dtype of its
parameter: codes of 4 or 8 bits would come back as floating-point numbers, and float32 moments of bfloat16 weights rounded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.artefacts import write_atomically
from fewstep.errors import ArtefactError

__all__ = ["CHECKPOINT", "read_checkpoint", "restore_optimizer", "same_state", "whole", "write_checkpoint"]

CHECKPOINT = "checkpoint.safetensors"
FORMAT = 2
"""Format of the checkpoints."""
HOW_AFRESH = "start afresh (resume=False; for commands --afresh or --fresh)"
"""How messages say it to those who call a function and to those who give a command."""
AFRESH = f"Delete it, or {HOW_AFRESH}."


def rank_file(folder: Path, step: int, rank: int) -> Path:
    """The file of one process whose state is its own."""
    return folder / f"checkpoint-{step}-of-{rank}.safetensors"


def earlier_file(folder: Path, step: int) -> Path:
    """The file of a checkpoint that is no longer the newest, which workers of Local SGD keep."""
    return folder / f"checkpoint-{step}.safetensors"


def earlier_files(folder: Path) -> dict[int, Path]:
    """Step -> such files."""
    found = {file.stem.removeprefix("checkpoint-"): file for file in folder.glob("checkpoint-*.safetensors")}
    return {int(step): file for step, file in found.items() if step.isdigit()}


# ---- trees -------------------------------------------------------------------------------------------------------------------------


def pack(tree: Any, path: str = "", tensors: dict[str, Tensor] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """A tree as JSON values, and its tensors by the names that stand in it.

    Raises:
        TypeError: for a leaf that is neither a tensor nor JSON, with where it is.

    Example:
        >>> document, tensors = pack({"a": (1, torch.zeros(2))})
        >>> document, list(tensors)
        ({'dict': [['a', {'tuple': [1, {'tensor': 'a/1'}]}]]}, ['a/1'])
        >>> unpack(document, tensors)
        {'a': (1, tensor([0., 0.]))}
    """
    tensors = {} if tensors is None else tensors
    if isinstance(tree, Tensor):
        name = path or "value"
        if name in tensors:
            raise TypeError(f"the state has two tensors called {name}.")
        tensors[name] = tree
        return ({"tensor": name, "sharded": True} if is_sharded(tree) else {"tensor": name}), tensors

    def below(key: Any, value: Any) -> Any:
        return pack(value, f"{path}/{key}" if path else str(key), tensors)[0]

    if isinstance(tree, Mapping):
        if not all(isinstance(key, (str, int)) for key in tree):
            raise TypeError(f"the state at {path or 'its top'} has keys that are neither text nor whole numbers: {list(tree)[:3]}.")
        return {"dict": [[key, below(key, value)] for key, value in tree.items()]}, tensors
    if isinstance(tree, (list, tuple)):
        return {"tuple" if isinstance(tree, tuple) else "list": [below(i, value) for i, value in enumerate(tree)]}, tensors
    if tree is None or type(tree) in (bool, int, float, str):
        return tree, tensors
    raise TypeError(
        f"the state has a {type(tree).__name__} at {path}, which a checkpoint cannot hold: tensors, numbers, texts, None, and dicts, lists "
        "and tuples of them."
    )


def unpack(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`; what was sharded is whole, and an instance of `WasSharded`."""
    if not isinstance(document, dict):
        return document
    ((kind, content), *marks) = document.items()
    if kind == "tensor":
        return WasSharded(tensors[content]) if marks else tensors[content]
    if kind == "dict":
        return {key: unpack(value, tensors) for key, value in content}
    values = [unpack(value, tensors) for value in content]
    return tuple(values) if kind == "tuple" else values


class WasSharded:
    """A whole tensor that was spread over processes when it was saved."""

    def __init__(self, value: Tensor):
        self.value = value

    def like(self, other: Any) -> Tensor:
        """Spread as a tensor (a parameter) of this run is; whole if that is not spread."""
        return like(self.value, other)


def is_sharded(value: Any) -> bool:
    """Whether a tensor is spread over processes, as those of FSDP are."""
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """A tensor that is spread over processes, put together; all processes must ask. Others as they are."""
    return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]


def like(value: Tensor, other: Any) -> Tensor:
    """A whole tensor spread over the processes as another one is, and on its device."""
    if not is_sharded(other):
        return value.to(other.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


# ---- files -------------------------------------------------------------------------------------------------------------------------


def frozen(tree: Any) -> tuple[str, dict[str, Tensor]]:
    """A state as text and tensors on the CPU, which later steps do not change. All processes must ask if tensors are spread over them."""
    document, tensors = pack(tree)
    arrays = {name: whole(value.detach()).cpu().contiguous().clone() for name, value in tensors.items()}
    return json.dumps(document), arrays


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a frozen state."""
    hasher = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        hasher.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        hasher.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def write_checkpoint(path: Path, values: Mapping[str, Any], text: str, tensors: dict[str, Tensor]) -> None:
    """Write one file with a checksum, under another name first, then renamed.

    Args:
        path: the file.
        values: JSON values that say what the state belongs to.
        text, tensors: the state, as `frozen` gives it.
    """
    from safetensors.torch import save

    about = json.dumps(dict(values), sort_keys=True)
    header = {"format": str(FORMAT), "checkpoint": about, "state": text, "sha256": digest(about + text, tensors)}
    write_atomically(path, save(tensors, metadata=header))


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Any]:
    """Read what `write_checkpoint` wrote: its values, and the state as a tree.

    Raises:
        ArtefactError: if it is truncated, damaged or foreign.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ArtefactError(f"{path} is damaged: {error}. {AFRESH}") from error
    if header.get("format") == "1":
        raise ArtefactError(f"{path} was written by an older fewstep, with which the run can be finished. {AFRESH}")
    about, text = header.get("checkpoint", ""), header.get("state", "")
    if header.get("format") != str(FORMAT) or header.get("sha256") != digest(about + text, tensors):
        raise ArtefactError(f"{path} is damaged or no checkpoint of this version. {AFRESH}")
    return json.loads(about), unpack(json.loads(text), tensors)


# ---- optimizers --------------------------------------------------------------------------------------------------------------------


def restore_optimizer(optimizer: Any, saved: Any) -> None:
    """Load the state of an optimizer and make sure that it is the saved one to the bit, dtypes included; entries may be added by it, as
    PyTorch adds options that an optimizer does not name.

    Args:
        optimizer: anything with ``state_dict`` and ``load_state_dict``, also one that wraps another.
        saved: what its ``state_dict`` gave.

    Raises:
        ArtefactError: if afterwards its ``state_dict`` is another.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = _spread(saved, parameters)
    optimizer.load_state_dict(_copied(saved))  # which may keep what it is given
    _put_back(optimizer.state_dict(), saved)
    if not _covers(optimizer.state_dict(), saved):
        raise ArtefactError(
            f"{type(optimizer).__name__} does not give back the state that it was given: load_state_dict, then state_dict, differ in more "
            "than the dtypes of tensors. A run with it cannot be continued exactly; "
            f"{HOW_AFRESH}."
        )


def _spread(tree: Any, parameters: list[Any], index: int | None = None) -> Any:
    """Tensors that were spread over processes, spread again as the parameter with their number is."""
    if isinstance(tree, WasSharded):
        return tree.value if index is None else tree.like(parameters[index])
    if isinstance(tree, dict):
        return {key: _spread(value, parameters, key if isinstance(key, int) else index) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_spread(value, parameters, index) for value in tree)
    return tree


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_copied(value) for value in tree)
    return tree.clone() if isinstance(tree, Tensor) else tree


def _put_back(live: Any, saved: Any) -> None:
    """Replace leaves of a live state, where the containers are the optimizer's own, that came back as something else."""
    pairs: Iterator[tuple[Any, Any]]
    if isinstance(live, dict) and isinstance(saved, Mapping):
        pairs = ((key, value) for key, value in saved.items() if key in live)
    elif isinstance(live, list) and isinstance(saved, list):
        pairs = iter(enumerate(saved[: len(live)]))
    else:
        return
    for key, value in pairs:
        if isinstance(value, (dict, list)) and isinstance(live[key], (dict, list)):
            _put_back(live[key], value)
        elif not same_state(live[key], value):
            device = live[key].device if isinstance(live[key], Tensor) else None
            live[key] = value.to(device) if isinstance(value, Tensor) and device is not None else _copied(value)


def _covers(live: Any, saved: Any) -> bool:
    """Whether a state has everything of a saved one."""
    if isinstance(live, Mapping) and isinstance(saved, Mapping):
        return all(key in live and _covers(live[key], value) for key, value in saved.items())
    if isinstance(live, (list, tuple)) and type(live) is type(saved) and len(live) == len(saved):
        return all(_covers(a, b) for a, b in zip(live, saved, strict=True))
    return same_state(live, saved)


def same_state(first: Any, second: Any) -> bool:
    """Whether two states are equal to the bit, types included; devices do not count.

    Example:
        >>> same_state({"a": [1, torch.ones(2)]}, {"a": [1, torch.ones(2)]}), same_state((1,), [1]), same_state(1, 1.0)
        (True, False, False)
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype is second.dtype and first.shape == second.shape and _same_bits(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same_state(first[key], second[key]) for key in first)
    if type(first) is not type(second):
        return False
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same_state(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second or (first != first and second != second))  # NaN is the same as NaN here


def _same_bits(first: Tensor, second: Tensor) -> bool:
    first, second = (value.to_local() if is_sharded(value) else value for value in (first, second))  # type: ignore[attr-defined]
    first, second = (value.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for value in (first, second))
    return torch.equal(first, second)
