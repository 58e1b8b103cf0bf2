"""What distillation makes: `Student`, a network or an adapter with everything that it takes to sample from it in a few calls.

A student's *folder* holds

- ``student.json``, the card: the method and its options, the numbers of calls with the exact times that the network is told, the guidance,
  the teacher with the digest of its weights, and how well it did; ``README.md`` says the same to people;
- ``pytorch_lora_weights.safetensors``, an adapter as diffusers' ``load_lora_weights`` reads it, or ``student.safetensors``, all weights;
- ``plan-N.safetensors``, the plan of N calls;
- ``scheduler/``, of a pipeline's student: a scheduler for the pipeline that runs the plan;
- ``probe.safetensors``, states and what the student said of them, so that whatever is loaded can be compared.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.adapt.lora import FILE, load_adapter, save_adapter
from fewstep.artefacts import json_value, write_atomically
from fewstep.denoisers import innermost
from fewstep.distill.networks import read_as
from fewstep.distill.student_network import WRAPPERS, AdaptedNetwork, GuidanceEmbedded, core, part_of
from fewstep.errors import ArtefactError, PlanError
from fewstep.guidance import Distilled
from fewstep.identity import identity
from fewstep.loading import load
from fewstep.noise import check_seeds, draw_noise
from fewstep.plan import Plan
from fewstep.sampler import sample

__all__ = ["CARD", "Student"]

CARD, WEIGHTS, PROBE, README = "student.json", "student.safetensors", "probe.safetensors", "README.md"
LARGEST_DIFFERENCE = 1e-5
"""Between what a student said when it was saved and says when it is loaded, relative to the largest value if that is above 1."""
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Student:
    """A distilled model.

    Args:
        network: its network, called as the teacher's is.
        teacher: the denoiser that it learnt from, or one of the same reading and other weights.
        plans: number of calls -> plan.
        card: JSON values: how it was made, and how well it does.
        probe: ``{"x", "time", ...}``: states, what the network is told of their time, and conditions, on which a saved student is compared
            with the loaded one.
        guidance_scale: of a student that is told the scale, the one it is asked for unless another is given; else None.

    Example:
        >>> import fewstep as fs
        >>> from fewstep.distill import distill
        >>> exact = fs.exact.Gaussian(fs.schedules.Flow(), [1.0, -1.0], 0.1)
        >>> class Network(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2))
        ...     def forward(self, x, time):
        ...         return self.layers(torch.cat([x, time[:, None]], 1))
        >>> data = {"x": exact.draw(512, seed=0).float()}
        >>> student = distill(exact, network=Network(), data=data, steps=(1, 2), iterations=20, compare=None)
        >>> student.sample(range(4), nfe=2).shape
        torch.Size([4, 2])
    """

    network: nn.Module
    teacher: Callable[..., Tensor] = field(repr=False)
    plans: Mapping[int, Plan]
    card: dict[str, Any] = field(repr=False)
    probe: Mapping[str, Tensor] = field(repr=False)
    guidance_scale: float | None = None

    # ---- sampling ------------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def denoiser(self) -> Any:
        """Its data prediction, for `fewstep.sample` and the tuners."""
        return self._denoiser(self.guidance_scale)

    def _denoiser(self, guidance_scale: float | None) -> Any:
        made = read_as(self.teacher, self.network.eval())
        told = hashlib.sha256(f"{identity(self.teacher)['fingerprint']} {identity(made)['fingerprint']}".encode()).hexdigest()
        made.info = dataclasses.replace(made.info, name=f"student of {made.info.name}", fingerprint=told)
        return made if guidance_scale is None else Distilled(made, guidance_scale)

    def plan(self, nfe: int | None = None) -> Plan:
        """The plan of so many calls; of the most it is made for, if nothing is said.

        Raises:
            PlanError: for a number of calls that it is not made for.
        """
        nfe = max(self.plans) if nfe is None else nfe
        if nfe not in self.plans:
            raise PlanError(f"this student has plans of {', '.join(map(str, sorted(self.plans)))} calls, not of {nfe}.")
        return self.plans[nfe]

    @torch.no_grad()
    def sample(
        self,
        seeds: Iterable[int] | Tensor,
        *,
        nfe: int | None = None,
        cond: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Samples.

        Args:
            seeds: one whole number a sample, of the starting noise and of that which the plan draws.
            nfe: number of calls; as of `plan`.
            cond: conditions, one entry a sample.
            noise: other starting noise, at the scale of the plan's start.
            guidance_scale: for a student that is told the scale.

        Returns:
            ``Float[Tensor, "batch *shape"]``.
        """
        plan, seeds = self.plan(nfe), check_seeds(seeds)
        if guidance_scale is not None and self.guidance_scale is None:
            raise ValueError("this student is not told the guidance scale; it has the one that it was taught under. Leave it out.")
        denoiser = self.denoiser if guidance_scale is None else self._denoiser(guidance_scale)
        if noise is None:
            like = self.probe["x"]
            noise = draw_noise(like.shape[1:], seeds, plan, dtype=like.dtype, device=_device(self.network))
        return sample(denoiser, noise, plan, cond=cond, seeds=seeds)

    # ---- files ---------------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | PathLike[str], *, form: str = "peft") -> Path:
        """Write the folder; what it holds is compared with the student before it is done.

        Args:
            folder: where; made if needed.
            form: of an adapter's file, see `fewstep.adapt.save_adapter`.

        Raises:
            ArtefactError: if what was written is not the student.
        """
        from safetensors.torch import save

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        (place / CARD).unlink(missing_ok=True)  # comes last: a folder with a card is whole
        answers = self._answers()
        if isinstance(self.network, AdaptedNetwork):
            part = part_of(self.network)
            save_adapter(core(self.network), place, ask=functools.partial(self._ask_core), part=part, form=form)
            (place / WEIGHTS).unlink(missing_ok=True)
        else:
            state = {name: value.detach().cpu().clone().contiguous() for name, value in self.network.state_dict().items()}
            write_atomically(place / WEIGHTS, save(state, metadata={"format": "pt"}))
            (place / FILE).unlink(missing_ok=True)
        for old in place.glob("plan-*.safetensors"):
            old.unlink()
        for nfe, plan in self.plans.items():
            plan.save(place / f"plan-{nfe}.safetensors")
        told = {name: value.detach().cpu().contiguous() for name, value in {**self.probe, "said": answers}.items()}
        write_atomically(place / PROBE, save(told))
        self._save_scheduler(place)
        write_atomically(place / README, self._readme().encode())
        write_atomically(place / CARD, (json.dumps(json_value(self.card), indent=2, allow_nan=False) + "\n").encode())
        try:
            Student.load(place, self.teacher, network=self._blank())
        except ArtefactError:
            (place / CARD).unlink()
            raise
        return place

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        base: Any = None,
        *,
        other_base: bool = False,
        network: nn.Module | None = None,
        **options: Any,
    ) -> Student:
        """Read a folder that `save` wrote.

        Args:
            folder: where it is.
            base: the teacher: a denoiser, guided or not, or whatever `fewstep.load` takes. Left out, it is loaded by the card's name.
            other_base: take an adapter to another model than it was made for, such as a fine-tuned one; nothing is compared then.
            network: what the weights go into, for a student whose network is not the teacher's.
            **options: of `fewstep.load`, where that loads the base: ``device``, ``dtype``.

        Raises:
            ArtefactError: if the folder is damaged, the base another one, or the student does not say what it said when it was saved.
            FileNotFoundError: if there is none.
        """
        place = Path(folder)
        card = _read_card(place)
        source = card["base"].get("source", card["base"]["name"]) if base is None else base
        teacher = source if hasattr(source, "schedule") else load(source, **options)
        if not other_base:
            _check_base(card, teacher, place)
        student_network = _read_network(place, card, innermost(teacher, "network") if network is None else network)
        tensors = _read_tensors(place / PROBE)
        said = tensors.pop("said")
        plans = {int(nfe): Plan.load(place / f"plan-{nfe}.safetensors") for nfe in card["calls"]}
        student = cls(student_network, teacher, plans, card, tensors, card["guidance_scale"])
        if not other_base:
            now = student._answers().cpu()
            difference = float((now - said).abs().max()) / max(1.0, float(said.abs().max()))
            if not difference <= LARGEST_DIFFERENCE:
                raise ArtefactError(f"{place} is not the student that was saved: what it says differs by {difference:.2g}.")
        return student

    def _blank(self) -> nn.Module | None:
        """A copy of a network that is not the teacher's, for the weights to go into."""
        return copy.deepcopy(self.network) if innermost(self.teacher, "network") is None else None

    @torch.no_grad()
    def _ask(self, network: nn.Module) -> Tensor:
        device = _device(network)
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        given = {name: value.to(device) for name, value in self.probe.items()}
        x, time = given.pop("x").to(dtype), given.pop("time")
        extra = {} if self.guidance_scale is None else {"guidance": x.new_full((len(x),), self.guidance_scale, dtype=torch.float32)}
        return network(x, time, **given, **extra).float()

    def _answers(self) -> Tensor:
        training = self.network.training
        said = self._ask(self.network.eval())
        self.network.train(training)
        return said

    def _ask_core(self, inner: nn.Module) -> Tensor:
        """What the network says with another core."""
        whole = self.network.network
        own = core(self.network)
        if whole is own:
            return self._ask(inner)
        holder = next(part for part in whole.modules() if getattr(part, "model", None) is own)  # type: ignore[union-attr]
        holder.model = inner
        try:
            return self._ask(whole)  # type: ignore[arg-type]
        finally:
            holder.model = own

    def _save_scheduler(self, place: Path) -> None:
        pipeline = innermost(self.teacher, "pipeline")
        if pipeline is not None:
            self._scheduler(pipeline, None).save_pretrained(place / "scheduler")

    def _scheduler(self, pipeline: Any, nfe: int | None) -> Any:
        from fewstep.diffusers import PlanScheduler

        return PlanScheduler.from_plan(self.plan(nfe), pipeline.scheduler.config)

    def _readme(self) -> str:
        card, base = self.card, self.card["base"]
        lines = [f"# Student of {base['name']}", "", f"Made by `{card['method']['name']}` with fewstep {card['fewstep']}.", ""]
        lines += ["| calls | the network is told |", "| --- | --- |"]
        lines += [f"| {nfe} | {', '.join(f'{time:g}' for time in times)} |" for nfe, times in card["calls"].items()]
        lines += ["", f"- base: {base['name']}, weights {base['fingerprint']}", f"- guidance: {json.dumps(card['guidance'])}"]
        if card["adapter"] is not None:
            lines += [f"- adapter: {json.dumps(card['adapter'])}; to be used with weight 1 and guidance_scale=1 in a pipeline"]
        lines += [f"- {line}" for line in card.get("told", [])]
        return "\n".join([*lines, "", "Load it with `fewstep.distill.Student.load(FOLDER, BASE)`.", ""])

    # ---- in a pipeline -------------------------------------------------------------------------------------------------------------

    def pipeline(self, base: Any, nfe: int | None = None, *, name: str = "fewstep") -> Any:
        """Put the student into a pipeline of diffusers: its adapter or its weights, and a scheduler that runs its plan.

        Call it with ``num_inference_steps=nfe`` and ``guidance_scale=1.0``: the guidance is in the student. One that is told the scale is
        told ``guidance_scale`` by the pipelines that do so.

        Args:
            base: the pipeline; it is changed, and returned.
            nfe: number of calls; as of `plan`.
            name: of the adapter. Weights beside other adapters: ``base.set_adapters(["style", name], [0.8, 1.0])``.

        Raises:
            TypeError: for a student of a network that is no pipeline's.
        """
        part = part_of(self.network)
        if part is None:
            raise TypeError(f"the student's network is a {type(self.network).__name__}, not a part of a diffusers pipeline.")
        base.scheduler = self._scheduler(base, nfe)
        if isinstance(self.network, AdaptedNetwork):
            with tempfile.TemporaryDirectory() as folder:
                save_adapter(core(self.network), folder, ask=self._ask_core, part=part)
                base.load_lora_weights(folder, adapter_name=name, weight_name=FILE)
        else:
            setattr(base, part, self._model(getattr(base, part)))
        return base

    def _model(self, like: Any) -> Any:
        """A model of diffusers with the student's weights; with a projection of the guidance scale, if it is told that."""
        state, options = dict(core(self.network).state_dict()), {}
        if isinstance(self.network, GuidanceEmbedded):
            state = dict(core(self.network.network).state_dict())
            options = {"time_cond_proj_dim": self.network.project.in_features}
            state["time_embedding.cond_proj.weight"] = self.network.project.weight
        made = type(like).from_config(like.config, **options)
        made.load_state_dict(state)
        return made.to(_device(like), like.dtype).eval()


