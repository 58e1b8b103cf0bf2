r"""The small image network of the shipped models, and the folder that a model is kept in.

`SmallUNet` is a U-Net of residual blocks $h + F(h, e)$, with $e$ an embedding of time and label that scales and shifts the second
normalised activation of every block, and with self-attention on the coarsest level. The time enters as

$$ \big(\cos \omega_k s t,\; \sin \omega_k s t\big)_{k=1..m}, \qquad
   \omega_k \text{ geometric from } \tfrac12 \text{ to } 200, \quad s = \text{time\_scale}, $$

which resolves a hundredth of the unit interval and yet is smooth in t, as solvers of high order want it. Every sample is treated by itself
(group normalisation). The last layer of each block and of the network start at zero: an untrained network returns zeros.

Sources: U-Net and residual blocks as in "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239), the scale-and-shift conditioning
of "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233, section 3), the null label of "Classifier-Free Diffusion Guidance"
(arXiv 2207.12598).

`SmallClassifier` tells digits apart. Its features judge samples of the shipped model (`fewstep.evaluate`). It is one file, an artefact:
`save_classifier`, `read_classifier`.

A *model folder* holds ``config.json`` (what the network is, the noise schedule it was trained on, what it predicts, its data, its
conditions, its licence, how it was trained) and ``model.safetensors`` (the weights). `save_model` writes it; `read_model` reads it,
strictly.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.artefacts import Artefact, write_atomically
from fewstep.errors import ArtefactError
from fewstep.predictions import check_prediction
from fewstep.schedules import NoiseSchedule, from_config

__all__ = [
    "FORMAT",
    "ModelConfig",
    "SmallClassifier",
    "SmallUNet",
    "SmallUNetConfig",
    "read_classifier",
    "read_model",
    "save_classifier",
    "save_model",
]

FORMAT = 1
"""The newest form of a model folder that this version writes and reads."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
LARGEST_CONFIG = 1_000_000
"""Bytes of a ``config.json``; one of ours has about two thousand."""

GROUPS = 8
"""Groups of every normalisation; channels are multiples of it."""
HEAD = 32
"""Channels of an attention head."""
FREQUENCIES = (0.5, 200.0)
"""Lowest and highest angular frequency of the time features."""
BOUNDS = {"in_channels": (1, 64), "image_size": (1, 1024), "patch": (1, 32), "classes": (1, 100_000), "embedding": (2, 4096)}
"""Bounds of the options, so that a hostile or mistyped configuration is refused before anything is allocated."""
MOST_LEVELS, MOST_CHANNELS, MOST_BLOCKS = 8, 2048, 16


