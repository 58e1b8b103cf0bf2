"""PSO and SPO where the answer is known, and what they share: labels, clipping, the network that is trained, resumption."""

import copy
import math

import pytest
import torch
from torch import nn

import fewstep as fs
from fewstep.errors import ArtefactError, PlanError, UnknownNameError
from fewstep.steer import (
    PSO,
    SPO,
    BradleyTerry,
    Dominance,
    OfflinePSO,
    Policy,
    StepPreference,
    best,
    fit_preference,
    make_reward,
    prefer,
    scored_by,
    uniform,
)
from fewstep.steer.method import clipped
from fewstep.steer.policy import trained_copy, with_network

FLOW = fs.schedules.Flow(t_end=0.5)


class Constant(nn.Module):
    """D(x, t) = c, one number."""

    def __init__(self, value=0.3):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x, time):
        return self.value.expand_as(x)


class Gain(nn.Module):
    """D(x, t) = a x + b, where b begins at 0."""

    def __init__(self, gain=0.7, shift=0.0):
        super().__init__()
        self.gain, self.shift = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (gain, shift))

    def forward(self, x, time):
        return self.gain * x + self.shift


def one_dimensional(network, schedule=FLOW):
    return fs.Denoiser(network, schedule, "data", info=fs.ModelInfo(shape=(1,)))


def policy_of(denoiser, plan, reward=None):
    return Policy(denoiser, denoiser, plan, (1,), reward, torch.zeros(1, 1, dtype=torch.float64))


# ---- PSO ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Constants(nn.Module):
    """D(x, t) = c, d numbers."""

    def __init__(self, d):
        super().__init__()
        self.value = nn.Parameter(torch.full((d,), 0.3, dtype=torch.float64))

    def forward(self, x, time):
        return self.value.expand_as(x)


@pytest.mark.parametrize("d", [1, 4])
def test_the_optimum_is_the_tilted_gaussian(double, d):
    """x = alpha c + sigma xi, reward k x_1, labels of Bradley and Terry.

    p_ref e^{d k x_1 / beta} / Z has the mean of x_1 d k sigma^2 / beta higher: log-densities are means over d elements."""
    plan = fs.make_plan("lcm", FLOW, 1, final="t_end")
    alpha, sigma = float(FLOW.alpha(0.5)), float(FLOW.sigma(0.5))
    k, beta = 2.0 / d, 1.5
    method = PSO(beta=beta, clip=None, labels=BradleyTerry())
    student = fs.Denoiser(Constants(d), FLOW, "data", info=fs.ModelInfo(shape=(d,)))
    made = prefer(
        student,
        plan,
        method=method,
        reward=lambda x: k * x[:, 0],
        steps=500,
        batch_size=1024,
        learning_rate=0.03,
        decay="cosine",
        ema=0.98,
        judged=None,
    )
    shift = alpha * (made.network.value.detach() - 0.3)
    assert shift[0].item() == pytest.approx(d * k * sigma**2 / beta, rel=0.05)
    assert shift[1:].abs().max().item() < 0.1 * shift[0].item() if d > 1 else True


def test_the_loss_begins_at_log_2_and_the_sign_of_beta_is_the_direction():
    plan = fs.make_plan("lcm", FLOW, 1, final="t_end")
    student = one_dimensional(Constant())
    for beta, sign in ((5.0, -1.0), (-5.0, 1.0)):
        objective = PSO(beta=beta).objective(policy_of(student, plan, lambda x: x[:, 0]))
        loss, info = objective(student.network, {"row": torch.zeros(256)}, torch.Generator().manual_seed(0))
        assert loss.item() == pytest.approx(math.log(2.0), rel=1e-9)
        (slope,) = torch.autograd.grad(loss, student.network.value)
        assert float(slope) * sign > 0.0
        assert float(info["ties"]) == float(info["clipped"]) == 0.0


