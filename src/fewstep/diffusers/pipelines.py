"""From a pipeline of diffusers, in memory or on disk, to a denoiser: `PipelineDenoiser`.

    den = fs.load("path/to/pipeline")
    cond, null = den.encode(["a lighthouse in a storm"] * 4, negative="blurry")
    latents = fs.sample(den.guided(7.5, null), fs.draw_noise(den.info.shape, range(4), plan), plan, cond=cond)
    images = den.decode(latents)

Weights are read from safetensors files only: nothing is unpickled, and no code that lies beside a model is run.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.artefacts import check_not_pickled
from fewstep.denoisers import Clipped, Denoiser, DynamicThreshold, ModelInfo
from fewstep.diffusers.config import check_config, schedule_of, unsaid
from fewstep.diffusers.families import FAMILIES, Family, family_of
from fewstep.diffusers.networks import FlowNetwork, PreconditionedNetwork, TableNetwork, network_of
from fewstep.errors import ArtefactError, FewstepError, UnknownNameError
from fewstep.guidance import ClassifierFree, Distilled
from fewstep.identity import digest_of
from fewstep.preconditioning import EDMPreconditioned
from fewstep.schedules import NoiseSchedule

__all__ = ["PipelineDenoiser", "download", "load_file", "load_folder"]

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler/scheduler_config.json"
LEFT_OUT = ("feature_extractor", "image_encoder", "safety_checker")
"""Parts of a pipeline that text and class conditions do not need."""
LIBRARIES = ("diffusers", "transformers", "fewstep.diffusers")
"""Where the classes of a pipeline's parts may come from; the last for `PlanScheduler`."""
REMEMBERED_PROMPTS = 1024
"""After so many, encoded prompts are forgotten: a server meets new ones without end."""
WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.([^.]+?))?(?:-\d+-of-\d+)?\.safetensors")
"""Names of files with weights, and the variant (fp16) that a name may say."""
SINGLE_FILES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "playground-v2-5": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
}
"""Kinds of single-file checkpoints, as diffusers tells them apart, and their pipelines."""


