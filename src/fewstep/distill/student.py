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

from fewstep.adapt.lora import FORMATS, bare, save_adapter
from fewstep.artefacts import json_value, write_atomically
from fewstep.denoisers import innermost
from fewstep.distill.in_pipeline import put_into, scheduler_of
from fewstep.distill.networks import device_of, read_as
from fewstep.distill.student_folder import (
    CARD,
    FORMAT,
    PROBE,
    README,
    SCHEDULER,
    WEIGHTS,
    check_base,
    move,
    read_card,
    read_network,
    read_tensors,
)
from fewstep.distill.student_network import AdaptedNetwork, core, part_of
from fewstep.distill.told import Telling
from fewstep.errors import ArtefactError, PlanError, UnknownNameError
from fewstep.guidance import Distilled
from fewstep.identity import identity
from fewstep.loading import load
from fewstep.noise import check_seeds, draw_noise
from fewstep.plan import Plan
from fewstep.sampler import sample

__all__ = ["CARD", "FORMAT", "Student", "denoiser_of"]

LARGEST_DIFFERENCE = 1e-5
"""Between what a student said when it was saved and says when it is loaded, relative to the largest value if that is above 1."""


def denoiser_of(
    teacher: Any, network: nn.Module, number: float | None = None, guidance_scale: float | None = None, calls: int | None = None
) -> Any:
    """The denoiser of a student's network.

    Args:
        teacher: as whose network the student's is called and read.
        network: the student's.
        number: the number that it is told beside the time, for a student that knows its number of calls; None: nothing more.
        guidance_scale: the scale that it is told, for a student that takes one; None: none.
        calls: the number of calls that the number stands for.
    """
    made = read_as(teacher, network if number is None else Telling(network, number, calls))
    return made if guidance_scale is None else Distilled(made, guidance_scale)


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
        """Its data prediction, for `fewstep.sample` and the tuners; of a student that is told the number of calls, for the most of them."""
        return self.denoiser_of()

    def denoiser_of(self, nfe: int | None = None, guidance_scale: float | None = None) -> Any:
        """Its data prediction where so many calls are made, of those that it has plans for.

        Args:
            nfe: number of calls, which some students are told; as of `plan`.
            guidance_scale: for a student that is told the scale.

        Raises:
            PlanError: for a number of calls that it is not made for.
        """
        calls = self.plan(nfe).nfe
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        made = denoiser_of(self.teacher, self.network.eval(), self.told_number(calls), scale, calls)
        inner: Any = made.denoiser if isinstance(made, Distilled) else made
        told = hashlib.sha256(f"{identity(self.teacher)['fingerprint']} {identity(inner)['fingerprint']}".encode()).hexdigest()
        inner.info = dataclasses.replace(
            inner.info, name=f"student of {inner.info.name}", fingerprint=told, conditions=self._known(inner.info)
        )
        return made

    def _known(self, info: Any) -> dict[str, dict[str, Any]]:
        """The teacher's conditions, without the value that stands for no class if the card says that the student never saw it."""
        known = {name: dict(told) for name, told in info.conditions.items()}
        if self.card.get("null_label") is False:
            known.get("label", {}).pop("null", None)
        return known

    def told_number(self, nfe: int) -> float | None:
        """What the network is told beside the time when so many calls are made; None for a network that is told nothing more."""
        return self.card.get("told_number", {}).get(str(nfe))

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
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        denoiser = denoiser_of(self.teacher, self.network.eval(), self.told_number(plan.nfe), scale, plan.nfe)
        if noise is None:
            like = self.probe["x"]
            noise = draw_noise(like.shape[1:], seeds, plan, dtype=like.dtype, device=device_of(denoiser))
        return sample(denoiser, noise, plan, cond=cond, seeds=seeds)

    # ---- files ---------------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | PathLike[str], *, form: str = "peft") -> Path:
        """Write the folder; what it holds is compared with the student before it is done.

        Args:
            folder: where; made if needed. A student that is there is replaced when the new one is written and compared; if that is
                refused, the old one stays. Other files stay.
            form: of an adapter's file, see `fewstep.adapt.save_adapter`.

        Raises:
            ArtefactError: if what was written is not the student.
            UnknownNameError, ValueError: for a form that does not exist, or one of an adapter for a student without.
        """
        place = Path(folder)
        self._check_form(form)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as beside:
            made = Path(beside)
            try:
                self._write(made, form)
                Student.load(made, self.teacher, network=self._blank())
            except ArtefactError as error:
                raise ArtefactError(f"nothing was saved in {place}: {str(error).replace(str(made), str(place))}") from error
            move(made, place)
        return place

    def _check_form(self, form: str) -> None:
        if form not in FORMATS:
            raise UnknownNameError("form of an adapter's file", form, FORMATS)
        if form != "peft" and not isinstance(self.network, AdaptedNetwork):
            raise ValueError(f"form={form!r} is one of an adapter's file, and this student is a whole network: leave form out.")

    def _write(self, place: Path, form: str) -> None:
        """The files, into a new folder."""
        from safetensors.torch import save

        if isinstance(self.network, AdaptedNetwork):
            save_adapter(core(self.network), place, ask=self._ask_core, part=part_of(self.network), form=form)
        else:
            state = {name: value.detach().cpu().clone().contiguous() for name, value in self.network.state_dict().items()}
            write_atomically(place / WEIGHTS, save(state, metadata={"format": "pt"}))
        for nfe, plan in self.plans.items():
            plan.save(place / f"plan-{nfe}.safetensors")
        told = {name: value.detach().cpu().contiguous() for name, value in {**self.probe, "said": self._answers()}.items()}
        write_atomically(place / PROBE, save(told))
        pipeline = innermost(self.teacher, "pipeline")
        if pipeline is not None:
            scheduler_of(self.plan(), pipeline).save_pretrained(place / SCHEDULER)
        write_atomically(place / README, self._readme().encode())
        write_atomically(place / CARD, (json.dumps(json_value(self.card), indent=2, allow_nan=False) + "\n").encode())

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
            network: what the weights go into, for a student whose network is not the teacher's; without what the method has around it.
            **options: of `fewstep.load`, where that loads the base: ``device``, ``dtype``.

        Raises:
            ArtefactError: if the folder is damaged, the base another one, or the student does not say what it said when it was saved.
            FileNotFoundError: if there is none.
        """
        place = Path(folder)
        card = read_card(place)
        source = card["base"].get("source", card["base"]["name"]) if base is None else base
        teacher = source if hasattr(source, "schedule") else load(source, **options)
        if not other_base:
            check_base(card, teacher, place)
        if card.get("own_network") and network is None:
            raise TypeError(f"{place} is a student with a network of its own, a {card['own_network']}: pass network=, one like it.")
        student_network = read_network(place, card, innermost(teacher, "network") if network is None else network)
        tensors = read_tensors(place / PROBE)
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
        """A copy of a network that is not the teacher's, for the weights to go into, without what the student has around it."""
        if innermost(self.teacher, "network") is not None and not self.card.get("own_network"):
            return None
        if isinstance(self.network, AdaptedNetwork):
            return bare(self.network.network)
        return copy.deepcopy(self.network.network if self.card["wrapped"] else self.network)  # type: ignore[arg-type]

    @torch.no_grad()
    def _ask(self, network: nn.Module) -> Tensor:
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
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
            TypeError: for a student of a network that is no pipeline's, or one that is told what no network of diffusers can be told.
        """
        calls = self.plan(nfe).nfe
        put_into(base, self.network, self.plan(calls), self._ask_core, self.told_number(calls), name)
        return base