def test_the_clip_has_finite_gradients_however_far_the_ratio_is():
    log_r = torch.tensor([-200.0, -0.2, 0.05, 89.0, 100.0], requires_grad=True)
    kept = clipped(log_r, 0.1)
    torch.testing.assert_close(kept.detach().exp(), torch.tensor([0.9, 0.9, math.exp(0.05), 1.1, 1.1]))
    assert torch.autograd.grad(kept.sum(), log_r)[0].tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]


def test_beyond_the_clip_there_is_no_gradient():
    plan = fs.make_plan("lcm", FLOW, 1, final="t_end")
    far, reference = one_dimensional(Constant(30.0)), one_dimensional(Constant(0.3))
    policy = Policy(far, reference, plan, (1,), lambda x: x[:, 0], torch.zeros(1, 1, dtype=torch.float64))
    loss, info = PSO().objective(policy)(far.network, {"row": torch.zeros(64)}, torch.Generator().manual_seed(0))
    assert float(info["clipped"]) == 1.0
    assert float(torch.autograd.grad(loss, far.network.value)[0]) == 0.0


def test_ties_teach_nothing():
    plan = fs.make_plan("lcm", FLOW, 1, final="t_end")
    student = one_dimensional(Constant())
    objective = PSO().objective(policy_of(student, plan, lambda x: torch.zeros(len(x))))
    loss, info = objective(student.network, {"row": torch.zeros(8)}, torch.Generator().manual_seed(0))
    assert loss.item() == 0.0
    assert float(info["ties"]) == 1.0


def test_labels():
    first, second = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])
    assert Dominance()(first, second, torch.Generator()).tolist() == [1.0, -1.0, 0.0]
    chance = (
        (BradleyTerry(2.0)(torch.full((20000,), 1.0), torch.zeros(20000), torch.Generator().manual_seed(0)) > 0).double().mean()
    )
    expected = 1.0 / (1.0 + math.exp(-0.5))
    assert abs(float(chance) - expected) < 5 * math.sqrt(expected * (1 - expected) / 20000)  # five standard errors
    with pytest.raises(ValueError, match="one reward"):
        BradleyTerry()(torch.zeros(2, 2), torch.zeros(2, 2), torch.Generator())


@pytest.mark.parametrize(("push", "low", "high"), [(0.0, 0.99, 1.01), (0.1, 1.04, 1.12), (0.3, 1.2, 1.31)])
def test_offline_pairs_lead_to_the_targets_and_beyond_by_the_push(push, low, high):
    """Data predictions, and so the own samples y, are 0.3; targets are 1: (v - 1)^2 - c (v - y)^2 is least at (1 - c y) / (1 - c)."""
    plan = fs.make_plan("lcm", fs.schedules.Flow(), 2, final="zero")
    student = one_dimensional(Constant(), fs.schedules.Flow())
    data, method = {"x": torch.full((64, 1), 1.0)}, OfflinePSO(beta=2.0, push=push)
    loss, _ = method.objective(policy_of(student, plan))(student.network, data, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(math.log(2.0), rel=1e-9)
    made = prefer(student, plan, method=method, data=data, steps=150, batch_size=16, learning_rate=0.02, judged=None)
    assert low < made.network.value.item() < high
    assert float(student.network.value.detach()) == 0.3


def test_offline_pairs_need_no_noise_in_the_plan():
    schedule = fs.schedules.Flow()
    student, data = one_dimensional(Constant(), schedule), {"x": torch.full((64, 1), 1.0)}
    options = {"method": OfflinePSO(beta=2.0), "data": data, "steps": 150, "batch_size": 16, "learning_rate": 0.02, "judged": None}
    for nfe in (1, 2):
        made = prefer(student, fs.make_plan("ddim", schedule, nfe, final="zero"), **options)
        assert made.network.value.item() > 0.9


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x, **_: x.mean(), r"gave shape \(\)"),
        (lambda x, **_: x.mean(0), r"gave shape \(1, 8, 8\)"),
        (lambda x, **_: (x > 0).flatten(1).sum(1), r"gave torch.int64. Cast it"),
        (lambda x, **_: 1.0, "gave float"),
        (lambda x, **_: x.flatten(1).mean(1) / 0.0 * 0.0, "not finite"),
    ],
)
def test_a_reward_that_gives_no_number_a_sample_is_refused(reward, message):
    model, plan = digits_plan(2)
    for method in (PSO(), SPO(lambda d, t, **cond: reward(d, **cond), candidates=2)):
        with pytest.raises(ValueError, match=message):
            prefer(model, plan, method=method, reward=reward, judged=None, **LITTLE)


