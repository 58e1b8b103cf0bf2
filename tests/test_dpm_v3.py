"""DPM-Solver-v3 against its paper's algorithm, and the two statistics that are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import SCHEDULES
from test_solvers import MEANS, WEIGHTS, exact_solution, noise

import fewstep as fs
from fewstep.errors import ArtefactError, GridError, PlanError, UnknownNameError
from fewstep.plan import Plan
from fewstep.solvers import DPMSolverV3, UniPC
from fewstep.statistics import ModelStatistics

VP = fs.schedules.VPLinear()


def some_statistics(shape, nodes=120, schedule=VP):
    """Smooth functions of the size that models have."""
    lam = np.linspace(float(schedule.lam(schedule.t_start)), float(schedule.lam(schedule.t_end)), nodes + 1)
    u = np.linspace(0.0, 1.0, nodes + 1).reshape(-1, *[1] * len(shape))
    place = np.arange(math.prod(shape)).reshape(shape)
    slope = 1.0 / (1.0 + np.exp(2.0 * lam.reshape(u.shape)) * (0.3 + 0.2 * place))
    return ModelStatistics(schedule, lam, slope, 0.2 * np.sin(3 * u + place), 0.3 * np.cos(2 * u + place))


def test_degenerate_statistics_make_it_unip_3():
    for name in ("vp_linear", "vp_cosine_full", "edm", "flow_full", "stable_diffusion"):
        schedule = SCHEDULES[name]
        stats = ModelStatistics.degenerate(schedule)
        for nfe in (1, 2, 3, 9):
            for corrector, ours in (("none", False), ("raised", True)):
                for lower in (False, True):
                    v3 = DPMSolverV3(stats, corrector=corrector, lower_order_final=lower)
                    unip = UniPC(3, corrector=ours, shortcut="none", lower_order_final=lower)
                    one, two = (s.plan(schedule, nfe, grid="lambda").dense() for s in (v3, unip))
                    for a, b in ((one.A, two.A), (one.B, two.B), (one.e, two.e)):
                        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.abs(two.B).max())


@pytest.mark.parametrize(
    "schedule",
    [VP, fs.schedules.VPCosine(), fs.schedules.EDM(), fs.schedules.Flow(t_start=0.99, t_end=0.01)],
    ids=lambda s: type(s).__name__,
)
def test_exact_in_one_step_for_gaussian_data(schedule):
    """The statistics of a diagonal Gaussian in closed form; what is left is their interpolation, of fourth order in the nodes."""
    mean, variance = torch.tensor([0.7, -1.2, 0.0], dtype=torch.float64), torch.tensor([0.5, 1.5, 0.05], dtype=torch.float64)
    denoiser, x = fs.exact.Gaussian(schedule, mean, variance), noise(schedule)[:, :1].repeat(1, 3)
    (a, s), (a0, s0) = ([float(f(t)) for f in (schedule.alpha, schedule.sigma)] for t in (schedule.t_start, schedule.t_end))
    exact = a0 * mean + ((a0**2 * variance + s0**2) / (a**2 * variance + s**2)).sqrt() * (x - a * mean)
    errors = []
    for nodes in (60, 240):
        stats = ModelStatistics.gaussian(schedule, mean.numpy(), variance.numpy(), nodes=nodes)
        for corrector in ("none", "same", "pseudo", "raised"):
            solver = DPMSolverV3(stats, corrector=corrector)
            run = fs.sample(denoiser, x, solver.plan(schedule, 1, grid="lambda"))
            errors.append(float((run - exact).abs().max()))
            assert float((fs.sample(denoiser, x, solver.plan(schedule, 5, grid="time")) - exact).abs().max()) < 1e-3
    assert max(errors[4:]) < 1e-7
    assert max(errors[4:]) < max(errors[:4]) / 50 or max(errors) < 1e-10
    ddim = fs.sample(denoiser, x, fs.make_plan("ddim", schedule, 1, grid="lambda"))
    assert float((ddim - exact).abs().max()) > 0.1


def test_from_infinite_noise_the_first_step_is_one_of_order_1():
    """Where alpha is 0 there is no lambda to hold statistics, so one step on the default flow schedule is DDIM's, not exact."""
    schedule = fs.schedules.Flow()
    stats = ModelStatistics.gaussian(schedule, 0.7, 0.5)
    one, ddim = (solver.plan(schedule, 1) for solver in (DPMSolverV3(stats), fs.solvers.DDIM()))
    np.testing.assert_allclose(one.dense().B, ddim.dense().B, rtol=1e-12)
    np.testing.assert_allclose(one.dense().A, ddim.dense().A, rtol=1e-12)


