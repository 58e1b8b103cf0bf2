"""``fewstep prefer``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.cli.options import Prompted, option

METHODS = ("pso", "offline-pso", "spo")


@dataclass(frozen=True)
class PreferOptions(Prompted):
    """Options of the command."""

    model: str = option(
        "digits", "a student's folder, a shipped model (digits, photos), a model folder or a diffusers pipeline", positional=True
    )
    reward: str = option(
        "", "what is preferred: ink, contrast, classifier, classifier:LABEL, or package.module:function of your own"
    )
    method: str = option("pso", "pso: pairs of runs; spo: pairs of steps; offline-pso: targets in --data", choices=METHODS)
    options: str = option("", "options of the method: beta=50,clip=0.1; for spo candidates=4,threshold=0.3")
    nfe: int = option(0, "network calls a sample; 0: the most that a student is made for, 4 for other models")
    solver: str = option("", "for models that are no students: a solver that draws noise, for offline-pso any; left out: ddpm")
    label: str = option("each", 'labels to learn from: a class, a list like 0,1,2, or "each"; "" for without condition')
    data: str = option(
        "",
        "targets for offline-pso, a .npz file with x (or samples), label (or labels) for models with classes, and worse if there are such",
    )
    pairs: int = option(512, "for spo: pairs to train its preference model on; 0: the reward itself scores predictions")
    adapter: int = option(0, "train an adapter of this rank; 0: the whole network, or the adapter that a student is")
    iterations: int = option(200, "optimizer steps")
    batch: int = option(32, "conditions in a step")
    learning_rate: float = option(0.0, "of AdamW; 0: 0.00001 for a network, 0.0001 for an adapter")
    seed: int = option(0, "of everything random")
    count: int = option(256, "samples that before and after are compared on; 0: no comparison")
    out: str = option("preferred", "folder for the tuned student, index.html and results.json")
    fresh: bool = option(False, "begin anew; otherwise a run that was stopped goes on from OUT.unfinished")


OPTIONS = {"prefer": PreferOptions}
SHOWN, PROBED = 64, 2


def run(options: PreferOptions) -> int:
    """Tune, write the student and the page."""
    from fewstep.cli.parsing import check_prompted

    _check(options)
    check_prompted(options)
    from fewstep.adapt.lora import LoraOptions
    from fewstep.cli.conditions import conditions
    from fewstep.cli.training import STUDENT_FILES, drawable, features_of, resumable
    from fewstep.steer import Judged, make_reward, prefer
    from fewstep.train.watched import Spent

    reward = make_reward(options.reward) if options.reward else None
    base, plan = _base(options)
    model = base.denoiser_of(plan.nfe) if hasattr(base, "plans") else base
    reward = _Decoded(model, reward) if reward is not None and hasattr(model, "decode") else reward
    label = options.label or None if model.info.conditions else None
    data = _targets(options, model) if options.method == "offline-pso" else None
    cond = None if data is not None else conditions(model, options, SHOWN, label)
    with resumable(options, STUDENT_FILES) as (folder, unfinished):
        scoring = Spent()
        method = _method(options, model, plan, reward, cond, unfinished, scoring)
        made = prefer(
            model,
            plan,
            method=method,
            reward=reward,
            cond=cond,
            data=data,
            adapter=LoraOptions(rank=options.adapter) if options.adapter else None,
            steps=options.iterations,
            batch_size=options.batch,
            learning_rate=options.learning_rate or None,
            seed=options.seed,
            folder=unfinished,
            checkpoint_every=50,
            progress=not options.quiet,
            sheets=max(1, options.iterations // 4) if drawable(model) else 0,
            judged=Judged(options.count, features=features_of(model)) if options.count else None,
        )
        made = _with_scoring(made, scoring.evaluations)
        student = _student(base, made, plan, cond or data or {}, options)
        student.save(folder)
        _page(student, made, options, unfinished).write(folder)
    if options.json:
        print(json.dumps(made.report))
    elif not options.quiet:
        for line in made.told:
            print(line)
        print(f"written to {options.out}; sample with: fewstep sample {options.out} --plan {options.out} --nfe {plan.nfe}")
    return 0


class _Decoded:
    """A reward of the pictures that a model's latents decode to."""

    def __init__(self, model: Any, reward: Any):
        from fewstep.steer.method import told_of

        self.model, self.reward, self.told = model, reward, f"{told_of(reward)} of pictures"

    def __repr__(self) -> str:
        return self.told

    def __call__(self, x: Any, **cond: Any) -> Any:
        return self.reward(self.model.decode(x), **cond)


def _with_scoring(made: Any, evaluations: int) -> Any:
    """What was made, with the network evaluations that the score took on its report."""
    import dataclasses

    return dataclasses.replace(made, report={**made.report, "score_evaluations": evaluations}) if evaluations else made