# ---- SPO ---------------------------------------------------------------------------------------------------------------------------

RANGES = {2: 2.0 / math.sqrt(math.pi), 3: 3.0 / math.sqrt(math.pi), 4: 2.0587507503}
"""Expected ranges of normal numbers."""


@pytest.mark.parametrize("n", RANGES)
def test_the_margin_of_linear_scores_is_the_range_of_normal_numbers(n):
    """Candidates alpha c + sigma xi, predictions a times them, scores k times those: apart by k a sigma times the range of n normals."""
    plan = fs.make_plan("lcm", fs.schedules.Flow(), 2, final="zero")
    student, k, count = one_dimensional(Gain(), fs.schedules.Flow()), 3.0, 20000
    spo = SPO(scored_by(lambda d: d[:, 0], k), candidates=n, threshold=0.0)
    objective = spo.objective(policy_of(student, plan))
    with torch.no_grad():
        _, pairs = objective.draw(torch.zeros(count, 1, dtype=torch.float64), {}, torch.Generator().manual_seed(0))
    better, worse, _, apart = pairs[0]
    expected = k * 0.7 * float(plan.rows[0].noise.scale) * RANGES[n]
    assert abs(float(apart.mean()) - expected) < 5 * float(apart.std()) / math.sqrt(count)  # five standard errors
    torch.testing.assert_close(k * 0.7 * (better - worse)[:, 0], apart)


def test_the_margin_of_quadratic_scores():
    """-(d - c)^2 of two candidates: E|u - v| E|u + v - 2 c| for predictions u, v, normal and independent, as u - v and u + v are."""
    plan = fs.make_plan("lcm", fs.schedules.Flow(), 2, final="zero")
    student, centre, count = one_dimensional(Gain(), fs.schedules.Flow()), 0.4, 40000
    spo = SPO(lambda d, t: -(d[:, 0] - centre).square(), candidates=2, threshold=0.0)
    with torch.no_grad():
        start = torch.full((count, 1), 1.2, dtype=torch.float64)
        _, pairs = spo.objective(policy_of(student, plan)).draw(start, {}, torch.Generator().manual_seed(1))
    row, apart = plan.rows[0], pairs[0][3]
    mean, deviation = 0.7 * row.weights[0] * 0.7 * 1.2, 0.7 * row.noise.scale
    s, m = math.sqrt(2.0) * deviation, 2.0 * (mean - centre)  # of u + v - 2 c; u - v has the same deviation
    folded = s * math.sqrt(2.0 / math.pi) * math.exp(-(m**2) / (2 * s**2)) + m * math.erf(m / (s * math.sqrt(2.0)))
    expected = s * math.sqrt(2.0 / math.pi) * folded
    assert abs(float(apart.mean()) - expected) < 5 * float(apart.std()) / math.sqrt(count)


def test_a_random_candidate_keeps_the_law_of_the_runs_and_the_best_does_not():
    plan = fs.make_plan("lcm", fs.schedules.Flow(), 2, final="zero")
    student, count = one_dimensional(Gain(), fs.schedules.Flow()), 20000
    scale = float(plan.rows[0].noise.scale)
    for choose, expected in ((uniform, 0.0), (best, scale * RANGES[2] / 2)):
        spo = SPO(scored_by(lambda d: d[:, 0]), candidates=2, choose=choose)
        with torch.no_grad():
            states, _ = spo.objective(policy_of(student, plan)).draw(
                torch.zeros(count, 1, dtype=torch.float64), {}, torch.Generator().manual_seed(0)
            )
        assert abs(float(states[1].mean()) - expected) < 5 * scale / math.sqrt(count)


