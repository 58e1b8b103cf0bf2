"""Noise on which plans go wrong is found, mended and judged on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.tuners import Effort, Learned, auto, hard
from fewstep.tuners.draws import Draws
from fewstep.tuners.preparation import prepare
from fewstep.tuners.result import best_of, ratio_of, settled
from fewstep.tuners.task import Counted, distances, errors_of

EFFORT = Effort(trajectories=64, held_out=256, pool=2, hard_pool=2048, hard=256, trials=20, trial_paths=64, polish=3)
POOL = {"pool": EFFORT.hard_pool, "count": EFFORT.hard}


@pytest.fixture(scope="module")
def task():
    generator = torch.Generator().manual_seed(3)
    means = 1.5 * torch.randn(6, 2, generator=generator, dtype=torch.float64)
    denoiser = fs.exact.GaussianMixture(fs.schedules.VPLinear(), means, 0.1)
    counted = Counted(denoiser, 4096)
    draw = Draws(counted, fs.draw_noise((2,), range(64), dtype=torch.float64), {}, 0)
    return prepare(counted, draw, EFFORT, final="t_end", seed=0)


@pytest.fixture(scope="module")
def candidates(task):
    stages = Learned(trials=20, trial_paths=64, polish=3, hard=0, matched=False, entries=()).stages(task, 5)
    return [task.untuned(5), *(task.judge(stage, numbers.plan(task.schedule, {})) for stage, numbers in stages)]


def test_mined_paths_are_those_on_which_the_plans_are_farthest_apart(task, candidates):
    plan = candidates[-1].plan
    found = hard.mined(task, plan, **POOL).paths
    noise, _ = task.draw.stream(hard.MINING, 5, 0)(POOL["pool"])
    apart = distances(*(fs.sample(task.denoiser, noise, each) for each in (plan, candidates[0].plan)))
    ours = distances(*(fs.sample(task.denoiser, found.noise, each) for each in (plan, candidates[0].plan)))
    assert ours == pytest.approx(np.sort(apart)[::-1][: POOL["count"]])
    exact = fs.reference(task.denoiser, found.noise, task.schedule, tol=1e-6).plain()
    assert errors_of(found.target, exact).median < 0.02 * errors_of(fs.sample(task.denoiser, found.noise, plan), exact).median


def test_streams_of_noise_do_not_depend_on_what_was_drawn(task):
    before = task.draw.stream(1, 2)(16)[0]
    task.draw(7)
    assert torch.equal(task.draw.stream(1, 2)(16)[0], before)
    assert not torch.equal(task.draw.stream(1, 3)(16)[0], before)


def test_challenge_tells_the_error_over_all_noise(task, candidates):
    noise = fs.draw_noise((2,), range(50_000, 70_000), dtype=torch.float64)
    exact = fs.sample(task.denoiser, noise, fs.make_plan("auto", task.schedule, 200))
    told = hard.challenged(task, candidates[1:], **POOL)
    for candidate, (mine, untuned) in zip(candidates[1:], told, strict=True):
        for plan, error in ((candidate.plan, mine), (candidates[0].plan, untuned)):
            assert error == pytest.approx(errors_of(fs.sample(task.denoiser, noise, plan), exact).rms, rel=0.2)


def test_few_samples_astray_decide_nothing_and_many_do():
    """A plan of half the median error may lose one sample more than the untuned plan does, and not ten more."""

    def told(lost_by_mine, lost_by_untuned, count=500):
        mine, untuned = np.full(count, 0.25), np.ones(count)
        mine[:lost_by_mine], untuned[count - lost_by_untuned :] = 900.0, 900.0
        return hard.steadied(mine, untuned, np.full(count, 1.0 / count), (0.5, 1.0))

    for lost in [(0, 0), (1, 0), (1, 1), (2, 1), (10, 12)]:
        assert np.less(*told(*lost)), lost
    for lost in [(5, 1), (12, 2), (20, 12)]:
        assert np.greater(*told(*lost)), lost
    assert told(0, 0) == pytest.approx((0.5, 1.0))
    assert sum(error**2 for error in told(2, 1)) == pytest.approx(498 / 500 * 0.25 + 499 / 500 + 3 * 900 / 500)


def test_what_fails_its_challenge_is_not_chosen(task, candidates, monkeypatch):
    assert best_of(candidates).tuned
    heard = []
    monkeypatch.setattr(
        "fewstep.tuners.result.challenged", lambda task, found, **_: heard.append(len(found)) or [(2.0, 1.0)] * len(found)
    )
    after = settled(task, candidates, EFFORT)
    assert best_of(after) is candidates[0]
    assert sum(heard) == sum(c.challenge is not None for c in after) > 0


def test_what_comes_later_and_is_better_is_challenged_too(task, candidates, monkeypatch):
    """Whatever passed before it; and of those that pass the best with hard noise is taken. What is not finite there fails."""
    base = candidates[0]
    passed = replace(candidates[-1], name="passed", challenge=(0.95, 1.0))
    made = {"gain": 9.0, "errors": replace(passed.errors, rms=0.1 * passed.errors.rms), "challenge": None}
    better, broken = replace(passed, name="better", **made), replace(passed, name="broken", **made)
    outcomes = {"better": (0.5, 1.0), "broken": (math.nan, 1.0)}
    monkeypatch.setattr("fewstep.tuners.result.challenged", lambda task, found, **_: [outcomes[c.name] for c in found])
    for order in ([base, passed, broken, better], [base, better, broken, passed]):
        after = settled(task, order, EFFORT)
        assert best_of(after).name == "better"
    assert best_of(settled(task, [base, broken, passed], EFFORT)).name == "passed"


def test_a_plan_whose_samples_are_not_finite_fails_and_leads_astray(task, candidates):
    plan = candidates[-1].plan
    wild = replace(plan, rows=(replace(plan.rows[0], carry=(1e200,)), *plan.rows[1:]))
    wild = replace(wild, rows=(*wild.rows[:-1], replace(wild.rows[-1], carry=(1e200,))))
    assert hard.mined(task, wild, pool=16, count=4).led_astray
    ((mine, untuned),) = hard.challenged(task, [replace(candidates[-1], plan=wild)], pool=16, count=4)
    assert mine == math.inf
    assert math.isfinite(untuned)


@pytest.mark.parametrize("method", ["learned", "auto"])
def test_what_is_refused_is_learned_once_more_from_the_untuned_plan(task, monkeypatch, method):
    """And if that is refused too, ``"auto"`` goes on to the other methods, whatever the validation noise says."""
    effort = replace(EFFORT, trials=5, polish=1, hard=8, hard_pool=64)
    for name in auto.OTHERS:  # no other method is too dear, but the last three are
        monkeypatch.setitem(auto.PRICES, name, lambda effort, nfe, name=name: 0 if name in auto.OTHERS[:2] else 10**9)
    monkeypatch.setattr("fewstep.tuners.result.challenged", lambda task, found, **_: [(2.0, 1.0)] * len(found))
    found = auto._candidates(task, 5, method, effort, None)
    names = [candidate.name for candidate in found]
    assert any(name.startswith("learned: polish") for name in names)
    assert any(name.startswith("learned: untuned, polish") for name in names)
    assert any(name.startswith("compensation") for name in names) == (method == "auto"), names
    assert best_of(found) is found[0]
    assert ratio_of(found) == 1.0


def test_paths_join_with_their_weights(task):
    first, second = task.fit.take(slice(3)), hard.mined(task, task.untuned(4).plan, pool=8, count=2).paths
    both = first.joined(second)
    assert both.count == 5
    assert both.weights is not None
    assert both.weights.tolist() == [1.0, 1.0, 1.0, hard.MINED_WEIGHT, hard.MINED_WEIGHT]
    t = float(task.fit.times[5]) * 0.99
    assert torch.equal(both.at(t), torch.cat([first.at(t), second.at(t)]))


def test_ends_of_paths_forget_the_states_between(task):
    ends = task.fit.ends()
    assert torch.equal(ends.noise, task.fit.noise)
    assert torch.equal(ends.target, task.fit.target)
    assert ends.states.numel() < task.fit.states.numel() / 16
    with pytest.raises(ValueError, match="the ends alone were kept"):
        ends.at(0.5)
    assert not task.held_out.whole
