"""Policies and schedulers: stability where it was promised, regret, equality of units, and what each one orders."""

import importlib.util
import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fewstep.errors import UnknownNameError
from fewstep.serve import SSMW, ByKind, LongestQueue, MaxWeight, Queue, SoftMW, Uniform, make_scheduler
from fewstep.serve.schedulers import queues_of

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "serving.py"


@pytest.fixture(scope="module")
def serving():
    spec = importlib.util.spec_from_file_location("serving_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def growth(serving, policy, load, slots, seed=0):
    second, last = serving.quarters(serving.simulate(policy, load, slots, seed))
    return last / second


@pytest.mark.parametrize("policy", [SoftMW, SSMW])
def test_drifting_rates_are_followed(serving, policy):
    # 24,000 slots are four periods, so quarters compare like with like
    assert growth(serving, policy(2000), 0.7, 24_000) <= 1.5


@pytest.mark.parametrize("make", [lambda: None, Uniform, LongestQueue])
def test_what_does_not_look_at_rates_is_unstable(serving, make):
    assert growth(serving, make(), 0.7, 24_000) > 1.8


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.7, 0.85])
@pytest.mark.parametrize("seed", [0, 1])
def test_stability_over_ten_periods(serving, load, seed):
    for policy in (SoftMW(2000, seed), SSMW(2000, seed)):
        assert growth(serving, policy, load, 60_000, seed) <= 1.5
    for policy in (None, Uniform(seed), LongestQueue()):
        assert growth(serving, policy, load, 60_000, seed) > 1.8


@pytest.mark.parametrize("policy", [SoftMW, SSMW])
def test_constant_rates_stay_stable(serving, policy):
    history = serving.simulate(policy(2000), 0.85, 16_000, 0, drifts=False)
    assert max(history) < 100  # 14,000 arrivals; what does not serve grows by hundreds


@pytest.mark.parametrize("policy", [SoftMW, SSMW])
def test_regret_on_constant_rewards(policy):
    # arms of Bernoulli rewards: EXP3's regret is at most 2.7 sqrt(T K ln K); bar 3
    rates, T, draw = [0.2, 0.5, 0.8, 0.4], 4000, random.Random(5)
    learner, got = policy(T), 0.0
    for _ in range(T):
        choice = learner.choose({str(i): Queue(1.0) for i in range(4)})
        reward = float(draw.random() < rates[int(choice.kind)])
        got += reward
        learner.observe(choice, reward)
    assert max(rates) * T - got <= 3.0 * math.sqrt(T * 4 * math.log(4))


@pytest.mark.parametrize("policy", [SoftMW, SSMW])
def test_units_do_not_matter(policy):
    def choices(unit):
        learner, draw, kinds = policy(50, seed=3), random.Random(1), []
        for _ in range(400):
            queues = {kind: Queue(unit * draw.randint(0, 9)) for kind in "abcd"} | {"e": Queue(unit)}
            choice = learner.choose(queues)
            kinds.append(choice.kind)
            learner.observe(choice, unit * draw.random())
        return kinds

    assert choices(1.0) == choices(8.0) == choices(10.0)


@pytest.mark.parametrize("policy", [SoftMW(100), SSMW(100), MaxWeight(), LongestQueue(), Uniform()])
def test_empty_queues_are_never_chosen(policy):
    draw = random.Random(0)
    for slot in range(500):
        queues = (
            {"only": Queue(3.0, 1.0)}
            if slot % 3
            else {k: Queue(float(draw.random() < 0.5), 1.0) for k in "abc"} | {"d": Queue(1.0)}
        )
        choice = policy.choose(queues)
        assert queues[choice.kind].backlog > 0
        assert 0.0 < choice.probability <= 1.0
        policy.observe(choice, 1.0)
    with pytest.raises(ValueError, match="all queues are empty"):
        policy.choose({"a": Queue(0.0)})


@pytest.mark.parametrize("policy", [SoftMW, SSMW])
def test_probabilities_are_those_of_the_draws(policy):
    learner = policy(200, seed=1)
    queues = {"a": Queue(4.0), "b": Queue(2.0), "c": Queue(1.0)}
    total, spread = 0.0, 0.0
    for _ in range(6000):
        choice = learner.choose(queues)
        if choice.kind == "c":
            total += 1.0 / choice.probability
            spread += (1.0 - choice.probability) / choice.probability**2
        learner.observe(choice, 1.0)
    # the sum of 1 / p over the slots that c got has mean 6000 whatever the weights do, and that variance; four standard deviations
    assert abs(total - 6000) < 4.0 * math.sqrt(spread)


@pytest.mark.parametrize(("policy", "memory"), [(SoftMW, "weights"), (SSMW, "_sums")])
def test_many_queues_are_forgotten(policy, memory):
    learner = policy(50)
    for slot in range(2000):
        choice = learner.choose({f"user {slot}": Queue(1.0), "always": Queue(1.0)})
        learner.observe(choice, 1.0)
    assert "always" in getattr(learner, memory)
    assert len(learner._seen) <= 101
    assert len(getattr(learner, memory)) <= 101


