"""`map` of compare and tune: the same results whoever runs the trials."""

from __future__ import annotations

import contextlib
import pickle

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.errors import FewstepError
from fewstep.evaluate.comparison import Judge, candidates, compare_solvers
from fewstep.evaluate.distances import make_distances
from fewstep.scale import RayMap
from fewstep.tuners import Effort

MIXTURE = fs.exact.GaussianMixture(fs.schedules.VPLinear(), [[-1.0, 0.0], [1.0, 0.5]], 0.05)
EFFORT = Effort(trajectories=64, held_out=32, pool=1, trials=10, polish=3)


def flatten(samples: torch.Tensor) -> torch.Tensor:
    return samples.flatten(1)


def elsewhere(function, items):
    """Like `map`, in an order of its own, and nothing is shared: functions and arguments travel as bytes."""
    items = list(items)
    found = {i: pickle.loads(pickle.dumps(function))(pickle.loads(pickle.dumps(items[i]))) for i in reversed(range(len(items)))}
    return [pickle.loads(pickle.dumps(found[i])) for i in range(len(items))]


def comparison(**options):
    denoiser = fs.Denoiser(MIXTURE, MIXTURE.schedule, predicts="data")
    found = candidates(MIXTURE.schedule, [3, 4], names=["ddim", "dpmpp_2m", "ddpm"])
    noise = fs.draw_noise((2,), range(12), found.plans[0][2])
    exact = fs.reference(MIXTURE, noise, MIXTURE.schedule, tol=1e-3)
    (distance,) = make_distances(["sliced_wasserstein"])
    judge = Judge(distance, flatten, exact, exact.flip(0), "elements", resamples=20)
    return compare_solvers(
        denoiser, noise, exact, found, exact_error=0.0, exact_nfe=1, seeds=range(12), judge=judge, block=5, **options
    )


def test_a_comparison_is_the_same_elsewhere():
    here, there = comparison(), comparison(map=elsewhere)
    assert here.records() == there.records()
    assert here.results() == there.results()
    assert all(torch.equal(a.samples, b.samples) for a, b in zip(here.rows, there.rows, strict=True))


def tuned(**options):
    noise = fs.draw_noise((2,), range(64), dtype=torch.float64)
    return fs.tune(MIXTURE, nfe=[3, 4], noise=noise, effort=EFFORT, **options)


@pytest.mark.parametrize("method", ["closed-form", "learned", "teleport"])
def test_plans_are_the_same_when_the_numbers_of_calls_are_tuned_apart(method):
    here, there = tuned(method=method), tuned(method=method, map=elsewhere)
    assert [plan.digest for plan in here.plans.values()] == [plan.digest for plan in there.plans.values()] or all(
        a.nfe == b.nfe and np.array_equal(a.tau, b.tau) and np.array_equal(a.dense().B, b.dense().B)
        for a, b in zip(here.plans.values(), there.plans.values(), strict=True)
    )
    for nfe, tried in here.candidates.items():
        assert [c.told for c in tried] == [c.told for c in there.candidates[nfe]]


def test_what_depends_on_the_numbers_before_is_refused():
    with pytest.raises(ValueError, match='"auto" goes by what'):
        tuned(map=map)
    with pytest.raises(ValueError, match="a budget of minutes or evaluations"):
        fs.tune(MIXTURE, nfe=[3, 4], noise=torch.randn(64, 2), method="learned", evaluations=10**5, map=map)


def square(x):
    if x == 7:
        raise ValueError("seven is right out.")
    return x * x


def test_ray_maps_in_order_and_tells_errors_as_their_own(ray_here):
    from ray import cloudpickle
    from scale import test_trials

    cloudpickle.register_pickle_by_value(test_trials)
    assert list(RayMap(2)(test_trials.square, range(6))) == [k * k for k in range(6)]
    results = RayMap(2)(test_trials.square, [6, 7, 8])
    assert next(results) == 36
    with pytest.raises(ValueError, match="seven is right out"):
        next(results)
    here, there = test_trials.comparison(), test_trials.comparison(map=RayMap(2))
    assert here.records() == there.records()
    cloudpickle.unregister_pickle_by_value(test_trials)


class Cluster:
    """What `RayMap` asks of Ray, with machines of so many cores; the last has gone."""

    class exceptions:
        RayTaskError = RuntimeError

    def __init__(self, cores):
        self.cores, self.asked, self.waiting, self.most_waiting = cores, set(), 0, 0

    def cluster_resources(self):
        return {"CPU": float(sum(self.cores))}

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": float(c)}} for c in self.cores] + [
            {"Alive": False, "Resources": {"CPU": 999.0}}
        ]

    def remote(self, function):
        cluster = self

        class Remote:
            def options(self, *, num_cpus, max_retries):
                cluster.asked.add(num_cpus)
                return self

            def remote(self, *given):
                cluster.waiting += 1
                cluster.most_waiting = max(cluster.waiting, cluster.most_waiting)
                return function(*given)

        return Remote()

    def put(self, value):
        return value

    def get(self, value):
        self.waiting -= 1
        return value


@pytest.mark.parametrize(
    ("cores", "workers", "reserved", "most_waiting"),
    [([16] * 4, 2, 16, 2), ([16], 2, 8, 4), ([16, 4], 5, 4, 10), ([8, 8], 0, 1, 20), ([4], 9, 1, 8)],
)
def test_a_call_reserves_no_more_cores_than_a_machine_has(monkeypatch, one_thread, cores, workers, reserved, most_waiting):
    cluster = Cluster(cores)
    monkeypatch.setattr("fewstep.scale.trials.ray_session", lambda address, wanted: contextlib.nullcontext(cluster))
    assert list(RayMap(workers, "auto")(square, range(-20, 0))) == [k * k for k in range(-20, 0)]
    assert (cluster.asked, cluster.most_waiting) == ({reserved}, most_waiting)


def test_a_cluster_without_room_for_a_call_is_refused(monkeypatch, one_thread):
    cluster = Cluster([1, 1])
    torch.set_num_threads(2)
    monkeypatch.setattr("fewstep.scale.trials.ray_session", lambda address, wanted: contextlib.nullcontext(cluster))
    with pytest.raises(FewstepError, match="no worker with 2 processor cores"):
        list(RayMap(0, "auto")(square, [1]))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_fewer_than_no_workers_are_refused():
    with pytest.raises(ValueError, match="at least 0"):
        RayMap(-1)
