"""``fewstep sample``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.cli.options import Common, final_option, option


@dataclass(frozen=True)
class SampleOptions(Common):
    """Options of the command."""

    model: str = option("digits", "a shipped model (digits, photos) or a model folder", positional=True)
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
    out: str = option("samples", "folder for samples.png, samples.npz, plan.safetensors and sample.json")


OPTIONS = {"sample": SampleOptions}


def run(options: SampleOptions) -> int:
    """Draw samples and write them."""
    from fewstep.cli.setup import ask_for, guided, new_folder, open_model, parse_labels, parse_seeds
    from fewstep.solvers import make_plan

    if options.count < 1 or options.batch < 1:
        raise ValueError(f"--count and --batch must be at least 1, got {options.count} and {options.batch}.")
    seeds = parse_seeds(options.seed, options.count)
    denoiser = open_model(options.model, options)
    shape, labels = ask_for(denoiser.info.shape, denoiser.info.name), parse_labels(options.label, denoiser, len(seeds))
    if options.plan:
        plan = _load(Path(options.plan), options)
    else:
        plan = make_plan(options.solver, denoiser.schedule, options.nfe, grid=options.grid, final=options.final)
    model = guided(denoiser, options.guidance, labels)
    if options.skips:
        from fewstep.tuners import LayerSkips, Skipping

        model = Skipping(model, LayerSkips.load(options.skips))
        model.check_plan(plan)
    with new_folder(options.out) as folder:
        samples = _samples(model, plan, shape, seeds, labels, options)
        skips = model.skips.digest if options.skips else None
        _write(
            folder, samples, seeds, labels, plan, denoiser, {"guidance": options.guidance, "label": options.label, "skips": skips}
        )
    if options.json:
        print(json.dumps({"out": options.out, "nfe": plan.nfe, "count": len(seeds), "calls": denoiser.calls, "plan": plan.digest}))
    elif not options.quiet:
        print(f"{len(seeds)} samples of {denoiser.info.name}, {plan.nfe} network calls each: {options.out}")
    return 0


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


def _samples(model: Any, plan: Any, shape: tuple[int, ...], seeds: list[int], labels: Any, options: SampleOptions) -> Any:
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
            cond = {} if labels is None else {"label": labels[i : i + options.batch].to(options.device)}
            pieces.append(sample(model, noise, plan, cond=cond, seeds=own, callback=advance).cpu())
    return torch.cat(pieces)


def _write(folder: Any, samples: Any, seeds: list[int], labels: Any, plan: Any, denoiser: Any, told: dict[str, Any]) -> None:
    import io

    import numpy as np

    from fewstep.artefacts import json_value, write_atomically
    from fewstep.cli.setup import machine
    from fewstep.evaluate.report import image_grid

    info, arrays = denoiser.info, {"samples": samples.numpy(), "seeds": np.array(seeds)}
    if told["label"] is not None:  # that of "no condition" is no class
        arrays["labels"] = labels.numpy()
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_atomically(folder / "samples.npz", file.getvalue())
    side = samples.shape[-1]
    picture = image_grid(
        samples, info.data_range or (-1.0, 1.0), columns=math.ceil(math.sqrt(len(seeds))), scale=max(1, 64 // side)
    )
    write_atomically(folder / "samples.png", picture)
    plan.save(folder / "plan.safetensors")
    record = {"model": info.name, "fingerprint": info.fingerprint, "plan": plan.digest, "provenance": json_value(plan.provenance)}
    record |= {"nfe": plan.nfe, **told, "seeds": seeds, "machine": machine()}
    write_atomically(folder / "sample.json", (json.dumps(record, indent=2) + "\n").encode())
