"""``fewstep sample --shards``: many samples as checksummed WebDataset shards, in this process or by workers of Ray."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fewstep.cli.engines import check_engine

if TYPE_CHECKING:
    from fewstep.cli.sample import SampleOptions

__all__ = ["check_shards", "run_shards"]

BLOCKS = 16
ONLY_SHARDS = ("engine", "shard_size", "address", "workers")


def check_shards(options: SampleOptions) -> None:
    """Refuse options that would do nothing, or contradict each other.

    Raises:
        ValueError: names them.
        FewstepError: as of `fewstep.cli.engines.check_engine`.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    given = [name for name in ONLY_SHARDS if getattr(options, name) != defaults[name]]
    if given and not options.shards:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{names} {'does' if len(given) == 1 else 'do'} nothing without --shards.")
    if options.shard_size < 0 or options.shard_size % options.batch:
        raise ValueError(
            f"--shard-size takes a multiple of --batch ({options.batch}), so that shards hold whole blocks, not {options.shard_size}."
        )
    check_engine(options)


def run_shards(options: SampleOptions, plan: Any, seeds: list[int], shape: tuple[int, ...], name: str) -> None:
    """Draw, and say what was done. The model is open, so the number of threads is known."""
    import torch

    from fewstep.cli.setup import progress, state_dtype
    from fewstep.scale import Job, LocalEngine, RayEngine, sample_shards

    if options.engine == "ray" and options.device.startswith("cuda"):  # Ray shows a worker its own device alone
        options = dataclasses.replace(options, device="cuda")
    options = dataclasses.replace(options, threads=torch.get_num_threads())
    job = Job(
        partial(opened, options, plan),
        plan,
        shape,
        range(seeds[0], seeds[-1] + 1) if seeds == list(range(seeds[0], seeds[-1] + 1)) else seeds,
        block=options.batch,
        threads=options.threads,
        dtype=state_dtype(options),
        device=options.device,
        told=_told(options, plan),
    )
    engine = (
        LocalEngine() if options.engine == "local" else RayEngine(options.workers, options.address or None, told=_lost(options))
    )
    per_shard = options.shard_size // options.batch or BLOCKS
    with progress(options, total=len(seeds), desc="sampling", unit="sample") as bar:

        def advance(there: int) -> None:
            bar.update(there - bar.n)

        try:
            summary = sample_shards(job, options.out, engine=engine, blocks_per_shard=per_shard, after=advance)
        except KeyboardInterrupt:
            print(
                f"\nstopped: finished blocks are kept in {options.out}, and the same command goes on from there.", file=sys.stderr
            )
            raise
    tally = dataclasses.asdict(summary.tally)
    if options.json:
        told = {"out": options.out, "nfe": plan.nfe, "count": summary.samples, "drawn": summary.drawn, "plan": plan.digest}
        print(json.dumps({**told, "damaged": list(summary.damaged), **tally, "shards": summary.checksums}))
    elif not options.quiet:
        _print(summary, plan, options, name)


def _lost(options: SampleOptions) -> Callable[[str, int], None]:
    """Says in one line that a worker died, beside the bar."""
    from tqdm import tqdm

    def told(what: str, process: int) -> None:
        if what == "died" and not options.quiet:
            tqdm.write(f"worker {process} was lost; its blocks are drawn again", file=sys.stderr)

    return told


def _print(summary: Any, plan: Any, options: SampleOptions, name: str) -> None:
    shards = len(summary.checksums)
    print(
        f"{summary.samples} samples of {name}, {plan.nfe} network calls each, in {shards} shard{'s' * (shards != 1)}: {options.out}"
    )
    if summary.drawn < summary.samples:
        print(f"{summary.samples - summary.drawn} of them were there already")
    if summary.damaged:
        print(f"damaged and made again: {', '.join(summary.damaged)}")
    if summary.tally.deaths:
        print(f"workers that were lost and replaced: {summary.tally.deaths}")


def _told(options: SampleOptions, plan: Any) -> dict[str, Any]:
    """What decides the samples besides plan, model and seeds."""
    from fewstep.cli.parsing import told_prompts
    from fewstep.tuners import LayerSkips

    skips = LayerSkips.load(options.skips).digest if options.skips else None
    told = {"guidance": options.guidance, "label": options.label, "skips": skips, "precision": options.dtype, "size": options.size}
    return {**told, **told_prompts(options)}


def opened(options: SampleOptions, plan: Any) -> Any:
    """The model of a worker, and its conditions."""
    from fewstep.cli.conditions import conditions
    from fewstep.cli.parsing import prompts_of
    from fewstep.cli.sample import model_of
    from fewstep.cli.setup import open_model
    from fewstep.scale import Opened

    denoiser = open_model(options.model, options, plan.nfe)
    prompts = prompts_of(options)

    def conditions_of(rows: range) -> dict[str, Any]:
        return conditions(denoiser, options, len(rows), options.label, first=rows.start)

    def about(rows: range) -> list[dict[str, Any]]:
        if options.label is not None:
            return [{"label": label} for label in conditions_of(rows)["label"].tolist()]
        return [{"prompt": prompts[i % len(prompts)]} if prompts else {} for i in rows]

    data_range = denoiser.info.data_range or (-1.0, 1.0)
    return Opened(model_of(denoiser, plan, options), conditions_of, about, getattr(denoiser, "decode", None), data_range)