def _device(network: nn.Module) -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def _read_card(place: Path) -> dict[str, Any]:
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


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}.") from None
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} cannot be read: {str(error)[:200]}. It is truncated, damaged or foreign.") from error


def _check_base(card: Mapping[str, Any], teacher: Any, place: Path) -> None:
    wanted, found = card["base"]["fingerprint"], identity(teacher)["fingerprint"]
    if wanted != found:
        hint = " Its adapter may serve other weights of the same layers: pass other_base=True." if card["adapter"] else ""
        raise ArtefactError(
            f"{place} was made for {card['base']['name']} ({str(wanted)[:12]}), but the base has other weights ({str(found)[:12]}).{hint}"
        )


def _read_network(place: Path, card: Mapping[str, Any], inner: Any) -> nn.Module:
    if not isinstance(inner, nn.Module):
        raise TypeError("the base has no network, as an exact denoiser has none: pass network=, one like the student's.")
    if card["adapter"] is not None:
        return AdaptedNetwork(inner, lambda part: load_adapter(part, place)).eval()
    network: nn.Module = copy.deepcopy(inner)
    if card["wrapped"] is not None:
        network = WRAPPERS[card["wrapped"]["kind"]](network, **card["wrapped"]["options"])
    try:
        network.load_state_dict(_read_tensors(place / WEIGHTS))
    except RuntimeError as error:
        raise ArtefactError(f"{place / WEIGHTS} does not fit the base: {str(error).splitlines()[-1].strip()[:200]}") from error
    return network.eval().requires_grad_(False)
