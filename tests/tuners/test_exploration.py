from __future__ import annotations

import math

import numpy as np
import pytest

from fewstep.errors import UnknownNameError
from fewstep.tuners.designs import e_design, g_design, information, rounded, variances
from fewstep.tuners.exploration import halvings, leading_subspace, pick

RANDOM = np.random.default_rng(0)
ARMS = RANDOM.standard_normal((40, 8))


def test_e_design_of_arms_along_the_axes_is_inverse_to_their_squared_lengths():
    lengths = np.array([1.0, 2.0, 0.5, 3.0, 0.1])
    expected = lengths**-2 / np.sum(lengths**-2.0)
    assert np.abs(e_design(np.diag(lengths), tol=1e-4) - expected).max() < 1e-3


def test_e_design_is_that_of_a_linear_program_with_cuts():
    """max t with v^T A v >= t for unit vectors v: those of the least eigenvalues of one solution cut it off for the next."""
    optimize = pytest.importorskip("scipy.optimize")
    arms, cuts = ARMS[:20, :5], [np.eye(5)]
    bound, least = math.inf, 0.0
    for _ in range(60):
        seen = (arms @ np.concatenate(cuts).T).T ** 2  # cuts x arms
        found = optimize.linprog(
            np.r_[np.zeros(20), -1.0],
            A_ub=np.c_[-seen, np.ones(len(seen))],
            b_ub=np.zeros(len(seen)),
            A_eq=np.r_[np.ones(20), 0.0][None],
            b_eq=[1.0],
            bounds=[(0, None)] * 20 + [(None, None)],
        )
        values, vectors = np.linalg.eigh(information(arms, found.x[:20]))
        bound, least = -found.fun, max(least, values[0])
        if least > 0.999 * bound:
            break
        cuts.append(vectors.T)
    assert least > 0.99 * bound
    assert np.linalg.eigvalsh(information(arms, e_design(arms)))[0] > 0.99 * bound


def test_g_design_of_the_arms_themselves_has_the_dimension_as_its_variance():
    design, worst = g_design(ARMS, ARMS, iterations=5000)
    assert worst == pytest.approx(8.0, rel=1e-2)
    assert variances(ARMS, design, ARMS).max() == pytest.approx(worst)


def test_designs_of_directions_are_no_worse_than_the_even_one():
    pairs = np.array([ARMS[i] - ARMS[j] for i in range(10) for j in range(i)])
    assert g_design(ARMS, pairs)[1] < 0.8 * variances(ARMS, np.full(40, 1 / 40), pairs).max()


def test_rounding_keeps_the_sum_and_the_variance():
    design, worst = g_design(ARMS, ARMS)
    counts = rounded(design, 400)
    assert counts.sum() == 400
    support = int((design > 1e-6).sum())
    assert variances(ARMS, counts / 400, ARMS).max() <= worst * 400 / (400 - support)  # Pukelsheim and Rieder's bound
    with pytest.raises(ValueError, match="fewer than"):
        rounded(design, support - 1)


@pytest.mark.parametrize(("count", "noise"), [(3, 0.12), (4, 0.1), (8, 0.1)])
def test_rounding_takes_nothing_off_the_confidence(count, noise):
    """In the first phase the variance of every difference is at most what the confidence asks for; few arms, few measurements."""
    asked = []

    def task(k, number):
        asked.append((k, number))
        return np.full(number, 2.0 * (k == 0))

    assert pick(np.eye(count), [task], "single-design", confidence=0.95, noise=noise).best == (0,)
    counts = np.bincount([k for k, _ in asked], [number for _, number in asked])
    assert len(asked) == count  # one phase
    variance = noise**2 * max(1 / counts[i] + 1 / counts[j] for i in range(count) for j in range(i))
    union = count**2 * 2 / 0.05
    assert 2.0 * variance * math.log(union) <= 0.25


def test_every_arm_is_measured_at_least_as_often_as_the_rounding_promises():
    chance = np.random.default_rng(3)
    for _ in range(200):
        design = chance.dirichlet(np.full(12, 0.3))
        arms = int((design > 1e-6).sum())
        count = int(chance.integers(arms, 200))
        assert (rounded(design, count) >= (count - arms) * np.where(design > 1e-6, design, 0.0) - 1e-9).all()


def test_features_that_do_not_span_are_refused():
    with pytest.raises(ValueError, match="span 1 of 2"):
        e_design(np.ones((3, 2)))


def shared_tasks(seed, *, arms=24, d=12, k=2, count=20, noise=1.0, gap=0.1):
    """Tasks that share k of d dimensions, and whose two best arms differ by at least `gap`."""
    chance = np.random.default_rng(seed)
    x = chance.standard_normal((arms, d))
    x /= np.linalg.norm(x, axis=1)[:, None]
    basis = np.linalg.qr(chance.standard_normal((d, k)))[0]
    w = chance.standard_normal((5000, k))
    w /= np.linalg.norm(w, axis=1)[:, None]
    means = w @ basis.T @ x.T
    ordered = np.sort(means, 1)
    means = means[ordered[:, -1] - ordered[:, -2] > gap][:count]
    assert len(means) == count
    tasks = [lambda a, n, mean=mean: mean[a] + noise * chance.standard_normal(n) for mean in means]
    return x, basis, means, tasks