def test_a_step_costs_as_many_calls_as_candidates_and_no_more():
    asked = []

    class Watched(Gain):
        def forward(self, x, time):
            asked.append(len(x))
            return super().forward(x, time)

    plan = fs.make_plan("lcm", fs.schedules.Flow(), 4, final="zero")
    student = one_dimensional(Watched(), fs.schedules.Flow())
    with torch.no_grad():
        spo = SPO(scored_by(lambda d: d[:, 0]), candidates=3)
        spo.objective(policy_of(student, plan)).draw(torch.zeros(5, 1, dtype=torch.float64), {}, torch.Generator())
    assert asked == [5, 15, 15, 15]  # the chosen candidate's prediction is that of the next call


def test_unsure_pairs_are_left_out_and_the_sure_ones_move_the_policy():
    plan = fs.make_plan("lcm", fs.schedules.Flow(), 2, final="zero")
    student = one_dimensional(Gain(), fs.schedules.Flow())
    batch, generator = {"row": torch.zeros(64)}, torch.Generator().manual_seed(0)
    unsure = SPO(scored_by(lambda d: d[:, 0], 1e-3)).objective(policy_of(student, plan))
    loss, info = unsure(student.network, batch, generator)
    assert float(info["kept"]) == 0.0
    assert loss.item() == 0.0
    sure = SPO(scored_by(lambda d: d[:, 0], 100.0)).objective(policy_of(student, plan))
    loss, info = sure(student.network, batch, generator)
    assert float(info["kept"]) > 0.9
    made = prefer(student, plan, method=sure.method, steps=30, batch_size=64, learning_rate=0.01, judged=None)
    assert made.network.shift.item() > 0.02


def test_the_preference_model_begins_blind_to_time_and_learns_what_is_better():
    torch.manual_seed(0)
    gaussian = fs.exact.Gaussian(fs.schedules.Flow(), torch.zeros(1, 8, 8), 1.0)
    network = StepPreference(1, width=16)
    d = torch.randn(4, 1, 8, 8)
    assert torch.equal(network(d, 0.1), network(d, 0.9))
    bright, dark = torch.randn(2, 256, 1, 8, 8)
    pairs = {"better": bright + 0.5, "worse": dark - 0.5}
    result = fit_preference(network, gaussian, pairs, steps=60, batch_size=32, learning_rate=3e-3)
    assert result.log[-1]["accuracy"] > 0.6
    with torch.no_grad():
        clean = (network(pairs["better"], 0.001) > network(pairs["worse"], 0.001)).float().mean()
        assert clean > 0.95
        apart = [(network(gaussian(x, t), t) - network(gaussian(y, t), t)).mean() for t, x, y in _noised(pairs)]
    assert apart[0] > 3 * apart[1]  # close to noise it knows little, and says so


def _noised(pairs):
    noise = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    for t in (0.1, 0.97):
        yield t, (1 - t) * pairs["better"] + t * noise, (1 - t) * pairs["worse"] + t * noise


def test_ties_count_for_nothing_in_the_preference_model():
    gaussian = fs.exact.Gaussian(fs.schedules.Flow(), torch.zeros(1, 8, 8), 1.0)
    network = StepPreference(1, width=8)
    with torch.no_grad():
        network.write.weight.zero_()
    x = torch.randn(8, 1, 8, 8)
    result = fit_preference(network, gaussian, {"better": x, "worse": -x, "tie": torch.ones(8)}, steps=1, batch_size=8)
    assert abs(result.log[-1]["loss"]) < 1e-6  # log 2 is taken off


# ---- prefer ------------------------------------------------------------------------------------------------------------------------


def digits_plan(nfe=3):
    model = fs.load("digits")
    return model, fs.make_plan("ddpm", model.schedule, nfe, final="zero")


