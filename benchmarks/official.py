r"""Do our plans take the authors' steps? ``python benchmarks/official.py --official FOLDER`` writes ``benchmarks/results/official.json``.

Ours and the papers' own code, and k-diffusion and azula where they are installed, from the same noise on the same noise levels, on an exact
Gaussian mixture under VP-linear in double precision. What is reported is the largest difference of any number of any sample, over all
cases of a comparison; samples are about 1 in size. Rounding makes 1e-15 to 1e-12 of it.

FOLDER holds, from the papers' repositories:

    dpm-solver/dpm_solver_pytorch.py    github.com/LuChengTHU/dpm-solver
    UniPC/uni_pc.py                     github.com/wl-zhao/UniPC
    SA-Solver/sa_solver.py              github.com/scxue/SA-Solver
    DPM-Solver-v3/dpm_solver_v3.py      github.com/thu-ml/DPM-Solver-v3
    DC-Solver/dc_solver.py, scheduling_dcsolver_multistep.py, sd2.1.npy    github.com/wl-zhao/DC-Solver
    USF/uni_sampler.py                  github.com/thu-nics/USF

What is not there is named and left out. Their code runs as it is, with these changes from outside: on the processor where it asks for
CUDA, and in double precision where it asks for single, so that formulas are compared and not roundings.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import tempfile
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from orders import MEANS, VARIANCES, WEIGHTS, gaussian_statistics
from peers import Levels, Stepper, steppers
from torch import Tensor
from tqdm import tqdm

import fewstep as fs
from fewstep.recipes import Derivative, Move, Recipe, Update
from fewstep.solver import Solver
from fewstep.statistics import ModelStatistics

RESULTS = Path(__file__).parent / "results" / "official.json"
SCHEDULE = fs.schedules.VPLinear(t_start=1.0, t_end=0.01)
CALLS = (6, 12, 24)
RECIPES, NODES = 60, 1000
MEAN = (WEIGHTS[:, None] * MEANS).sum(0)
NAMES = {"data": "data_prediction", "noise": "noise_prediction", "v3": "dpmsolver_v3_prediction"}
RELAXED = {
    "none": None,
    "linear": "linear",
    "bh1": "unipc-bh1",
    "bh2": "unipc-bh2",
    "half_exp": "0.5exp",
    "minus_half_exp": "-0.5exp",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare with the authors' code step for step.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--official", type=Path, required=True, help="a folder with the papers' code")
    parser.add_argument("--seed", type=int, default=0, help="of the ratios, statistics and recipes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    comparisons: list[Callable[[Path, int], Iterator[Row]]] = [of_steppers, of_adaptive, of_v3, of_dc, of_regression, of_usf]
    rows, missing = [], []
    for compare in tqdm(comparisons, desc="comparisons"):
        with _noted(missing, compare.__name__.removeprefix("of_")):
            rows += list(compare(options.official, options.seed))
    report = {
        "command": "python benchmarks/official.py --official FOLDER",
        "schedule": repr(SCHEDULE),
        "seed": options.seed,
        "missing": missing,
        "comparisons": [row.record() for row in rows],
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        print(f"{row.code:12} {row.theirs:42} {len(row.differences):4} cases  {max(row.differences):.1e}")
    print("missing:", "; ".join(missing) or "none")
    return 0


@contextlib.contextmanager
def _noted(missing: list[str], what: str) -> Iterator[None]:
    """A comparison whose files are not there is noted."""
    try:
        yield
    except FileNotFoundError as error:
        missing.append(f"{what} ({error})")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        code: whose.
        theirs, ours: what was compared with what.
        differences: the largest difference of every case.
    """

    code: str
    theirs: str
    ours: str
    differences: list[float]

    def record(self) -> dict[str, Any]:
        largest = float(f"{max(self.differences):.2g}")
        return {"code": self.code, "theirs": self.theirs, "ours": self.ours, "cases": len(self.differences), "largest": largest}


# ---- the problem and their code ----------------------------------------------------------------------------------------------------


DENOISER = fs.exact.GaussianMixture(SCHEDULE, MEANS, VARIANCES[:, None].expand(3, 2), WEIGHTS)
NOISE = fs.draw_noise((2,), range(16), dtype=torch.float64) * float(SCHEDULE.sigma(SCHEDULE.t_start))


