"""The folder of a student: the names of its files, how it is read, and how a new one takes the place of an old one."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep.adapt.lora import FILE, load_adapter
from fewstep.adapt.trained import in_single_precision
from fewstep.distill.student_network import WRAPPERS, AdaptedNetwork
from fewstep.errors import ArtefactError
from fewstep.identity import identity
from fewstep.loading import STUDENT_CARD

__all__ = [
    "CARD",
    "FORMAT",
    "PROBE",
    "README",
    "SCHEDULER",
    "WEIGHTS",
    "check_base",
    "move",
    "read_card",
    "read_network",
    "read_tensors",
]

CARD, WEIGHTS, PROBE, README = STUDENT_CARD, "student.safetensors", "probe.safetensors", "README.md"
SCHEDULER = "scheduler"
FORMAT = 1


def move(made: Path, place: Path) -> None:
    """Files of a new student into a folder, in the place of an old one's. The card comes last: a folder with a card is whole."""
    place.mkdir(exist_ok=True)
    (place / CARD).unlink(missing_ok=True)
    for old in (place / WEIGHTS, place / FILE, *place.glob("plan-*.safetensors")):
        old.unlink(missing_ok=True)
    shutil.rmtree(place / SCHEDULER, ignore_errors=True)
    for file in sorted(made.iterdir(), key=lambda file: file.name == CARD):
        file.replace(place / file.name)


def read_card(place: Path) -> dict[str, Any]:
    """The card of a folder."""
    path = place / CARD
    if not path.is_file():
        raise FileNotFoundError(f"there is no student in {place}: it has no {CARD}.")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(card, dict) and card["format"] <= FORMAT and {"base", "calls", "guidance_scale", "method"} <= card.keys()
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} is damaged: {str(error)[:200]}") from error
    if not known:
        raise ArtefactError(f"{path} is not what this fewstep writes, or of a newer format. Upgrade fewstep.")
    return card


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}.") from None
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} cannot be read: {str(error)[:200]}. It is truncated, damaged or foreign.") from error


def check_base(card: Mapping[str, Any], teacher: Any, place: Path) -> None:
    """Refuse a base of other weights than the student was made for."""
    wanted, found = card["base"]["fingerprint"], identity(teacher)["fingerprint"]
    if wanted != found:
        hint = " Its adapter may serve other weights of the same layers: pass other_base=True." if card["adapter"] else ""
        raise ArtefactError(
            f"{place} was made for {card['base']['name']} ({str(wanted)[:12]}), but the base has other weights ({str(found)[:12]}).{hint}"
        )


def read_network(place: Path, card: Mapping[str, Any], inner: Any) -> nn.Module:
    """The network of a student, from a network like the base's."""
    if not isinstance(inner, nn.Module):
        raise TypeError("the base has no network, as an exact denoiser has none: pass network=, one like the student's.")
    if card["adapter"] is not None:
        return AdaptedNetwork(inner, lambda part: load_adapter(part, place)).eval()
    network: nn.Module = in_single_precision(copy.deepcopy(inner))
    if card["wrapped"] is not None:
        network = WRAPPERS[card["wrapped"]["kind"]](network, **card["wrapped"]["options"])
    try:
        network.load_state_dict(read_tensors(place / WEIGHTS))
    except RuntimeError as error:
        raise ArtefactError(f"{place / WEIGHTS} does not fit the base: {str(error).splitlines()[-1].strip()[:200]}") from error
    return network.eval().requires_grad_(False)