@dataclass(frozen=True)
class SmallUNetConfig:
    """Options of `SmallUNet`; all of them JSON values.

    Args:
        in_channels: channels of a sample.
        image_size: height and width of a sample.
        channels: channels of every level, finest first; multiples of 8. The last level is the coarsest.
        blocks: residual blocks on each level, on the way down and again on the way up (the coarsest level is passed once).
        attention: whether the coarsest level has self-attention after every block.
        patch: side of the square patches that become one pixel of the finest level; saves computation.
        classes: number of labels, or None for a network without labels. The null label is the number `classes` itself.
        embedding: width of the embedding of time and label.
        dropout: probability of dropping an activation inside a block, while training.
        time_scale: what the time is multiplied by, so that it runs over about a unit interval.

    Raises:
        ValueError: for options outside their bounds, or a size that the patches and levels do not divide.
    """

    in_channels: int
    image_size: int
    channels: tuple[int, ...] = (64, 128)
    blocks: tuple[int, ...] = (2, 3)
    attention: bool = True
    patch: int = 1
    classes: int | None = None
    embedding: int = 128
    dropout: float = 0.0
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if not (_whole(value, low, high) or (name == "classes" and value is None)):
                raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}.")
        for name, most in (("channels", MOST_CHANNELS), ("blocks", MOST_BLOCKS)):
            values = getattr(self, name)
            if (
                not isinstance(values, (tuple, list))
                or not 1 <= len(values) <= MOST_LEVELS
                or not all(_whole(v, 1, most) for v in values)
            ):
                raise ValueError(f"{name} must be 1 to {MOST_LEVELS} whole numbers from 1 to {most}, got {values!r:.80}.")
            object.__setattr__(self, name, tuple(values))
        if len(self.channels) != len(self.blocks) or self.embedding % 2:
            raise ValueError(
                f"channels and blocks must be equally long and embedding even, got {self.channels}, {self.blocks}, {self.embedding}."
            )
        if any(c % (GROUPS if c < HEAD else HEAD) for c in self.channels):
            raise ValueError(f"channels must be multiples of {GROUPS}, and of {HEAD} from there on, got {self.channels}.")
        if self.image_size % (self.patch * 2 ** (len(self.channels) - 1)):
            raise ValueError(
                f"image_size {self.image_size} must be divisible by patch {self.patch} and by 2 for every level after the first."
            )
        if not isinstance(self.attention, bool):
            raise ValueError(f"attention must be true or false, got {self.attention!r}.")
        if not (_number(self.dropout) and 0.0 <= self.dropout < 1.0 and _number(self.time_scale) and self.time_scale > 0.0):
            raise ValueError(f"dropout must be in [0, 1) and time_scale positive, got {self.dropout!r} and {self.time_scale!r}.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one sample."""
        return (self.in_channels, self.image_size, self.image_size)


def _whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


class TimeFeatures(nn.Module):
    """Cosines and sines of the time at geometric frequencies."""

    omega: Tensor

    def __init__(self, count: int, scale: float):
        super().__init__()
        low, high = FREQUENCIES
        # on the CPU even where the rest is made without storage, because no file holds it
        exponents = torch.linspace(0.0, 1.0, count // 2, dtype=torch.float64, device="cpu")
        self.register_buffer("omega", scale * low * (high / low) ** exponents, persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        angle = time.float()[:, None] * self.omega.float()
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class ResidualBlock(nn.Module):
    """h + F(h, e): two convolutions; the embedding scales and shifts between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float):
        super().__init__()
        self.norm_in = nn.GroupNorm(GROUPS, inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outputs)
        self.norm_out = nn.GroupNorm(GROUPS, outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        inner = self.conv_in(functional.silu(self.norm_in(h)))
        inner = self.norm_out(inner) * (1.0 + scale) + shift
        return self.skip(h) + self.conv_out(self.dropout(functional.silu(inner)))


class Attention(nn.Module):
    """h + self-attention over the pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(1, channels // HEAD)
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.read = nn.Conv2d(channels, 3 * channels, 1)
        self.write = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)  # type: ignore[arg-type]

    def forward(self, h: Tensor) -> Tensor:
        batch, channels, height, width = h.shape
        parts = self.read(self.norm(h)).reshape(batch, 3, self.heads, channels // self.heads, height * width)
        query, key, value = parts.transpose(3, 4).unbind(1)  # batch heads pixels channels
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(2, 3)
        return h + self.write(mixed.reshape(batch, channels, height, width))


class Level(nn.Module):
    """Residual blocks of one resolution, with attention after each if wanted."""

    def __init__(self, inputs: int, outputs: int, config: SmallUNetConfig, count: int, attention: bool):
        super().__init__()
        widths = [inputs] + [outputs] * count
        blocks = (ResidualBlock(a, b, config.embedding, config.dropout) for a, b in itertools.pairwise(widths))
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(Attention(outputs) for _ in range(count if attention else 0))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            h = block(h, embedding)
            if len(self.attentions):
                h = self.attentions[i](h)
        return h


class SmallUNet(nn.Module):
    """A small U-Net ``network(x, time, label=None)`` for square images.

    Args:
        config: its options.

    Example:
        >>> network = SmallUNet(SmallUNetConfig(in_channels=1, image_size=8, channels=(16, 32), blocks=(1, 1), classes=10))
        >>> network(torch.randn(5, 1, 8, 8), torch.rand(5), label=torch.arange(5)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(self, config: SmallUNetConfig):
        super().__init__()
        self.config = config
        channels, blocks, width = config.channels, config.blocks, config.embedding
        pixel = config.in_channels * config.patch**2
        features = TimeFeatures(width, config.time_scale)
        self.time = nn.Sequential(features, nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = None if config.classes is None else nn.Embedding(config.classes + 1, width)
        self.stem = nn.Conv2d(pixel, channels[0], 3, padding=1)
        last = len(channels) - 1
        self.down = nn.ModuleList(Level(channels[i], channels[i], config, blocks[i], False) for i in range(last))
        self.shrink = nn.ModuleList(nn.Conv2d(4 * channels[i], channels[i + 1], 1) for i in range(last))
        self.bottom = Level(channels[last], channels[last], config, blocks[last], config.attention)
        self.grow = nn.ModuleList(nn.Conv2d(channels[i + 1], 4 * channels[i], 1) for i in range(last))
        self.up = nn.ModuleList(Level(2 * channels[i], channels[i], config, blocks[i], False) for i in range(last))
        self.norm = nn.GroupNorm(GROUPS, channels[0])
        self.head = nn.Conv2d(channels[0], pixel, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """The prediction.

        Args:
            x: ``Float[Tensor, "batch in_channels image_size image_size"]``.
            time: ``Float[Tensor, "batch"]``.
            label: ``Int[Tensor, "batch"]`` in 0..classes, `classes` being the null label; left out, all are null.

        Returns:
            a tensor of x's shape.

        Raises:
            ValueError: if x or time have another shape, or a label is given to a network without labels.
        """
        if x.shape[1:] != self.config.shape or time.shape != x.shape[:1]:
            raise ValueError(
                f"this network wants x of shape (batch, {', '.join(map(str, self.config.shape))}) and time of shape (batch,), "
                f"got {tuple(x.shape)} and {tuple(time.shape)}."
            )
        embedding = functional.silu(self._embed(x, time, label))
        h = self.stem(functional.pixel_unshuffle(x, self.config.patch))
        kept = []
        for level, shrink in zip(self.down, self.shrink, strict=True):
            h = level(h, embedding)
            kept.append(h)
            h = shrink(functional.pixel_unshuffle(h, 2))
        h = self.bottom(h, embedding)
        for i in reversed(range(len(kept))):
            h = torch.cat([kept[i], functional.pixel_shuffle(self.grow[i](h), 2)], dim=1)
            h = self.up[i](h, embedding)
        return functional.pixel_shuffle(self.head(functional.silu(self.norm(h))), self.config.patch)

    def _embed(self, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        embedding = self.time[0](time).to(self.stem.weight.dtype)
        embedding = self.time[1:](embedding)
        if self.label is None:
            if label is not None:
                raise ValueError("this network was made without labels; leave label= out.")
            return embedding
        if label is None:
            label = x.new_full((x.shape[0],), self.label.num_embeddings - 1, dtype=torch.int64)
        return embedding + self.label(label)


# ---- the model folder --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """What a model folder says of its network.

    Attributes:
        schedule: the noise schedule it was trained on.
        predicts: what it predicts.
        shape: shape of one sample, without the batch.
        data_range: lowest and highest value of clean data.
        conditions: for every condition the network takes, ``{"classes": n, "null": label}``.
        fingerprint: SHA-256 of the file of the weights; None before there is one.
        extra: ``"architecture"``, ``"network"`` (its options), ``"licence"`` and ``"training"`` (how it was made).
    """

    schedule: NoiseSchedule
    predicts: str
    shape: tuple[int, ...]
    data_range: tuple[float, float]
    conditions: dict[str, dict[str, int]]
    fingerprint: str | None
    extra: dict[str, Any]


def save_model(
    folder: str | os.PathLike[str],
    network: SmallUNet,
    *,
    schedule: NoiseSchedule,
    predicts: str,
    data_range: tuple[float, float] = (-1.0, 1.0),
    licence: str = "",
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a model folder; an old one there is replaced.

    Each file is written under another name and then renamed. The configuration comes last and holds the checksum of the weights, so a
    folder that a crash left between two models is refused, not misread.

    Args:
        folder: where; made if needed.
        network: the network; its weights are stored in `dtype`.
        schedule, predicts: what it was trained on, and what it predicts.
        data_range: lowest and highest value of clean data.
        licence: on what terms it may be used, and whose the data are.
        training: how it was made; JSON values.
        dtype: ``torch.float16`` or ``torch.float32``.

    Raises:
        ValueError: for weights that are not finite in `dtype`, or a training record that is not JSON.

    Example:
        >>> import tempfile
        >>> from fewstep.schedules import Flow
        >>> network = SmallUNet(SmallUNetConfig(in_channels=1, image_size=8, channels=(16, 32), blocks=(1, 1)))
        >>> folder = tempfile.mkdtemp()
        >>> save_model(folder, network, schedule=Flow(), predicts="flow", licence="CC0")
        >>> network, config = read_model(folder)
        >>> config.schedule, config.predicts, config.shape
        (Flow(shift=1.0, t_start=1.0, t_end=0.001), 'flow', (1, 8, 8))
    """
    from safetensors.torch import save

    if dtype not in DTYPES.values():
        raise ValueError(f"the weights are stored in torch.float16 or torch.float32, not in {dtype}.")
    tensors = {name: value.detach().cpu().to(dtype).contiguous() for name, value in network.state_dict().items()}
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"the weights {name} are not finite in {dtype}; a model like that cannot be kept.")
    content = save(tensors)
    config = {
        "format": FORMAT,
        "architecture": SmallUNet.__name__,
        "network": dataclasses.asdict(network.config),
        "schedule": schedule.config(),
        "predicts": check_prediction(predicts),
        "data": {"shape": network.config.shape, "range": data_range},
        "conditions": _conditions(network.config),
        "weights": {"dtype": next(name for name, value in DTYPES.items() if value is dtype), "sha256": _sha256(content)},
        "licence": licence,
        "training": dict(training or {}),
    }
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / WEIGHTS, content)
    write_atomically(place / CONFIG, text.encode())


def read_model(folder: str | os.PathLike[str]) -> tuple[SmallUNet, ModelConfig]:
    """Read a model folder, strictly: nothing in it is executed, and nothing large is allocated that its files do not hold.

    Returns:
        the network with its weights in float32, on the CPU; and what the folder says of it.

    Raises:
        ArtefactError: if a file is missing, damaged, of a newer form or of an unknown architecture, or the weights do not fit.
    """
    place = Path(folder)
    config = _read_config(place / CONFIG)
    try:
        parsed = _parse(config)
        options = SmallUNetConfig(**config["network"])
        _same("data shape", config["data"]["shape"], list(options.shape))
        _same("conditions", config["conditions"], _conditions(options))
        dtype = DTYPES[config["weights"]["dtype"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArtefactError(f"{place / CONFIG} is not valid: {type(error).__name__}: {str(error)[:300]}") from error
    content = _read_file(place / WEIGHTS)
    fingerprint = _sha256(content)
    if config["weights"].get("sha256", fingerprint) != fingerprint:
        raise ArtefactError(f"{place / WEIGHTS} is damaged or of another model: its checksum is not the one in {CONFIG}.")
    with torch.device("meta"):  # shapes without storage
        network = SmallUNet(options)
    tensors = _fitting(place / WEIGHTS, content, network, dtype)
    network.load_state_dict(tensors, assign=True)
    return network, dataclasses.replace(parsed, fingerprint=fingerprint)


DTYPES = {"float16": torch.float16, "float32": torch.float32}
KEYS = {"format", "architecture", "network", "schedule", "predicts", "data", "conditions", "weights", "licence", "training"}


def _conditions(options: SmallUNetConfig) -> dict[str, dict[str, int]]:
    return {} if options.classes is None else {"label": {"classes": options.classes, "null": options.classes}}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _same(what: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise ValueError(f"its {what} is {found!r:.100}, but its network has {wanted!r}.")


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ArtefactError(f"there is no file {path}: a model is a folder with {CONFIG} and {WEIGHTS}.") from error


def _read_config(path: Path) -> dict[str, Any]:
    """The JSON document, after the checks that come before all others: size, form, format and architecture."""
    content = _read_file(path)
    if len(content) > LARGEST_CONFIG:
        raise ArtefactError(f"{path} has {len(content)} bytes; a model's has at most {LARGEST_CONFIG}.")
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is not valid JSON: {str(error)[:200]}. It is truncated or damaged.") from error
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise ArtefactError(f"{path} has no format number: it is not a model folder of fewstep's form.")
    if config["format"] != FORMAT:
        raise ArtefactError(f"{path} has format {config['format']}; this fewstep reads {FORMAT}. Upgrade fewstep.")
    if config.get("architecture") != SmallUNet.__name__:
        raise ArtefactError(f"{path} has architecture {config.get('architecture')!r:.80}; this fewstep knows {SmallUNet.__name__}.")
    if config.keys() != KEYS:
        raise ArtefactError(f"{path} must have the entries {sorted(KEYS)}; lacking or unknown: {sorted(KEYS ^ config.keys())}.")
    return config


def _parse(config: Mapping[str, Any]) -> ModelConfig:
    low, high = config["data"]["range"]
    if not (_number(low) and _number(high) and low < high):
        raise ValueError(f"the range of the data must be two increasing numbers, got {config['data']['range']!r:.100}.")
    if not isinstance(config["licence"], str) or not isinstance(config["training"], dict):
        raise ValueError("licence must be text, and training a JSON object.")
    return ModelConfig(
        schedule=from_config(config["schedule"]),
        predicts=check_prediction(config["predicts"]),
        shape=tuple(config["data"]["shape"]),
        data_range=(float(low), float(high)),
        conditions=config["conditions"],
        fingerprint=None,
        extra={key: config[key] for key in ("architecture", "network", "licence", "training")},
    )


def _fitting(path: Path, content: bytes, network: SmallUNet, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the file in float32, if their names, shapes and dtype are those of the network."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtefactError(f"{path} is damaged: {str(error)[:200]}") from error
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        name = wrong[0]
        raise ArtefactError(
            f"the weights in {path} do not fit the network of {CONFIG}: {name} is {found.get(name, 'missing')}, "
            f"the network has {wanted.get(name, 'no such weights')} ({len(wrong)} differ)."
        )
    for name, value in tensors.items():
        if value.dtype is not dtype or not bool(value.isfinite().all()):
            raise ArtefactError(f"{path} is damaged: {name} is not {dtype} or not finite.")
    return {name: value.float() for name, value in tensors.items()}


# ---- the classifier ----------------------------------------------------------------------------------------------------------------


class SmallClassifier(nn.Module):
    """Which digit an 8 x 8 image is: three convolutions, 64 features, 10 classes. The features of a sample have mean 0 and variance 1.

    Example:
        >>> network = SmallClassifier()
        >>> network.features(torch.zeros(5, 1, 8, 8)).shape, network(torch.zeros(5, 1, 8, 8)).shape
        (torch.Size([5, 64]), torch.Size([5, 10]))
    """

    shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 64, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * 16, 64)),
            nn.LayerNorm(64, elementwise_affine=False),
        )
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits ``"batch 10"`` of images ``"batch 1 8 8"`` in [-1, 1]."""
        return self.out(self.features(x))


CLASSIFIER = "classifier"
"""Kind of the artefact."""


def save_classifier(path: str | os.PathLike[str], network: SmallClassifier, *, licence: str, training: Mapping[str, Any]) -> None:
    """Write a classifier to one file, its weights in half precision.

    Args:
        path: where.
        network: the classifier.
        licence: on what terms it may be used, and whose the data are.
        training: how it was made; JSON values.
    """
    tensors = {name: value.detach().cpu().half().numpy() for name, value in network.state_dict().items()}
    meta = {"architecture": SmallClassifier.__name__, "licence": licence, "training": dict(training)}
    Artefact(CLASSIFIER, meta, tensors).save(path)


def read_classifier(path: str | os.PathLike[str]) -> tuple[SmallClassifier, dict[str, Any]]:
    """Read a file that `save_classifier` wrote.

    Returns:
        the network, frozen and in float32 on the CPU; and what the file says of it.

    Raises:
        ArtefactError: if it is damaged, foreign, or its weights do not fit.
        FileNotFoundError: if there is none.
    """
    artefact = Artefact.load(path, kind=CLASSIFIER)
    network = SmallClassifier()
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: value.shape for name, value in artefact.tensors.items()}
    if artefact.meta.get("architecture") != SmallClassifier.__name__ or found != wanted:
        raise ArtefactError(f"{path} holds the weights of another network than {SmallClassifier.__name__}.")
    network.load_state_dict({name: torch.from_numpy(value).float() for name, value in artefact.tensors.items()})
    return network.eval().requires_grad_(False), artefact.meta
