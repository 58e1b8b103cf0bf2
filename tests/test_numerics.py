from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.numerics import (
    decaying_moments,
    exponential_weights,
    gauss_legendre,
    lagrange_integrals,
    lagrange_polynomials,
    phi,
)

# 50-digit values (mpmath, quadrature of the defining integrals)
PHI_GOLDEN = [
    (1, 1e-8, 1.0000000050000000167),
    (2, 1e-8, 0.50000000166666667083),
    (3, 1e-3, 0.16670834166805575521),
    (2, -5.0, 0.16026951787996341),
    (1, 20.0, 24258259.720489514048),
    (4, 0.0, 1 / 24),
]


@pytest.mark.parametrize(("k", "z", "value"), PHI_GOLDEN)
def test_phi_golden(k, z, value):
    assert phi(k, z) == pytest.approx(value, rel=1e-13)


@given(st.integers(0, 5), st.floats(-30, 30))
def test_phi_is_its_integral(k, z):
    nodes, weights = gauss_legendre(0.0, 1.0, 60)
    integral = math.exp(z) if k == 0 else float(weights @ (np.exp((1 - nodes) * z) * nodes ** (k - 1))) / math.factorial(k - 1)
    assert phi(k, z) == pytest.approx(integral, rel=1e-11)


def test_phi_is_continuous_where_series_and_recursion_meet():
    for k in range(6):
        border = 2.0 + k
        for z in (border, -border):
            assert phi(k, z * (1 - 1e-12)) == pytest.approx(phi(k, z * (1 + 1e-12)), rel=3e-11)


def test_phi_refuses():
    with pytest.raises(ValueError, match="at least 0"):
        phi(-1, 0.0)
    with pytest.raises(ValueError, match="finite"):
        phi(1, math.nan)


@given(st.floats(1e-6, 300) | st.floats(-40, -1e-6), st.integers(1, 5))
def test_moments_are_their_integrals(z, count):
    edges = np.linspace(0, 1, 41)
    rules = [gauss_legendre(low, high, 24) for low, high in pairwise(edges)]
    for k, moment in enumerate(decaying_moments(z, count)):
        integral = sum(float(w @ (z * np.exp(-z * (1 - u)) * u**k)) for u, w in rules)
        assert moment == pytest.approx(integral, rel=1e-11)


def test_moments_at_infinity_and_relation_to_phi():
    assert decaying_moments(math.inf, 3).tolist() == [1.0, 1.0, 1.0]
    for z in (0.1, 3.0, 12.0):
        expected = [math.factorial(k) * z * phi(k + 1, -z) for k in range(4)]
        np.testing.assert_allclose(decaying_moments(z, 4), expected, rtol=1e-12)


def test_golden_weight():
    # integral of e^u over [-1, 0] is 1 - 1/e = 0.63212055882855767840...; of e^u (1 + u) it is 1/e
    np.testing.assert_allclose(lagrange_integrals([-1.0], -1.0, 0.0, np.exp), [0.63212055882855767840], rtol=1e-15)
    np.testing.assert_allclose(lagrange_integrals([0.0, -1.0], -1.0, 0.0, np.exp)[0], 0.36787944117144232160, rtol=1e-14)


@given(
    st.lists(st.floats(-5, 1).map(lambda x: round(x, 2)), min_size=1, max_size=4, unique=True),
    st.floats(1e-3, 25) | st.floats(-12, -1e-3),
)
def test_exponential_weights_are_quadrature_and_sum_to_the_whole(nodes, z):
    weights = exponential_weights(nodes, z)
    quadrature = lagrange_integrals(nodes, 0.0, 1.0, lambda u: z * np.exp(-z * (1 - u)), points=48)
    scale = np.abs(lagrange_polynomials(nodes)).max() * max(1.0, math.expm1(-z))
    np.testing.assert_allclose(weights, quadrature, rtol=1e-9, atol=1e-11 * scale)
    assert weights.sum() == pytest.approx(-math.expm1(-z), abs=1e-11 * scale)


def test_lagrange_refuses_repeated_nodes():
    with pytest.raises(ValueError, match="must differ"):
        lagrange_polynomials([0.0, 0.0])