def _check(options: PreferOptions) -> None:
    if (
        min(options.iterations, options.batch) < 1
        or min(options.adapter, options.pairs, options.count, options.seed, options.nfe) < 0
    ):
        raise ValueError("--iterations and --batch must be at least 1; --adapter, --pairs, --count, --seed and --nfe at least 0.")
    if options.count == 1:
        raise ValueError("--count must be 0 or at least 2.")
    if options.method == "offline-pso" and not options.data:
        raise ValueError("offline-pso learns from targets: give --data.")
    if options.method != "offline-pso" and not options.reward:
        raise ValueError(f"{options.method} learns from a reward: give --reward, such as ink or classifier:3.")
    if options.method != "offline-pso" and options.data:
        raise ValueError(f"{options.method} makes its own samples; leave --data out.")
    if options.dtype != "float32":
        raise ValueError("models are tuned in float32: leave --dtype out.")


def _base(options: PreferOptions) -> tuple[Any, Any]:
    """A student or a denoiser, and the plan."""
    from fewstep.cli.conditions import check_null
    from fewstep.cli.setup import check_plannable, open_model, open_student
    from fewstep.loading import is_student
    from fewstep.solvers import make_plan

    if is_student(options.model):
        if options.adapter:
            raise ValueError(f"{options.model} is a student, which is tuned as it is, network or adapter: leave --adapter out.")
        if options.solver:
            raise ValueError(f"{options.model} is a student, which is sampled by its own plans: leave --solver out.")
        student = open_student(options.model, options)
        if options.method != "offline-pso":
            check_null(student, options.model, options.label or None)
        return student, student.plan(options.nfe or None)
    solver = options.solver or "ddpm"
    check_plannable(solver, "auto", options.nfe or 4)
    model = open_model(options.model, options)
    return model, make_plan(solver, model.schedule, options.nfe or 4, final="zero")


def _method(options: PreferOptions, model: Any, plan: Any, reward: Any, cond: Any, unfinished: Path, scoring: Any) -> Any:
    from fewstep.cli.training import parse_options
    from fewstep.steer import PSO, SPO, OfflinePSO

    given = parse_options(options.options)
    made = {"pso": PSO, "offline-pso": OfflinePSO, "spo": SPO}[options.method]
    known = [name for name in made.__dataclass_fields__ if name not in ("score", "choose", "labels")]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{options.method} has no option {unknown[0]!r} on the command line; it has {', '.join(known)}.")
    score = {"score": _score(options, model, plan, reward, cond, unfinished, scoring)} if options.method == "spo" else {}
    return made(**score, **given)


def _score(options: PreferOptions, model: Any, plan: Any, reward: Any, cond: Any, unfinished: Path, scoring: Any) -> Any:
    """What SPO tells candidates apart by: a preference model of pairs of the model's own samples, or the reward, in its deviations."""
    import torch

    from fewstep.denoisers import innermost
    from fewstep.noise import draw_noise
    from fewstep.sampler import sample
    from fewstep.steer import StepPreference, fit_preference, scored_by
    from fewstep.steer.method import checked
    from fewstep.train.watched import Spent, counted

    count = options.pairs or SHOWN
    rows = torch.arange(count) % SHOWN
    told = {name: value[rows] for name, value in cond.items()}
    with torch.no_grad(), counted([innermost(model, "network")]) as drawing:
        seeds = [range(2_000_000 + k * count, 2_000_000 + (k + 1) * count) for k in (0, 1)]
        noises = [draw_noise(model.info.shape, each, plan, device=options.device) for each in seeds]
        first, second = (sample(model, n, plan, cond=told, seeds=s) for n, s in zip(noises, seeds, strict=True))
        rewards = [checked(reward(x, **told), count, "a reward") for x in (first, second)]
    scoring.evaluations = drawing.evaluations
    if not options.pairs:
        return scored_by(reward, 1.0 / max(1e-12, float(torch.cat([*rewards]).std())))
    if len(model.info.shape) != 3 or not set(cond) <= {"label"}:
        raise ValueError(
            f"the preference model sees pictures of pixels, with labels at most; for {model.info.name} give --pairs 0."
        )
    better = (rewards[0] >= rewards[1]).reshape(-1, *[1] * (first.ndim - 1))
    pairs = {"better": torch.where(better, first, second), "worse": torch.where(better, second, first)}
    known = model.info.conditions.get("label")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        classes, scale = known["classes"] if known else None, 1.0 / float(model.schedule.t_start)
        network = StepPreference(model.info.shape[0], classes=classes, time_scale=scale).to(options.device)
    fit_preference(
        network,
        model,
        {**pairs, "tie": rewards[0] == rewards[1], **told},
        steps=300,
        learning_rate=2e-3,
        seed=options.seed,
        folder=unfinished / "preference",
        progress=not options.quiet,
        spent=(learning := Spent()),
    )
    scoring.evaluations += learning.evaluations
    return network