def predict(x: Tensor, alpha: float, sigma: float) -> Tensor:
    return DENOISER(x, float(SCHEDULE.t_of_lam(math.log(alpha / sigma))))


def noise_model(x: Tensor, t: Tensor) -> Tensor:
    """The noise prediction of images ``"batch 1 1 2"``, as their code calls it."""
    at = float(t.flatten()[0])
    alpha, sigma = float(SCHEDULE.alpha(at)), float(SCHEDULE.sigma(at))
    return (x - alpha * DENOISER(x.flatten(1), at).reshape(x.shape)) / sigma


def our_samples(solver: Solver, calls: int | None, grid: Any) -> Tensor:
    return fs.sample(DENOISER, NOISE, solver.plan(SCHEDULE, calls, grid))


def apart(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs.reshape(ours.shape) - ours).abs().max())


def load(folder: Path, path: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, folder / path)
    if spec is None or spec.loader is None or not (folder / path).is_file():
        raise FileNotFoundError(f"there is no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def theirs_in_double() -> Iterator[None]:
    """On the processor, in double precision, without what their code prints."""
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor),
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
            mock.patch.object(torch, "FloatTensor", torch.DoubleTensor),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def linear(module: types.ModuleType, **options: Any) -> Any:
    """Their VP-linear schedule."""
    return module.NoiseScheduleVP("linear", continuous_beta_0=0.1, continuous_beta_1=20.0, **options)


# ---- solvers on given levels -------------------------------------------------------------------------------------------------------


def twins() -> dict[tuple[str, str], Solver]:
    """(library, its solver) as `peers.steppers` name them -> ours."""
    s = fs.solvers
    found: dict[tuple[str, str], Solver] = {}
    for order in (1, 2, 3):
        for kind, multi, single in (
            ("dpmsolver++", s.DPMSolverPP, s.DPMSolverPPSinglestep),
            ("dpmsolver", s.DPMSolver, s.DPMSolverSinglestep),
        ):
            found["official", f"DPM-Solver {kind} multistep order {order}"] = multi(order=order, compat="official")
            found["official", f"DPM-Solver {kind} singlestep order {order}"] = single(order=order, budget="fast")
        for shortcut in ("bh1", "bh2"):
            found["official", f"UniPC {shortcut} order {order}"] = s.UniPC(order=order, shortcut=shortcut)
    found["official", "SA-Solver tau 0, predictor 3, corrector 4"] = s.SASolver(3, 4, tau=0.0, compat="official")
    for name, solver in (
        ("sample_euler", s.DDIM()),
        ("sample_heun", s.EDMHeun()),
        ("sample_dpm_2", s.DPMSolverSinglestep(order=2)),
        ("sample_lms", s.Adams(order=4, corrector="none")),
        ("sample_dpmpp_2s_ancestral", s.DPMSolverPPSinglestep(order=2)),
        ("sample_dpmpp_2m", s.DPMSolverPP(order=2)),
        ("sample_dpmpp_2m_sde", s.DPMSolverPP(order=2)),
        ("sample_dpmpp_3m_sde", s.DPMSolverPP(order=3, variant="taylor", compat="official")),
    ):
        found["k-diffusion", name] = solver
    found |= {("azula", "DDIMSampler"): s.DDIM(), ("azula", "EulerSampler"): s.DDIM(), ("azula", "HeunSampler"): s.EDMHeun()}
    for order in (2, 3):
        found["azula", f"zABSampler order {order}"] = s.Adams(order=order, corrector="none")
        found["azula", f"vABSampler order {order}"] = s.Adams(order=order, prediction="flow", corrector="none")
        found["azula", f"zEABSampler order {order}"] = s.DEIS(order=order, variable="logrho", compat="official")
        found["azula", f"xEABSampler order {order}"] = s.UniPC(order=order, corrector=False, shortcut="none")
    return found


def of_steppers(folder: Path, seed: int) -> Iterator[Row]:
    found, missing = steppers(folder)
    for note in missing:
        print("missing:", note)
    ours = twins()
    for stepper in found:
        solver = ours.get((stepper.library, stepper.solver))
        if solver is not None:
            differences = [apart(their_samples(stepper, calls), our_samples(solver, calls, "lambda")) for calls in CALLS]
            yield Row(stepper.library, stepper.solver, told(solver), differences)