LABELS = {"label": torch.arange(10)}
LITTLE = {"cond": LABELS, "steps": 4, "batch_size": 2, "learning_rate": 1e-4}


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    model, plan = digits_plan()

    class Stopped(Exception):
        pass

    asked = []

    def stopping(x, **cond):
        asked.append(1)
        if len(asked) == 4:
            raise Stopped
        return make_reward("ink")(x, **cond)

    stopping.__qualname__ = "ink"  # a checkpoint is gone on from under the same reward only
    options = {**LITTLE, "judged": None, "checkpoint_every": 1}
    whole = prefer(model, plan, reward=make_reward("ink"), **options)
    with pytest.raises(Stopped):
        prefer(model, plan, reward=stopping, folder=tmp_path, **options)
    with pytest.raises(ArtefactError, match="other settings"):
        prefer(model, plan, reward=make_reward("contrast"), folder=tmp_path, **options)
    again = prefer(model, plan, reward=make_reward("ink"), folder=tmp_path, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.network.parameters(), again.network.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(whole.network.parameters(), model.network.parameters(), strict=True))


def scaled(model, factor):
    """The same denoiser with other weights."""
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(factor)
    return with_network(model, network)


def test_a_checkpoint_of_another_plan_model_or_of_other_labels_is_refused(tmp_path):
    model, plan = digits_plan(2)
    options = {"reward": make_reward("ink"), "judged": None, "steps": 1, "batch_size": 2, "folder": tmp_path, "checkpoint_every": 1}
    prefer(model, plan, cond=LABELS, **options)
    others = [
        (model, digits_plan(3)[1], LABELS),
        (scaled(model, 0.5), plan, LABELS),
        (model, plan, {"label": torch.full((10,), 7)}),
    ]
    for student, other, cond in others:
        with pytest.raises(ArtefactError, match="other settings"):
            prefer(student, other, cond=cond, **options)


def test_scores_and_pairs_are_told_apart(tmp_path):
    ink, contrast = make_reward("ink"), make_reward("contrast")
    told = [scored_by(ink), scored_by(ink, 9.0), scored_by(contrast), StepPreference(1, width=8), StepPreference(1, width=8)]
    assert len({repr(SPO(score)) for score in told}) == len(told)
    model, x = digits_plan()[0], torch.linspace(-1, 1, 8 * 64).reshape(8, 1, 8, 8)
    options = {"steps": 1, "batch_size": 2, "folder": tmp_path}
    fit_preference(StepPreference(1, width=8), model, {"better": x, "worse": -x, "label": torch.arange(8)}, **options)
    for student, better in ((model, -x), (scaled(model, 0.5), x)):
        with pytest.raises(ArtefactError, match="other settings"):
            fit_preference(
                StepPreference(1, width=8), student, {"better": better, "worse": -better, "label": torch.arange(8)}, **options
            )


def test_what_is_trained_drops_nothing_out_and_is_in_single_precision():
    network = nn.Sequential(nn.Dropout2d(0.3), nn.Linear(2, 2, dtype=torch.bfloat16))
    network.attention = nn.MultiheadAttention(2, 1, dropout=0.4)
    made = trained_copy(network)
    assert (made[0].p, made[1].weight.dtype, made.attention.dropout) == (0.0, torch.float32, 0.0)
    assert (network[0].p, network[1].weight.dtype, network.attention.dropout) == (0.3, torch.bfloat16, 0.4)


def test_a_model_in_half_precision_learns_and_begins_as_its_reference():
    model, plan = fs.load("digits", dtype=torch.bfloat16), digits_plan()[1]
    made = prefer(model, plan, reward=make_reward("ink"), judged=None, log_every=1, ema=0, **LITTLE)
    assert made.log[0]["margin"] == 0.0
    pairs = zip(made.network.parameters(), model.network.parameters(), strict=True)
    assert all(new.dtype == torch.float32 and not torch.equal(new, old.float()) for new, old in pairs if old.numel() > 1000)