def test_the_error_of_the_shared_subspace_falls_as_the_root_of_the_measurements():
    chance = np.random.default_rng(1)
    basis = np.linalg.qr(chance.standard_normal((12, 2)))[0]
    theta = chance.standard_normal((40, 2)) @ basis.T
    spread = np.diag(np.linspace(0.5, 3.0, 12))  # noise of different size in different directions: it has to be taken off
    sizes = 10.0 ** np.arange(2, 6)
    errors = []
    for size in sizes:
        found = [
            leading_subspace(theta + chance.standard_normal((40, 12)) @ spread / math.sqrt(size), spread**2 / size, 2)
            for _ in range(20)
        ]
        errors.append(np.mean([np.linalg.norm(b - basis @ (basis.T @ b), 2) for b in found]))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)


def test_without_taking_the_noise_off_the_subspace_is_led_astray():
    chance = np.random.default_rng(2)
    basis = np.eye(12)[:, :2]
    spread = np.diag([0.1] * 10 + [3.0] * 2)
    theta = chance.standard_normal((400, 2)) @ basis.T
    estimates = theta + chance.standard_normal((400, 12)) @ spread
    with_it, without = (leading_subspace(estimates, part, 2) for part in (spread**2, np.zeros((12, 12))))
    away = [np.linalg.norm(b - basis @ (basis.T @ b), 2) for b in (with_it, without)]
    assert away[0] < 0.7 < 0.95 < away[1]


def test_the_double_design_needs_at_most_half_the_measurements_of_the_single_one():
    """d = 12, k = 2, 20 tasks; `benchmarks/exploration.py` does it a hundred times."""
    spent: dict[str, list[int]] = {"single-design": [], "double-design": []}
    for seed in range(2):
        x, _, means, _ = shared_tasks(seed)
        for method, used in spent.items():
            tasks = shared_tasks(seed)[3]
            rank = 2 if method == "double-design" else None
            found = pick(x, tasks, method, confidence=0.95, noise=1.0, rank=rank)
            assert list(found.best) == means.argmax(1).tolist()
            used.append(found.evaluations)
    assert sum(spent["double-design"]) <= 0.5 * sum(spent["single-design"])


@pytest.mark.parametrize("method", ["successive-halving", "uniform"])
def test_a_budget_is_kept_and_enough_of_it_finds_the_best(method):
    x, _, means, tasks = shared_tasks(0, noise=0.05)
    asked = []

    def counted(task):
        def measure(arm, count):
            asked.append(count)
            return task(arm, count)

        return measure

    found = pick(x, [counted(task) for task in tasks], method, budget=2000)
    assert sum(asked) == found.evaluations <= 2000 * len(tasks)
    assert found.evaluations > 0.9 * 2000 * len(tasks)
    assert list(found.best) == means.argmax(1).tolist()


def test_halving_beats_even_measuring_where_one_is_best_by_little():
    """One of 32 is best by 0.2 at noise 1: at a budget of 3200, even measuring is wrong far more often."""
    right = {"successive-halving": 0, "uniform": 0}
    chance = np.random.default_rng(5)
    means = np.concatenate([[0.2], np.zeros(7), np.full(24, -1.0)])
    for _ in range(60):
        for method in right:
            found = pick(np.eye(32), [lambda k, n: means[k] + chance.standard_normal(n)], method, budget=3200)
            right[method] += found.best == (0,)
    assert right["successive-halving"] >= right["uniform"] + 10


def test_equal_best_ones_end_with_an_epsilon_and_are_told_without():
    chance = np.random.default_rng(0)
    tasks = [lambda k, n: (0.0, 1.0, 1.0)[k] + 1e-9 * chance.standard_normal(n)]
    assert pick(np.eye(3), tasks, "single-design", confidence=0.9, noise=1e-6, epsilon=0.1).best[0] in (1, 2)
    exact = [lambda k, n: np.full(n, (0.0, 1.0, 1.0)[k])]
    with pytest.raises(ValueError, match="still equal: give epsilon"):
        pick(np.eye(3), exact, "single-design", confidence=0.9, noise=1e-12)


def test_what_a_method_needs_and_does_not_need_is_said():
    def task(k, n):
        return np.zeros(n)

    with pytest.raises(UnknownNameError, match="uniform"):
        pick(np.eye(2), [task], "unifrom", budget=9)
    with pytest.raises(ValueError, match="double-design needs confidence and noise and rank and nothing else; wrong: rank"):
        pick(np.eye(2), [task], "double-design", confidence=0.9, noise=1.0)
    with pytest.raises(ValueError, match="wrong: confidence"):
        pick(np.eye(2), [task], "uniform", confidence=0.9, budget=9)
    with pytest.raises(ValueError, match="at least 6, got 4"):
        pick(np.eye(3), [task], "successive-halving", budget=4)
    with pytest.raises(ValueError, match="at least 2 configurations"):
        pick(np.eye(1), [task], "uniform", budget=4)
    with pytest.raises(ValueError, match="finite rewards"):
        pick(np.eye(2), [lambda k, n: [math.nan] * n], "uniform", budget=4)


def test_rounds_of_halving():
    assert [halvings(n) for n in (2, 3, 4, 5, 8, 9)] == [1, 2, 2, 3, 3, 4]
