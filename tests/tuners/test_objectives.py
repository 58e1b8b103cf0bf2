"""What a polish makes small: derivatives that agree with finite differences, and distances with known values."""

from __future__ import annotations

import numpy as np
import torch

from fewstep.tuners.objectives import Matched, Paired
from fewstep.tuners.sliced import sliced_distance


def sets(count=60, size=3, numbers=4):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(count, size, generator=generator, dtype=torch.float64) for _ in range(2 + numbers)]
    return drawn[0], drawn[1], torch.stack(drawn[2:])


def gradient_by_differences(loss, samples, jacobian, h=1e-6):
    sides = [[loss(samples + sign * h * column) for sign in (1.0, -1.0)] for column in jacobian]
    return np.array([(up - down) / (2.0 * h) for up, down in sides])


def test_the_gradient_of_the_capped_errors():
    samples, target, jacobian = sets()
    paired = Paired(target, 1.5)
    matrix, gradient = paired.model(jacobian, samples)
    size = jacobian[0].numel()
    wanted = -gradient_by_differences(paired.loss, samples, jacobian) * paired.scale * size / 2.0
    np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert (np.linalg.eigvalsh(matrix.numpy()) > 0.0).all()


def test_the_gradient_of_matched_distributions():
    samples, target, jacobian = sets()
    for features in (None, lambda x: torch.cat([x, torch.tanh(x)], 1)):
        matched = Matched(Paired(target, 1.5), features)
        _, gradient = matched.model(jacobian, samples)
        wanted = -gradient_by_differences(matched.loss, samples, jacobian) / 2.0
        np.testing.assert_allclose(gradient.numpy(), wanted, rtol=0.02, atol=2e-3 * np.abs(wanted).max())


def test_a_permutation_is_no_distance_of_distributions():
    samples, target, _ = sets()
    matched = Matched(Paired(target, 1.5))
    assert matched.distance(target.flip(0)) < 1e-12
    assert matched.distance(samples) > 0.01
    assert matched.loss(torch.full_like(samples, torch.nan)) == np.inf


def test_weights_are_copies():
    samples, target, _ = sets(count=12)
    copies = np.arange(12) % 3 + 1
    rows = np.repeat(np.arange(12), copies)
    assert np.isclose(sliced_distance(samples, target, copies.astype(float)), sliced_distance(samples[rows], target[rows]))
    assert np.isclose(sliced_distance(samples, target, np.ones(12)), sliced_distance(samples, target))
