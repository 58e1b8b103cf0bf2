from __future__ import annotations

import numpy as np
import pytest

from fewstep.scale.simulation import Cluster, simulate


def test_even_workers_take_the_ideal_time_and_waste_nothing():
    outcome = simulate(Cluster(workers=8, spread=0.0, restart_seconds=3.0, block_seconds=2.0), 80)
    assert outcome.seconds == pytest.approx(3.0 + 10 * 2.0)
    assert (outcome.efficiency, outcome.kept, outcome.wasted) == (pytest.approx(1.0), 80, pytest.approx(0.0))


def test_one_coordinator_that_takes_long_for_a_message_is_the_bound():
    """With m seconds a message, n blocks and as many starts take (n + workers) m at least, however many workers there are."""
    cluster = Cluster(workers=50, spread=0.0, restart_seconds=0.0, message_seconds=0.1)
    outcome = simulate(cluster, 500, copies=1)
    assert outcome.seconds == pytest.approx(0.1 * (500 + 50), rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_failing_hanging_and_slow_workers_lose_and_double_nothing(seed):
    cluster = Cluster(workers=40, slow=0.1, hangs=0.02, hang_seconds=30.0, failure_seconds=20.0, restart_seconds=5.0)
    outcome = simulate(cluster, 1000, seed=seed)
    assert outcome.blocks == outcome.kept == 1000
    assert outcome.deaths > 20
    assert simulate(cluster, 1000, seed=seed) == outcome  # the same seed, the same run


def test_slow_workers_cost_less_when_their_last_blocks_are_done_again():
    cluster = Cluster(workers=100, slow=0.05, slowdown=20.0, restart_seconds=0.0)
    with_copies, without = (np.mean([simulate(cluster, 2000, copies=k, seed=s).seconds for s in range(3)]) for k in (2, 1))
    assert with_copies < 0.75 * without


def test_failures_take_the_share_of_time_that_they_must():
    """A worker works f of f + r seconds, and a failure throws away half a block at most: efficiency at least about f / (f + r + 1)."""
    cluster = Cluster(workers=50, failure_seconds=50.0, restart_seconds=10.0, block_seconds=1.0)
    outcome = simulate(cluster, 20000)
    assert outcome.efficiency == pytest.approx(50.0 / 61.0, abs=0.05)


def test_numbers_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="must be positive"):
        Cluster(workers=0)