def told(solver: Solver) -> str:
    """The solver with the options that are not its defaults."""
    given = {f.name: getattr(solver, f.name) for f in dataclasses.fields(solver) if getattr(solver, f.name) != f.default}  # type: ignore[arg-type]
    return f"{type(solver).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def their_samples(stepper: Stepper, calls: int) -> Tensor:
    return stepper.run(predict, Levels(SCHEDULE, fs.grids.make_grid("lambda", SCHEDULE, calls)), NOISE)


def of_adaptive(folder: Path, seed: int) -> Iterator[Row]:
    """DPM-Solver-12 and -23: the same accepted steps, so the same samples."""
    module = load(folder, "dpm-solver/dpm_solver_pytorch.py")
    for order in (2, 3):
        for kind, predicts in (("dpmsolver", "noise"), ("dpmsolver++", "data")):
            differences = []
            for tolerance in (0.05, 0.005):
                with theirs_in_double():
                    solver = module.DPM_Solver(noise_model, linear(module, dtype=torch.float64), algorithm_type=kind)
                    image = NOISE.reshape(-1, 1, 1, 2)
                    ends = {"t_start": SCHEDULE.t_start, "t_end": SCHEDULE.t_end}
                    theirs = solver.sample(image, method="adaptive", order=order, atol=0.0078, rtol=tolerance, **ends)
                options = {"order": order, "predicts": predicts, "atol": 0.0078, "rtol": tolerance, "growth": math.inf}
                run = fs.adaptive(DENOISER, NOISE, SCHEDULE, together=True, **options)
                differences.append(apart(theirs, run.samples))
            words = f"DPM-Solver {kind} adaptive order {order}"
            yield Row("official", words, f"adaptive(order={order}, predicts={predicts!r}, together=True, growth=inf)", differences)


# ---- DPM-Solver-v3 -----------------------------------------------------------------------------------------------------------------


def random_statistics(seed: int, nodes: int) -> ModelStatistics:
    """Smooth ones, of an element each, that are no model's: close to a Gaussian's, with s and b that are not 0."""
    closed, random = gaussian_statistics(SCHEDULE), np.random.default_rng(seed)
    lam = np.linspace(closed.lam[0], closed.lam[-1], nodes + 1)
    waves = [0.1 * np.sin(lam[:, None] * random.uniform(0.3, 1.0, 2) + random.uniform(0.0, 6.0, 2)) for _ in range(3)]
    l = 1.0 / (1.0 + np.exp(2.0 * lam))[:, None] + waves[0]  # noqa: E741 - the paper's name
    return ModelStatistics(SCHEDULE, lam, l, waves[1], waves[2])


@contextlib.contextmanager
def written(statistics: ModelStatistics) -> Iterator[str]:
    """A folder with the statistics in their files, over images ``"1 1 2"``."""
    with tempfile.TemporaryDirectory() as folder:
        l, s, b = (array[:, None, None, :] for array in (statistics.l, statistics.s, statistics.b))  # noqa: E741
        np.savez(Path(folder) / "l.npz", l=l)
        np.savez(Path(folder) / "sb.npz", s=s, b=b)
        yield folder


def of_v3(folder: Path, seed: int) -> Iterator[Row]:
    """All combinations of order, pseudo derivatives, corrector, their ``half``, lowered end and two grids."""
    module = load(folder, "DPM-Solver-v3/dpm_solver_v3.py")
    statistics = random_statistics(seed, 120)
    correctors = {"none": (False, False), "same": (True, False), "pseudo": (True, True)}
    differences = []
    grids = {"lambda": "logSNR", "time": "time_uniform"}
    choices = itertools.product((1, 2, 3), (False, True), correctors, (False, True), (False, True), grids)
    with written(statistics) as files:
        for order, pseudo, corrector, half, lower, grid in choices:
            if half and corrector == "none":
                continue
            ends = {"t_start": SCHEDULE.t_start, "t_end": SCHEDULE.t_end}
            uses, of_corrector = correctors[corrector]
            with theirs_in_double():
                solver = module.DPM_Solver_v3(files, linear(module), steps=8, skip_type=grids[grid], device="cpu", **ends)
                theirs = solver.sample(NOISE.reshape(-1, 1, 1, 2), noise_model, order, pseudo, uses, of_corrector, lower, half=half)
            above = 0.5 if half else 0.0
            ours = fs.solvers.DPMSolverV3(statistics, order, pseudo, corrector, above, lower, compat="official")
            differences.append(apart(theirs, our_samples(ours, 8, grid)))
    yield Row("official", "DPM-Solver-v3, every option, 8 calls", "DPMSolverV3(statistics, ..., compat='official')", differences)


