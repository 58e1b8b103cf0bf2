r"""Low-rank adapters: a thin layer on PEFT for any module, and their files.

A layer of weight W becomes $W + \frac{a}{r} B A$ with A of r rows, B of r columns and the *alpha* a; several adapters on one layer add up,
$W + \sum_k w_k \frac{a_k}{r_k} B_k A_k$. B begins at zero, so a network with a new adapter is the network, bit for bit.

Files are those of diffusers, ``pytorch_lora_weights.safetensors`` with its metadata, which ``load_lora_weights`` of a pipeline and
``load_lora_adapter`` of a model read; or Kohya's. The scale a / r is not in the weights: a file that loses the alpha is read with a = r,
and its adapter is then too weak or too strong without a word. So the alpha is always written, and whatever is saved is loaded into a fresh
network and compared before saving is done.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). This is the one file that imports PEFT.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.artefacts import write_atomically
from fewstep.errors import ArtefactError, FewstepError, MissingExtraError, UnknownNameError

__all__ = [
    "FILE",
    "LoraOptions",
    "adapters_of",
    "add_adapter",
    "bare",
    "disabled",
    "fuse",
    "load_adapter",
    "save_adapter",
    "set_adapters",
    "sum_adapters",
    "unfuse",
]

FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for."""
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the configuration, in the header."""
KOHYA = "lora_unet_"
"""What Kohya's keys of a denoising network begin with."""
PARTS = ("unet", "transformer")
"""Parts of pipelines whose names the keys of a pipeline's file begin with."""
LARGEST_DIFFERENCE = 1e-5
"""Of outputs, relative to the largest if that is above 1, between a saved adapter and its file."""
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""What LCM-LoRA adapts in the networks of diffusers."""
SIMPLE = {"bias": "none", "modules_to_save": None}
"""Options of PEFT that change what is not low-rank, for which diffusers' files have no place."""
FORMATS = ("peft", "kohya")
"""Forms of an adapter's file."""


@dataclass(frozen=True)
class LoraOptions:
    """What an adapter is like.

    Args:
        rank: r.
        alpha: a; left out, it is the rank, so the scale a / r is 1.
        targets: ends of the names of the layers to adapt. None given: those of LCM-LoRA where the network has them, else every linear
            layer and convolution.
        dropout: of the input of A, while training.
        others: further options of ``peft.LoraConfig``: ``{"use_dora": True}``, ``{"init_lora_weights": "gaussian"}``.

    Raises:
        ValueError: for a rank below 1 or a dropout outside [0, 1).
    """

    rank: int = 64
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1 or not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"an adapter needs a rank of at least 1 and a dropout in [0, 1), got {self.rank!r} and {self.dropout}."
            )

    def config(self, network: nn.Module) -> Any:
        """The ``peft.LoraConfig`` for a network."""
        alpha = self.rank if self.alpha is None else self.alpha
        options = {"r": self.rank, "lora_alpha": alpha, "lora_dropout": self.dropout, **self.others}
        return _peft().LoraConfig(**options, target_modules=list(self.targets) or _layers(network))

    def told(self) -> dict[str, Any]:
        """As JSON values."""
        alpha = self.rank if self.alpha is None else self.alpha
        options = {"rank": self.rank, "alpha": alpha, "targets": list(self.targets), "dropout": self.dropout}
        return {**options, "others": dict(self.others)}


def _peft() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries that it looks for
            import peft
    except ImportError as missing:
        raise MissingExtraError("PEFT", "diffusers", "fewstep.adapt.lora") from missing
    return peft


def _layers(network: nn.Module) -> list[str]:
    """The layers that are adapted when nobody says which."""
    adapted = _adapted(network)
    closed = (*adapted, *(name for name, part in network.named_modules() if isinstance(part, nn.MultiheadAttention)))
    within = tuple(f"{name}." for name in closed)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    parts = {name: adapted[name].get_base_layer() if name in adapted else part for name, part in network.named_modules()}
    names = [
        name
        for name, part in parts.items()
        if isinstance(part, kinds) and getattr(part, "groups", 1) == 1 and name and not name.startswith(within)
    ]
    known = [target for target in TARGETS if any(name == target or name.endswith(f".{target}") for name in names)]
    if not names:
        raise FewstepError(f"a {type(network).__name__} has no linear layer and no convolution that an adapter could be put on.")
    return known or names


