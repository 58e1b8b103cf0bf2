r"""A sub-network for every call of a plan: which residual blocks to leave out when, searched for a model.

Source: "AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion Model Acceleration" (arXiv
2309.10438), the search of architectures, and its official code. A candidate says for every call which blocks are left out; the number of
blocks executed is bounded, the bound gets tighter from stage to stage, and each stage keeps the best, mutates and crosses them. Not as
there:

- The search begins with what was measured: at every call, each block is left out by itself, and the change of the prediction, times the
  weight that the prediction has in the sample (the last row of the dense plan), is its damage. New skips are drawn by damage, the least
  most often, where the paper draws all alike.
- Candidates are compared by the distance of their samples from the exact ones of the same noise, not by a Frechet distance, whose noise
  in small sets is larger than the differences ranked; the best few once more with noise that the search did not see among it.
- Every candidate of a stage leaves out the same number. In the code it is at most that number.
- The times of the calls stay as they are: those of a plan, which may have been tuned before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fewstep.identity import identity
from fewstep.plan import Plan
from fewstep.sampler import sample
from fewstep.tuners.judge import Judge, Objective
from fewstep.tuners.paths import Paths
from fewstep.tuners.skipping import LayerSkips, Skipping, network_of, skippable, without
from fewstep.tuners.task import Counted, distances, errors_of
from fewstep.version import __version__

__all__ = ["layer_skips"]

Floats = NDArray[np.float64]
Genes = tuple[int, ...]
"""Places in the flattened table of times and blocks that are left out, increasing."""
HELD_OUT = 0.25
"""Share of the paths that only the report is made on."""
STAGES = 4
"""Bounds on the way to the last one."""
GENERATIONS = 6
"""Of the last stage."""
LAST = 0.6
"""Share of the evaluations that are spent on it."""
KEPT, MUTATED, CROSSED = 0.2, 0.6, 0.2
"""Of a population: parents, their mutations, their crossovers."""
MOVES = 2.0
"""Skips that a mutation moves, on average."""
FINALISTS = 8
PROBES = 64
"""Most paths that damage is measured on."""


def layer_skips(
    denoiser: Callable[..., Tensor],
    plan: Plan,
    *,
    paths: Paths,
    share: float = 0.2,
    blocks: Sequence[str] | None = None,
    objective: Objective | None = None,
    evaluations: int = 200,
    seed: int = 0,
    block: int = 256,
    report: Callable[[str], None] = lambda line: None,
) -> LayerSkips:
    """Search what a network may leave out at every call of a plan.

    Args:
        denoiser: ``D(x, t, **cond)``, at whose core is a `fewstep.Denoiser` of a ``torch.nn.Module``; guided or not. The result serves
            this model under this guidance, and this plan, only.
        plan: without noise of its own.
        paths: exact paths, see `fewstep.tuners.trace_paths`. On 9/16 of them candidates are compared, on 12/16, these included, the
            finalists, and on the rest the report is made.
        share: of all blocks at all calls so many are left out, in (0, 1).
        blocks: names of modules that may be left out; the residual blocks when left out, see `skippable`.
        objective: of samples ``"batch *shape"``, less is better; the distance from the exact ones when left out.
        evaluations: how many candidates are judged. Each costs the plan's calls on 9/16 of the paths.
        seed: of what is drawn.
        block: the most samples of a network call.
        report: called with a line about what goes on.

    Returns:
        `LayerSkips`. Its report has the errors on the rest of the paths: with the skips, of the whole network, and with as many of the
        same blocks left out at all calls (their places in the flattened table are in the report as well).

    Raises:
        ValueError: for a share that leaves out nothing or everything, fewer than 8 paths, a plan that draws noise, or a name that cannot
            be left out.
        FewstepError: if there is no module, or no residual block in it.

    Example:
        >>> import fewstep as fs
        >>> denoiser, noise = fs.load("digits"), fs.draw_noise((1, 8, 8), range(16))
        >>> paths = fs.tuners.trace_paths(denoiser, noise, denoiser.schedule, calls=16)
        >>> plan = fs.make_plan("auto", denoiser.schedule, 4)
        >>> skips = layer_skips(denoiser, plan, paths=paths, share=0.1, evaluations=8)
        >>> len(skips.skips), round(skips.share, 1)
        (4, 0.1)
        >>> samples = fs.sample(Skipping(denoiser, skips), noise, plan)
    """
    if plan.stochastic:
        raise ValueError("the plan draws noise, so its samples are not to be compared with the ends of exact paths.")
    if paths.count < 8:
        raise ValueError(f"{paths.count} paths are too few to search on some, to decide on others and to report on the rest.")
    names = skippable(denoiser, paths.noise, paths.cond, blocks=blocks)
    times = np.array(list(dict.fromkeys(plan.tau.tolist())))
    size = len(times) * len(names)
    count = round(share * size)
    if not 0 < count < size:
        raise ValueError(f"a share of {share:g} of {size} leaves out {count}: it must leave out some, and not all.")
    counted = denoiser if isinstance(denoiser, Counted) else Counted(denoiser, block)
    cut = paths.count - max(2, round(HELD_OUT * paths.count))
    runs = _Runs(counted, plan, names, times, paths.take(slice(cut)), identity(denoiser))
    judge = Judge(runs, objective, evaluations)
    breeder = _Breeder(_damage(runs, judge.seen.take(slice(PROBES))), seed)
    _search(judge, runs, breeder, count, report)
    finalists = [genes for genes in judge.best(evaluations) if len(genes) == count][:FINALISTS]
    genes, loss = judge.decide({genes: runs.skips(genes) for genes in finalists})
    told = {
        "share": share,
        "seed": seed,
        "tried": len(judge.losses),
        "loss": loss,
        "objective": "distance" if objective is None else "own",
    }
    told["same"] = breeder.same(count)
    told["held_out"] = _errors(runs, {"skips": genes, "whole": (), "same": breeder.same(count)}, paths.take(slice(cut, None)))
    return runs.skips(genes, {**told, "evaluations": counted.evaluations, "fewstep": __version__})


def _errors(runs: _Runs, tables: Mapping[str, Genes], paths: Paths) -> dict[str, dict[str, float]]:
    """What is reported, on paths that nothing was decided on."""
    samples = {name: runs.run(runs.skips(genes), paths) for name, genes in tables.items()}
    told = {
        name: {"mean": float(distances(x, paths.target).mean()), **asdict(errors_of(x, paths.target))}
        for name, x in samples.items()
    }
    return {name: {key: value for key, value in row.items() if np.isfinite(value)} for name, row in told.items()}


@dataclass(frozen=True)
class _Runs:
    """Runs sub-networks of one model under one plan."""

    denoiser: Counted
    plan: Plan
    names: tuple[str, ...]
    times: Floats
    fit: Paths
    model: dict[str, Any]

    def skips(self, genes: Genes, report: Mapping[str, Any] | None = None) -> LayerSkips:
        """What the genes stand for."""
        table = np.zeros((len(self.times), len(self.names)), bool)
        table.flat[list(genes)] = True
        return LayerSkips(self.names, self.times, table, self.model, self._digest, self.plan.nfe, report or {})

    @cached_property
    def _digest(self) -> str:
        return self.plan.digest

    def run(self, plan: LayerSkips, paths: Paths) -> Tensor:
        """The samples of a sub-network."""
        return sample(Skipping(self.denoiser, plan), paths.noise, self.plan, cond=paths.cond, check=False)


def _damage(runs: _Runs, paths: Paths) -> Floats:
    """``"U K"``: how far the samples move, to first order and through the prediction alone, if one block is left out at one time."""
    whole = sample(runs.denoiser, paths.noise, runs.plan, cond=paths.cond, trajectory=True, check=False)
    modules = dict(network_of(runs.denoiser).named_modules())
    weights = [_size(entry) for entry in runs.plan.dense().B[-1]]
    damage = np.zeros((len(runs.times), len(runs.names)))
    for i, t in enumerate(runs.plan.tau.tolist()):
        place = int(np.flatnonzero(runs.times == t)[0])
        for k, name in enumerate(runs.names):
            with without([modules[name]]):
                moved = runs.denoiser(whole.states[i], t, **paths.cond)
            damage[place, k] += weights[i] * float(distances(moved, whole.predictions[i]).mean())
    return np.where(np.isfinite(damage), damage, np.inf)


def _size(entry: Any) -> float:
    return float(np.sqrt(np.mean(np.square(entry))))


def _search(judge: Judge, runs: _Runs, breeder: _Breeder, count: int, report: Callable[[str], None]) -> None:
    """Tighter bounds, each with the best of the one before; most evaluations go to the last."""
    bounds = sorted({max(1, round(count * (stage + 1) / STAGES)) for stage in range(STAGES)})
    parents: list[Genes] = []
    for bound in bounds:
        last = bound == count
        room = judge.left if last else round((1.0 - LAST) * judge.evaluations / max(1, len(bounds) - 1))
        size = max(4, room // (GENERATIONS if last else 2))
        losses: dict[Genes, float] = {}
        population = breeder.first(parents, bound, size)
        while population and len(losses) < room and judge.left:
            tried = population[: room - len(losses)]
            losses |= {genes: judge(genes, lambda genes=genes: runs.skips(genes)) for genes in tried}
            parents = sorted(losses, key=lambda genes: losses[genes])[: max(2, round(KEPT * size))]
            population = breeder.next(parents, size, losses)
        if losses:
            report(f"{bound} of {breeder.damage.size} left out: loss {min(losses.values()):.4g}, {judge.left} trials left")


class _Breeder:
    """Makes candidates.

    Args:
        damage: ``"U K"``: what is drawn rarely.
        seed: of what is drawn.
    """

    def __init__(self, damage: Floats, seed: int):
        self.damage, self.random = damage, np.random.default_rng(seed)
        floor = 1e-3 * float(np.median(damage[np.isfinite(damage)])) if np.isfinite(damage).any() else 1.0
        self.logs = -np.log(damage.ravel() + floor + np.finfo(float).tiny)

    def first(self, parents: list[Genes], count: int, size: int) -> list[Genes]:
        """The least damage, the same blocks at all calls, as many at every call; the parents with more; and draws."""
        begun = [self._least((), count), self.same(count), self._even(count), *(self._least(genes, count) for genes in parents)]
        grown = [self._filled(genes, count) for genes in parents for _ in range(max(1, size // (2 * len(parents))))]
        drawn = [self._filled((), count) for _ in range(size)]
        return list(dict.fromkeys([*begun, *grown, *drawn]))[: max(size, len(begun))]

    def next(self, parents: list[Genes], size: int, tried: Mapping[Genes, float]) -> list[Genes]:
        """Mutations of the parents, crossovers of two of them, and draws, none of them tried."""
        mutants = [self._mutated(self._one(parents)) for _ in range(round(MUTATED * size))]
        children = [self._crossed(self._one(parents), self._one(parents)) for _ in range(round(CROSSED * size))]
        drawn = [self._filled((), len(parents[0])) for _ in range(size - len(mutants) - len(children))]
        return [genes for genes in dict.fromkeys([*mutants, *children, *drawn]) if genes not in tried]

    def same(self, count: int) -> Genes:
        """The blocks of the least damage in all, at all calls; of the last of them at some calls only."""
        order = np.argsort(self.damage.sum(0), kind="stable")
        places = [i * len(order) + k for k in order for i in np.argsort(self.damage[:, k], kind="stable")]
        return tuple(sorted(map(int, places[:count])))

    def _even(self, count: int) -> Genes:
        """The same number at every call, the least damage of each."""
        ranks = self.damage.argsort(1, kind="stable").argsort(1, kind="stable")
        return tuple(sorted(map(int, np.argsort(ranks.ravel(), kind="stable")[:count])))

    def _least(self, genes: Genes, count: int) -> Genes:
        """With what does the least damage beside them."""
        others = [int(place) for place in np.argsort(-self.logs, kind="stable") if place not in genes]
        return tuple(sorted([*genes, *others[: count - len(genes)]]))

    def _filled(self, genes: Sequence[int], count: int) -> Genes:
        """With others drawn without repetition, each with a probability in proportion to 1 / damage."""
        keys = self.logs + self.random.gumbel(size=len(self.logs))
        keys[list(genes)] = -np.inf
        return tuple(sorted([*genes, *map(int, np.argsort(-keys, kind="stable")[: count - len(genes)])]))

    def _mutated(self, genes: Genes) -> Genes:
        stay = self.random.random(len(genes)) >= min(0.5, MOVES / len(genes))
        return self._filled([gene for gene, kept in zip(genes, stay, strict=True) if kept], len(genes))

    def _crossed(self, first: Genes, second: Genes) -> Genes:
        """What both have, and half of what one of them has."""
        both, one = set(first) & set(second), sorted(set(first) ^ set(second))
        drawn = self.random.permutation(one)[: len(first) - len(both)] if one else []
        return tuple(sorted(both | set(map(int, drawn))))

    def _one(self, parents: list[Genes]) -> Genes:
        return parents[self.random.integers(len(parents))]