class Papers:
    """Algorithms 1 and 2 of the paper on the nodes of the statistics, all integrals by trapezoids."""

    def __init__(self, stats):
        self.lam, self.l, self.s, self.b = (np.asarray(v) for v in (stats.lam, stats.l, stats.s, stats.b))
        self.L, self.S = self.integral(self.l), self.integral(self.s)
        self.I = self.integral(np.exp(self.L + self.S))
        self.B = self.integral(np.exp(-self.S) * self.b)
        self.C = self.integral(np.exp(self.L + self.S) * self.B)

    def integral(self, values):
        width = np.diff(self.lam).reshape(-1, *[1] * (values.ndim - 1))
        return np.concatenate([0 * values[:1], np.cumsum(0.5 * width * (values[1:] + values[:-1]), 0)])

    def derivatives(self, g, lam, pseudo):
        n = len(g) - 1
        if pseudo:
            table = [list(g)]
            for i in range(1, n + 1):
                table.append([(table[-1][j] - table[-1][j + 1]) / (lam[j] - lam[i + j]) for j in range(n + 1 - i)])
            return [table[k][0] * math.factorial(k) for k in range(1, n + 1)]
        matrix = np.array([[(lam[j] - lam[0]) ** k for k in range(1, n + 1)] for j in range(1, n + 1)])
        solution = np.linalg.solve(matrix, (np.stack(g[1:]) - g[0]).reshape(n, -1)) if n else []
        return [solution[k - 1].reshape(g[0].shape) * math.factorial(k) for k in range(1, n + 1)]

    def update(self, x, alphas, s, t, nodes, f, pseudo):
        """From node s to t with the values f at `nodes`, the first of which is s."""
        g = [np.exp(self.S[s] - self.S[j]) * v - np.exp(self.S[s]) * (self.B[j] - self.B[s]) for j, v in zip(nodes, f, strict=True)]
        out = alphas[1] / alphas[0] * np.exp(self.L[s] - self.L[t]) * x
        out = out - alphas[1] * np.exp(-self.L[t] - self.S[s]) * (self.I[t] - self.I[s]) * g[0]
        out = out - alphas[1] * np.exp(-self.L[t]) * (self.C[t] - self.C[s] - self.B[s] * (self.I[t] - self.I[s]))
        for k, derivative in enumerate(self.derivatives(g, [self.lam[j] for j in nodes], pseudo), start=1):
            inside = np.exp(self.L + self.S - self.L[s] - self.S[s])
            power = ((self.lam - self.lam[s]) ** k / math.factorial(k)).reshape(-1, *[1] * (inside.ndim - 1))
            total = self.integral(inside * power)
            out = out - alphas[1] * np.exp(self.L[s] - self.L[t]) * (total[t] - total[s]) * derivative
        return out

    def run(self, network, x, schedule, nodes, solver):
        alpha, sigma = (f(schedule.t_of_lam(self.lam)) for f in (schedule.alpha, schedule.sigma))
        states, values, order = [], [], 0
        for i, j in enumerate(nodes[:-1]):
            t = float(schedule.t_of_lam(self.lam[j]))
            eps = (x - alpha[j] * network(torch.from_numpy(x), t).numpy()) / sigma[j]
            values.insert(0, (sigma[j] * eps - self.l[j] * x) / alpha[j])
            states.insert(0, x)
            corrected = order + (solver.corrector == "pseudo")
            if solver.corrector != "none" and corrected > 1 and t > solver.corrector_above:
                near = [nodes[i - 1], j, *nodes[: i - 1][::-1]][:corrected]
                f = [values[1], values[0], *values[2:]][:corrected]
                states[0] = self.update(states[1], alpha[[near[0], j]], near[0], j, near, f, solver.corrector == "pseudo")
            order = min(solver.order, i + 1, len(nodes) - 1 - i if solver.lower_order_final else solver.order)
            near = nodes[: i + 1][::-1][:order]
            x = self.update(states[0], alpha[[j, nodes[i + 1]]], j, nodes[i + 1], near, values[:order], solver.pseudo)
        return x


