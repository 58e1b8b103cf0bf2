"""``fewstep tune``."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.cli.options import Prompted, address_option, engine_option, final_option, option, workers_option


@dataclass(frozen=True)
class TuneOptions(Prompted):
    """Options of the command."""

    model: str = option(
        "digits",
        "a shipped model (digits, photos), a model folder or a diffusers pipeline (folder, id of the hub)",
        positional=True,
    )
    nfe: str = option("4,5,6,8,10", "numbers of network calls")
    method: str = option(
        "auto",
        "auto, learned, closed-form (seconds), statistics (DPM-Solver-v3), compensation (DC-Solver), timesteps, recipe or teleport",
    )
    guidance: str = option(
        "1",
        "scale of classifier-free guidance, 1 is none; or several like 1,3,7.5, whose plans serve the scales between where they can",
    )
    label: str = option(
        "each", 'the labels that plans are made for: a class, a list like 0,1,2, or "each"; "" for without condition'
    )
    final: str = final_option()
    minutes: float = option(0.0, "spend about so long; 0: what suits the speed of the network")
    evaluations: int = option(0, "spend about so many network evaluations (one sample, one call), instead of --minutes")
    trajectories: int = option(
        0,
        "exact paths to fit to, instead of --minutes, trials and validation grow with them; 0: what suits the speed of the network",
    )
    seed: int = option(0, "of the noise that is drawn")
    batch: int = option(256, "the most samples of a network call")
    engine: str = engine_option(
        "where the numbers of calls are tuned: one after the other in this process, or side by side in workers of Ray, with the same plans"
    )
    address: str = address_option()
    workers: int = workers_option()
    out: str = option("tuned", "folder for plan-N.safetensors, index.html, results.json and the pictures")
    fresh: bool = option(False, "begin anew; otherwise a run that was stopped goes on from OUT.unfinished")


OPTIONS = {"tune": TuneOptions}
OWN_FILES = (
    r"plan-\d+(-guidance-[-+.e\d]+)?\.safetensors|family\.json|guidance-[-+.e\d]+|index\.html|results\.json"
    r"|(errors|exact|(un)?tuned-\d+)\.png"
)
"""Names of the files and folders that the command writes."""
SHOWN = 10
TYPICAL_BATCH = 64
"""Samples of the calls that are timed for the number of threads."""
OTHER_NOISE = 1_000_000
"""Seeds of the noise in the pictures begin here."""


def run(options: TuneOptions) -> int:
    """Tune, write the plans and the page."""
    from fewstep.cli.engines import check_engine, mapper
    from fewstep.cli.parsing import check_prompted, parse_numbers
    from fewstep.errors import UnknownNameError

    nfes = parse_numbers("--nfe", options.nfe)
    if min(options.minutes, options.evaluations, options.trajectories, options.seed) < 0 or options.batch < 1:
        raise ValueError("--minutes, --evaluations, --trajectories and --seed must be at least 0, --batch at least 1.")
    if sum(map(bool, (options.minutes, options.evaluations, options.trajectories))) > 1:
        raise ValueError("give one of --minutes, --evaluations and --trajectories.")
    scales = _scales(options.guidance)
    check_prompted(options)
    check_engine(options)
    from fewstep.cli.conditions import conditions, guided
    from fewstep.cli.setup import ask_for, new_folder, open_model, quickest_threads, state_dtype
    from fewstep.noise import draw_noise
    from fewstep.tuners import Effort, tune, tune_family
    from fewstep.tuners.auto import METHODS

    effort = Effort().scaled(options.trajectories / Effort().trajectories) if options.trajectories else None
    if options.method not in METHODS:
        raise UnknownNameError("method of tuning", options.method, METHODS)
    model = open_model(options.model, options)
    shape, count = ask_for(model.info.shape, model.info.name), 64
    cond = conditions(model, options, count, _label(model, options))
    quickest_threads(model, options, min(options.batch, TYPICAL_BATCH), cond)
    noise = draw_noise(shape, range(options.seed, options.seed + count), dtype=state_dtype(options), device=options.device)
    unfinished = Path(f"{options.out}.unfinished")
    given: dict[str, Any] = {
        "nfe": nfes,
        "noise": noise * float(model.schedule.sigma(model.schedule.t_start)),
        "method": options.method,
        "cond": cond,
        "seed": options.seed,
        "final": options.final,
        "effort": effort,
        "block": options.batch,
        "minutes": options.minutes or None,
        "evaluations": options.evaluations or None,
        "checkpoint": unfinished,
        "progress": not options.quiet,
        "map": mapper(options),
    }
    if options.fresh:
        shutil.rmtree(unfinished, ignore_errors=True)
    with new_folder(options.out, OWN_FILES) as folder, _told_how_to_go_on(unfinished):
        if len(scales) > 1:
            family = tune_family(guided(model, max(scales, key=lambda scale: scale != 1.0), options), scales, **given)
            _write_family(family, model, options, folder)
            every, gaps = dict(family.tuned), family.gaps
        else:
            denoiser = guided(model, scales[0], options)
            tuned = tune(denoiser, **given)
            _write(tuned, model, denoiser, scales[0], options, folder)
            every, gaps = {scales[0]: tuned}, ()
    shutil.rmtree(unfinished, ignore_errors=True)
    if options.json:
        reports = {f"{scale:g}": found.report for scale, found in every.items()}
        print(json.dumps(reports if len(scales) > 1 else next(iter(reports.values()))))
    elif not options.quiet:
        for scale, found in every.items():
            print(found.show() if scale == 1.0 else f"guidance {scale:g}\n{found.show()}")
        for gap in gaps:
            print(_told_gap(gap))
        print(f"errors to the exact solution on noise that nothing was fitted to; plans and page: {options.out}")
    return 0


@contextmanager
def _told_how_to_go_on(unfinished: Path) -> Iterator[None]:
    """When the run is stopped within."""
    try:
        yield
    except KeyboardInterrupt:
        kept = sorted(file.name for file in unfinished.glob("*")) if unfinished.is_dir() else []
        if kept == ["spending.json"]:
            print("\nstopped before the exact paths were finished: the same command begins with them again.", file=sys.stderr)
        elif kept:
            print(f"\nstopped: what is finished is kept in {unfinished}, and the same command goes on from there.", file=sys.stderr)
        raise


def _label(model: Any, options: TuneOptions) -> str | None:
    """The labels, for a model that takes some."""
    return options.label or None if model.info.conditions else None


def _scales(text: str) -> list[float]:
    try:
        scales = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"--guidance takes scales separated by commas, not {text!r}.") from None
    return scales


def _write(tuned: Any, model: Any, denoiser: Any, scale: float, options: TuneOptions, folder: Path) -> None:
    """The plans and the page of one guidance scale."""
    for nfe, plan in tuned.plans.items():
        plan.save(folder / f"plan-{nfe}.safetensors")
    _page(tuned, model, denoiser, scale, options).write(folder)


def _write_family(family: Any, model: Any, options: TuneOptions, folder: Path) -> None:
    """The family's files, a folder with a page for every scale, and a page about them all."""
    from fewstep.cli.conditions import guided
    from fewstep.cli.setup import machine
    from fewstep.evaluate.report import Report

    family.save(folder)
    intro = f"Plans made for {model.info.name} under classifier-free guidance of several scales, each with a page of its own."
    told = {"command": "fewstep tune", "machine": machine(), "guidance": dict(family.guidance)}
    page = Report("fewstep: a family of tuned plans", intro, told)
    rows = []
    for scale, tuned in family.tuned.items():
        within = folder / f"guidance-{scale:g}"
        within.mkdir()
        _write(tuned, model, guided(model, scale, options), scale, options, within)
        rows += [
            [
                f"{scale:g}",
                nfe,
                told["untuned"],
                f"{told['untuned_rms']:.3g}",
                told["best"],
                f"{told['rms']:.3g}",
                f"{told['ratio']:.2f}",
            ]
            for nfe, told in tuned.report["plans"].items()
        ]
    page.links("A page for every scale", [(f"guidance {scale:g}", f"guidance-{scale:g}/index.html") for scale in family.tuned])
    page.text(_how_to_use(options, model, next(iter(family.plans))[0], "SCALE", several=True), note=True)
    page.heading("Error by guidance scale and number of calls")
    page.table(["guidance", "calls", "best untuned", "its error", "tuned by", "its error", "ratio"], rows, text=(2, 4))
    page.heading("Between the scales")
    page.text("The largest error at a quarter, a half and three quarters of the way, over that of the best untuned setting there.")
    page.table(
        ["calls", "between", "both mixed", "the lower's", "the upper's", "serves"],
        [
            [str(gap.nfe), f"{gap.lower:g} and {gap.upper:g}"]
            + [f"{gap.ratios[name]:.2f}" if name in gap.ratios else "" for name in ("mixed", "lower", "upper")]
            + [gap.chosen or "none"]
            for gap in family.gaps
        ],
        text=(1, 5),
    )
    page.write(folder)


