"""``fewstep sample``."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.cli.options import Prompted, address_option, engine_option, option, workers_option
from fewstep.cli.parsing import COUNT

NFE, SOLVER, GRID, FINAL = 10, "auto", "auto", "zero"
FINALS = ("zero", "t_end")
OWN_PICTURES = r"\d{5,}-seed-\d+\.png"
"""Names of the pictures of single samples."""
PLAN_FILE = re.compile(r"plan-(\d+)\.safetensors")


@dataclass(frozen=True)
class SampleOptions(Prompted):
    """Options of the command."""

    model: str = option(
        "digits",
        "a shipped model (digits, photos), a model folder or a diffusers pipeline (folder, id of the hub)",
        positional=True,
    )
    nfe: int | None = option(None, f"network calls per sample (default: {NFE})", kind=int)
    solver: str | None = option(None, f"name of the solver; see `fewstep solvers` (default: {SOLVER})")
    grid: str | None = option(None, f"name of the time grid (default: {GRID})")
    final: str | None = option(
        None, f"where to end: zero (sigma = 0) or t_end (where the schedule ends) (default: {FINAL})", choices=FINALS
    )
    plan: str = option(
        "",
        "a plan file, instead of nfe, solver, grid and final; or a folder that `fewstep tune` wrote, and --nfe if it has several; "
        "left out: a student's own plan; of other models what nfe, solver, grid and final say",
    )
    skips: str = option("", "a file of fewstep.tuners.layer_skips: blocks of the network to leave out at every call of this plan")
    count: int | None = option(None, f"how many samples (default: {COUNT}, or as many as --seed names)", kind=int)
    seed: str = option("0", "seed of the first sample, or a range like 0-63, or a list like 3,5,8")
    label: str = option(None, 'a class, a list like 0,1,2 (in turn), or "each"; left out: without condition')
    guidance: float = option(1.0, "scale of classifier-free guidance; 1 is none")
    batch: int = option(64, "samples that run at a time; the samples do not depend on it")
    out: str = option(
        "samples", "folder for samples.png, samples.npz, plan.safetensors and sample.json; of a pipeline also a picture of each"
    )
    shards: bool = option(
        False, "write WebDataset shards with checksums instead, as many as there are samples; a run that was stopped goes on"
    )
    engine: str = engine_option("who draws shards: this process, or workers of Ray, to the same bits")
    address: str = address_option()
    workers: int = workers_option()
    shard_size: int = option(0, "samples of a shard, a multiple of --batch; 0: 16 times --batch")


OPTIONS = {"sample": SampleOptions}


def run(options: SampleOptions) -> int:
    """Draw samples and write them."""
    from fewstep.cli.parsing import check_prompted, parse_seeds
    from fewstep.cli.shards import check_shards, run_shards

    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}.")
    seeds = parse_seeds(options.seed, options.count)
    check_prompted(options)
    check_shards(options)
    from fewstep.cli.conditions import check_unguided, conditions
    from fewstep.cli.setup import ask_for, check_plannable, new_folder, open_model
    from fewstep.loading import is_student
    from fewstep.solvers import make_plan

    if is_student(options.model):
        check_unguided(options.model, options.guidance)
        if not options.plan and options.solver is options.grid is options.final is None:
            options = replace(options, plan=options.model)  # its own plans
    asked = options.solver or SOLVER, options.grid or GRID, NFE if options.nfe is None else options.nfe
    check_plannable(*asked)
    plan = _load(Path(options.plan), options) if options.plan else None
    denoiser = open_model(options.model, options, asked[2] if plan is None else plan.nfe)
    count = min(options.batch, len(seeds)) if options.shards else len(seeds)  # a shard's worker makes those of its own
    shape, cond = ask_for(denoiser.info.shape, denoiser.info.name), conditions(denoiser, options, count, options.label)
    if plan is None:
        solver, grid, nfe = asked
        plan = make_plan(solver, denoiser.schedule, nfe, grid=grid, final=options.final or FINAL)
    model = model_of(denoiser, plan, options)
    if options.shards:
        run_shards(options, plan, seeds, shape, denoiser.info.name)
        return 0
    with new_folder(options.out, OWN_PICTURES) as folder:
        samples = _samples(model, plan, shape, seeds, cond, options)
        skips = model.skips.digest if options.skips else None
        told = {
            "path": options.model,
            "guidance": options.guidance,
            "label": options.label,
            "skips": skips,
            "precision": options.dtype,
        }
        told |= {**_told_plan(plan, options), **_told_prompts(options, len(seeds))}
        _write(folder, samples, seeds, cond, plan, denoiser, told)
    if options.json:
        print(json.dumps({"out": options.out, "nfe": plan.nfe, "count": len(seeds), "calls": denoiser.calls, "plan": plan.digest}))
    elif not options.quiet:
        plural = "s" * (len(seeds) != 1)
        print(f"{len(seeds)} sample{plural} of {denoiser.info.name}, {plan.nfe} network calls each: {options.out}")
    return 0


def model_of(denoiser: Any, plan: Any, options: SampleOptions) -> Any:
    """The denoiser under guidance, with blocks left out if that is asked for."""
    from fewstep.cli.conditions import guided
    from fewstep.cli.parsing import prompts_of

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
    from fewstep.cli.parsing import told_prompts

    told = told_prompts(options)
    return {**told, "prompts": [told["prompts"][i % len(told["prompts"])] for i in range(count)]} if told else {}


def _told_plan(plan: Any, options: SampleOptions) -> dict[str, Any]:
    """How the plan was made, in the words of the command line, for the record: what repeats it, if it was not tuned."""
    from fewstep.artefacts import json_value
    from fewstep.solvers import name_of

    made = json_value(plan.provenance)
    described = made.get("solver") or {}
    name, changes = name_of(described) or (described.get("name"), described.get("options") or {})
    if options.solver is not None or not options.plan:
        name, changes = options.solver or SOLVER, {}
    return {"solver": name, "solver_options": changes, "grid": made.get("grid"), "final": made.get("final")}


def _load(path: Path, options: SampleOptions) -> Any:
    """A plan file, or what serves this number of calls and this guidance in a folder that `fewstep tune` wrote.

    Raises:
        PlanError: if the folder has no such plan, or several and the number of calls is not given; if an option contradicts the plan.
    """
    from fewstep.plan import Plan
    from fewstep.tuners import Family

    if not path.is_dir():
        plan = Plan.load(path)
    elif (path / "family.json").exists():
        family = Family.load(path)
        plan = family.plan(_calls(path, sorted({nfe for nfe, _ in family.plans}), options), options.guidance)
    else:
        files = {file: PLAN_FILE.fullmatch(file.name) for file in path.glob("plan-*.safetensors")}
        calls = sorted(int(match[1]) for match in files.values() if match)
        plan = Plan.load(path / f"plan-{_calls(path, calls, options)}.safetensors")
    _check_asked(plan, path, options)
    return plan


def _calls(path: Path, known: list[int], options: SampleOptions) -> int:
    """Which of a folder's plans is meant, by its number of calls."""
    from fewstep.errors import PlanError

    if options.nfe in known or (options.nfe is None and len(known) == 1):
        return options.nfe or known[0]
    if not known:
        raise PlanError(f"{path} has no plans in it.")
    names = ", ".join(f"plan-{nfe}.safetensors" for nfe in known)
    missing = f"has plans for several numbers of calls, and --nfe says which: {names}"
    raise PlanError(f"{path} {missing if options.nfe is None else f'has no plan for {options.nfe} calls (--nfe): {names}'}.")