class PipelineDenoiser(Denoiser):
    """The network of a diffusers pipeline as a denoiser, with the pipeline's text encoders and decoder.

    The times that the network is told, and what is taken for the data, are those of `fewstep.diffusers.PlanScheduler`: a plan gives the
    same samples here and in the pipeline.

    Args:
        pipeline: a text-to-image, class-conditional or unconditional pipeline of diffusers; the module's page lists them. Its networks
            are put into evaluation mode, and their parameters need no gradient any more.
        name: how to call it in messages; left out, the name of its class.

    Attributes:
        pipeline: the pipeline.
        info: ``shape`` is that of one sample of the pipeline's default size, latents for most.

    Raises:
        UnknownNameError: for another pipeline.
        FewstepError: for a network that these pipelines are not made for.
    """

    def __init__(self, pipeline: Any, *, name: str | None = None):
        class_name = type(pipeline).__name__
        family = _served("pipeline", class_name)
        _check_pipeline(pipeline, family)
        network = family(getattr(pipeline, family.part)).eval()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        super().__init__(info=_info(network, name or class_name), **_reading(network, pipeline.scheduler.config))
        self.pipeline = pipeline
        self._family = network
        self._encoded: dict[str, dict[str, Tensor]] = {}

    @property
    def family(self) -> Family:
        """The network, without the preconditioning of those that have one."""
        return self._family

    @property
    def takes_prompts(self) -> bool:
        """Whether there is a text encoder."""
        found = [part for name, part in self.pipeline.components.items() if name.startswith("text_encoder")]
        return self.family.takes_prompts and any(part is not None for part in found)

    # ---- sizes ---------------------------------------------------------------------------------------------------------------------

    @property
    def size(self) -> tuple[int, ...]:
        """Height and width of a decoded sample in pixels; of a video its frames as well, last."""
        *frames, height, width = self.info.shape[1:]  # type: ignore[index]
        spatial, temporal = self._factors()
        return (height * spatial, width * spatial, *((count - 1) * temporal + 1 for count in frames))

    def with_size(self, size: Sequence[int]) -> PipelineDenoiser:
        """The same denoiser for samples of another size.

        Args:
            size: height and width in pixels; for a video, and its number of frames.

        Raises:
            ValueError: for a size that the network cannot take.
        """
        spatial, temporal = self._factors()
        step, frames = spatial * self.family.multiple, size[2:]
        wanted = 3 if len(self.info.shape or ()) == 4 else 2
        if len(size) != wanted or min(size) < 1:
            raise ValueError(f"a size of this model is {wanted} positive numbers, height, width{', frames' * (wanted - 2)}.")
        if any(side % step for side in size[:2]) or any((count - 1) % temporal for count in frames):
            also = f", and frames one more than a multiple of {temporal}" if frames else ""
            raise ValueError(f"height and width must be multiples of {step}{also}, got {'x'.join(map(str, size))}.")
        own = (*((count - 1) // temporal + 1 for count in frames), *(side // spatial for side in size[:2]))
        other = copy.copy(self)
        other.info = dataclasses.replace(self.info, shape=self.family.shape(own))
        return other

    def _factors(self) -> tuple[int, int]:
        """Pixels to a latent, and frames."""
        if not self.family.latent:
            return 1, 1
        vae = self.pipeline.vae.config
        if "scale_factor_spatial" in vae:
            return vae["scale_factor_spatial"], vae["scale_factor_temporal"]
        return 2 ** (len(vae["block_out_channels"]) - 1), 1

    # ---- conditions ----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], negative: str | None = None, size: Sequence[int] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Conditions of prompts, by the pipeline's own ``encode_prompt``, one prompt at a time.

        Args:
            prompts: one a sample; what was encoded before is remembered.
            negative: what to guide away from; left out, what the pipeline takes then.
            size: for models that are told it, height and width in pixels; left out, `size`.

        Returns:
            the conditions, with one entry a sample, and of those that guidance replaces the null, of one sample: for `guided`.

        Raises:
            FewstepError: for a model that takes no prompts, or has no text encoder.
            ValueError: for no prompts.
        """
        if not self.takes_prompts:
            raise FewstepError(f"{self.info.name} takes no prompts.")
        if isinstance(prompts, str) or not prompts:
            raise ValueError("prompts must be a list of at least one text, one a sample.")
        if len(self._encoded) >= REMEMBERED_PROMPTS:
            self._encoded.clear()
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._encoded:
                self._encoded[prompt] = self.family.encode(self.pipeline, prompt)
        encoded = [self._encoded[prompt] for prompt in prompts]
        cond = {key: torch.cat([each[key] for each in encoded]) for key in encoded[0]}
        null = {key: value[0] for key, value in self.family.encode_null(self.pipeline, prompts[0], negative).items()}
        told = self.family.time_ids(size or self.size)
        return cond | {key: value.to(self._device).repeat(len(prompts), 1) for key, value in told.items()}, null

    def guided(self, guidance_scale: float = 1.0, null: Mapping[str, float | Tensor] | None = None) -> Any:
        """What the pipeline samples from: with guidance, and limited as the config of its scheduler says (``clip_sample``).

        Args:
            guidance_scale: 1 is none.
            null: from `encode`, or of a label. Models that were distilled from guided ones (Flux) take the scale as a condition, and no
                null.

        Raises:
            FewstepError: for a scale without a null.
        """
        denoiser: Any = self
        if self.family.distilled():
            denoiser = Distilled(self, guidance_scale)
        elif guidance_scale != 1.0:
            if not null:
                raise FewstepError(f"guidance needs a null, what stands for no condition; {self.info.name} was given none.")
            denoiser = ClassifierFree(self, guidance_scale, null)
        return _limited(denoiser, self.pipeline.scheduler.config)

    # ---- pictures ------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, x: Tensor, *, at_once: int = 4) -> Tensor:
        """Pictures from samples; of a model of pixels, the samples.

        Args:
            x: ``"batch *shape"``.
            at_once: how many are decoded at a time.

        Returns:
            ``"batch 3 height width"``, or ``"batch 3 frames height width"``, in about [-1, 1].
        """
        if not self.family.latent:
            return x
        vae = self.pipeline.vae
        with _without_half_precision(vae) as dtype:
            latents = _unscaled(vae.config, x.to(self._device, dtype), self.family.shifts_latents)
            return torch.cat([vae.decode(piece, return_dict=False)[0] for piece in latents.split(at_once)])

    @property
    def _device(self) -> torch.device:
        return self.pipeline._execution_device


def _served(what: str, class_name: str, config: Mapping[str, Any] | None = None) -> type[Family]:
    family = family_of(class_name, config)
    if family is None:
        raise UnknownNameError(what, class_name, [name for known in FAMILIES for name in known.pipelines], "It is not served.")
    return family


def _check_pipeline(pipeline: Any, family: type[Family]) -> None:
    """Refuse a pipeline without a part, or with settings under which one network does not serve all times alike."""
    for part in (family.part, "vae") if family.latent else (family.part,):
        if getattr(pipeline, part, None) is None:
            raise FewstepError(f"the pipeline has no {part}.")
    for name in ("boundary_ratio", "expand_timesteps"):
        if pipeline.config.get(name):
            raise FewstepError(f"a pipeline with {name} (Wan 2.2) is not served.")


def _info(network: Family, name: str) -> ModelInfo:
    weights = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    return ModelInfo(
        name=name,
        shape=network.shape(network.default_size()),
        data_range=None if network.latent else (-1.0, 1.0),
        conditions=network.conditions(),
        embeddings=network.embeddings(),
        fingerprint=digest_of(weights),
    )


def _reading(network: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Denoiser`: the network, and what a scheduler's config says of it, as `PlanScheduler` reads it.

    Raises:
        FewstepError: for a network that is asked in a way that is not served.
    """
    check_config(config)
    schedule, host = schedule_of(config), network_of({**config, **unsaid(config)})
    if isinstance(host, PreconditionedNetwork) and host.time == "continuous":
        inner = network if host.sign > 0.0 else _Opposite(network)
        dtype = torch.promote_types(network.model.dtype, torch.float32)  # type: ignore[arg-type]
        wrapped = EDMPreconditioned(inner, host.sigma_data)
        return {"network": wrapped, "schedule": schedule, "predicts": "data", "network_dtype": dtype}
    reading: dict[str, Any] = {"network": network, "schedule": schedule}
    if isinstance(host, FlowNetwork) and not host.inverted:
        return {**reading, "predicts": host.predicts, "network_time": lambda t: host.count * schedule.sigma(t)}
    if isinstance(host, TableNetwork):
        return {**reading, "predicts": host.predicts, "integer_time": not host.fractional}
    raise FewstepError("a network that is told 1 - sigma (invert_sigmas), or an angle, is not served.")


class _Opposite(torch.nn.Module):
    """The network of a velocity in EDM's preconditioning, which has the opposite sign."""

    def __init__(self, network: Family):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        """The output, ``"batch *shape"``."""
        return -self.network(x, time, **cond)


@contextmanager
def _without_half_precision(vae: Any) -> Iterator[torch.dtype]:
    """The decoder in at least single precision, because some overflow in half; as it was afterwards."""
    own = vae.dtype
    dtype = torch.promote_types(own, torch.float32)
    if dtype == own:
        yield own
        return
    vae.to(dtype)
    try:
        yield dtype
    finally:
        vae.to(own)


def _limited(denoiser: Any, config: Mapping[str, Any]) -> Any:
    if config.get("thresholding"):
        ratio = config.get("dynamic_thresholding_ratio", 0.995)
        return DynamicThreshold(denoiser, ratio, ceiling=float(config.get("sample_max_value", 1.0)))
    if config.get("clip_sample"):
        reach = float(config.get("clip_sample_range", 1.0))
        return Clipped(denoiser, -reach, reach)
    return denoiser


def _unscaled(config: Mapping[str, Any], x: Tensor, shifts: bool) -> Tensor:
    """Latents in the units of the decoder."""
    scaling = config.get("scaling_factor") or 1.0
    mean, std = (config.get(f"latents_{name}") for name in ("mean", "std"))
    if mean is not None and std is not None:
        column = (-1, *[1] * (x.ndim - 2))
        return x * x.new_tensor(std).reshape(column) / scaling + x.new_tensor(mean).reshape(column)
    return x / scaling + ((config.get("shift_factor") or 0.0) if shifts else 0.0)


# ---- from disk ---------------------------------------------------------------------------------------------------------------------


def load_folder(
    folder: Path,
    *,
    name: str | None = None,
    schedule: NoiseSchedule | None = None,
    predicts: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Denoiser:
    """The denoiser of a pipeline's folder, or of the folder of a model alone, which encodes and decodes nothing.

    Args:
        folder: with ``model_index.json``; or with ``config.json``, the scheduler's folder beside it unless `schedule` and `predicts`
            are given.
        name: how to call it; left out, the folder's name.
        schedule, predicts: of a model alone.
        device, dtype: of the networks; a dtype left out is that of diffusers' ``from_pretrained``.

    Raises:
        ArtefactError: for pickled weights, or a damaged folder.
        UnknownNameError: for a pipeline or a model that is not served.
        FileNotFoundError: for a folder without weights.
        TypeError: if `schedule` and `predicts` are missing or superfluous.
    """
    name = name or folder.name
    if not (folder / INDEX).is_file():
        return _load_model(folder, name, schedule, predicts, device, dtype)
    if schedule is not None or predicts is not None:
        raise TypeError(f"{folder} says its schedule and prediction itself; leave schedule= and predicts= out.")
    index = _read_json(folder / INDEX)
    family = _served("pipeline", str(index.get("_class_name")))
    parts = {key: value for key, value in index.items() if isinstance(value, list) and value[0] and key not in LEFT_OUT}
    for key, value in parts.items():
        if value[0] not in LIBRARIES:
            raise ArtefactError(f"{folder}: its {key} comes from {value[0]}; only diffusers and transformers are served.")
    variants = {key: _variant(folder / key) for key in parts if key not in WITHOUT_WEIGHTS}
    absent = [key for key, value in index.items() if isinstance(value, list) and not value[0]]
    left_out: dict[str, Any] = {key: None for key in (*LEFT_OUT, *absent) if key in index}
    if "requires_safety_checker" in index:
        left_out["requires_safety_checker"] = False
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    with _explained(folder):
        pipeline = DiffusionPipeline.from_pretrained(
            folder, use_safetensors=True, variant=variants[family.part], torch_dtype=dtype, **left_out
        )
    return PipelineDenoiser(pipeline.to(device), name=name)


def _load_model(
    folder: Path,
    name: str,
    schedule: NoiseSchedule | None,
    predicts: str | None,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> Denoiser:
    config = _read_json(folder / CONFIG)
    class_name = str(config.get("_class_name"))
    family = _served("model", class_name, config)
    beside = folder.parent / SCHEDULER
    if schedule is not None and predicts is not None:
        said: Mapping[str, Any] | None = None
    elif schedule is None and predicts is None and beside.is_file():
        said = _read_json(beside)
    else:
        raise TypeError(f"{folder} is a model alone: it needs schedule= and predicts=, or a scheduler's folder beside it.")
    import diffusers

    variant = _variant(folder)
    with _explained(folder):
        model = getattr(diffusers, class_name).from_pretrained(folder, use_safetensors=True, variant=variant, torch_dtype=dtype)
    network = family(model.to(device)).eval().requires_grad_(False)
    reading = {"network": network, "schedule": schedule, "predicts": predicts} if said is None else _reading(network, said)
    return Denoiser(info=_info(network, name), **reading)


def load_file(path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> PipelineDenoiser:
    """The denoiser of a single ``.safetensors`` checkpoint that diffusers' ``from_single_file`` can read; configs come from the hub.

    Raises:
        ArtefactError: for a file that diffusers cannot read.
        UnknownNameError: for a checkpoint of another model.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type
    from safetensors.torch import load_file as read_tensors

    with _explained(path):
        tensors = read_tensors(path)
        kind = infer_diffusers_model_type(tensors)
    if kind == "v1" and not any(
        key.startswith("model.diffusion_model.") for key in tensors
    ):  # what diffusers takes anything else for
        part = f" It looks like a part of one: load its folder, {path.parent}." if (path.parent / CONFIG).is_file() else ""
        raise ArtefactError(f"{path} is no checkpoint of a model that is known.{part}")
    if kind not in SINGLE_FILES:
        raise UnknownNameError("kind of checkpoint", kind, SINGLE_FILES, "It is not served.")
    with _explained(path):
        pipeline = getattr(diffusers, SINGLE_FILES[kind]).from_single_file(str(path), torch_dtype=dtype)
    return PipelineDenoiser(pipeline.to(device), name=path.stem)


def download(name: str) -> Path:
    """The folder of a repository of the hub, brought here unless it is already: a pipeline's parts, or a model's files.

    Raises:
        FileNotFoundError: if there is none, or the hub cannot be reached.
        UnknownNameError: for a pipeline that is not served, before its weights come.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        index = Path(hf_hub_download(name, INDEX))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"there is no folder {name}, and the hub cannot be reached: {_first_line(error)}") from error
    except EntryNotFoundError:
        patterns = [CONFIG, "*.safetensors", "*.safetensors.index.json"]
        with _explained(name):
            return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"there is no folder {name}, and the hub says: {_first_line(error)}") from error
    _served("pipeline", str(_read_json(index).get("_class_name")))
    with _explained(name):
        return Path(DiffusionPipeline.download(name, use_safetensors=True))


def _variant(folder: Path) -> str | None:
    """The variant of a folder's weights: None if there are plain ones.

    Raises:
        ArtefactError: if they are pickled, or an index of several files names one that may be.
        FileNotFoundError: if there are none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder.parent} has no folder {folder.name}.")
    found = [match for match in map(WEIGHTS.fullmatch, sorted(file.name for file in folder.iterdir())) if match]
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        named = _read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(str(name).endswith(".safetensors") for name in named.values()):
            raise ArtefactError(f"{index} names files that are not .safetensors.")
    if found:
        variants = [match[1] for match in found]
        return None if None in variants else variants[0]
    check_not_pickled(folder)
    raise FileNotFoundError(f"{folder} has no weights (.safetensors).")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtefactError(f"{path} is no JSON file: {error}.") from error
    if not isinstance(document, dict):
        raise ArtefactError(f"{path} holds no JSON object.")
    return document


@contextmanager
def _explained(source: Path | str) -> Iterator[None]:
    """What diffusers says of a source that it cannot read, in one line; its bars and transformers' wish for torchvision are left out."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import SafetensorError

    known = (AttributeError, KeyError, OSError, RuntimeError, SafetensorError, SingleFileComponentError, TypeError, ValueError)
    with ExitStack() as stack:
        for shown in _loggers():
            if shown.is_progress_bar_enabled():
                shown.disable_progress_bar()
                stack.callback(shown.enable_progress_bar)
        imports = logging.getLogger("transformers.utils.import_utils")
        imports.addFilter(_needs_no_torchvision)
        stack.callback(imports.removeFilter, _needs_no_torchvision)
        try:
            yield
        except known as error:
            raise ArtefactError(f"{source} cannot be read: {_first_line(error)}") from error


def _needs_no_torchvision(record: logging.LogRecord) -> bool:
    """Whether to log this: not that a class which reads pictures would like torchvision, since none is read."""
    return "requires torchvision" not in record.getMessage()


def _loggers() -> list[Any]:
    """The modules that show bars while weights are read."""
    from diffusers.utils import logging as own
    from diffusers.utils.import_utils import is_transformers_available

    if not is_transformers_available():
        return [own]
    from transformers.utils import logging as theirs

    return [own, theirs]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
