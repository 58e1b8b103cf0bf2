"""``fewstep sample``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.cli.options import Prompted, final_option, option


@dataclass(frozen=True)
class SampleOptions(Prompted):
    """Options of the command."""

    model: str = option(
        "digits",
        "a shipped model (digits, photos), a model folder or a diffusers pipeline (folder, id of the hub)",
        positional=True,
    )
    nfe: int = option(10, "network calls per sample")
    solver: str = option("auto", "name of the solver; see `fewstep solvers`")
    grid: str = option("auto", "name of the time grid")
    final: str = final_option()
    plan: str = option("", "a plan file, instead of nfe, solver, grid and final; or a folder that `fewstep tune` wrote, and --nfe")
    skips: str = option("", "a file of fewstep.tuners.layer_skips: blocks of the network to leave out at every call of this plan")
    count: int = option(16, "how many samples")
    seed: str = option("0", "seed of the first sample, or a range like 0-63, or a list like 3,5,8")
    label: str = option(None, 'a class, a list like 0,1,2 (in turn), or "each"; left out: without condition')
    guidance: float = option(1.0, "scale of classifier-free guidance; 1 is none")
    batch: int = option(64, "samples that run at a time; the samples do not depend on it")
    out: str = option(
        "samples", "folder for samples.png, samples.npz, plan.safetensors and sample.json; of a pipeline also a picture of each"
    )


OPTIONS = {"sample": SampleOptions}


def run(options: SampleOptions) -> int:
    """Draw samples and write them."""
    from fewstep.cli.conditions import conditions
    from fewstep.cli.setup import ask_for, new_folder, open_model, parse_seeds
    from fewstep.solvers import make_plan

    if options.count < 1 or options.batch < 1:
        raise ValueError(f"--count and --batch must be at least 1, got {options.count} and {options.batch}.")
    seeds = parse_seeds(options.seed, options.count)
    denoiser = open_model(options.model, options)
    shape, cond = ask_for(denoiser.info.shape, denoiser.info.name), conditions(denoiser, options, len(seeds), options.label)
    if options.plan:
        plan = _load(Path(options.plan), options)
    else:
        plan = make_plan(options.solver, denoiser.schedule, options.nfe, grid=options.grid, final=options.final)
    model = _model(denoiser, plan, options)
    with new_folder(options.out) as folder:
        samples = _samples(model, plan, shape, seeds, cond, options)
        skips = model.skips.digest if options.skips else None
        told = {"guidance": options.guidance, "label": options.label, "skips": skips, **_told_prompts(options, len(seeds))}
        _write(folder, samples, seeds, cond, plan, denoiser, told)
    if options.json:
        print(json.dumps({"out": options.out, "nfe": plan.nfe, "count": len(seeds), "calls": denoiser.calls, "plan": plan.digest}))
    elif not options.quiet:
        print(f"{len(seeds)} samples of {denoiser.info.name}, {plan.nfe} network calls each: {options.out}")
    return 0


def _model(denoiser: Any, plan: Any, options: SampleOptions) -> Any:
    """The denoiser under guidance, with blocks left out if that is asked for."""
    from fewstep.cli.conditions import guided, prompts_of

    if options.guidance != 1.0 and options.label is None and not prompts_of(options):
        raise ValueError("--guidance needs --label, or of a pipeline --prompt or --prompt-file: what it leads to.")
    model = guided(denoiser, options.guidance, options)
    if not options.skips:
        return model
    from fewstep.tuners import LayerSkips, Skipping

    skipping = Skipping(model, LayerSkips.load(options.skips))
    skipping.check_plan(plan)
    return skipping


def _told_prompts(options: SampleOptions, count: int) -> dict[str, Any]:
    """The prompt of every sample, for the record; nothing without prompts."""
    from fewstep.cli.conditions import told_prompts

    told = told_prompts(options)
    return {**told, "prompts": [told["prompts"][i % len(told["prompts"])] for i in range(count)]} if told else {}


def _load(path: Path, options: SampleOptions) -> Any:
    """A plan file, or what serves this number of calls and this guidance in a folder that `fewstep tune` wrote."""
    from fewstep.errors import PlanError
    from fewstep.plan import Plan
    from fewstep.tuners import Family

    if not path.is_dir():
        return Plan.load(path)
    if (path / "family.json").exists():
        return Family.load(path).plan(options.nfe, options.guidance)
    one = path / f"plan-{options.nfe}.safetensors"
    if not one.exists():
        found = sorted(file.name for file in path.glob("plan-*.safetensors"))
        raise PlanError(f"{path} has no plan for {options.nfe} calls (--nfe): {', '.join(found) or 'there are no plans in it'}.")
    return Plan.load(one)


def _samples(model: Any, plan: Any, shape: tuple[int, ...], seeds: list[int], cond: Any, options: SampleOptions) -> Any:
    import torch

    from fewstep.cli.setup import progress, state_dtype
    from fewstep.noise import draw_noise
    from fewstep.sampler import sample

    def advance(*_: Any) -> None:
        bar.update()

    pieces = []
    starts = range(0, len(seeds), options.batch)
    with torch.no_grad(), progress(options, total=len(starts) * plan.nfe, desc="sampling", unit="call") as bar:
        for i in starts:
            own = seeds[i : i + options.batch]
            noise = draw_noise(shape, own, plan, dtype=state_dtype(options), device=options.device)
            part = {name: value[i : i + options.batch] for name, value in cond.items()}
            pieces.append(sample(model, noise, plan, cond=part, seeds=own, callback=advance).cpu())
    return torch.cat(pieces)


def _write(folder: Any, samples: Any, seeds: list[int], cond: Any, plan: Any, denoiser: Any, told: dict[str, Any]) -> None:
    import io

    import numpy as np

    from fewstep.artefacts import json_value, write_atomically
    from fewstep.cli.setup import machine

    info, decode = denoiser.info, getattr(denoiser, "decode", None)
    pictures = samples if decode is None else decode(samples).cpu()
    arrays = {"samples": pictures.numpy(), "seeds": np.array(seeds)}
    if pictures is not samples:
        arrays["latents"] = samples.numpy()
    if told["label"] is not None:  # that of "no condition" is no class
        arrays["labels"] = cond["label"].cpu().numpy()
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_atomically(folder / "samples.npz", file.getvalue())
    _write_pictures(folder, pictures, seeds, _about(plan, info, told), told.get("prompts"), info, each=decode is not None)
    plan.save(folder / "plan.safetensors")
    record = {"model": info.name, "fingerprint": info.fingerprint, "plan": plan.digest, "provenance": json_value(plan.provenance)}
    record |= {"nfe": plan.nfe, **told, "seeds": seeds, "machine": machine()}
    write_atomically(folder / "sample.json", (json.dumps(record, indent=2) + "\n").encode())


def _about(plan: Any, info: Any, told: dict[str, Any]) -> dict[str, str]:
    """What is written into every picture."""
    solver = plan.provenance.get("solver") or {}
    about = {"model": info.name, "plan": plan.digest, "solver": str(solver.get("name", "")), "calls": str(plan.nfe)}
    about |= {"guidance": f"{told['guidance']:g}", "negative": told.get("negative") or "", "label": told["label"] or ""}
    return {name: value for name, value in about.items() if value}


def _write_pictures(
    folder: Any, pictures: Any, seeds: list[int], about: dict[str, str], prompts: list[str] | None, info: Any, *, each: bool
) -> None:
    """The sheet of all samples, and if `each` a picture of every one. The frames of a video stand side by side."""
    from fewstep.artefacts import write_atomically
    from fewstep.evaluate.report import image_grid

    frames = pictures.shape[2] if pictures.ndim == 5 else 1
    rows = pictures.movedim(2, 1) if pictures.ndim == 5 else pictures[:, None]
    columns = frames if frames > 1 else math.ceil(math.sqrt(len(seeds)))
    looks = {"data_range": info.data_range or (-1.0, 1.0), "scale": max(1, 64 // pictures.shape[-1])}

    def text(which: list[int]) -> dict[str, str]:
        told = {"seed": ", ".join(str(seeds[i]) for i in which)}
        return about | told | ({"prompt": "\n".join(dict.fromkeys(prompts[i] for i in which))} if prompts else {})

    sheet = image_grid(rows.flatten(0, 1), columns=columns, text=text(list(range(len(seeds)))), **looks)
    write_atomically(folder / "samples.png", sheet)
    for i, seed in enumerate(seeds if each else []):
        write_atomically(folder / f"{i:05d}-seed-{seed}.png", image_grid(rows[i], columns=frames, text=text([i]), **looks))