@pytest.mark.parametrize("shape", [(), (2, 1), (2, 3)], ids=["scalar", "channel", "element"])
@pytest.mark.parametrize("corrector", ["none", "same", "pseudo"])
def test_the_papers_algorithm(shape, corrector):
    stats, x = some_statistics(shape), np.random.default_rng(0).standard_normal((4, 2, 3))

    def network(x, t):
        return torch.tanh(1.3 * x) * (1.1 - 0.4 * t)

    for order, pseudo, lower, above in (
        (1, False, True, 0.0),
        (2, False, False, 0.0),
        (3, False, True, 0.5),
        (3, True, False, 0.0),
    ):
        solver = DPMSolverV3(stats, order, pseudo, corrector, above, lower, compat="official")
        plan = solver.plan(VP, 7, grid="time")
        nodes = np.abs(VP.lam(plan.grid)[:, None] - stats.lam).argmin(1).tolist()
        np.testing.assert_allclose(VP.lam(plan.grid), stats.lam[nodes], atol=1e-9)
        paper = Papers(stats).run(network, x, VP, nodes, solver)
        np.testing.assert_allclose(fs.sample(network, torch.from_numpy(x), plan).numpy(), paper, rtol=1e-10, atol=1e-10)


def test_the_quadratures_agree_as_the_nodes_grow():
    errors = []
    for nodes in (120, 480):
        stats = some_statistics((), nodes)
        grid = VP.t_of_lam(stats.lam[:: nodes // 8])
        ours, theirs = (DPMSolverV3(stats, compat=compat).plan(VP, grid=grid).dense().B[-1] for compat in ("exact", "official"))
        errors.append(np.abs(ours - theirs).max())
    assert errors[1] == pytest.approx(errors[0] / 16, rel=0.1)  # trapezoids are of second order


@pytest.mark.parametrize(("s", "t"), [(-2.3, 1.9), (1.9, -2.3)], ids=["there", "back"])
def test_integrals_by_another_quadrature(s, t):
    from scipy.integrate import quad

    lam = np.linspace(-3.0, 4.0, 15)
    stats = ModelStatistics(VP, lam, 0.5 - 0.1 * lam, 0.05 * lam**2, 0.2 + 0.02 * lam**3)  # cubics are interpolated exactly

    def inside(u):
        return math.exp(0.5 * (u - s) - 0.05 * (u**2 - s**2) + 0.05 / 3 * (u**3 - s**3))

    def drift(u):
        return quad(lambda v: math.exp(-0.05 / 3 * (v**3 - s**3)) * (0.2 + 0.02 * v**3), s, u, epsabs=1e-12)[0]

    found = stats.integrals(s, t, count=3)
    for k in range(3):
        expected = quad(lambda u, k=k: inside(u) * (u - s) ** k / math.factorial(k), s, t, epsabs=1e-12)[0]
        assert float(found.moments[k]) == pytest.approx(expected, rel=1e-10)
    assert float(found.drift) == pytest.approx(drift(t), rel=1e-10)
    assert float(found.forcing) == pytest.approx(quad(lambda u: inside(u) * drift(u), s, t, epsabs=1e-11)[0], rel=1e-9)
    forth, back = stats.align(t, s), stats.align(s, t)
    assert float(back[0] * forth[0]) == pytest.approx(1.0, rel=1e-12)
    assert float(back[0] * forth[1] + back[1]) == pytest.approx(0.0, abs=1e-12)  # g_s(f_t) mapped back is f_t


def test_orders_from_noise():
    """Any smooth statistics keep the order; here those of a Gaussian with the mixture's moments."""
    schedule = fs.schedules.VPLinear(t_end=0.01)
    denoiser = fs.exact.GaussianMixture(schedule, MEANS, torch.tensor([0.1, 0.2, 0.15], dtype=torch.float64), WEIGHTS)
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact, stats = exact_solution(denoiser, x), ModelStatistics.gaussian(schedule, [-0.16, -0.24], [0.8, 0.6], nodes=30)
    for options, order in (
        ({"corrector": "none"}, 3),
        ({"order": 2, "corrector": "none"}, 2),
        ({"order": 2, "corrector": "raised"}, 3),
        ({"corrector": "raised"}, 4),
        ({"corrector": "pseudo"}, 2),
        ({"pseudo": True, "corrector": "none"}, 2),
    ):
        solver = DPMSolverV3(stats, lower_order_final=False, **options)
        runs = [fs.sample(denoiser, x, solver.plan(schedule, n, grid="lambda")) for n in (160, 320)]
        coarse, fine = (float((run - exact).square().mean().sqrt()) for run in runs)
        # two of them still approach: 3.16 and 3.85
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2), options


def test_every_number_of_calls_and_both_ends():
    for name, schedule in SCHEDULES.items():
        stats = ModelStatistics.gaussian(schedule, np.zeros((3, 1)), np.array([[0.2], [0.5], [0.9]]), nodes=30)
        x = noise(schedule, 3)[:, None, :1].repeat(1, 3, 2)
        for final in ("t_end", "zero"):
            for nfe in (1, 2, 3, 6):
                plan = DPMSolverV3(stats).plan(schedule, nfe, grid="lambda", final=final)
                assert plan.nfe == nfe
                run = fs.sample(lambda x, t: torch.tanh(x), x, plan)
                assert bool(torch.isfinite(run).all()), (name, final, nfe)


def test_files_are_exact_and_guarded(tmp_path):
    stats = some_statistics((2, 1))
    stats.save(tmp_path / "s.safetensors")
    again = ModelStatistics.load(tmp_path / "s.safetensors")
    assert again == stats
    assert hash(again) == hash(stats)
    assert again.schedule == VP
    content = (tmp_path / "s.safetensors").read_bytes()
    for damaged in (content[:-9], content[:-1] + bytes([content[-1] ^ 1])):
        (tmp_path / "d.safetensors").write_bytes(damaged)
        with pytest.raises(ArtefactError):
            ModelStatistics.load(tmp_path / "d.safetensors")
    fs.make_plan("ddim", VP, 2).save(tmp_path / "p.safetensors")
    with pytest.raises(ArtefactError, match="model-statistics"):
        ModelStatistics.load(tmp_path / "p.safetensors")
    plan = DPMSolverV3(stats).plan(VP, 4)
    plan.save(tmp_path / "p.safetensors")
    loaded = Plan.load(tmp_path / "p.safetensors")
    assert loaded == plan
    assert loaded.provenance["solver"]["options"]["statistics"] == stats.digest


def test_published_options():
    stats = ModelStatistics.degenerate(VP)

    def options(*args, **kwargs):
        solver = DPMSolverV3.published(stats, *args, **kwargs)
        return solver.order, solver.pseudo, solver.corrector, solver.lower_order_final

    assert options(5) == (3, True, "same", False)
    assert options(8) == (3, False, "same", True)
    assert options(10) == (3, False, "none", True)
    assert options(12) == (3, False, "same", True)
    assert options(5, "edm") == (3, True, "same", True)
    assert options(8, "edm") == (3, False, "none", True)
    assert options(8, "guided") == (3, False, "pseudo", True)
    assert options(8, "latent") == (3, False, "pseudo", True)
    assert options(8, "latent", guidance_scale=7.5) == (2, False, "none", True)


STATS = ModelStatistics.degenerate(VP)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: DPMSolverV3(STATS, order=4), ValueError, "orders 1, 2 and 3"),
        (lambda: DPMSolverV3(STATS, corrector="half"), UnknownNameError, "raised"),
        (lambda: DPMSolverV3(STATS, compat="theirs"), UnknownNameError, "official"),
        (lambda: DPMSolverV3.published(STATS, 5, "images"), UnknownNameError, "pixels"),
        (lambda: DPMSolverV3("file"), TypeError, "ModelStatistics"),
        (lambda: DPMSolverV3(STATS).plan(fs.schedules.EDM(), 4), PlanError, "computed for VPLinear"),
        (lambda: DPMSolverV3(STATS).plan(fs.schedules.VPLinear(t_end=1e-4), 4), PlanError, "cover lambda"),
        (lambda: DPMSolverV3(some_statistics((), 6), compat="official").plan(VP, 10, grid="time"), GridError, "repeats"),
        (lambda: ModelStatistics(VP, np.arange(3.0), np.ones(2), np.ones(3), np.ones(3)), ArtefactError, "3 nodes"),
        (lambda: ModelStatistics(VP, np.zeros(3), *[np.ones(3)] * 3), ArtefactError, "increase"),
        (lambda: ModelStatistics(VP, np.arange(2.0), *[np.full(2, np.nan)] * 3), ArtefactError, "finite"),
        (lambda: ModelStatistics(VP, np.arange(2.0), np.ones((2, 3)), np.ones((2, 2)), np.ones(2)), ArtefactError, "together"),
        (lambda: ModelStatistics.gaussian(VP, 0.0, -1.0), ValueError, "at least 0"),
        (lambda: STATS.integrals(0.0, 1.0, rule="simpson"), UnknownNameError, "gauss"),
    ],
)
def test_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