# ---- on a network ------------------------------------------------------------------------------------------------------------------


def add_adapter(network: nn.Module, options: Any = None, *, name: str = "default", seed: int = 0) -> None:
    """Put a new adapter on a network, in place. Everything else of it is frozen; the output stays what it was, bit for bit.

    Args:
        network: any module.
        options: `LoraOptions`, or a ``peft.LoraConfig``.
        name: of the adapter.
        seed: of A, which begins random.

    Raises:
        MissingExtraError: without PEFT.
        FewstepError: for a name that is taken, or options that are not low-rank.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 2))
        >>> x = torch.ones(3, 2)
        >>> before = network(x)
        >>> add_adapter(network, LoraOptions(rank=2))
        >>> torch.equal(network(x), before), adapters_of(network)
        (True, ['default'])
    """
    config = LoraOptions().config(network) if options is None else options
    config = config.config(network) if isinstance(config, LoraOptions) else config
    _check_config(config)
    if name in adapters_of(network):
        raise FewstepError(f"the network has an adapter {name!r} already; give another name.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(network, config, name)


def _inject(network: nn.Module, config: Any, name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # several adapters are meant
        _peft().inject_adapter_in_model(config, network, adapter_name=name)
    for layer in _adapted(network).values():
        for part in _weights(layer, name):
            if part.dtype in (torch.float16, torch.bfloat16):
                part.data = part.data.float()  # half precision is too coarse for the updates of an optimizer
    if hasattr(network, "_hf_peft_config_loaded"):  # what diffusers' models ask before they touch adapters
        network._hf_peft_config_loaded = True  # type: ignore[assignment]


def _weights(layer: Any, name: str) -> Iterator[nn.Parameter]:
    for kind in layer.adapter_layer_names:
        found = getattr(layer, kind)
        if name in found:
            yield from [found[name]] if isinstance(found[name], nn.Parameter) else found[name].parameters()


def _check_config(config: Any) -> None:
    for key, plain in SIMPLE.items():
        if getattr(config, key, plain) not in (plain, []):
            raise FewstepError(
                f"{key}={getattr(config, key)!r} changes more than low-rank matrices, which diffusers' files cannot hold."
            )


def _adapted(network: nn.Module) -> dict[str, Any]:
    """Name -> layer with adapters."""
    if not adapters_of(network):
        return {}
    from peft.tuners.lora import LoraLayer  # a network with adapters has PEFT

    return {name: part for name, part in network.named_modules() if isinstance(part, LoraLayer)}


def adapters_of(network: nn.Module) -> list[str]:
    """Names of the adapters on a network."""
    return list(getattr(network, "peft_config", {}))


def _check_name(network: nn.Module, name: str) -> None:
    if name not in adapters_of(network):
        raise UnknownNameError("adapter", name, adapters_of(network))


def set_adapters(network: nn.Module, weights: Mapping[str, float]) -> None:
    """Let these adapters act, each with its weight, and no others: the exact sum of their changes. None: the network alone.

    Raises:
        UnknownNameError: for an adapter that the network does not have.
    """
    for name in weights:
        _check_name(network, name)
    for layer in _adapted(network).values():
        trained = [(part, part.requires_grad) for part in layer.parameters()]
        layer.enable_adapters(bool(weights))
        if weights:
            layer.set_adapter([name for name in weights if name in layer.scaling])
        for name, weight in weights.items():
            layer.set_scale(name, weight)
        for part, needed in trained:
            part.requires_grad_(needed)


@contextmanager
def disabled(network: nn.Module) -> Iterator[None]:
    """Within it, the network is as if it had no adapters: the teacher of a student that is an adapter."""
    layers = [layer for layer in _adapted(network).values() if not layer.disable_adapters]
    for layer in layers:
        layer._disable_adapters = True  # `enable_adapters` would change what is trained
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def sum_adapters(network: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Make one adapter of several: the exact weighted sum of their changes, of the sum of their ranks.

    PEFT's ``add_weighted_adapter(combination_type="linear")`` mixes A with A and B with B instead, which is another map.

    Args:
        network: with the adapters.
        weights: name -> weight.
        name: of the new one.

    Raises:
        UnknownNameError: for an adapter that the network does not have.
        FewstepError: for DoRA, whose changes are no sums.
    """
    for each in weights:
        _check_name(network, each)
        if network.peft_config[each].use_dora:  # type: ignore[index]
            raise FewstepError(f"the adapter {each!r} is of DoRA, whose change is not low-rank; there is no exact sum.")
    state: dict[str, Tensor] = {}
    for place, layer in _adapted(network).items():
        there = {each: weight for each, weight in weights.items() if each in layer.lora_A}
        if there:
            scales = {each: weight * _scale(layer, network, each) for each, weight in there.items()}
            state[f"{place}.lora_A.weight"] = torch.cat([layer.lora_A[each].weight.detach().float() for each in there])
            parts = [scales[each] * layer.lora_B[each].weight.detach().float() for each in there]
            state[f"{place}.lora_B.weight"] = torch.cat(parts, 1)
    _load_state(network, state, {}, name)


def _scale(layer: Any, network: nn.Module, name: str) -> float:
    """The scale a / r of a layer, without the weight that it acts with."""
    config: Any = network.peft_config[name]  # type: ignore[index]
    rank, alpha = layer.r[name], layer.lora_alpha[name]
    return alpha / (rank**0.5 if config.use_rslora else rank)


def fuse(network: nn.Module) -> None:
    """Add the acting adapters to the weights, so that they cost nothing. They are kept, for `unfuse`."""
    for layer in _adapted(network).values():
        if not layer.disable_adapters:
            layer.merge()


def unfuse(network: nn.Module) -> None:
    """Take the fused adapters off the weights again, to the rounding of the weights' precision."""
    for layer in _adapted(network).values():
        layer.unmerge()


def bare(network: nn.Module) -> nn.Module:
    """A copy without adapters, with weights of its own. Fused ones must be unfused before."""
    if any(layer.merged for layer in _adapted(network).values()):
        raise FewstepError("the adapters are fused with the weights; unfuse them first.")
    made = copy.deepcopy(network)
    for name, layer in _adapted(made).items():
        parent, _, child = name.rpartition(".")
        setattr(made.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(made, "peft_config"):
        del made.peft_config
    if hasattr(made, "_hf_peft_config_loaded"):
        made._hf_peft_config_loaded = False  # type: ignore[assignment]
    return made


# ---- files -------------------------------------------------------------------------------------------------------------------------


def save_adapter(
    network: nn.Module,
    folder: str | PathLike[str],
    *,
    ask: Callable[[nn.Module], Tensor],
    name: str = "default",
    part: str | None = None,
    form: str = "peft",
) -> Path:
    """Write an adapter, load the file into a fresh network, and compare what both say.

    Args:
        network: with the adapter.
        folder: where; made if needed.
        ask: calls a network, such as ``lambda network: network(x, time)``; both must answer alike.
        name: of the adapter.
        part: ``"unet"`` or ``"transformer"``, for ``load_lora_weights`` of a pipeline; left out, the file is that of a model, for
            ``load_lora_adapter(folder, prefix=None, use_safetensors=True)`` or `load_adapter`.
        form: ``"peft"``, or ``"kohya"`` for ComfyUI and A1111.

    Returns:
        the file.

    Raises:
        ArtefactError: if the answers differ by more than 1e-5; a file that was there before stays.
        UnknownNameError: for an adapter that there is not.
        FewstepError: for what Kohya's form has no keys for.
    """
    _check_name(network, name)
    if form not in FORMATS:
        raise UnknownNameError("form of an adapter's file", form, FORMATS)
    content = _packed(network, name, part) if form == "peft" else _packed_kohya(network, name, part)
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{FILE}.new")
    try:
        write_atomically(beside, content)
        difference = _difference(network, beside, name, ask)
        if not difference <= LARGEST_DIFFERENCE:
            raise ArtefactError(
                f"the adapter {name!r} was not saved: loaded into a fresh network, its file gives outputs that differ by {difference:.2g} "
                f"(at most {LARGEST_DIFFERENCE:g}). Options of PEFT that a file does not hold change the network."
            )
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


@torch.no_grad()
def _difference(network: nn.Module, path: Path, name: str, ask: Callable[[nn.Module], Tensor]) -> float:
    """The largest one between the outputs of the adapter alone and of its file."""
    training = network.training
    layers = _adapted(network).values()
    before = [(layer, list(layer.active_adapters), dict(layer.scaling), layer.disable_adapters) for layer in layers]
    network.eval()
    try:
        set_adapters(network, {name: 1.0})
        mine = ask(network)
        fresh = bare(network)
        load_adapter(fresh, path)
        theirs = ask(fresh.eval())
    finally:
        network.train(training)
        for layer, active, scaling, off in before:
            layer._active_adapter, layer._disable_adapters = active, off
            layer.scaling.update(scaling)
    return float((mine - theirs).abs().max()) / max(1.0, float(mine.abs().max()))


def _packed(network: nn.Module, name: str, part: str | None) -> bytes:
    from safetensors.torch import save

    prefix = f"{part}." if part else ""
    told = {f"{prefix}{key}": value for key, value in _told(network.peft_config[name]).items()}  # type: ignore[index]
    tensors = {f"{prefix}{key}": value for key, value in _state(network, name).items()}
    return save(tensors, metadata={"format": "pt", METADATA: json.dumps(told, indent=2, sort_keys=True)})


def _told(config: Any) -> dict[str, Any]:
    """A configuration as JSON values: what is not a default, so that other versions of PEFT read it."""
    plain = type(config)().to_dict()
    given = {key: value for key, value in config.to_dict().items() if value != plain.get(key)}
    always = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": config.target_modules}
    told = {key: sorted(value) if isinstance(value, set) else value for key, value in {**given, **always}.items()}
    return {key: value for key, value in told.items() if key not in ("inference_mode", "peft_version")}


def _state(network: nn.Module, name: str) -> dict[str, Tensor]:
    found = _peft().get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().cpu().contiguous() for key, value in found.items()}


def _packed_kohya(network: nn.Module, name: str, part: str | None) -> bytes:
    """``lora_unet_<module>.lora_down | lora_up | alpha``, where alpha is the scale times the rank."""
    from safetensors.torch import save

    if part not in (None, "unet"):
        raise FewstepError(f"Kohya's form names the layers of a {part} otherwise than diffusers; only a unet's are served.")
    layers = {place: layer for place, layer in _adapted(network).items() if name in layer.lora_A}
    tensors: dict[str, Tensor] = {}
    for key, value in _state(network, name).items():
        place, _, kind = key.removesuffix(".weight").rpartition(".")
        if kind not in ("lora_A", "lora_B"):
            raise FewstepError(f"Kohya's form holds plain low-rank matrices; this adapter has {kind}.")
        tensors[f"{KOHYA}{place.replace('.', '_')}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = value
    for place, layer in layers.items():
        tensors[f"{KOHYA}{place.replace('.', '_')}.alpha"] = torch.tensor(float(_scale(layer, network, name) * layer.r[name]))
    return save(tensors, metadata={"format": "pt"})


def load_adapter(network: nn.Module, path: str | PathLike[str], *, name: str = "default") -> None:
    """Put the adapter of a file on a network, in place; it acts with weight 1, and no other does.

    Args:
        network: that it was made for, or one of the same layers.
        path: a file, or a folder with ``pytorch_lora_weights.safetensors``: of a model or a pipeline, in PEFT's or Kohya's form.
        name: of the adapter.

    Raises:
        ArtefactError: for another file, or one for other layers. A file that says no alpha is read with the rank, as diffusers does.
        FileNotFoundError: if there is none.
    """
    place = Path(path) / FILE if Path(path).is_dir() else Path(path)
    tensors, told = _read(place)
    if name in adapters_of(network):
        raise FewstepError(f"the network has an adapter {name!r} already; give another name.")
    if any(key.startswith("lora_") for key in tensors):
        state, settings = _of_kohya(network, tensors, place)
    else:
        state, settings = _of_part(tensors, told, place)
    try:
        _load_state(network, state, settings, name)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ArtefactError(f"{place} does not fit a {type(network).__name__}: {str(error).splitlines()[0][:200]}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, told  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no adapter {path}.") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise ArtefactError(f"{path} cannot be read: {str(error)[:200]}. It is truncated, damaged or foreign.") from error


def _of_part(tensors: dict[str, Tensor], told: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state and the configuration without the name of the pipeline's part."""
    parts = {key.split(".")[0] for key in tensors}
    others = {part for part in parts if part.startswith("text_encoder")}
    if others:
        raise ArtefactError(f"{path} adapts the text encoder too ({', '.join(sorted(others))}); load it into the whole pipeline.")
    prefix = f"{next(iter(parts))}." if len(parts) == 1 and parts <= set(PARTS) else ""
    settings = {key.removeprefix(prefix): value for key, value in told.items()}
    return {key.removeprefix(prefix): value for key, value in tensors.items()}, settings


def _of_kohya(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    places = {f"{KOHYA}{name.replace('.', '_')}": name for name, _ in network.named_modules()}
    if unknown := sorted({key.split(".")[0] for key in tensors} - places.keys()):
        raise ArtefactError(f"{path} adapts {unknown[0]}, which a {type(network).__name__} does not have.")
    kinds = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    state, alphas = {}, {}
    for key, value in tensors.items():
        place, _, kind = key.partition(".")
        if kind == "alpha":
            alphas[places[place]] = float(value)
        elif kind in kinds:
            state[f"{places[place]}.{kinds[kind]}"] = value
        else:
            raise ArtefactError(f"{path} holds {kind}, which is not plain low-rank.")
    return state, {"alpha_pattern": {f"^{place}": alpha for place, alpha in alphas.items()}}


def _load_state(network: nn.Module, state: dict[str, Tensor], settings: dict[str, Any], name: str) -> None:
    """A new adapter with these weights: exactly on the layers that they name, of the ranks that they have."""
    ranks = {key.removesuffix(".lora_A.weight"): len(value) for key, value in state.items() if key.endswith(".lora_A.weight")}
    if not ranks:
        raise ValueError("it holds no low-rank matrices")
    if missing := [place for place in ranks if place not in dict(network.named_modules())]:
        raise ValueError(f"it has no layer {missing[0]}")
    rank = settings.get("r", max(ranks.values()))
    config = {
        "r": rank,
        "lora_alpha": rank,
        **settings,
        "rank_pattern": {f"^{place}": value for place, value in ranks.items() if value != rank},
        "target_modules": f"^({'|'.join(re.escape(place) for place in ranks)})$",  # a list would name layers by the ends of their names
        "inference_mode": False,
    }
    if "alpha_pattern" not in settings and "lora_alpha" not in settings:  # nothing said: the scale is 1
        config["alpha_pattern"] = dict(config["rank_pattern"])
    made = _peft().LoraConfig(**config)
    _check_config(made)
    _inject(network, made, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = _peft().set_peft_model_state_dict(network, state, adapter_name=name)
    if result.unexpected_keys:
        raise ValueError(f"it has no place for {result.unexpected_keys[0]}")
    set_adapters(network, {name: 1.0})
