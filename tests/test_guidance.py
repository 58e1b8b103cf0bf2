"""Classifier-free guidance: its limits, the pair in one call, the interval, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.denoisers import Clipped, Denoiser
from fewstep.exact import GaussianMixture
from fewstep.guidance import ClassifierFree
from fewstep.identity import identity
from fewstep.schedules import EDM, Flow, VPCosine, VPLinear

SCHEDULES = [VPLinear(), VPCosine(t_start=1.0), EDM(), Flow()]
LABELS = torch.tensor([0, 1, 2, 0, 1])


def mixture(schedule=SCHEDULES[0]) -> GaussianMixture:
    means = [[1.0, 0.5], [-1.0, -0.3], [0.2, -1.2]]
    return GaussianMixture(schedule, means, [[0.1, 0.4], [0.2, 0.2], [0.3, 0.05]], [0.3, 0.5, 0.2])


def states(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))


class Recorder:
    """A denoiser that keeps what it was called with, and adds up its conditions."""

    def __init__(self):
        self.schedule = Flow()
        self.seen: list[dict] = []

    def __call__(self, x: Tensor, t, **cond) -> Tensor:
        self.seen.append({"x": x, "t": t, **cond})
        return x * 0.5 + cond["text"].sum(-1, keepdim=True) + cond.get("extra", {}).get("size", torch.zeros(len(x), 1))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("batched", [True, False])
def test_the_formula_on_an_exact_model(schedule, batched):
    exact = mixture(schedule)
    for t in (schedule.t_start, float(schedule.t_of_lam(0.2)), schedule.t_end):
        x = states()
        conditional, free = exact(x, t, label=LABELS), exact(x, t)
        for w in (-1.0, 0.5, 3.0):
            guided = ClassifierFree(exact, w, {"label": -1}, batched=batched)(x, t, label=LABELS)
            torch.testing.assert_close(guided, free + w * (conditional - free), rtol=0, atol=1e-13)


@pytest.mark.parametrize("batched", [True, False])
def test_limits_are_exact_and_call_one_model_only(batched):
    for w, label in ((1.0, LABELS), (0.0, torch.full_like(LABELS, -1))):
        exact = mixture()
        guided = ClassifierFree(exact, w, {"label": -1}, batched=batched)
        result = guided(states(), 0.4, label=LABELS)
        assert (guided.calls, exact.calls) == (1, 1)
        assert torch.equal(result, exact(states(), 0.4, label=label))


def test_a_pair_counts_as_one():
    for batched, network_calls in ((True, 2), (False, 4)):
        exact = mixture()
        guided = ClassifierFree(exact, 2.0, {"label": -1}, batched=batched)
        for _ in range(2):
            guided(states(), 0.4, label=LABELS)
        assert (guided.calls, exact.calls) == (2, network_calls)
        assert guided.schedule is exact.schedule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_call_equals_two(dtype):
    network = torch.nn.Linear(3, 2).to(dtype)

    def run(x, time, label):
        return network(torch.cat([x, (label.to(x.dtype) * time)[:, None]], 1))

    denoiser = Denoiser(run, Flow(), predicts="flow", network_dtype=dtype)
    for t in (0.3, np.linspace(0.1, 0.9, 5), torch.linspace(0.1, 0.9, 5)):
        one, two = (
            ClassifierFree(denoiser, 2.0, {"label": 3}, batched=batched)(states(dtype), t, label=LABELS)
            for batched in (True, False)
        )
        assert one.dtype is dtype
        torch.testing.assert_close(one, two, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_conditions_are_paired_as_documented():
    recorder = Recorder()
    text, null = torch.randn(5, 4), torch.randn(4)
    extra = {"size": torch.ones(5, 1), "list": [torch.arange(5), "name"]}
    shared, scale = torch.randn(7, 3), 0.7
    guided = ClassifierFree(recorder, 2.0, {"text": null})
    result = guided(states(torch.float32), 0.5, text=text, extra=extra, shared=shared, scale=scale, nothing=None)
    (seen,) = recorder.seen
    assert torch.equal(seen["x"], torch.cat([states(torch.float32)] * 2))
    assert torch.equal(seen["text"], torch.cat([null.expand(5, 4), text]))
    assert torch.equal(seen["extra"]["size"], torch.ones(10, 1))
    assert torch.equal(seen["extra"]["list"][0], torch.arange(5).repeat(2))
    assert seen["extra"]["list"][1] == "name"
    assert seen["shared"] is shared
    assert seen["scale"] == 0.7
    assert seen["nothing"] is None
    two = ClassifierFree(Recorder(), 2.0, {"text": null}, batched=False)
    separate = two(states(torch.float32), 0.5, text=text, extra=extra, shared=shared, scale=scale, nothing=None)
    torch.testing.assert_close(result, separate, rtol=0, atol=1e-6)


def test_a_null_for_the_whole_batch_and_a_condition_given_as_a_number():
    recorder = Recorder()
    nulls = torch.randn(5, 4, dtype=torch.float64)
    ClassifierFree(recorder, 2.0, {"text": nulls})(states(torch.float32), 0.5, text=torch.ones(5, 4))
    assert torch.equal(recorder.seen[0]["text"][:5], nulls.float())  # in the condition's precision
    exact = mixture()
    number, vector = (
        ClassifierFree(exact, 2.0, {"label": -1})(states(), 0.4, label=label) for label in (1, torch.ones_like(LABELS))
    )
    assert torch.equal(number, vector)


def test_interval():
    exact = mixture()
    limited = ClassifierFree(exact, 3.0, {"label": -1}, interval=(0.2, 0.6))
    everywhere = ClassifierFree(exact, 3.0, {"label": -1})
    x = states()
    for t, inside in ((0.1, False), (0.2, False), (0.2001, True), (0.6, True), (0.6001, False), (1.0, False)):
        expected = everywhere(x, t, label=LABELS) if inside else exact(x, t, label=LABELS)
        assert torch.equal(limited(x, t, label=LABELS), expected), t
    t = torch.tensor([0.1, 0.3, 0.6, 0.7, 0.2], dtype=torch.float64)
    each = torch.cat([limited(x[i : i + 1], float(t[i]), label=LABELS[i : i + 1]) for i in range(5)])
    for times in (t, t.numpy()):
        torch.testing.assert_close(limited(x, times, label=LABELS), each, rtol=0, atol=1e-14)
    assert limited.jumps == (0.2, 0.6)
    assert everywhere.jumps == ()
    free_inside = ClassifierFree(exact, 0.0, {"label": -1}, interval=(0.2, 0.6))
    assert torch.equal(free_inside(x, 0.4, label=LABELS), exact(x, 0.4))
    assert torch.equal(free_inside(x, 0.7, label=LABELS), exact(x, 0.7, label=LABELS))
    torch.testing.assert_close(free_inside(x, t, label=LABELS)[1], exact(x, 0.3)[1], rtol=0, atol=1e-14)


def test_guidance_within_a_limit_is_told_once_and_scale_one_is_none():
    guided = ClassifierFree(GaussianMixture(VPLinear(), [[-1.0], [1.0]], 0.01), 3.0, {"label": -1})
    assert identity(Clipped(guided))["guidance"] == identity(guided)["guidance"] == guided.guidance
    assert identity(guided.with_scale(1.0))["guidance"] is None
    assert guided.with_scale(2.0).guidance == {**guided.guidance, "guidance_scale": 2.0}


def test_guidance_composes_and_is_told_as_json():
    inner = ClassifierFree(mixture(), 2.0, {"label": -1}, interval=(0.2, 0.6))
    outer = ClassifierFree(inner, 1.5, {"label": 0}, batched=False)
    assert outer(states(), 0.4, label=LABELS).shape == (5, 2)
    assert outer.jumps == (0.2, 0.6)
    assert json.loads(json.dumps(inner.guidance)) == {
        "kind": "classifier-free",
        "guidance_scale": 2.0,
        "null": {"label": -1},
        "interval": [0.2, 0.6],
    }
    told = [ClassifierFree(Recorder(), 2.0, {"text": value}).guidance for value in (torch.zeros(4), torch.zeros(4), torch.ones(4))]
    assert told[0] == told[1] != told[2]
    assert json.loads(json.dumps(told[0]))["null"]["text"]["shape"] == [4]
    assert "guidance_scale=2" in repr(inner)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ClassifierFree(mixture(), float("nan"), {"label": -1}), ValueError, "guidance_scale must be finite"),
        (lambda: ClassifierFree(mixture(), 2.0, {}), ValueError, "null is empty"),
        (lambda: ClassifierFree(mixture(), 2.0, {"label": "none"}), TypeError, "must be a number or a tensor, got str"),  # type: ignore
        (lambda: ClassifierFree(mixture(), 2.0, {"label": -1}, interval=(0.6, 0.2)), ValueError, "t_low < t_high"),
        (lambda: ClassifierFree(lambda x, t: x, 2.0, {"label": -1}), TypeError, "has no noise schedule"),
        (lambda: ClassifierFree(mixture(), 2.0, {"label": -1})(states(), 0.5), ValueError, "'label'.*but got no condition"),
        (
            lambda: ClassifierFree(Recorder(), 2.0, {"text": torch.zeros(3)})(states(), 0.5, text=torch.zeros(5, 4)),
            ValueError,
            r"null of 'text' has shape \(3,\), but the condition \(5, 4\)",
        ),
        (
            lambda: ClassifierFree(Recorder(), 2.0, {"text": 0.0})(states(), 0.5, text=torch.zeros(1, 4)),
            ValueError,
            r"tensor of shape \(1, 4\).*batch of 5.*batched=False",
        ),
        (lambda: ClassifierFree(Recorder(), 2.0, {"text": 0.0})(states(), 0.5, text=None), ValueError, "NoneType"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
