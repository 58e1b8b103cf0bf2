"""Every row of the page on migration: our call beside the peer's, on its noise levels, from the same state, with the same noise.

Both are given the exact prediction of a mixture of Gaussians, at the level at which they ask. Their coefficients are single precision.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.kdiffusion import kdiffusion_sampler
from fewstep.noise import BrownianPath
from fewstep.numerics import noise_clock
from fewstep.preconditioning import edm_coefficients

diffusers = pytest.importorskip("diffusers", minversion="0.32")

from fewstep.diffusers import PlanScheduler  # noqa: E402
from fewstep.diffusers.config import UNSERVED  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]
ROOT = Path(__file__).parents[1]
ROWS = json.loads((ROOT / "docs" / "migration.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-4
SEEDS, SHAPE = range(32), (2,)
MIXTURE = [[1.0, 0.5], [-1.0, -0.3]], [0.16, 0.09]
ON_RATIO = fs.exact.GaussianMixture(fs.schedules.EDM(), *MIXTURE)
ON_FLOW = fs.exact.GaussianMixture(fs.schedules.Flow(), *MIXTURE)
COSINE = fs.schedules.VPCosine(t_end=0.0)


def output(kind, x, alpha, sigma):
    """What the exact network of this kind says."""
    x = x.double()
    d = ON_FLOW(x, sigma) if kind == "flow_prediction" else ON_RATIO(x / alpha, sigma / alpha)
    if kind == "sample":
        return d
    if kind == "flow_prediction":
        return (x - d) / sigma
    noise = (x - alpha * d) / sigma
    return noise if kind == "epsilon" else alpha * noise - sigma * d


def preserving(ratio):
    """Alpha and sigma of a variance-preserving state with this sigma / alpha."""
    return 1.0 / float(np.hypot(1.0, ratio)), float(ratio / np.hypot(1.0, ratio))


def first_noise():
    return fs.draw_noise(SHAPE, SEEDS, dtype=torch.float64)


def assert_close(found, wanted):
    assert float((found - wanted).abs().max()) < TOLERANCE * max(1.0, float(wanted.abs().max()))


def error(x, exact):
    """Largest distance from the exact solution; infinite for what is not a number."""
    return float(torch.nan_to_num((x - exact).abs(), nan=torch.inf).max())


def solution(x, ratio, end=1e-4):
    """The solution at sigma = 0 of the ODE through x_0 + ratio eps = x."""
    schedule = fs.schedules.EDM(end, ratio)
    return ON_RATIO(fs.reference(ON_RATIO, x, schedule, tol=1e-9), end)


# ---- schedulers --------------------------------------------------------------------------------------------------------------------


class Peer:
    """A scheduler of diffusers that was asked for n steps: the levels of its calls, and its loop."""

    def __init__(self, row, n):
        test = row.get("test", {})
        self.step = row.get("step", {})
        self.scheduler = getattr(diffusers, row["theirs"])(**row.get("settings", {}), **test.get("settings", {}))
        self.scheduler.set_timesteps(n)
        self.flow = row["theirs"].startswith(("Flow", "LTXEuler")) or self.scheduler.config.get("use_flow_sigmas", False)
        self.kind = "flow_prediction" if self.flow else self.scheduler.config.get("prediction_type", "epsilon")
        self.stages = test.get("stages", 1)
        ratios = getattr(self, "_" + test.get("levels", "sigmas"))()
        self.ratios, self.end = ratios[:-1], ratios[-1]

    def _table(self):
        bars = self.scheduler.alphas_cumprod.double().numpy()[self.scheduler.timesteps]
        return [*np.sqrt(1.0 / bars - 1.0).tolist(), 0.0]

    def _table_to_first(self):
        return [*self._table()[:-1], float(np.sqrt(1.0 / float(self.scheduler.alphas_cumprod[0].double()) - 1.0))]

    def _sigmas(self):
        return self.scheduler.sigmas.double().tolist()[: len(self.scheduler.timesteps)] + self.scheduler.sigmas[-1:].tolist()

    def _interpolated(self):
        found = self._sigmas()
        found[1:-1:2] = self.scheduler.sigmas_interpol[1 : len(found) - 1 : 2].tolist()
        return found

    def _below(self):
        found = self._sigmas()
        found[1:-1:2] = self.scheduler.sigmas_interpol[: len(found) - 2 : 2].tolist()
        return found

    def _middle(self):
        found = self._sigmas()
        found[1:-1:2] = [float(np.sqrt(a * b)) for a, b in pairwise(dict.fromkeys(self._sigmas()[:-1]))]
        return found

    @property
    def levels(self):
        """The levels of the calls, those inside the steps of single-step methods where ours places them; and of the end."""
        outer = self.ratios[:: self.stages]
        return np.array([*(r for a, b in pairwise(outer) for r in np.geomspace(a, b, self.stages + 1)[:-1]), outer[-1], self.end])

    def level(self, i):
        return (1.0 - self.ratios[i], self.ratios[i]) if self.flow else preserving(self.ratios[i])

    def start(self):
        return first_noise() * float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def run(self, x, draws, monkeypatch, left=0):
        """Their loop; `draws` are used where they would draw."""
        at = [0]
        module = sys.modules[type(self.scheduler).__module__]
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: draws[at[0]].clone())
        if hasattr(self.scheduler, "noise_sampler_seed"):
            self.scheduler.noise_sampler = lambda sigma, sigma_next: draws[at[0]]
        for i, t in enumerate(self.scheduler.timesteps[: len(self.ratios) - left]):
            at[0] = i
            given = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            said = output(self.kind, given, *self.level(i))
            x = self.scheduler.step(said, t, x, return_dict=False, **self.step)[0].double()
        return x


def ours_for(row, peer):
    """Our scheduler in place of theirs, on their levels."""
    scheduler = PlanScheduler.from_config(peer.scheduler.config, **row["ours"])
    if peer.flow:
        scheduler.set_timesteps(timesteps=1000.0 * peer.levels[:-1])
    else:
        scheduler.set_timesteps(sigmas=peer.levels)
    return scheduler


def our_loop(scheduler, x, draws, kind, left=0):
    plan = scheduler.plan
    for i, t in enumerate(scheduler.timesteps[: plan.nfe - left]):
        alpha, sigma = float(plan.schedule.alpha(plan.tau[i])), float(plan.schedule.sigma(plan.tau[i]))
        x = scheduler.step(output(kind, x, alpha, sigma), t, x, variance_noise=draws[i]).prev_sample
    return x


def path_of(plan, stages):
    """Unit noise for every row of ours, and for every call of theirs, which draws over the whole step so far."""
    path, nothing = BrownianPath(SEEDS, SHAPE), torch.zeros(len(SEEDS), *SHAPE, dtype=torch.float64)
    mine, other = [nothing] * plan.nfe, [nothing] * plan.nfe
    for i, noise in ((i, row.noise) for i, row in enumerate(plan.rows) if row.noise is not None):
        first = plan.rows[i - i % stages].noise or noise
        mine[i] = torch.from_numpy(path.normalised(noise.begin, noise.end))
        other[i] = torch.from_numpy(path.normalised(first.begin, noise.end))
    return mine, other


def both(row, n, monkeypatch, left=0):
    """Samples of theirs and of ours, from the same state; or the states before the `left` last calls."""
    peer = Peer(row, n)
    scheduler = ours_for(row, peer)
    mine, other = path_of(scheduler.plan, scheduler._solver.stages)
    exploding = getattr(peer.scheduler, "init_noise_sigma", 1.0) != 1.0
    scale = preserving(peer.ratios[0])[0] if exploding else 1.0
    theirs = peer.run(peer.start(), other, monkeypatch, left)
    ours = our_loop(scheduler, peer.start() * scale, mine, peer.kind, left)
    return theirs, ours / preserving(peer.ratios[-left])[0] if exploding and left else ours


def agrees(row, n, monkeypatch):
    assert_close(*both(row, n, monkeypatch)[::-1])


def agrees_before_the_end(row, n, monkeypatch):
    theirs, ours = both(row, n, monkeypatch, left=1)
    assert_close(ours, theirs)


def nothing_comes_out(row, n, monkeypatch):
    """Of theirs; ours, on its own times, is near the exact solution."""
    peer = Peer(row, n)
    theirs = peer.run(peer.start(), [first_noise()] * n, monkeypatch)
    assert not torch.isfinite(theirs).any()
    scheduler = PlanScheduler.from_config(peer.scheduler.config, **row["ours"])
    scheduler.set_timesteps(n)
    ours = our_loop(scheduler, first_noise(), [None] * n, peer.kind)
    ratio = float(scheduler.sigmas[0])
    assert error(ours, solution(first_noise() / preserving(ratio)[0], ratio)) < 0.2


def inverse(row, n, monkeypatch):
    """From data with a little noise to noise."""
    peer = Peer({"theirs": row["theirs"]}, n)
    schedule = PlanScheduler.from_config(peer.scheduler.config).plan_schedule
    steps = np.array([*peer.scheduler.timesteps.tolist(), 999])
    plan = fs.solvers.DPMSolverPP(lower_order_final=15).inverse_plan(schedule, grid=(steps[::-1] + 1.0) / 1000)
    alpha, sigma = preserving(peer.ratios[0])
    x = alpha * ON_RATIO.draw(len(SEEDS), seed=0) + sigma * first_noise()
    exact = fs.exact.GaussianMixture(schedule, *MIXTURE)
    assert_close(fs.sample(exact, x, plan), peer.run(x, [], monkeypatch))


def from_no_signal(row, n, monkeypatch):
    """iPNDM, which begins where alpha is 0: ours are nearer to the exact solution."""
    peer = diffusers.IPNDMScheduler()
    peer.set_timesteps(n)
    with np.errstate(divide="ignore"):
        times = COSINE.t_of_lam(np.log(peer.alphas.double().numpy()) - np.log(peer.betas.double().numpy()))
    network = fs.exact.GaussianMixture(COSINE, *MIXTURE)
    ours = fs.sample(network, first_noise(), fs.make_plan("ipndm", COSINE, grid=times))
    x = first_noise()
    for t, time in zip(peer.timesteps, times, strict=False):
        alpha, sigma = float(COSINE.alpha(time)), float(COSINE.sigma(time))
        d = network(x, float(time))
        noise = (x - alpha * d) / sigma
        x = peer.step(alpha * noise - sigma * d, t, x, return_dict=False)[0].double()
    exact = fs.reference(network, first_noise(), fs.schedules.VPCosine(t_end=1e-4), tol=1e-8)
    assert error(ours, x) > 10.0 * TOLERANCE
    assert error(ours, exact) < error(x, exact)


def preconditioned(row, n, monkeypatch):
    """The raw network of the exact prediction, in the loop of a pipeline."""
    host = getattr(diffusers, row["theirs"])(**row.get("settings", {}))
    ours = PlanScheduler.from_config(host.config, **row["ours"])
    data = host.config.get("sigma_data", 1.0)
    sign = -1.0 if host.config.prediction_type == "v_prediction" else 1.0
    draws = [torch.randn(len(SEEDS), *SHAPE, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(n)]
    samples, at = [], [0]
    monkeypatch.setattr(sys.modules[type(host).__module__], "randn_tensor", lambda *_, **__: draws[at[0]], raising=False)
    for scheduler in (host, ours):
        scheduler.set_timesteps(n)
        scheduler.noise_sampler = lambda *_: draws[at[0]]
        x = first_noise() * float(scheduler.init_noise_sigma)
        for i, t in enumerate(scheduler.timesteps):
            at[0], sigma = i, float(scheduler.sigmas[i])
            skip, out, scale = edm_coefficients(sigma, data)
            state = scheduler.scale_model_input(x, t).double() / scale
            said = sign * (ON_RATIO(state, sigma) - skip * state) / out
            more = {"variance_noise": draws[i]} if scheduler is ours else {}
            x = scheduler.step(said, t, x, return_dict=False, **more)[0].double()
        samples.append(x)
    assert_close(*samples[::-1])


def inverted(row, n, monkeypatch):
    host = diffusers.FlowMatchEulerDiscreteScheduler(**row["settings"])
    ours = PlanScheduler.from_config(host.config, **row["ours"])
    samples = []
    for scheduler in (host, ours):
        scheduler.set_timesteps(n)
        x = first_noise()
        for t in scheduler.timesteps:
            said = -output("flow_prediction", x, float(t) / 1000.0, 1.0 - float(t) / 1000.0)
            x = scheduler.step(said, t, x, return_dict=False)[0].double()
        samples.append(x)
    assert_close(*samples[::-1])


def cogvideox(row, n, monkeypatch):
    peer = Peer({"theirs": row["theirs"], "test": {"settings": {"timestep_spacing": "trailing"}, "levels": "table"}}, n)
    scheduler = ours_for(row, peer)
    mine, other = path_of(scheduler.plan, 1)
    at = [0]
    monkeypatch.setattr(sys.modules[type(peer.scheduler).__module__], "randn_tensor", lambda shape, **_: other[at[0]])
    x, old, before = first_noise(), None, None
    for i, t in enumerate(peer.scheduler.timesteps):
        at[0] = i
        said = output(peer.kind, x, *peer.level(i))
        x, old = peer.scheduler.step(said, old, t, before, x)
        x, before = x.double(), t
    assert_close(our_loop(scheduler, first_noise(), mine, peer.kind), x)


def wuerstchen(row, n, monkeypatch):
    peer = diffusers.DDPMWuerstchenScheduler()
    peer.set_timesteps(n)
    bars = peer._alpha_cumprod(peer.timesteps, "cpu").double().numpy()
    with np.errstate(divide="ignore"):
        times = COSINE.t_of_lam(-0.5 * np.log(1.0 / bars - 1.0))
    plan = fs.make_plan("ddpm", COSINE, grid=times)
    mine, _ = path_of(plan, 1)
    exact = fs.exact.GaussianMixture(COSINE, *MIXTURE)
    at = [0]
    monkeypatch.setattr(sys.modules[type(peer).__module__], "randn_tensor", lambda shape, **_: mine[at[0]])
    x = first_noise()
    for i, t in enumerate(peer.timesteps[:-1]):
        at[0] = i
        alpha, sigma = float(COSINE.alpha(times[i])), float(COSINE.sigma(times[i]))
        said = (x - alpha * exact(x, float(times[i]))) / sigma
        x = peer.step(said, t.expand(len(x)), x, return_dict=False)[0].double()
    ours = fs.sample(exact, first_noise(), plan, seeds=SEEDS)
    # theirs adds no noise in the last step, which ends at alpha^2 = 0.9999
    last = plan.rows[-1].noise
    assert_close(ours - last.scale * mine[-1], x)


def pndm(row, n, monkeypatch):
    """Both on the timesteps that they choose."""
    peer = diffusers.PNDMScheduler(**row["settings"])
    ours = PlanScheduler.from_config(peer.config, **row["ours"])
    peer.set_timesteps(n)
    ours.set_timesteps(len(peer.timesteps))
    assert ours.timesteps.tolist() == peer.timesteps.tolist()
    bars, x = peer.alphas_cumprod.double(), first_noise()
    for t in peer.timesteps:
        x = peer.step(output("epsilon", x, *preserving((1.0 / bars[t] - 1.0) ** 0.5)), t, x, return_dict=False)[0].double()
    assert_close(our_loop(ours, first_noise(), [None] * ours.plan.nfe, "epsilon"), x)


KINDS = {
    "agrees": agrees,
    "before the end": agrees_before_the_end,
    "nan": nothing_comes_out,
    "inverse": inverse,
    "ipndm": from_no_signal,
    "preconditioned": preconditioned,
    "inverted": inverted,
    "pndm": pndm,
    "cogvideox": cogvideox,
    "wuerstchen": wuerstchen,
}


def named(rows):
    return [f"{row['theirs']} {row.get('settings', '')} {row.get('step', '')}" for row in rows]


SERVED = [row for row in ROWS["schedulers"] if "ours" in row or "call" in row]


def require(name):
    """Skip where the installed diffusers is older, or lacks a library for this class and has a stand-in."""
    found = getattr(diffusers, name, getattr(diffusers.schedulers, name, None))
    if found is None or found.__module__.startswith("diffusers.utils"):
        pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("row", SERVED, ids=named(SERVED))
def test_scheduler(row, monkeypatch):
    require(row["theirs"])
    test = row.get("test", {})
    for n in test.get("steps", (8, 20)):
        with monkeypatch.context() as patch:
            KINDS[test.get("kind", "agrees")](row, n, patch)


WITHOUT = [row for row in ROWS["schedulers"] if row not in SERVED]


@pytest.mark.parametrize("row", WITHOUT, ids=named(WITHOUT))
def test_no_counterpart_says_so(row):
    require(row["theirs"])
    assert row["note"].endswith(".")


@pytest.mark.parametrize("name", [name for names in UNSERVED.values() for name in names])
def test_configs_for_other_networks_are_refused(name):
    assert name in {row["theirs"] for row in ROWS["schedulers"] if "ours" not in row}
    with pytest.raises(fs.FewstepError, match="cannot take the place"):
        PlanScheduler.from_config({"_class_name": name})


def test_every_scheduler_has_a_row():
    """But not the abstract ones, and enumerations."""
    rows = {row["theirs"] for row in ROWS["schedulers"]}
    names = [name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")]
    classes = {name: getattr(diffusers.schedulers, name, None) for name in names}  # None: a library for this class is missing
    assert len(classes) > 20
    assert {name for name, found in classes.items() if inspect.isclass(found)} <= rows


# ---- samplers ----------------------------------------------------------------------------------------------------------------------

RATIOS = torch.tensor([*np.geomspace(14.6, 0.03, 12).tolist(), 0.0], dtype=torch.float64)
SAMPLERS = [row for row in ROWS["samplers"] if ("ours" in row or "call" in row) and row["theirs"] != "–"]


@pytest.fixture(scope="module")
def theirs():
    if importlib.util.find_spec("k_diffusion") is None:
        pytest.skip("k_diffusion is not installed")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("peers")._k_diffusion_sampling()
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        sys.modules.pop("peers", None)


def model(x, sigma):
    return ON_RATIO(x, float(sigma[0]))


def noise_between(path, sigma, sigma_next):
    """Of the path, in the clock of the reverse SDE."""
    return torch.from_numpy(path.normalised(*(noise_clock(-float(np.log(float(s))), 1.0) for s in (sigma, sigma_next))))


def same_samples(row, theirs, monkeypatch):
    levels = RATIOS[:-1] if row.get("test", {}).get("end") == "above" else RATIOS
    sampler = kdiffusion_sampler(**row["ours"])
    function = getattr(theirs, row["theirs"])
    asked = inspect.signature(function).parameters
    given = partial(noise_between, BrownianPath(SEEDS, SHAPE))
    mine, other = {}, {}
    if sampler.solver.plan(fs.schedules.EDM(), grid=[80.0, 1.0, 0.1]).stochastic or "s_churn" in row.get("settings", {}):
        mine["noise_sampler"] = given
    if "noise_sampler" in asked:
        other["noise_sampler"] = given
    if "s_churn" in row.get("settings", {}):
        draws = list(torch.randn(len(levels), len(SEEDS), *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
        noisy = [i for i, sigma in enumerate(levels[:-1].tolist()) if sigma <= row["settings"]["s_tmax"]]
        steps, calls = iter(noisy), iter(range(len(levels)))
        mine["noise_sampler"] = lambda *_: draws[next(steps)]
        monkeypatch.setattr(theirs.torch, "randn_like", lambda x: draws[next(calls)])
    x = float(levels[0]) * first_noise()
    wanted = function(model, x, levels, disable=True, **other, **row.get("settings", {}))
    assert_close(sampler(model, x, levels, disable=True, **mine), wanted)


def fast(row, theirs, monkeypatch):
    x = 14.6 * first_noise()
    for n in (6, 10, 14):
        sampler = kdiffusion_sampler(fs.make_plan("dpm_fast", fs.schedules.EDM(0.03, 14.6), n, grid="lambda"))
        assert_close(sampler(model, x, sampler.sigmas, disable=True), theirs.sample_dpm_fast(model, x, 0.03, 14.6, n, disable=True))


def adaptive(row, theirs, monkeypatch):
    x, schedule = 14.6 * first_noise(), fs.schedules.EDM(0.03, 14.6)
    wanted = fs.reference(ON_RATIO, x, schedule, tol=1e-9)
    peers = theirs.sample_dpm_adaptive(model, x, 0.03, 14.6, disable=True, rtol=1e-4, atol=1e-5)
    assert error(fs.adaptive(ON_RATIO, x, schedule, rtol=1e-4, atol=1e-5).samples, wanted) < 1e-3
    assert error(peers, wanted) < 1e-3


@pytest.mark.parametrize("row", SAMPLERS, ids=named(SAMPLERS))
def test_sampler(row, theirs, monkeypatch):
    {"same": same_samples, "fast": fast, "adaptive": adaptive}[row.get("test", {}).get("kind", "same")](row, theirs, monkeypatch)


def test_every_sampler_and_rule_has_a_row(theirs):
    for start, table in (("sample_", "samplers"), ("get_sigmas_", "levels")):
        found = {name for name in dir(theirs) if name.startswith(start)}
        assert found == {row["theirs"] for row in ROWS[table]} - {"–"}


def test_names_of_menus_are_names_of_solvers():
    for row in ROWS["samplers"]:
        assert row.get("menu") or "settings" in row
        if "ours" in row:
            kdiffusion_sampler(**row["ours"])


# ---- noise levels ------------------------------------------------------------------------------------------------------------------


def test_levels(theirs):
    """Those of n - 1 calls are theirs of n."""
    schedule = fs.schedules.EDM(0.03, 14.6)
    for name, grid in (("karras", "karras"), ("exponential", "lambda"), ("polyexponential", "lambda")):
        wanted = getattr(theirs, f"get_sigmas_{name}")(9, 0.03, 14.6)[:-1]
        np.testing.assert_allclose(fs.grids.make_grid(grid, schedule, 8), wanted.numpy(), rtol=TOLERANCE)
    linear = fs.schedules.VPLinear(t_end=0.01)  # at 0.001, theirs has lost digits
    found = np.exp(-linear.lam(fs.grids.make_grid("time", linear, 8)))
    np.testing.assert_allclose(found, theirs.get_sigmas_vp(9, eps_s=0.01)[:-1].numpy(), rtol=TOLERANCE)


# ---- the page ----------------------------------------------------------------------------------------------------------------------


def test_the_page_is_up_to_date():
    path = ROOT / "tools" / "migration_table.py"
    spec = importlib.util.spec_from_file_location("migration_table", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.main(["--check"]) == 0
