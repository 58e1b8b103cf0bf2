"""`fs.tune`: plans that beat every untuned one on noise they never saw, and are refused where they do not belong."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.errors import ArtefactError, PlanError
from fewstep.tuners import Effort, trace_paths
from fewstep.tuners.checkpoint import Checkpoint
from fewstep.tuners.task import errors_of

SMALL = Effort(trajectories=128, held_out=128, pool=3, reference_calls=64, trials=30, polish=4)
ENOUGH = Effort(
    trajectories=1024, held_out=512, pool=8, reference_calls=96, trials=80, trial_paths=256, polish=12, robust=(3.0, 30.0)
)


def mixture(schedule=None, size=4, shift=0.0):
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(5, size, generator=generator, dtype=torch.float64) + shift
    variances = 0.02 + 0.1 * torch.rand(5, size, generator=generator, dtype=torch.float64)
    return fs.exact.GaussianMixture(schedule or fs.schedules.VPLinear(), means, variances)


def start(denoiser, count=64, first=0, size=4):
    schedule = denoiser.schedule
    return fs.draw_noise((size,), range(first, first + count), dtype=torch.float64) * float(schedule.sigma(schedule.t_start))


@pytest.mark.parametrize(
    "schedule",
    [fs.schedules.VPLinear(), fs.schedules.VPCosine(), fs.schedules.EDM(), fs.schedules.Flow(), fs.schedules.Flow(t_end=0.0)],
    ids=["VPLinear", "VPCosine", "EDM", "Flow", "Flow to 0"],
)
def test_a_tuned_plan_beats_every_untuned_one_on_other_noise(schedule):
    denoiser = mixture(schedule)
    tuned = fs.tune(denoiser, nfe=5, noise=start(denoiser), effort=ENOUGH)
    noise = start(denoiser, 2048, first=9000)
    exact = trace_paths(denoiser, noise, schedule, calls=200).target
    mine = errors_of(fs.sample(denoiser, noise, tuned.plan), exact)
    base = errors_of(fs.sample(denoiser, noise, tuned.candidates[5][0].plan), exact)
    assert tuned.plan.nfe == 5
    assert mine.rms < 0.6 * base.rms
    assert mine.median < 0.8 * base.median


def test_a_family_shares_its_paths():
    denoiser = mixture()
    tuned = fs.tune(denoiser, nfe=[3, 6], noise=start(denoiser), effort=SMALL)
    assert sorted(tuned.plans) == [3, 6]
    assert [plan.nfe for plan in tuned.plans.values()] == [3, 6]
    assert tuned.report["plans"]["6"]["rms"] < tuned.report["plans"]["3"]["rms"]
    with pytest.raises(ValueError, match=r"\[3, 6\]"):
        _ = tuned.plan


def test_final_zero_ends_in_clean_data():
    denoiser = mixture()
    tuned = fs.tune(denoiser, nfe=4, noise=start(denoiser), effort=SMALL, final="zero")
    noise = start(denoiser, 2048, first=9000)
    exact = denoiser(fs.reference(denoiser, noise, denoiser.schedule, tol=1e-6).plain(), denoiser.schedule.t_end)
    assert float(denoiser.schedule.sigma(tuned.plan.grid[-1])) == 0.0
    plans = (tuned.plan, tuned.candidates[4][0].plan)
    mine, untuned = (errors_of(fs.sample(denoiser, noise, plan), exact).rms for plan in plans)
    assert mine < 0.7 * untuned


def test_one_call_is_exact_for_a_round_gaussian():
    denoiser = fs.exact.Gaussian(fs.schedules.EDM(), [0.5, -1.0, 2.0], 0.3)
    tuned = fs.tune(denoiser, nfe=1, noise=start(denoiser, size=3), effort=dataclasses.replace(SMALL, reference_calls=256))
    noise = start(denoiser, 64, first=9000, size=3)
    assert errors_of(fs.sample(denoiser, noise, tuned.plan), denoiser.solution(noise, 80.0, 0.002)).rms < 1e-4


def test_too_few_paths_never_make_it_worse():
    denoiser = mixture()
    effort = Effort(trajectories=1, held_out=64, pool=1, reference_calls=32, trials=12, polish=8)
    tuned = fs.tune(denoiser, nfe=8, noise=start(denoiser, 1), method="learned", effort=effort)
    told = tuned.report["plans"]["8"]
    assert told["rms"] <= told["untuned_rms"]
    assert any(candidate["rms"] > told["untuned_rms"] for candidate in told["candidates"])  # it was over-fitted


def test_eight_paths_hardly_ever_make_it_worse_on_other_noise():
    ratios = []
    for seed in range(4):
        denoiser, fresh = mixture(shift=0.2 * seed), start(mixture(), 1024, first=9000)
        effort = Effort(trajectories=8, held_out=128, pool=8, trial_paths=8)
        tuned = fs.tune(denoiser, nfe=5, noise=start(denoiser, 8), method="learned", seed=seed, effort=effort)
        exact = trace_paths(denoiser, fresh, denoiser.schedule, calls=100).target
        mine, base = (errors_of(fs.sample(denoiser, fresh, p), exact) for p in (tuned.plan, tuned.candidates[5][0].plan))
        ratios.append(mine.rms / base.rms)
    assert max(ratios) < 1.25
    assert np.exp(np.mean(np.log(ratios))) <= 1.0


def test_same_seed_same_plan_whatever_the_blocks():
    denoiser = mixture()
    plans = [fs.tune(denoiser, nfe=3, noise=start(denoiser), effort=SMALL, block=block).plan for block in (256, 256, 50)]
    for other, tolerance in ((plans[1], 0.0), (plans[2], 1e-3)):
        np.testing.assert_allclose(plans[0].tau, other.tau, rtol=tolerance)
        for row, same in zip(plans[0].rows, other.rows, strict=True):
            np.testing.assert_allclose(row.weights, same.weights, rtol=0, atol=tolerance)


def test_the_plan_says_what_it_was_made_for_and_refuses_the_rest(tmp_path):
    denoiser = mixture()
    guided = fs.guidance.ClassifierFree(denoiser, 3.0, {"label": -1})
    cond = {"label": torch.arange(64) % 5}
    tuned = fs.tune(guided, nfe=3, noise=start(denoiser), cond=cond, effort=SMALL)
    assert tuned.candidates[3][0].errors.rms > tuned.report["plans"]["3"]["rms"]
    tuned.plan.save(tmp_path / "plan.safetensors")
    plan, noise = fs.Plan.load(tmp_path / "plan.safetensors"), start(denoiser)
    fs.sample(guided, noise, plan, cond=cond)
    with pytest.raises(PlanError, match="guidance of scale 3, but the denoiser has no guidance"):
        fs.sample(denoiser, noise, plan)
    with pytest.raises(PlanError, match=r"scale 3, .* of scale 7\.5"):
        fs.sample(fs.guidance.ClassifierFree(denoiser, 7.5, {"label": -1}), noise, plan, cond=cond)
    other = fs.guidance.ClassifierFree(mixture(shift=0.1), 3.0, {"label": -1})
    with pytest.raises(PlanError, match="GaussianMixture"):
        fs.sample(other, noise, plan, cond=cond)
    made_for = plan.provenance["tuned"]
    assert made_for["model"]["guidance"]["guidance_scale"] == 3.0
    assert made_for["evaluations"] > 0
    assert made_for["validation"]["rms"] < made_for["validation"]["untuned_rms"]


def test_a_network_is_told_from_another_by_its_weights():
    networks = [torch.nn.Linear(4, 4).double() for _ in range(2)]
    schedule = fs.schedules.VPLinear()
    denoisers = [fs.Denoiser(lambda x, t, net=net: net(x), schedule, predicts="data") for net in networks]
    assert fs.identity.identity(denoisers[0])["fingerprint"] is None  # a function has no weights to look at

    class Wrapped(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(x)

    first, second = (fs.Denoiser(Wrapped(net), schedule, predicts="data") for net in networks)
    before = fs.identity.identity(first)["fingerprint"]
    assert before == fs.identity.identity(first)["fingerprint"] != fs.identity.identity(second)["fingerprint"]
    with torch.no_grad():
        networks[0].weight.add_(1.0)
    assert fs.identity.identity(first)["fingerprint"] != before


def test_a_discrete_model_with_integer_times():
    schedule = fs.schedules.FromBetas(np.linspace(1e-4, 0.02, 1000).tolist())
    exact = mixture(schedule)

    denoiser = fs.Denoiser(lambda x, i: exact(x, float(i[0] + 1) / 1000), schedule, predicts="data", integer_time=True)
    tuned = fs.tune(denoiser, nfe=5, noise=start(denoiser), effort=ENOUGH)
    assert tuned.report["plans"]["5"]["ratio"] < 0.7


def test_what_is_wrong_is_said():
    denoiser = mixture()
    noise = start(denoiser)
    with pytest.raises(ValueError, match="nfe"):
        fs.tune(denoiser, nfe=0, noise=noise)
    with pytest.raises(ValueError, match="learned"):
        fs.tune(denoiser, nfe=3, noise=noise, method="lerned")
    with pytest.raises(ValueError, match="the scale"):
        fs.tune(denoiser, nfe=3, noise=100 * noise)
    with pytest.raises(ValueError, match="noise="):
        fs.tune(denoiser, nfe=3)
    with pytest.raises(ValueError, match="entries for"):
        fs.tune(denoiser, nfe=3, noise=noise, cond={"label": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(fs.FewstepError, match="noise schedule"):
        fs.tune(lambda x, t: x, nfe=3, noise=noise)


def test_a_stopped_run_goes_on_and_another_run_is_refused(tmp_path):
    denoiser = mixture()
    noise, lines = start(denoiser), []

    def stop_at_six(line):
        lines.append(line)
        if line.startswith("6 calls: learned: closed"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fs.tune(denoiser, nfe=[3, 6], noise=noise, effort=SMALL, checkpoint=tmp_path / "run", report=stop_at_six)
    lines.clear()
    again = fs.tune(denoiser, nfe=[3, 6], noise=noise, effort=SMALL, checkpoint=tmp_path / "run", report=lines.append)
    assert not any(line.startswith(("3 calls", "exact paths")) for line in lines)
    straight = fs.tune(denoiser, nfe=[3, 6], noise=noise, effort=SMALL)
    for nfe in (3, 6):
        for row, same in zip(again.plans[nfe].rows, straight.plans[nfe].rows, strict=True):
            np.testing.assert_array_equal(np.stack(np.broadcast_arrays(*row.weights)), np.stack(np.broadcast_arrays(*same.weights)))
    with pytest.raises(fs.FewstepError, match=r"the folder .* is of another run"):
        fs.tune(denoiser, nfe=3, noise=noise + 0.01, effort=SMALL, checkpoint=tmp_path / "run")


def test_the_closed_form_alone_is_quick_and_helps():
    denoiser = mixture()
    tuned = fs.tune(denoiser, nfe=5, noise=start(denoiser), method="closed-form", effort=SMALL)
    assert [c.name for c in tuned.candidates[5][1:]] == ["learned: closed form"]
    assert tuned.report["plans"]["5"]["ratio"] < 1.0


def test_a_budget_of_evaluations_is_kept_and_lets_other_methods_try():
    denoiser = mixture()
    small = fs.tune(denoiser, nfe=[3, 5], noise=start(denoiser), method="learned", evaluations=150_000)
    large = fs.tune(denoiser, nfe=[3, 5], noise=start(denoiser), evaluations=400_000)
    assert small.report["evaluations"] < 180_000
    assert 200_000 < large.report["evaluations"] < 500_000
    names = {c.name.split(":")[0].split(",")[0] for c in large.candidates[5]}
    assert {"learned", "compensation"} <= names
    with pytest.raises(ValueError, match="do not suffice: the least takes about"):
        fs.tune(denoiser, nfe=5, noise=start(denoiser), evaluations=1000)
    with pytest.raises(ValueError, match="not several"):
        fs.tune(denoiser, nfe=5, noise=start(denoiser), evaluations=1000, minutes=1.0)


def test_the_others_are_tried_where_learning_gains_little(monkeypatch):
    denoiser = mixture()
    monkeypatch.setattr("fewstep.tuners.auto.ENOUGH", 0.0)
    lines = []
    tuned = fs.tune(denoiser, nfe=3, noise=start(denoiser), effort=SMALL, report=lines.append)
    names = {c.name.split(":")[0].split(",")[0] for c in tuned.candidates[3]}
    assert {"learned", "compensation", "statistics"} <= names


def test_a_resumed_run_spends_what_the_first_was_to_spend(tmp_path):
    denoiser, folder = mixture(), tmp_path / "run"

    def stop(line):
        if line.startswith("3 calls: learned: closed"):
            raise KeyboardInterrupt

    options = {"nfe": 3, "noise": start(denoiser), "minutes": 0.2, "method": "learned"}
    with pytest.raises(KeyboardInterrupt):
        fs.tune(denoiser, **options, checkpoint=folder, report=stop)
    before = Checkpoint(folder, json.loads((folder / "spending.json").read_text())["key"]).spending()
    tuned = fs.tune(denoiser, **options, checkpoint=folder)  # however fast the network seems this time
    assert before.evaluations > 0
    assert tuned.report["effort"] == dataclasses.asdict(before.effort)
    assert tuned.report["evaluations"] > before.evaluations


def test_the_last_row_may_have_weights_of_its_own_for_every_element():
    variances = torch.tensor([0.01, 0.1, 1.0, 4.0], dtype=torch.float64)  # each element wants weights of its own
    denoiser = fs.exact.Gaussian(fs.schedules.VPLinear(), torch.zeros(4, dtype=torch.float64), variances)
    tuned = fs.tune(denoiser, nfe=1, noise=start(denoiser), effort=SMALL)
    assert "per element" in tuned.report["plans"]["1"]["best"]
    noise = start(denoiser, 64, first=9000)
    exact = denoiser.solution(noise, 1.0, 1e-3)
    scalar = next(c for c in tuned.candidates[1] if c.name.endswith("medians"))
    mine, other = (errors_of(fs.sample(denoiser, noise, plan), exact).rms for plan in (tuned.plan, scalar.plan))
    assert mine < 0.01 * other


def test_two_calls_are_exact_for_a_gaussian():
    denoiser = fs.exact.Gaussian(fs.schedules.VPLinear(), torch.zeros(4), torch.tensor([0.01, 0.1, 1.0, 4.0]))
    tuned = fs.tune(denoiser, nfe=2, noise=start(denoiser), effort=SMALL)
    assert tuned.report["plans"]["2"]["rms"] < 1e-9


# ---- what a review found ---------------------------------------------------------------------------------------------------------------


def test_centred_data_where_alpha_is_zero():
    denoiser = fs.exact.GaussianMixture(
        fs.schedules.Flow(), [[-1.0, 0.0], [1.0, 0.0]], 0.05
    )  # the first prediction is 0 everywhere
    tuned = fs.tune(denoiser, nfe=4, noise=start(denoiser, size=2), effort=SMALL)
    assert tuned.report["plans"]["4"]["ratio"] < 0.6


def test_a_checkpoint_of_other_conditions_or_another_function_is_refused(tmp_path):
    denoiser, given = mixture(), {"noise": start(mixture()), "effort": dataclasses.replace(SMALL, trials=0, polish=1), "nfe": 2}
    fs.tune(denoiser, cond={"label": torch.zeros(64, dtype=torch.int64)}, checkpoint=tmp_path / "a", **given)
    with pytest.raises(fs.FewstepError, match=r"the folder .* is of another run"):
        fs.tune(denoiser, cond={"label": torch.ones(64, dtype=torch.int64)}, checkpoint=tmp_path / "a", **given)
    schedule = fs.schedules.VPLinear()
    functions = [lambda x, time: 0.5 * x, lambda x, time: torch.tanh(x)]
    first, second = (fs.Denoiser(function, schedule, "data") for function in functions)
    fs.tune(first, checkpoint=tmp_path / "b", **given)
    with pytest.raises(fs.FewstepError, match=r"the folder .* is of another run"):
        fs.tune(second, checkpoint=tmp_path / "b", **given)
    with pytest.raises(ValueError, match="checkpoint keeps conditions"):
        fs.tune(denoiser, cond={"extra": {"a": torch.zeros(64)}}, checkpoint=tmp_path / "c", **given)


def test_a_damaged_checkpoint_is_named(tmp_path):
    denoiser, given = mixture(), {"noise": start(mixture()), "effort": dataclasses.replace(SMALL, trials=0, polish=1), "nfe": 2}
    fs.tune(denoiser, checkpoint=tmp_path / "run", **given)
    for name in ("calls-2.json", "spending.json"):
        path = tmp_path / "run" / name
        before = path.read_bytes()
        path.write_bytes(before[:40])
        with pytest.raises(ArtefactError, match=f"{name} is damaged"):
            fs.tune(denoiser, checkpoint=tmp_path / "run", **given)
        path.write_bytes(before)
    (tmp_path / "run" / "calls-2-0.safetensors").unlink()
    with pytest.raises(ArtefactError, match="is missing"):
        fs.tune(denoiser, checkpoint=tmp_path / "run", **given)


def test_starts_must_fit():
    denoiser = mixture()
    eight = fs.make_plan("ddim", denoiser.schedule, 8)
    with pytest.raises(ValueError, match="the plan for 4 calls has 8"):
        fs.tune(denoiser, nfe=4, noise=start(denoiser), starts={4: eight}, effort=SMALL)
    four = fs.make_plan("dpmpp_2m", denoiser.schedule, 4)
    tuned = fs.tune(denoiser, nfe=4, noise=start(denoiser), starts={4: four}, effort=SMALL)
    assert tuned.candidates[4][1].name.startswith("learned: start, polish")


def test_nested_conditions_reach_the_network_row_by_row():
    inner = mixture()

    def function(x, t, **cond):
        assert len(cond["extra"]["label"]) == len(cond["more"]) == len(x)
        return inner(x, t, label=cond["extra"]["label"])

    function.schedule = inner.schedule
    labels = torch.arange(64) % 5
    cond = {"extra": {"label": labels}, "more": labels.numpy()}
    tuned = fs.tune(function, nfe=3, noise=start(inner), cond=cond, method="closed-form", effort=SMALL)
    assert tuned.report["plans"]["3"]["ratio"] <= 1.0


def test_features_may_be_a_module():
    denoiser = mixture()
    features = torch.nn.Linear(4, 6, dtype=torch.float64)
    tuned = fs.tune(denoiser, nfe=4, noise=start(denoiser), features=features, effort=SMALL)
    assert any(c.name.endswith("matched") for c in tuned.candidates[4])


def test_paths_turn_where_the_guidance_jumps():
    guided = fs.guidance.ClassifierFree(mixture(), 3.0, {"label": -1}, interval=(0.2, 0.7))
    noise, cond = start(guided, 32), {"label": torch.arange(32) % 5}
    exact = fs.reference(guided, noise, guided.schedule, tol=1e-7, cond=cond).plain()
    paths = trace_paths(guided, noise, guided.schedule, calls=96, cond=cond)
    assert errors_of(paths.target, exact).rms < 5e-5  # without the turns 6e-4
    for jump in (0.7, 0.2):
        near = [paths.at(jump * (1.0 + side)) for side in (-1e-9, 0.0, 1e-9)]
        assert all(bool(torch.isfinite(states).all()) and torch.allclose(states, near[1], atol=1e-6) for states in near)


def test_weights_written_past_autograd_are_noticed():
    network = torch.nn.Linear(3, 3)
    denoiser = fs.Denoiser(lambda x, t: x, fs.schedules.VPLinear(), "data")
    denoiser.network = network
    before = fs.identity.identity(denoiser)["fingerprint"]
    network.weight.data.mul_(2.0)
    assert fs.identity.identity(denoiser)["fingerprint"] != before


@pytest.mark.parametrize("method", ["learned", "recipe"])
def test_a_method_keeps_its_budget(method):
    denoiser, budget = mixture(), 60_000
    tuned = fs.tune(denoiser, nfe=4, noise=start(denoiser), method=method, evaluations=budget)
    assert 0.25 * budget < tuned.report["evaluations"] < 1.25 * budget