def _targets(options: PreferOptions, model: Any) -> dict[str, Any]:
    """Targets with their conditions: as named here, or as `fewstep sample` names them."""
    import torch

    from fewstep.cli.setup import read_arrays

    arrays = {name: torch.from_numpy(array) for name, array in read_arrays(options.data, "x").items()}
    arrays.pop("seeds", None)  # of the samples' noise: no condition
    written = "latents" if "latents" in arrays else "samples"
    for name, other in (("x", written), ("label", "labels")):
        if name not in arrays and other in arrays:
            arrays[name] = arrays.pop(other)
    arrays.pop("samples", None)  # pictures beside their latents
    wrong = [n for n in ("x", "worse") if n in arrays and tuple(arrays[n].shape[1:]) != tuple(model.info.shape)]
    needed = {"x", *model.info.conditions}
    if wrong or not needed <= set(arrays):
        found = {name: tuple(array.shape) for name, array in arrays.items()}
        raise ValueError(f"{options.data} needs {sorted(needed)}, x of shape {tuple(model.info.shape)} a sample; it has {found}.")
    return {name: array.float() if array.is_floating_point() else array.long() for name, array in arrays.items()}


def _student(base: Any, made: Any, plan: Any, cond: dict[str, Any], options: PreferOptions) -> Any:
    """The tuned model as a student: of a student, that with other weights; of another model, one with one plan."""
    import dataclasses

    from fewstep.cli.conditions import learnt_null
    from fewstep.distill.networks import asked_of
    from fewstep.distill.student import Student
    from fewstep.distill.told import Telling
    from fewstep.noise import draw_noise
    from fewstep.steer.method import RESERVED

    told = {"name": f"prefer, {options.method}", "options": made.report["method"], "reward": options.reward}
    if isinstance(base, Student):
        network = made.network.network if isinstance(made.network, Telling) else made.network
        card = {**base.card, "method": {**told, "of": base.card["method"]}, "preferred": made.report, "told": made.told}
        card.pop("report", None)
        card["calls"] = {str(plan.nfe): base.card["calls"][str(plan.nfe)]}  # the others' were not tuned
        return dataclasses.replace(base, network=network, card=card, plans={plan.nfe: plan})
    card = _card(base, made, plan, told, options) | {"null_label": learnt_null(base, cond)}
    few = {name: value[:PROBED].cpu() for name, value in cond.items() if name not in RESERVED}
    asked = asked_of(base, draw_noise(base.info.shape, range(PROBED), plan), float(plan.tau[0]), few)
    return Student(made.network, base, {plan.nfe: plan}, card, asked)


def _card(model: Any, made: Any, plan: Any, told: dict[str, Any], options: PreferOptions) -> dict[str, Any]:
    from fewstep.adapt.lora import LoraOptions
    from fewstep.distill.student import FORMAT
    from fewstep.identity import identity
    from fewstep.version import __version__

    known, place = identity(model), Path(options.model)
    source = str(place.resolve()) if place.exists() else options.model
    return {
        "format": FORMAT,
        "fewstep": __version__,
        "method": told,
        "calls": {str(plan.nfe): model.network_time(plan.tau).tolist()},
        "guidance": known["guidance"],
        "guidance_scale": None,
        "wrapped": None,
        "base": {**{key: known[key] for key in ("name", "fingerprint", "predicts")}, "source": source},
        "schedule": model.schedule.config(),
        "adapter": LoraOptions(rank=options.adapter).told() if options.adapter else None,
        "training": made.report["training"],
        "preferred": made.report,
        "told": made.told,
    }


def _page(student: Any, made: Any, options: PreferOptions, unfinished: Path) -> Any:
    from fewstep.cli.setup import machine
    from fewstep.cli.training import student_sheets
    from fewstep.evaluate.report import Report

    results = {"command": "fewstep prefer", "machine": machine(), **made.report, "log": made.log}
    towards = options.reward or options.data
    intro = f"{student.card['base']['name']}, tuned by {options.method} in {options.iterations} steps towards {towards}."
    page = Report("fewstep: preferred", intro, results)
    page.text(f"To use it: fewstep sample {options.out} --plan {options.out} --nfe {made.plan.nfe}.", note=True)
    for line in made.told:
        page.text(line[0].upper() + line[1:] + ".")
    names = [name for name in made.log[-1] if name not in ("step", "learning_rate", "gradient_norm")]
    page.heading("Training")
    page.table(["step", *names], [[str(r["step"]), *(f"{r[n]:.4g}" for n in names)] for r in made.log[-12:]], text=())
    if sheets := student_sheets(unfinished):
        page.heading("Samples: before in the first row, now in the second")
        page.pictures(sheets)
    return page