# ---- DC-Solver ---------------------------------------------------------------------------------------------------------------------


def of_dc(folder: Path, seed: int) -> Iterator[Row]:
    """Both predictions and shortcuts, orders and degrees, with and without a lowered end, and random ratios."""
    module, random = load(folder, "DC-Solver/dc_solver.py"), np.random.default_rng(seed)
    differences = []
    for prediction, shortcut, (order, degree), lower, calls in itertools.product(
        ("data", "noise"), ("bh1", "bh2"), ((2, 1), (3, 1), (3, 2)), (False, True), (5, 10)
    ):
        ratios = [1.0, 1.0, *random.uniform(0.7, 1.3, calls - 2).tolist()]
        with theirs_in_double():
            solver = module.DCSolver(noise_model, linear(module), prediction == "data", variant=shortcut, dc_order=degree)
            options = {"steps": calls, "order": order, "skip_type": "time_uniform", "method": "multistep"}
            ends = {"t_start": SCHEDULE.t_start, "t_end": SCHEDULE.t_end, "lower_order_final": lower}
            theirs = solver.sample(NOISE.reshape(-1, 1, 1, 2), dc_ratios=list(ratios), **options, **ends)
        inner = fs.solvers.UniPC(order, shortcut=shortcut, prediction=prediction, lower_order_final=lower)
        differences.append(apart(theirs, our_samples(fs.solvers.Compensated(inner, tuple(ratios), degree), calls, "time")))
    yield Row("official", "DC-Solver, every option, random ratios", "Compensated(UniPC(...), ratios, degree)", differences)


def of_regression(folder: Path, seed: int) -> Iterator[Row]:
    """Their regression of ratios, cut out of a file that otherwise needs their fork of diffusers."""
    file, numbers = (folder / "DC-Solver" / name for name in ("scheduling_dcsolver_multistep.py", "sd2.1.npy"))
    for path in (file, numbers):
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path.relative_to(folder)}")
    source = file.read_text()
    name = "cascade_polynomial_regression"
    (node,) = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == name)
    namespace: dict[str, Any] = {"np": np}
    exec(textwrap.dedent("    " + (ast.get_source_segment(source, node) or "")), namespace)
    coefficients = np.load(numbers)
    ours = fs.solvers.CascadePolynomial(coefficients, (1.0, 12.0), (3, 50))
    differences = []
    for scale, calls in itertools.product((1.5, 3.0, 7.5, 12.0), (5, 8, 10, 20)):
        theirs = namespace[name](None, scale, calls, numbers)
        differences.append(float(np.abs(np.array(theirs) - ours.ratios(scale, calls)).max()))
    yield Row("official", "DC-Solver, regression of ratios", "CascadePolynomial", differences)


# ---- USF ---------------------------------------------------------------------------------------------------------------------------


def of_usf(folder: Path, seed: int) -> Iterator[Row]:
    """Random recipes of every decision. Those with the statistics' prediction apart: their integrals are trapezoids between the nodes."""
    module, random = load(folder, "USF/uni_sampler.py"), np.random.default_rng(seed)
    samplers = [usf_sampler(module, random_statistics(seed, nodes)) for nodes in (NODES, 2 * NODES)]
    statistics = random_statistics(seed, 2 * NODES)
    plain, with_v3 = ("data", "noise"), ("data", "noise", "v3")
    for words, predictions in (("data and noise", plain), ("with v3, trapezoids extrapolated", with_v3)):
        differences = [one_recipe(samplers, random_recipe(random, predictions), statistics) for _ in range(RECIPES)]
        yield Row("official", f"USF, random recipes, {words}", "Mixed(recipe, statistics, mean)", differences)


