"""Networks of diffusers' pipelines as ``network(x, time, **cond)``, one class a family.

Every network takes conditions with one entry a sample, under the names that diffusers' pipelines give them: ``label``, or
``prompt_embeds``, ``pooled_prompt_embeds``, ``time_ids``, ``guidance``. Latents have the shape in which the decoder takes them.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.errors import FewstepError

__all__ = ["FAMILIES", "Family", "family_of"]

Conditions = dict[str, Tensor]


class Family(torch.nn.Module, abc.ABC):
    """A network of diffusers as ``network(x, time, **cond)``.

    Args:
        model: the part of the pipeline that is called at every step.
    """

    part: ClassVar[str] = "transformer"
    pipelines: ClassVar[tuple[str, ...]]
    latent: ClassVar[bool] = True
    takes_prompts: ClassVar[bool] = True
    shifts_latents: ClassVar[bool] = False
    multiple: ClassVar[int] = 1

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.check()

    @property
    def config(self) -> Mapping[str, Any]:
        """What the model was made with."""
        return self.model.config  # type: ignore[return-value]

    def check(self) -> None:
        """Refuse what this family's pipeline is not called for.

        Raises:
            FewstepError: for such a model.
        """

    def conditions(self) -> dict[str, dict[str, int]]:
        """For `fewstep.denoisers.ModelInfo`."""
        return {}

    def embeddings(self) -> tuple[str, ...]:
        """For `fewstep.denoisers.ModelInfo`: the conditions that `forward` cannot do without."""
        arguments = inspect.signature(self.forward).parameters.values()
        return tuple(each.name for each in arguments if each.default is each.empty and each.name not in ("x", "time"))

    def distilled(self) -> bool:
        """Whether the network takes the guidance scale as a condition."""
        return False

    def default_size(self) -> tuple[int, ...]:
        """Height and width of a sample, and for videos its frames before them, in the network's own units."""
        side = self.config["sample_size"]
        return (side, side) if isinstance(side, int) else tuple(side)

    def shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """Of one sample of a size in the network's own units."""
        return (self.config["in_channels"], *size)

    def time_ids(self, size: Sequence[int]) -> Conditions:
        """Conditions that say the size, in pixels, of the picture: of one sample."""
        return {}

    @abc.abstractmethod
    def encode(self, pipeline: Any, prompt: str) -> Conditions:
        """Conditions of one prompt, ``"1 ..."``, by the pipeline's own encoders."""

    @abc.abstractmethod
    def encode_null(self, pipeline: Any, prompt: str, negative: str | None) -> Conditions:
        """Conditions ``"1 ..."`` of the unguided half of the pair that belongs to a prompt."""

    @abc.abstractmethod
    def forward(self, x: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        """The prediction, ``"batch *shape"``."""

    def _like(self, value: Tensor) -> Tensor:
        """In the precision of the model."""
        return value.to(self.model.dtype)  # type: ignore[arg-type]


class _Labelled(Family):
    """A family that takes a class, or nothing."""

    takes_prompts = False

    def encode(self, pipeline: Any, prompt: str) -> Conditions:
        raise FewstepError(f"{type(pipeline).__name__} takes no prompts.")

    def encode_null(self, pipeline: Any, prompt: str, negative: str | None) -> Conditions:
        raise FewstepError(f"{type(pipeline).__name__} takes no prompts.")


class PixelUNet(_Labelled):
    """`UNet2DModel`: pixels, with or without classes."""

    part = "unet"
    pipelines = ("DDPMPipeline", "DDIMPipeline")
    latent = False

    def conditions(self) -> dict[str, dict[str, int]]:
        classes = self.config.get("num_class_embeds")
        return {"label": {"classes": classes}} if classes else {}

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return _mean(self.model(x, time, class_labels=label, return_dict=False)[0], x)


class DiT(_Labelled):
    """`DiTTransformer2DModel`: latents, with classes. The class after the last stands for none."""

    pipelines = ("DiTPipeline",)

    def conditions(self) -> dict[str, dict[str, int]]:
        classes = self.config["num_embeds_ada_norm"]
        return {"label": {"classes": classes, "null": classes}}

    def shape(self, size: Sequence[int]) -> tuple[int, ...]:
        if tuple(size) != self.default_size():
            raise ValueError("this model has one size; leave the size out.")
        return super().shape(size)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if label is None:
            label = torch.full((len(x),), self.config["num_embeds_ada_norm"], device=x.device)
        return _mean(self.model(x, timestep=time, class_labels=label, return_dict=False)[0], x)


class TextUNet(Family):
    """`UNet2DConditionModel` with one text encoder: Stable Diffusion 1 and 2."""

    part = "unet"
    pipelines = ("StableDiffusionPipeline",)

    def check(self) -> None:
        _check_unet(self.config)
        if self.config.get("addition_embed_type") is not None:
            raise FewstepError("this network takes added conditions; load the folder of its pipeline.")

    def encode(self, pipeline: Any, prompt: str) -> Conditions:
        found, _ = pipeline.encode_prompt([prompt], pipeline._execution_device, 1, False)
        return {"prompt_embeds": found}

    def encode_null(self, pipeline: Any, prompt: str, negative: str | None) -> Conditions:
        told = None if negative is None else [negative]
        _, found = pipeline.encode_prompt([prompt], pipeline._execution_device, 1, True, told)
        return {"prompt_embeds": found}

    def forward(self, x: Tensor, time: Tensor, prompt_embeds: Tensor) -> Tensor:  # type: ignore[override]
        return self.model(x, time, encoder_hidden_states=self._like(prompt_embeds), return_dict=False)[0]


class TextUNetXL(Family):
    """`UNet2DConditionModel` with two text encoders and the size as a condition: SDXL."""

    part = "unet"
    pipelines = ("StableDiffusionXLPipeline",)

    def check(self) -> None:
        _check_unet(self.config)

    def time_ids(self, size: Sequence[int]) -> Conditions:
        height, width = size
        return {"time_ids": torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)}

    def encode(self, pipeline: Any, prompt: str) -> Conditions:
        found = pipeline.encode_prompt([prompt], device=pipeline._execution_device, do_classifier_free_guidance=False)
        return {"prompt_embeds": found[0], "pooled_prompt_embeds": found[2]}

    def encode_null(self, pipeline: Any, prompt: str, negative: str | None) -> Conditions:
        told = None if negative is None else [negative]
        found = pipeline.encode_prompt([prompt], device=pipeline._execution_device, negative_prompt=told)
        return {"prompt_embeds": found[1], "pooled_prompt_embeds": found[3]}

    def forward(  # type: ignore[override]
        self, x: Tensor, time: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, time_ids: Tensor
    ) -> Tensor:
        added = {"text_embeds": self._like(pooled_prompt_embeds), "time_ids": self._like(time_ids)}
        text = self._like(prompt_embeds)
        return self.model(x, time, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]


