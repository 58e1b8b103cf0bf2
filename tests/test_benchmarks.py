"""What the benchmarks measure with, on what is known."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import fewstep as fs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def orders(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("orders")
    for name in ("orders", "peers"):
        sys.modules.pop(name, None)


def test_orders_are_measured_where_every_run_ends_with_the_same_kind_of_step(orders):
    assert len(orders.CALLS) == 5
    assert all(calls % 12 == 0 for calls in orders.CALLS)
    # the rule of "dpm_fast" ends with a step of order 2 and one of order 1 for all of them, so its order shows within one doubling
    assert len({tuple(fs.solvers.make_solver("dpm_fast").split(calls)[-2:]) for calls in orders.CALLS}) == 1


def test_the_slope_is_that_of_a_power_above_the_rounding(orders):
    errors = [7.0 * calls**-2.5 for calls in orders.CALLS]
    assert orders.slope(errors) == pytest.approx(2.5)
    assert orders.slope([*errors[:4], 1e-12]) == pytest.approx(2.5)  # the last lies below the rounding
    assert orders.slope([1.0, *errors[1:]]) == pytest.approx(2.5)  # the last two doublings count
    assert orders.slope(errors, [2 * calls for calls in orders.CALLS]) == pytest.approx(2.5)
    assert orders.slope([float("nan")] * 4 + [0.1]) is None
    stalled = [*errors[:3], errors[2], errors[2]]
    assert orders.slope(stalled, single=True) == pytest.approx(2.5)


@pytest.fixture
def official(orders):
    yield importlib.import_module("official")
    sys.modules.pop("official", None)


def test_random_recipes_are_legal_and_the_same_in_the_words_of_others(official):
    """The comparison with the authors' search space needs their files; that its recipes are ones of theirs does not."""
    random = np.random.default_rng(0)
    recipes = [official.random_recipe(random, ("data", "noise", "v3")) for _ in range(200)]
    assert {move.prediction for recipe in recipes for move in recipe.moves} == {"data", "noise", "v3"}
    assert {recipe.first for recipe in recipes} == {"network", "mean"}
    for recipe in recipes:
        told = official.decisions(recipe, np.linspace(1.0, 0.1, len(recipe.moves) + 1))
        for move, order, start, points, corrector in zip(
            recipe.moves, told["orders"], told["start_points"], told["derivative_types"], told["corrector_types"], strict=True
        ):
            assert order == len(points) + 1
            assert all(start not in point["active_points"] for point in points)
            assert all(f"_{len(point['active_points'])}" in point["estimate"] for point in points)
            assert (corrector["type"] == "no_corrector") == (move.corrector is None)
            if corrector["type"] != "no_corrector":  # every derivative of theirs knows the evaluation at the end
                assert corrector["start_point"] <= -2
                assert all(-1 in point["active_points"] for point in corrector["derivative_type"])


def test_what_is_not_there_is_named(official, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="there is no USF"):
        next(official.of_usf(tmp_path, 0))
    missing: list[str] = []
    with official._noted(missing, "usf"):
        next(official.of_usf(tmp_path, 0))
    assert missing == ["usf (there is no USF/uni_sampler.py)"]


def test_every_solver_has_a_row_with_an_order_to_measure(orders):
    rows = orders.our_rows()
    assert set(fs.solver_names()) - set(orders.FOR_CONSISTENCY_MODELS) <= set(rows)
    problem = orders.Problem.make(orders.INTERVALS["midway"], 2)
    classes = {type(make(problem, orders.CALLS[0])) for make in rows.values()}
    public = {getattr(fs.solvers, name) for name in fs.solvers.__all__ if isinstance(getattr(fs.solvers, name), type)}
    solvers = {kind for kind in public if issubclass(kind, fs.solvers.Solver) and kind is not fs.solvers.Solver}
    assert {kind.__name__ for kind in solvers - classes} == {"EpsilonScale", "LCM", "Restart", "TCD", "Teleport"}
    row = orders.our_row("Mixed, recipe of 2M", rows["Mixed, recipe of 2M"], {"midway": problem})
    assert row["observed"]["midway"] == pytest.approx(2.0, abs=0.05)
    assert row["holds"]


@pytest.fixture
def distillation(monkeypatch):
    pytest.importorskip("fcntl")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("distill", "distill_teacher", "distill_lcm")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def test_processes_that_write_one_file_of_results_keep_what_others_wrote(distillation, tmp_path):
    """Two begin with the same file; each brings what it made."""
    bench, options = distillation["distill"], argparse.Namespace(out=tmp_path / "r.json", count=1)

    def cell(seed):
        return {"seed": seed, "calls": {"1": {"fd": 1.0}}}

    def begun():
        return {"parts": {"tdm": {"seeds": [cell(0)]}}, "floor": {"fd": 1.0}}

    first, second = begun(), begun()
    first["parts"]["tdm"]["seeds"].append(cell(1))
    bench.write(first, options, "tdm")
    second["parts"]["dmd2"] = {"seeds": [cell(0)]}
    bench.write(second, options, "dmd2")
    second["baselines"] = {"calls": {"1": {"fd": 2.0}, "3": {"fd": 0.5}}}
    bench.write(second, options, "baselines")
    found = json.loads(options.out.read_text())
    assert {name: len(part["seeds"]) for name, part in found["parts"].items()} == {"tdm": 2, "dmd2": 1}
    assert second["parts"] == found["parts"]
    lcm, out = distillation["distill_lcm"], tmp_path / "lcm.json"
    for seed in ("0", "1"):
        lcm.write(out, {"count": 1}, {"lcm": {seed: {}}})
    assert json.loads(out.read_text()) == {"students": {"lcm": {"0": {}, "1": {}}}, "count": 1}


def test_a_student_pays_beside_the_sampler_of_fewest_calls_that_is_as_good(distillation):
    pays = distillation["distill"].pays_off_after
    best = {1: 0.8, 2: 0.25, 4: 0.03, 8: 0.01}
    assert pays(1, 0.3, best, 1000) == 1000
    assert pays(1, 0.1, best, 900) == 300
    assert pays(4, 0.03, best, 900) is None
    assert pays(1, 0.001, best, 900) is None
    report = {"floor": {"fd": 0.01}, "baselines": {"calls": {"1": {"fd": 0.8}, "3": {"fd": 0.2}}}}
    old, new = {"evaluations": 10}, {distillation["distill"].COST: 600}
    for told, wanted in ((old, None), (new, 300)):
        parts = {"dmd2": {"seeds": [{**told, "calls": {"1": {"fd": 0.3, "pays_off_after": 7}}}]}}
        assert distillation["distill"].summary({**report, "parts": parts})["medians"]["dmd2: 1"].get("pays_off_after") == wanted
