"""What a distance of distributions looks at: from samples ``"n *shape"`` to vectors ``"n d"``.

- `pixels`: the samples themselves.
- `digit_features`: 64 features of the small classifier that comes along, for 1 x 8 x 8 images in [-1, 1].
- `Inception`: 2048 features of the network of the Frechet Inception distance, for pictures of any size. Its weights are not shipped
  and not fetched: the file must be at hand.

A function of your own that does the same may stand in for them everywhere.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import ArtefactError, MissingExtraError, UnknownNameError
from fewstep.models import SmallClassifier, read_classifier

__all__ = ["FEATURES", "TITLES", "Inception", "digit_features", "make_features", "pixels", "resolved_features"]

CLASSIFIER = Path(__file__).parents[1] / "shipped" / "digits_classifier.safetensors"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The file of the reference implementation's weights, as torch-fidelity and torchmetrics name it."""
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Its checksum. torch-fidelity unpickles the file, which executes what is in it: so this one or none."""
BLOCK = 256

Features = Callable[[Tensor], Tensor]


def pixels(samples: Tensor) -> Tensor:
    """The samples as vectors, in float64 on the CPU.

    Example:
        >>> pixels(torch.zeros(3, 1, 2, 2)).shape
        torch.Size([3, 4])
    """
    return samples.detach().cpu().double().flatten(1)


def digit_features(samples: Tensor) -> Tensor:
    """Features of the shipped classifier of digits: ``"n 64"``, of samples ``"n 1 8 8"`` clipped to [-1, 1].

    Raises:
        ValueError: for samples of another shape.

    Example:
        >>> digit_features(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 64])
    """
    _check_shape(tuple(samples.shape[1:]))
    return _blockwise(_classifier().features, samples.detach().cpu().float().clamp(-1.0, 1.0))


def _check_shape(shape: tuple[int, ...]) -> None:
    if shape != SmallClassifier.shape:
        raise ValueError(f"the classifier of digits sees samples of shape {SmallClassifier.shape}, got {shape}.")


class Inception:
    """Features of the Inception network of FID ("GANs Trained by a Two Time-Scale Update Rule", arXiv 1706.08500), by torchmetrics.

    Pictures are rounded to 8 bits, as FID is defined on files, and enlarged inside the network.

    Args:
        weights: the file ``weights-inception-2015-12-05-6726825d.pth``. Left out, it is looked for where PyTorch keeps downloads.
        data_range: lowest and highest value of the samples.
        device: where to compute.

    Raises:
        MissingExtraError: if torchmetrics or torch-fidelity is not installed.
        FileNotFoundError: if the weights are not there. Nothing is downloaded.
        ArtefactError: if the file is not that of the reference implementation.
    """

    def __init__(
        self, weights: str | Path | None = None, data_range: tuple[float, float] = (-1.0, 1.0), device: torch.device | str = "cpu"
    ):
        file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE if weights is None else Path(weights)
        if not file.is_file():
            raise FileNotFoundError(
                f"the weights of Inception are not at {file}. Get {INCEPTION_FILE} from the releases of torch-fidelity and name it."
            )
        if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != INCEPTION_SHA256:
            raise ArtefactError(f"{file} is not {INCEPTION_FILE}: its SHA-256 begins with {found[:8]}.")
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            network: Any = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))
        except ImportError as error:
            raise MissingExtraError("torchmetrics with torch-fidelity", "evaluate", "Inception's features") from error
        self.network, self.data_range, self.device = network.to(device), data_range, device

    def __call__(self, samples: Tensor) -> Tensor:
        """Features ``"n 2048"`` of pictures ``"n 1|3 height width"``."""
        if samples.ndim != 4 or samples.shape[1] not in (1, 3):
            raise ValueError(f"Inception sees pictures (n, 1 or 3, height, width), got {tuple(samples.shape)}.")
        low, high = self.data_range
        bytes_ = (
            ((samples.detach().to(self.device).float() - low) / (high - low)).clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)
        )
        return _blockwise(self.network, bytes_.expand(-1, 3, -1, -1))


FEATURES: dict[str, Features] = {"pixels": pixels, "digits": digit_features}
"""Name -> features that need nothing else; the command line adds ``inception`` and ``auto``."""
TITLES = {"pixels": "pixels", "digits": "features of the classifier of digits", "inception": "features of Inception"}
"""Name -> what reports call them."""


def make_features(name: str, shape: tuple[int, ...], *, weights: str | None = None, device: torch.device | str = "cpu") -> Features:
    """Features by name.

    Args:
        name: ``"pixels"``, ``"digits"``, ``"inception"``; or ``"auto"``: those of digits for samples of their shape, else pixels.
        shape: of one sample.
        weights: of Inception.
        device: for Inception.

    Raises:
        UnknownNameError: for an unknown name, with the nearest one.
        ValueError: if the features are of samples of another shape.

    Example:
        >>> make_features("auto", (1, 8, 8)) is digit_features, make_features("auto", (2,)) is pixels
        (True, True)
    """
    name = resolved_features(name, shape)
    if name == "inception":
        return Inception(weights, device=device)
    if name not in FEATURES:
        raise UnknownNameError("features", name, [*FEATURES, "inception", "auto"])
    if name == "digits":
        _check_shape(tuple(shape))
    return FEATURES[name]


def resolved_features(name: str, shape: tuple[int, ...]) -> str:
    """The name that ``"auto"`` stands for with samples of this shape; any other name as it is.

    Example:
        >>> resolved_features("auto", (1, 8, 8)), resolved_features("auto", (2,))
        ('digits', 'pixels')
    """
    if name != "auto":
        return name
    return "digits" if tuple(shape) == SmallClassifier.shape else "pixels"


@functools.cache
def _classifier() -> SmallClassifier:
    if not CLASSIFIER.is_file():
        raise ArtefactError(f"{CLASSIFIER} is missing: this installation of fewstep is not whole. Install it again.")
    return read_classifier(CLASSIFIER)[0]


@torch.no_grad()
def _blockwise(network: Callable[[Tensor], Any], samples: Tensor) -> Tensor:
    return torch.cat([network(block).cpu().double() for block in samples.split(BLOCK)])
