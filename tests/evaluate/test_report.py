from __future__ import annotations

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep as fs
from fewstep.evaluate import (
    Judge,
    Report,
    SlicedWasserstein,
    add_comparison,
    candidates,
    compare_plans,
    compare_solvers,
    image_grid,
    observed_order,
    pixels,
    rms_error,
    settled_solution,
)


def test_image_grid_places_every_pixel():
    samples = torch.tensor([[0.0, 51.0], [102.0, 255.0]]).reshape(1, 1, 2, 2).repeat(3, 1, 1, 1) / 255
    pixels = np.asarray(Image.open(io.BytesIO(image_grid(samples, (0.0, 1.0), columns=2, scale=1))))
    assert pixels.shape == (5, 5)
    for top, left in ((0, 0), (0, 3), (3, 0)):
        assert pixels[top : top + 2, left : left + 2].tolist() == [[0, 51], [102, 255]]
    assert (pixels[2] == 128).all()
    with pytest.raises(ValueError, match="1 or 3"):
        image_grid(torch.zeros(2, 2), (0.0, 1.0), columns=1)


def test_page_escapes_and_holds_its_pictures(tmp_path):
    report = Report("a <b>", "x & y", {"n": 1})
    report.heading("<h>")
    report.table(["k", "v"], [["<i>", "2"]], best={(0, 1)})
    report.pictures([("p.png", "caption", image_grid(torch.zeros(1, 3, 2, 2), (0.0, 1.0), columns=1))])
    report.write(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "<b>" not in page.split("<style>")[0] + page.split("</style>")[1].replace("<body>", "")
    assert "&lt;i&gt;" in page
    assert "class=best" in page
    assert json.loads((tmp_path / "results.json").read_text()) == {"n": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "p.png", "results.json"]


def test_errors_are_against_the_exact_solution():
    exact_model = fs.exact.Gaussian(fs.schedules.VPLinear(), torch.zeros(3), 0.5)
    x = fs.draw_noise((3,), range(8), dtype=torch.float64)
    exact = exact_model.solution(x, 1.0, 1e-3)
    plans = [("ddim", "lambda", fs.make_plan("ddim", exact_model.schedule, n, grid="lambda")) for n in (5, 50)]
    seen = []
    rows = compare_plans(exact_model, x, exact, plans=plans, after=seen.append)
    assert seen == rows
    assert rows[1].error < 0.2 * rows[0].error
    assert rows[0].error == pytest.approx(rms_error(rows[0].samples, exact))


def test_a_solver_that_overflows_has_an_infinite_error_and_the_others_go_on():
    broken = fs.Denoiser(lambda x, t: x * torch.inf, fs.schedules.VPLinear(), "data")
    rows = compare_plans(broken, torch.ones(2, 3), torch.ones(2, 3), plans=[("a", "", fs.make_plan("ddim", broken.schedule, 2))])
    assert not math.isfinite(rows[0].error)


def mixture():
    schedule = fs.schedules.VPLinear(t_start=0.95, t_end=0.05)
    means = torch.tensor([[1.0, 0.5], [-1.0, -0.3]], dtype=torch.float64)
    return fs.exact.GaussianMixture(schedule, means, 0.2)


def test_observed_order_is_the_claimed_one_and_stops_above_the_floor():
    denoiser, x = mixture(), fs.draw_noise((2,), range(8), dtype=torch.float64)
    exact = fs.reference(denoiser, x, denoiser.schedule, tol=1e-10)
    for name, order in (("ddim", 1), ("dpmpp_2m", 2), ("dpmpp_3m", 3)):
        plans = {n: fs.make_plan(name, denoiser.schedule, n, grid="lambda") for n in (40, 80, 160, 320)}
        found = observed_order(denoiser, x, exact, plans.__getitem__, nfes=list(plans))
        assert found.order == pytest.approx(order, abs=0.15)
        assert len(found.orders) == len(found.errors) - 1 == 3
        assert found.order == pytest.approx(found.orders[-1])
    rough = fs.reference(denoiser, x, denoiser.schedule, tol=1e-3)
    with pytest.raises(ValueError, match="well above that of the exact solution"):
        observed_order(denoiser, x, rough, plans.__getitem__, nfes=[160, 320])
    with pytest.raises(ValueError, match="increasing"):
        observed_order(denoiser, x, exact, plans.__getitem__, nfes=[80, 40])


def test_settled_solution_is_within_its_own_error():
    denoiser, x = mixture(), fs.draw_noise((2,), range(40), dtype=torch.float64)
    exact = fs.reference(denoiser, x, denoiser.schedule, tol=1e-9)
    done, counts = [], []
    found = settled_solution(denoiser, x, denoiser.schedule, tol=1e-4, block=16, after=done.append, advance=counts.append)
    assert rms_error(found.samples, exact) < found.error <= 1e-4
    assert sum(done) == found.calls
    assert done[-1] == found.nfe
    assert sum(counts) == 40 * found.calls  # every call of every sample
    alone = settled_solution(denoiser, x[:3], denoiser.schedule, tol=found.error).samples
    torch.testing.assert_close(alone, found.samples[:3], rtol=0, atol=2e-4)
    with pytest.raises(fs.FewstepError, match="Ask for less"):
        settled_solution(denoiser, x, denoiser.schedule, tol=1e-14, most=80)


def test_a_settled_solution_that_ends_at_zero_takes_one_more_prediction():
    denoiser, x = mixture(), fs.draw_noise((2,), range(8), dtype=torch.float64)
    at_end = settled_solution(denoiser, x, denoiser.schedule, tol=1e-4)
    zero = settled_solution(denoiser, x, denoiser.schedule, tol=1e-4, final="zero")
    torch.testing.assert_close(zero.samples, denoiser(at_end.samples, denoiser.schedule.t_end), rtol=0, atol=1e-4)
    assert zero.nfe % 10 == 1
    with pytest.raises(fs.FewstepError, match="unknown final"):
        settled_solution(denoiser, x, denoiser.schedule, final="end")


def test_candidates_run_equal_plans_once_and_say_what_is_left_out(monkeypatch):
    schedule = fs.schedules.VPLinear()
    found = candidates(schedule, [2, 5])
    ran = {name for name, _, _ in found.plans}
    assert ran | set(found.same) | set(found.skipped) >= set(fs.solver_names())
    assert found.same["dpmpp_1"] == "ddim"
    assert not ran & set(found.same)
    assert [name for name, _, _ in candidates(schedule, [1], names=["ddim", "dpmpp_3m"]).plans] == ["ddim", "dpmpp_3m"]

    class NeedsStatistics(fs.solvers.DDIM):
        pass

    monkeypatch.setattr(fs.solvers, "NeedsStatistics", NeedsStatistics, raising=False)
    monkeypatch.setattr(fs.solvers, "__all__", [*fs.solvers.__all__, "NeedsStatistics"])
    monkeypatch.setitem(fs.solvers.SOLVERS, "broken", (fs.solvers.DPMSolverPP, {"order": 17}))
    found = candidates(schedule, [5])
    assert "computed for the model" in found.skipped["NeedsStatistics"]
    assert "17" in found.skipped["broken"]
    ends = [{plan.grid[-1] for *_, plan in candidates(schedule, [5], final=final).plans} for final in ("t_end", "zero")]
    assert ends == [{schedule.t_end}, {0.0}]
    with pytest.raises(ValueError, match="17"):
        candidates(schedule, [5], names=["broken"])


def test_candidates_have_or_tell_of_every_method():
    found = candidates(fs.schedules.VPLinear(), [5])
    assert "epsilon_scale" in {name for name, _, _ in found.plans}
    assert set(found.skipped) == {"Compensated", "DPMSolverV3", "Mixed", "Restart", "Teleport", "TimeShift", "adaptive"}
    for name, reason in found.skipped.items():
        assert hasattr(fs.solvers, name) or hasattr(fs, name)
        assert reason != found.skipped.get("Mixed") or name == "Mixed"  # every reason is its own
    (own,) = candidates(fs.schedules.VPLinear(), [5], names=["epsilon_scale"]).plans
    assert own[2] == fs.solvers.EpsilonScale(fs.solvers.DPMSolverPP(order=2)).plan(fs.schedules.VPLinear(), 5)
    with pytest.raises(fs.FewstepError, match="Did you mean 'karras'"):
        candidates(fs.schedules.VPLinear(), [5], grids=["karas"])


def run_comparison(nfes=(3, 6), judge=True):
    exact_model = fs.exact.GaussianMixture(fs.schedules.VPLinear(), [[1.0, 0.5], [-1.0, -0.3]], 0.2)
    denoiser = fs.Denoiser(
        exact_model, exact_model.schedule, "data", scalar_time=True, info=fs.ModelInfo(name="mixture", shape=(2,))
    )
    noise, others = (fs.draw_noise((2,), seeds, dtype=torch.float64) for seeds in (range(60), range(100, 200)))
    solved = [settled_solution(denoiser, x, denoiser.schedule, tol=1e-4) for x in (noise, others)]
    chosen = Judge(SlicedWasserstein(), pixels, solved[0].samples, solved[1].samples, "pixels", 30, 0) if judge else None
    found = candidates(denoiser.schedule, nfes, names=["ddpm", "dpmpp_2m", "ddim"])
    options = {"exact_error": solved[0].error, "exact_nfe": solved[0].nfe, "seeds": range(60), "judge": chosen, "block": 25}
    return compare_solvers(denoiser, noise, solved[0].samples, found, **options), denoiser, noise, solved[0]


def test_comparison_ranks_by_both_figures():
    found, denoiser, noise, exact = run_comparison()
    assert [place.key[0] for place in found.ranking("error")] == ["dpmpp_2m", "ddim"]  # the stochastic one follows another path
    assert {place.key[0] for place in found.ranking("distance")} == {"ddpm", "dpmpp_2m", "ddim"}
    assert found.ranking("error")[0].score == 1.0
    errors = found.errors()
    wanted = math.sqrt(math.prod(errors["ddim", "auto", n] / errors["dpmpp_2m", "auto", n] for n in (3, 6)))
    assert found.ranking("error")[1].score == pytest.approx(wanted)
    samples = fs.sample(denoiser, noise, fs.make_plan("ddim", denoiser.schedule, 6))
    assert errors["ddim", "auto", 6] == pytest.approx(rms_error(samples, exact.samples), rel=1e-6)
    assert found.distances["ddim", "auto", 6].value == pytest.approx(SlicedWasserstein()(samples, found.judge.others))
    assert found.distances["ddim", "auto", 6].excess == pytest.approx(found.distances["ddim", "auto", 6].value - found.floor)
    assert all(len(row.samples) <= 10 for row in found.rows)
    document = json.loads(json.dumps({**found.results(), "rows": found.records()}, allow_nan=False))
    assert document["distance"]["sizes"] == [60, 100]
    assert [row.get("stochastic", False) for row in document["rows"]] == [True, True, False, False, False, False]


def test_a_solver_that_diverges_is_last_and_legal_json():
    found, *_ = run_comparison(judge=False)
    broken = dataclasses.replace(found.rows[-1], error=math.nan)
    found.rows = [*found.rows[:-1], broken]
    assert found.ranking("error")[-1].key[0] == "ddim"
    json.dumps([found.results(), found.records()], allow_nan=False)
    report = Report("t", "i")
    keys = [place.key for place in found.ranking()]
    add_comparison(report, found, summary="s", shown=keys, calls=[3])
    assert "<td>diverges</td>" in report.page()
    assert "ranked by distance only: ddpm" in report.page()


def test_errors_below_that_of_the_exact_solution_are_not_told_apart():
    found, *_ = run_comparison(nfes=(3, 6), judge=False)
    found.exact_error = 1.01 * found.errors()["ddim", "auto", 6]  # both are nearer than that at 6 calls
    assert [(place.key[0], place.rank) for place in found.ranking()] == [("dpmpp_2m", 1), ("ddim", 2)]
    assert found.figures("error")["dpmpp_2m", "auto", 6] == found.figures("error")["ddim", "auto", 6] == found.exact_error
    report = Report("t", "i")
    add_comparison(report, found, summary="s", shown=[], calls=[3])
    assert report.page().count(f"<td>&lt; {found.exact_error:#.3g}</td>") == 2
    assert "class=best>&lt;" not in report.page()
    found.exact_error = 10.0
    assert [place.rank for place in found.ranking()] == [1, 1]


def test_distances_that_are_not_told_from_the_floor_share_a_rank():
    found, *_ = run_comparison()
    near = {"excess_low": -0.1, "excess_high": 0.1}
    for key, distance in found.distances.items():
        found.distances[key] = dataclasses.replace(distance, excess=0.05, **near)
    assert [place.rank for place in found.ranking("distance")] == [1, 1, 1]
    for n, name in ((3, "ddim"), (3, "ddpm"), (6, "ddpm")):  # a set that varies too little is nearer than the floor, and no better
        key = (name, "auto", n)
        found.distances[key] = dataclasses.replace(found.distances[key], excess=-0.05, excess_low=-0.06, excess_high=-0.04)
    assert [(place.key[0], place.rank) for place in found.ranking("distance")] == [("dpmpp_2m", 1), ("ddim", 2), ("ddpm", 3)]
    report = Report("t", "i")
    add_comparison(report, found, summary="s", shown=[], calls=[3])
    assert report.page().count("<td>≠ ") == 3
    assert [place["rank"] for place in found.results()["ranking_by_distance"]] == [1, 2, 3]