def _told_gap(gap: Any) -> str:
    what = {"mixed": "both plans mixed", "lower": "the lower scale's plan", "upper": "the upper scale's plan", None: "no plan"}
    return (
        f"{gap.nfe:>5} calls between guidance {gap.lower:g} and {gap.upper:g}: {what[gap.chosen]} serves, at most "
        f"{gap.ratios[gap.best]:.2f} of the best untuned setting's error"
    )


def _page(tuned: Any, model: Any, denoiser: Any, scale: float, options: TuneOptions) -> Any:
    from fewstep.cli.parsing import told_prompts
    from fewstep.cli.setup import machine
    from fewstep.evaluate.report import Report, line_plot

    report = tuned.report
    guidance = "" if scale == 1.0 else f" under guidance of scale {scale:g}"
    intro = (
        f"Plans made for {model.info.name}{guidance}, from exact paths of {report['effort']['trajectories']} noises, and judged on "
        f"{report['effort']['held_out']} others. An error is the distance from the exact solution, root mean square; the distance of "
        f"distributions is sliced Wasserstein, between all samples and all exact ones. It took "
        f"{report['evaluations']} network evaluations (one sample, one call) and {report['seconds']:.0f} seconds. The exact paths "
        f"themselves have an error of about {report['reference_error']:.2g}."
    )
    page = Report(
        "fewstep: tuned plans", intro, {"command": "fewstep tune", "machine": machine(), **told_prompts(options), **report}
    )
    for warning in tuned.warnings:
        page.text(warning[0].upper() + warning[1:])
    page.text(_how_to_use(options, model, next(iter(tuned.plans)), f"{scale:g}", several=False), note=True)
    page.heading("Error by number of calls")
    rows = [
        [nfe, told["untuned"], f"{told['untuned_rms']:.3g}", told["best"], f"{told['rms']:.3g}", f"{told['ratio']:.2f}"]
        for nfe, told in report["plans"].items()
    ]
    page.table(["calls", "best untuned", "its error", "tuned by", "its error", "ratio"], rows, text=(1, 3))
    if len(rows) > 1:
        lines = {
            "best untuned": [(float(nfe), told["untuned_rms"]) for nfe, told in report["plans"].items()],
            "tuned": [(float(nfe), told["rms"]) for nfe, told in report["plans"].items()],
        }
        plot = line_plot(lines, xlabel="network calls", ylabel="error to the exact solution")
        page.pictures([("errors.png", "error on noise that nothing was fitted to", plot)], plot=True)
    _add_pictures(page, tuned, model, denoiser, options)
    for nfe, plan in tuned.plans.items():
        _add_plan(page, nfe, plan, tuned.candidates[nfe], report["plans"][str(nfe)]["best"])
    return page