def usf_sampler(module: types.ModuleType, statistics: ModelStatistics) -> Any:
    mean = MEAN.reshape(1, 1, 1, 2)
    with written(statistics) as files, theirs_in_double(), mock.patch.object(torch, "load", return_value=mean):
        ends = {"dpmsolver_v3_t_start": SCHEDULE.t_start, "dpmsolver_v3_t_end": SCHEDULE.t_end}
        schedule = linear(module, dtype=torch.float64)
        return module.uni_sampler(noise_model, schedule, statistics_dir=files, average_x0_dir="mean", **ends)


def one_recipe(samplers: Sequence[Any], recipe: Recipe, statistics: ModelStatistics) -> float:
    """Their error falls by 4 where the nodes double, so 4/3 and -1/3 of two runs leave the fourth order of the nodes' distance."""
    nodes = 2 * np.linspace(0, NODES, len(recipe.moves) + 1).round().astype(int)
    times = SCHEDULE.t_of_lam(statistics.lam[nodes])  # their statistics know their nodes only
    with theirs_in_double():
        coarse, fine = (s.sample(NOISE.reshape(-1, 1, 1, 2).clone(), decisions(recipe, times)) for s in samplers)
    ours = fs.solvers.Mixed(recipe, statistics, MEAN.numpy())
    return apart((4.0 * fine - coarse) / 3.0, our_samples(ours, None, times))


def random_recipe(random: np.random.Generator, predictions: Sequence[str]) -> Recipe:
    """Of 4 to 8 steps; predictors and correctors from any start, derivatives from any points, any relaxation."""
    count = int(random.integers(4, 9))
    moves = []
    for i in range(count):
        predictor = random_update(random, i + 1, int(random.integers(0, min(i, 2) + 1)))
        corrects = 0 < i < count - 1 and random.random() < 0.5
        corrector = random_update(random, i + 2, int(random.integers(1, min(i, 2) + 1)), must=0) if corrects else None
        moves.append(Move(predictor, str(random.choice(predictions)), corrector))
    return Recipe(tuple(moves), first=str(random.choice(["network", "mean"])))


def random_update(random: np.random.Generator, known: int, start: int, must: int | None = None) -> Update:
    """An update that knows so many evaluations; `must` is a point of all its derivatives."""
    near = [point for point in range(min(known, 4)) if point not in (start, must)]
    highest = min(len(near) + (must is not None), 3)
    order = 1 + int(random.integers(1 if must is not None else 0, highest + 1)) if highest else 1
    derivatives = []
    for k in range(1, order):
        fewest = k - (must is not None)
        size = int(random.integers(fewest, len(near) + 1))
        always = [] if must is None else [must]
        points = always + (random.choice(near, size, replace=False).tolist() if near else [])
        relaxation = str(random.choice(list(RELAXED))) if k == 1 else "none"
        derivatives.append(
            Derivative(tuple(points), relaxation, float(random.uniform(-0.3, 0.3)) if relaxation == "linear" else 0.0)
        )
    return Update(tuple(derivatives), start)


def decisions(recipe: Recipe, times: np.ndarray) -> dict[str, Any]:
    """The recipe in their words."""
    correctors = [move.corrector for move in recipe.moves]
    return {
        "timesteps": torch.from_numpy(times),
        "afs": {"network": "no_afs", "mean": "average_x0"}[recipe.first],
        "orders": [move.predictor.order for move in recipe.moves],
        "prediction_types": [NAMES[move.prediction] for move in recipe.moves],
        "start_points": [-1 - move.predictor.start for move in recipe.moves],
        "derivative_types": [derivative_types(move.predictor) for move in recipe.moves],
        "corrector_types": [{"type": "no_corrector"} if c is None else corrector_type(c) for c in correctors],
    }


def corrector_type(update: Update) -> dict[str, Any]:
    about = {"start_point": -1 - update.start, "taylor_order": update.order}
    return {"type": "pseudo", **about, "derivative_type": derivative_types(update)}


def derivative_types(update: Update) -> list[dict[str, Any]]:
    return [
        {
            "estimate": f"Difference_{len(derivative.points)}",
            "active_points": [-1 - point for point in derivative.points],
            "relaxation": RELAXED[derivative.relaxation],
            "relaxation_coefficient": derivative.coefficient,
        }
        for derivative in update.derivatives
    ]


if __name__ == "__main__":
    raise SystemExit(main())