def _check_asked(plan: Any, path: Path, options: SampleOptions) -> None:
    """Refuse options that say something else than the plan does."""
    from fewstep.artefacts import json_value
    from fewstep.errors import PlanError
    from fewstep.solvers import make_solver

    made = json_value(plan.provenance)
    solver = None if options.solver is None else json_value(make_solver(options.solver).described())
    same = {
        "nfe": options.nfe in (None, plan.nfe),
        "solver": solver in (None, made.get("solver")),
        "grid": options.grid in (None, made.get("grid")),
        "final": options.final in (None, made.get("final")),
    }
    if wrong := next((name for name, holds in same.items() if not holds), None):
        raise PlanError(
            f"--{wrong} {getattr(options, wrong)} contradicts {path}, a plan of {_told_of(plan)}: it runs as it was made. Leave one out."
        )


def _told_of(plan: Any) -> str:
    made = plan.provenance
    told = [f"solver {(made.get('solver') or {}).get('name')}", f"grid {made.get('grid')}", f"final {made.get('final')}"]
    return f"{plan.nfe} calls ({', '.join(told)})"


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
    size = "x".join(map(str, denoiser.size)) if decode is not None else None
    told = {**told, "size": size}
    _write_pictures(folder, pictures, seeds, _about(plan, info, told), told.get("prompts"), info, each=decode is not None)
    plan.save(folder / "plan.safetensors")
    record = {"model": info.name, "fingerprint": info.fingerprint, "plan": plan.digest, "provenance": json_value(plan.provenance)}
    record |= {"nfe": plan.nfe, **told, "seeds": seeds, "machine": machine()}
    write_atomically(folder / "sample.json", (json.dumps(record, indent=2) + "\n").encode())


def _about(plan: Any, info: Any, told: dict[str, Any]) -> dict[str, str]:
    """What is written into every picture."""
    names = ("path", "solver", "grid", "final", "size", "precision", "negative", "label", "skips")
    about = {name: str(told.get(name) or "") for name in names}
    about |= {"model": info.name, "plan": plan.digest, "calls": str(plan.nfe), "guidance": f"{told['guidance']:g}"}
    if told["solver_options"]:
        about["solver options"] = json.dumps(told["solver_options"])
    return {name: value for name, value in about.items() if value}


def _write_pictures(
    folder: Any, pictures: Any, seeds: list[int], about: dict[str, str], prompts: list[str] | None, info: Any, *, each: bool
) -> None:
    """The sheet of all samples, small ones enlarged, and if `each` a picture of every one, as large as it is. The frames of a video stand
    side by side.
    """
    from fewstep.artefacts import write_atomically
    from fewstep.evaluate.report import image_grid

    frames = pictures.shape[2] if pictures.ndim == 5 else 1
    rows = pictures.movedim(2, 1) if pictures.ndim == 5 else pictures[:, None]
    columns = frames if frames > 1 else math.ceil(math.sqrt(len(seeds)))
    data_range = info.data_range or (-1.0, 1.0)

    def text(which: list[int]) -> dict[str, str]:
        told = {"seed": ", ".join(str(seeds[i]) for i in which)}
        return about | told | ({"prompt": "\n".join(dict.fromkeys(prompts[i] for i in which))} if prompts else {})

    scale = max(1, 64 // pictures.shape[-1])
    sheet = image_grid(rows.flatten(0, 1), data_range, columns=columns, scale=scale, text=text(list(range(len(seeds)))))
    write_atomically(folder / "samples.png", sheet)
    for i, seed in enumerate(seeds if each else []):
        picture = image_grid(rows[i], data_range, columns=frames, scale=1, text=text([i]))
        write_atomically(folder / f"{i:05d}-seed-{seed}.png", picture)