def _how_to_use(options: TuneOptions, model: Any, nfe: int, scale: str, *, several: bool) -> str:
    """A line for the page."""
    out = options.out
    settings = "" if scale == "1" else f" --guidance {scale}"
    if getattr(model, "takes_prompts", False):
        settings += " --prompt PROMPT" + (f" --negative {shlex.quote(options.negative)}" if options.negative else "")
    elif "label" in model.info.conditions:
        settings += f" --label {shlex.quote(options.label)}"
    take = (
        f"fewstep.tuners.Family.load({out!r}).plan({nfe}, {scale})"
        if several
        else f"fewstep.Plan.load({f'{out}/plan-{nfe}.safetensors'!r})"
    )
    command = f"fewstep sample {shlex.quote(options.model)} --plan {shlex.quote(out)} --nfe {nfe}{settings}"
    return f"To use a plan: {command}; in Python, fewstep.sample(denoiser, noise, {take})."


def _add_pictures(page: Any, tuned: Any, model: Any, denoiser: Any, options: TuneOptions) -> None:
    """Samples of other noise: exact, of the best untuned plan, of the tuned one."""
    from fewstep.cli.conditions import conditions
    from fewstep.cli.setup import state_dtype
    from fewstep.evaluate.report import image_grid
    from fewstep.noise import draw_noise
    from fewstep.sampler import sample
    from fewstep.tuners import trace_paths

    shape, schedule = model.info.shape, model.schedule
    decode = getattr(model, "decode", None)
    if len(shape) != 3 or (decode is None and shape[0] not in (1, 3)):
        return
    cond = conditions(model, options, SHOWN, _label(model, options))
    noise = draw_noise(shape, range(OTHER_NOISE, OTHER_NOISE + SHOWN), dtype=state_dtype(options), device=options.device)
    noise = noise * float(schedule.sigma(schedule.t_start))
    calls = tuned.report["effort"]["reference_calls"]
    exact = trace_paths(denoiser, noise, schedule, calls=calls, cond=cond, final=options.final).target
    data_range = model.info.data_range or (-1.0, 1.0)

    def picture(name: str, caption: str, samples: Any) -> tuple[str, str, bytes]:
        pictures = samples if decode is None else decode(samples)
        return name, caption, image_grid(pictures.cpu(), data_range, columns=SHOWN, scale=max(1, 64 // pictures.shape[-1]))

    page.heading("Samples of noise that nothing was fitted to")
    page.pictures([picture("exact.png", "the exact solution", exact)])
    for nfe, plan in tuned.plans.items():
        for name, told, chosen in (("untuned", "best untuned", tuned.candidates[nfe][0].plan), ("tuned", "tuned", plan)):
            page.pictures([picture(f"{name}-{nfe}.png", f"{nfe} calls, {told}", sample(denoiser, noise, chosen, cond=cond))])


def _add_plan(page: Any, nfe: int, plan: Any, candidates: list[Any], best: str) -> None:
    """What was tried, the best of it set off, and the numbers of the plan."""
    import numpy as np

    page.heading(f"{nfe} calls")
    tried = [
        [
            c.name,
            f"{c.errors.rms:.3g}",
            f"{c.errors.median:.3g}",
            f"{c.distance:.3g}",
            f"{c.challenge[0]:.3g}" if c.challenge else "",
        ]
        for c in candidates
    ]
    chosen = next(i for i, candidate in enumerate(candidates) if candidate.name == best)
    head = ["tried", "error", "median error", "distance of distributions", "error with hard noise"]
    page.table(head, tried, best={(chosen, column) for column in range(len(head))})
    page.heading("The plan", 3)
    lams = plan.schedule.lam(plan.tau)
    head = ["call", "time", "lambda", "weight of the noise", *(f"of prediction {j}" for j in range(nfe))]
    rows, dense = [], plan.dense()
    for i in range(nfe):
        shares = [dense.A[i + 1], *dense.B[i + 1][: i + 1]]
        told = [
            f"{float(share):.4g}" if share.ndim == 0 else f"{share.min():.3g} to {share.max():.3g}"
            for share in map(np.asarray, shares)
        ]
        rows.append([str(i), f"{plan.tau[i]:.4g}", f"{lams[i]:.3g}", *told, *[""] * (nfe - i - 1)])
    page.text("Every state as a sum of the noise and the predictions so far; the last is the sample.", note=True)
    page.table(head, rows)