class SD3(Family):
    """`SD3Transformer2DModel`: Stable Diffusion 3 and 3.5."""

    pipelines = ("StableDiffusion3Pipeline",)
    shifts_latents = True

    @property
    def multiple(self) -> int:  # type: ignore[override]
        """Sides are multiples of a patch."""
        return self.config["patch_size"]

    def encode(self, pipeline: Any, prompt: str) -> Conditions:
        found = pipeline.encode_prompt([prompt], None, None, device=pipeline._execution_device, do_classifier_free_guidance=False)
        return {"prompt_embeds": found[0], "pooled_prompt_embeds": found[2]}

    def encode_null(self, pipeline: Any, prompt: str, negative: str | None) -> Conditions:
        told = None if negative is None else [negative]
        found = pipeline.encode_prompt([prompt], None, None, device=pipeline._execution_device, negative_prompt=told)
        return {"prompt_embeds": found[1], "pooled_prompt_embeds": found[3]}

    def forward(self, x: Tensor, time: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Tensor:  # type: ignore[override]
        return self.model(
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=self._like(prompt_embeds),
            pooled_projections=self._like(pooled_prompt_embeds),
            return_dict=False,
        )[0]


class Flux(Family):
    """`FluxTransformer2DModel`. Here latents are ``"channels height width"``; the network is called on patches of 2 x 2 of them."""

    pipelines = ("FluxPipeline",)
    shifts_latents = True
    multiple = 2

    def distilled(self) -> bool:
        return bool(self.config["guidance_embeds"])

    def default_size(self) -> tuple[int, ...]:
        return (128, 128)

    def shape(self, size: Sequence[int]) -> tuple[int, ...]:
        return (self.config["in_channels"] // 4, *size)

    def encode(self, pipeline: Any, prompt: str) -> Conditions:
        found = pipeline.encode_prompt([prompt], None, device=pipeline._execution_device)
        return {"prompt_embeds": found[0], "pooled_prompt_embeds": found[1]}

    def encode_null(self, pipeline: Any, prompt: str, negative: str | None) -> Conditions:
        return self.encode(pipeline, negative or "")

    def forward(  # type: ignore[override]
        self, x: Tensor, time: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        if guidance is None and self.distilled():
            guidance = x.new_ones(len(x), dtype=torch.float32)
        out = self.model(
            hidden_states=_patches(x),
            timestep=time / 1000.0,
            guidance=guidance,
            encoder_hidden_states=self._like(prompt_embeds),
            pooled_projections=self._like(pooled_prompt_embeds),
            txt_ids=x.new_zeros(prompt_embeds.shape[1], 3),
            img_ids=_places(rows, columns, x),
            return_dict=False,
        )[0]
        return _unpatched(out, rows, columns)


class Wan(Family):
    """`WanTransformer3DModel`: video from text, Wan 2.1."""

    pipelines = ("WanPipeline",)
    multiple = 2

    def default_size(self) -> tuple[int, ...]:
        return (21, 60, 104)

    def encode(self, pipeline: Any, prompt: str) -> Conditions:
        return {"prompt_embeds": self._encode(pipeline, prompt, None)[0]}

    def encode_null(self, pipeline: Any, prompt: str, negative: str | None) -> Conditions:
        return {"prompt_embeds": self._encode(pipeline, prompt, None if negative is None else [negative])[1]}

    def _encode(self, pipeline: Any, prompt: str, negative: list[str] | None) -> tuple[Tensor, Tensor]:
        """Both embeddings, of the length that the pipeline asks for, which is not the default of its encoder."""
        length = inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default
        return pipeline.encode_prompt([prompt], negative, device=pipeline._execution_device, max_sequence_length=length)

    def forward(self, x: Tensor, time: Tensor, prompt_embeds: Tensor) -> Tensor:  # type: ignore[override]
        text = self._like(prompt_embeds)
        return self.model(hidden_states=x, timestep=time, encoder_hidden_states=text, return_dict=False)[0]


FAMILIES: tuple[type[Family], ...] = (PixelUNet, DiT, TextUNet, TextUNetXL, SD3, Flux, Wan)
MODELS: dict[str, type[Family]] = {
    "UNet2DModel": PixelUNet,
    "DiTTransformer2DModel": DiT,
    "UNet2DConditionModel": TextUNet,
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": Flux,
    "WanTransformer3DModel": Wan,
}
"""Classes of models, and their families; with added conditions, `UNet2DConditionModel` is of SDXL."""


def family_of(class_name: str, config: Mapping[str, Any] | None = None) -> type[Family] | None:
    """The family of a pipeline's or a model's class; None if it is not served.

    Example:
        >>> family_of("FluxPipeline").__name__, family_of("UNet2DConditionModel", {"addition_embed_type": "text_time"}).__name__
        ('Flux', 'TextUNetXL')
    """
    if class_name == "UNet2DConditionModel" and (config or {}).get("addition_embed_type") == "text_time":
        return TextUNetXL
    return {**{name: family for family in FAMILIES for name in family.pipelines}, **MODELS}.get(class_name)


def _check_unet(config: Mapping[str, Any]) -> None:
    if config["in_channels"] != config["out_channels"]:
        raise FewstepError(
            f"a network of {config['in_channels']} channels in and {config['out_channels']} out (inpainting, for example) is not served."
        )
    if config.get("time_cond_proj_dim") is not None:
        raise FewstepError("a network that was distilled to few steps (time_cond_proj_dim) is not served: it has its own sampler.")


def _mean(output: Tensor, x: Tensor) -> Tensor:
    """The prediction without the variance that some networks give as further channels."""
    return output[:, : x.shape[1]] if output.shape[1] == 2 * x.shape[1] else output


def _patches(x: Tensor) -> Tensor:
    """``"batch c h w"`` to ``"batch (h/2 w/2) (c 4)"``."""
    batch, channels, height, width = x.shape
    cut = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def _unpatched(x: Tensor, rows: int, columns: int) -> Tensor:
    """The way back."""
    cut = x.reshape(len(x), rows, columns, -1, 2, 2)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, 2 * rows, 2 * columns)


def _places(rows: int, columns: int, like: Tensor) -> Tensor:
    """(0, row, column) of every patch, ``"rows*columns 3"``."""
    places = like.new_zeros(rows, columns, 3)
    places[..., 1] = torch.arange(rows, device=like.device)[:, None]
    places[..., 2] = torch.arange(columns, device=like.device)
    return places.reshape(-1, 3)