def test_the_report_and_the_pictures(tmp_path):
    from fewstep.steer import Judged

    model, plan = digits_plan()
    made = prefer(model, plan, reward=make_reward("ink"), folder=tmp_path, sheets=2, judged=Judged(20), **LITTLE)
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["samples-0000002.png", "samples-0000004.png"]
    assert made.report["reward"].keys() == {"before", "after", "gain"}
    # of each of 2 labels: two runs of 3 calls, 2 for the reference, 2 of the policy forward and backward
    assert made.report["evaluations"] == 4 * 2 * 2 * (3 + 2 + 3 * 2)
    assert len(made.told) == 3


def test_an_adapter_is_tuned_alone_and_a_students_own_further():
    pytest.importorskip("peft")
    from fewstep.adapt import LoraOptions

    model, plan = digits_plan()
    made = prefer(model, plan, reward=make_reward("ink"), adapter=LoraOptions(rank=2), judged=None, **LITTLE)
    names = set(made.network.state_dict())
    assert names
    assert all("lora_" in name for name in names)
    further = trained_copy(made.network)
    assert {name for name, p in further.named_parameters() if p.requires_grad} == names
    with pytest.raises(ValueError, match="adapter already"):
        trained_copy(made.network, LoraOptions(rank=2))


def test_guidance_stays_around_the_policy():
    guided = fs.guidance.ClassifierFree(fs.load("digits"), 2.0, {"label": 10})
    network = trained_copy(guided.denoiser.network)
    other = with_network(guided, network)
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    with torch.no_grad():
        torch.testing.assert_close(other(x, 0.5, label=label), guided(x, 0.5, label=label))
        network.head.bias += 1.0
        assert not torch.equal(other(x, 0.5, label=label), guided(x, 0.5, label=label))


def test_several_rewards_are_not_traded():
    model, plan = digits_plan()
    both = [make_reward("ink"), lambda x, **_: -make_reward("ink")(x)]
    made = prefer(model, plan, reward=both, judged=None, log_every=1, **LITTLE)
    assert all(record["ties"] == 1.0 for record in made.log)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": None}, "learns from a reward"),
        ({"method": OfflinePSO()}, "learns from targets"),
        ({"data": {"x": torch.zeros(1, 1, 8, 8)}}, "makes its own samples"),
    ],
)
def test_what_is_missing_is_named(options, message):
    model, plan = digits_plan()
    with pytest.raises(ValueError, match=message):
        prefer(model, plan, **{"reward": make_reward("ink"), **LITTLE, **options})


def test_deterministic_plans_and_models_without_a_network_are_refused():
    model, _ = digits_plan()
    with pytest.raises(PlanError, match="draw noise"):
        prefer(model, fs.make_plan("ddim", model.schedule, 4), reward=make_reward("ink"), cond=LABELS)
    exact = fs.exact.Gaussian(FLOW, [0.0], 1.0)
    with pytest.raises(TypeError, match="no torch module"):
        prefer(exact, fs.make_plan("lcm", FLOW, 2), reward=lambda x: x[:, 0], shape=(1,))
    with pytest.raises(ValueError, match="leaves none"):
        SPO(scored_by(lambda d: d[:, 0]), skip=1).objective(
            policy_of(one_dimensional(Gain()), fs.make_plan("lcm", FLOW, 2, final="zero"))
        )


def test_rewards_by_name():
    x = torch.rand(3, 1, 8, 8) * 2 - 1
    assert make_reward("ink")(x).shape == (3,)
    assert make_reward("classifier")(x, label=torch.tensor([1, 2, 3])).shape == (3,)
    assert make_reward("fewstep.steer.rewards:contrast")(x).shape == (3,)
    with pytest.raises(UnknownNameError, match="unknown reward 'inc'"):
        make_reward("inc")
    with pytest.raises(ValueError, match="import path"):
        make_reward("nowhere:function")
    with pytest.raises(ValueError, match="classes 0 to 9"):
        make_reward("classifier:12")
    with pytest.raises(ValueError, match="beta must not be 0"):
        PSO(beta=0.0)
    with pytest.raises(ValueError, match="candidates >= 2"):
        SPO(uniform, candidates=1)
