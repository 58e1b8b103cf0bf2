"""`tune_family`: plans for several guidance scales, what serves the scales between, and files."""

from __future__ import annotations

import pytest
import torch

import fewstep as fs
from fewstep.errors import ArtefactError, FewstepError
from fewstep.guidance import ClassifierFree
from fewstep.tuners import Effort, Family, trace_paths, tune_family
from fewstep.tuners.task import errors_of

CLASSES = 5
EFFORT = Effort(trajectories=160, held_out=128, pool=3, trials=20, polish=5)


def guided(scale=1.0):
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(CLASSES, 4, generator=generator, dtype=torch.float64)
    variances = 0.02 + 0.1 * torch.rand(CLASSES, 4, generator=generator, dtype=torch.float64)
    return ClassifierFree(fs.exact.GaussianMixture(fs.schedules.VPLinear(), means, variances), scale, {"label": -1})


def start(count=64, first=0):
    noise = fs.draw_noise((4,), range(first, first + count), dtype=torch.float64)
    return {"noise": noise, "cond": {"label": torch.arange(count) % CLASSES}}


@pytest.fixture(scope="module")
def family():
    return tune_family(guided(), [3.0, 2.0], nfe=[3, 5], effort=EFFORT, **start())


def test_every_scale_and_number_of_calls_has_a_plan(family):
    assert sorted(family.plans) == [(3, 2.0), (3, 3.0), (5, 2.0), (5, 3.0)]
    assert family.plan(5, 3.0).nfe == 5
    assert [c.name for c in family.tuned[2.0].candidates[5]][1] == "learned: closed form"
    assert [c.name for c in family.tuned[3.0].candidates[5]][1].startswith("learned: start, polish")  # from the scale before
    for scale in (2.0, 3.0):
        assert family.tuned[scale].report["plans"]["5"]["ratio"] < 0.3


def test_a_plan_between_two_scales_beats_untuned_ones_there(family):
    gap = next(gap for gap in family.gaps if gap.nfe == 5)
    assert (gap.lower, gap.upper) == (2.0, 3.0)
    assert gap.chosen is not None
    for scale in (2.3, 2.6):
        denoiser, fresh = guided(scale), start(1024, first=9000)
        exact = trace_paths(denoiser, fresh["noise"], denoiser.schedule, calls=120, cond=fresh["cond"]).target
        mine = errors_of(fs.sample(denoiser, fresh["noise"], family.plan(5, scale), cond=fresh["cond"]), exact)
        base = errors_of(fs.sample(denoiser, fresh["noise"], family.tuned[3.0].candidates[5][0].plan, cond=fresh["cond"]), exact)
        assert mine.rms < 0.6 * base.rms


def test_where_there_is_no_plan_it_is_said(family):
    with pytest.raises(FewstepError, match=r"no plan for 5 calls and guidance 7: tuned were \[3, 5\] calls at \[2.0, 3.0\]"):
        family.plan(5, 7.0)
    with pytest.raises(FewstepError, match="no plan for 4 calls"):
        family.plan(4, 2.0)
    bad = fs.tuners.Gap(5, 2.0, 3.0, {"mixed": 1.1, "lower": 1.2, "upper": 1.3})
    with pytest.raises(FewstepError, match=r"no plan serves guidance 2.5 at 5 calls: .* Tune that scale too"):
        Family(family.plans, (bad,), family.guidance, {}).plan(5, 2.5)
    with pytest.raises(TypeError, match="ClassifierFree"):
        tune_family(guided().denoiser, [2.0], nfe=3)
    with pytest.raises(ValueError, match="each once"):
        tune_family(guided(), [2.0, 2.0], nfe=3)


def test_scale_one_between_two_scales_is_no_guidance():
    family = tune_family(guided(), [0.5, 1.5], nfe=3, effort=EFFORT, **start())
    gap, given = family.gaps[0], start(8, first=9000)
    assert set(gap.ratios) == {"mixed", "lower", "upper"}
    if gap.chosen is not None:
        fs.sample(guided(1.0), given["noise"], family.plan(3, 1.0), cond=given["cond"])


def test_a_plan_between_is_refused_under_another_scale(family):
    plan, given = family.plan(5, 2.4), start(4)
    with pytest.raises(FewstepError, match=r"scale 2.4, but the denoiser has classifier-free guidance of scale 2.5"):
        fs.sample(guided(2.5), given["noise"], plan, cond=given["cond"])


def test_files(family, tmp_path):
    family.save(tmp_path / "family")
    again = Family.load(tmp_path / "family")
    assert again.plans == family.plans
    assert again.gaps == family.gaps
    assert again.plan(5, 2.4) == family.plan(5, 2.4)
    (tmp_path / "family" / "plan-5-guidance-3.safetensors").write_bytes(
        (tmp_path / "family" / "plan-5-guidance-2.safetensors").read_bytes()
    )
    with pytest.raises(ArtefactError, match=r"plan-5-guidance-3.safetensors is not the plan"):
        Family.load(tmp_path / "family")
    with pytest.raises(ArtefactError, match=r"family.json is missing"):
        Family.load(tmp_path)