@pytest.mark.parametrize("policy", [SoftMW, SSMW])
def test_services_that_come_late_learn_with_the_rate_of_their_slot(policy):
    for seed in range(50):
        learner = policy(2000, seed)
        for _ in range(100):
            learner.observe(learner.choose({"a": Queue(2000.0), "b": Queue(2000.0)}), 1.0)
        late = learner.choose({"a": Queue(2000.0), "b": Queue(2000.0)})
        before = dict(getattr(learner, "weights", {}))
        learner.choose(
            {"a": Queue(0.001), "b": Queue(0.001)}
        )  # the next call is put together; what filled the queues was cancelled
        learner.observe(late, 1.0)
        if before:  # at most e times as likely
            assert learner.weights[late.kind] <= math.e * before[late.kind] / sum(before.values()) + 1e-9
        assert 0.0 < learner.choose({"a": Queue(1.0), "b": Queue(1.0)}).probability <= 1.0


def test_rewards_of_slow_times_weigh_as_little_as_they_were():
    """The softmax of SSMW is of eta times the sums of rewards, with the M of now: what was earned while everything was slow counts less."""
    learner = SSMW(1000, seed=1)
    queues = {"a": Queue(50.0), "b": Queue(50.0)}
    rewards, most = [], 0.0
    for slot in range(700):
        slow = {"a": 0.01, "b": 0.005} if slot < 400 else {"a": 0.1, "b": 1.0}
        choice = learner.choose(queues)
        learner.observe(choice, slow[choice.kind])
        most = max(slow[choice.kind], most * (1.0 - 1.0 / 1000))
        rewards.append((choice.kind, 50.0 * slow[choice.kind] / choice.probability))
    eta = math.sqrt(math.log(2) / (2 * 1000 * 50.0**2)) / most
    raised = {kind: math.exp(eta * sum(g for name, g in rewards if name == kind)) for kind in queues}
    x = raised["b"] / sum(raised.values())
    gamma = 2 * eta * most * 50.0
    wanted = {kind: (1 - gamma) * share + gamma / 2 for kind, share in (("a", 1 - x), ("b", x))}
    choice = learner.choose(queues)
    assert choice.probability == pytest.approx(wanted[choice.kind], rel=1e-9)


def test_odd_values_are_refused():
    with pytest.raises(ValueError, match="window"):
        SSMW(0)
    learner = SoftMW(10)
    choice = learner.choose({"a": Queue(1.0)})
    with pytest.raises(ValueError, match="a service is finite"):
        learner.observe(choice, float("nan"))
    with pytest.raises(UnknownNameError, match="Did you mean 'ssmw'"):
        make_scheduler("ssmv")
    with pytest.raises(TypeError, match=r"fewstep\.serve\.Scheduler"):
        make_scheduler(SSMW(10))


@dataclass
class Sample:
    kind: str
    arrival: int
    samples: int
    cost: int
    calls: int
    remaining: int


WORKS = [
    Sample("long", 1, 4, 1, 50, 40),
    Sample("short", 2, 2, 2, 4, 4),
    Sample("long", 3, 1, 1, 50, 2),
    Sample("short", 4, 9, 1, 4, 3),
]


def test_orders():
    assert make_scheduler("fifo").arrange(WORKS, 8).works == [0, 1, 2, 3]
    assert make_scheduler("shortest-remaining").arrange(WORKS, 8).works == [2, 3, 1, 0]
    arranged = make_scheduler("maxweight").arrange(WORKS, 8)
    assert arranged.works == [1, 3, 0, 2]
    assert arranged.choice.kind == "short"


def test_queues_in_the_unit_of_samples():
    queues = queues_of(WORKS, 8)
    assert queues["long"] == Queue(4 * 40 / 50 + 2 / 50, 5 / 50)
    assert queues["short"] == Queue(2.0 + 9 * 3 / 4, 2 / 4 + 4 / 4)  # 8 rows: two guided samples, then four of nine


def test_a_policy_serves_its_queue_first_and_learns_from_it():
    scheduler = ByKind(SSMW(200, seed=2))
    for _ in range(600):
        works, choice = scheduler.arrange(WORKS, 8)
        kinds = [WORKS[place].kind for place in works]
        assert kinds == sorted(kinds, key=lambda kind: kind != choice.kind)
        scheduler.observe(choice, 1.0 if choice.kind == "long" else 0.01)
    # exponents differ by 0.37 sqrt(200 ln 2 / 2) = 3.1, so "long" has probability 0.91: of 40 draws 36 +- 2
    assert [scheduler.arrange(WORKS, 8).choice.kind for _ in range(40)].count("long") > 30


def test_the_page_has_the_measured_figures(serving):
    report = json.loads(serving.RESULTS.read_text())
    page = serving.PAGE.read_text()
    assert serving.with_tables(page, report) == page
    told = report["utilisation"]
    assert told["continuous"]["utilisation"] >= 0.9
    assert told["request_level"]["utilisation"] < told["static"]["utilisation"] < told["continuous"]["utilisation"]
    for load in (0.7, 0.85):
        case = report["drift"]["cases"][f"drifting, load {load:g}"]
        assert all(case[name]["growth"] <= 1.5 for name in ("ssmw", "softmw"))
        assert all(case[name]["growth"] > 1.8 for name in ("fifo", "uniform", "longest queue"))
