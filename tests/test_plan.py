from __future__ import annotations

import copy
import json
import random
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewstep as fs
from fewstep.errors import ArtefactError, FewstepError, PlanError
from fewstep.plan import Dense, Interval, Plan, Row, StartTransform

VP = fs.schedules.VPLinear()


def full_plan(shape=(2, 3)) -> Plan:
    """A plan that uses every part of the form: arrays, memory, offset, noise, start transform."""
    rng = np.random.default_rng(0)
    rows = (
        Row(0.9, (0.9,), (0.1 + rng.random(shape),)),
        Row(
            0.6, (0.5, 0.2), (0.4, -0.1), state_gain=0.1, output_gain=0.9, memory=(0.2,), offset=0.3, noise=Interval(0.3, 0.1, 0.2)
        ),
        Row(0.3, (rng.random(shape),), (0.3, 0.1, 0.05), offset=rng.random((1, 3)), noise=Interval(rng.random(shape), 0.2, 0.7)),
    )
    start = StartTransform(rng.random(shape), 0.2, rng.random((2, *shape)), np.array([0.5, -0.5]), time=1.0)
    return Plan(VP, np.array([0.95, 0.6, 0.3, 0.01]), rows, start, {"solver": {"name": "test"}, "seed": 3})


def linear_denoiser(x, t, **_):
    return torch.tanh(x) * (1 - 0.3 * t)


def test_round_trip_is_bit_exact(tmp_path):
    for plan in (full_plan(), fs.make_plan("dpmpp_3m_sde", fs.schedules.Flow(), 7), fs.make_plan("ddim", fs.schedules.EDM(), 1)):
        plan.save(tmp_path / "p.safetensors")
        again = Plan.load(tmp_path / "p.safetensors")
        assert again == plan
        assert again.digest == plan.digest
        assert hash(again) == hash(plan)
        assert again.provenance == plan.provenance
        assert again.schedule == plan.schedule
        assert again.show() == plan.show()
        assert copy.deepcopy(plan) == plan


def test_a_loaded_plan_gives_the_same_samples(tmp_path):
    plan, x = full_plan(), fs.draw_noise((2, 3), range(5))
    plan.save(tmp_path / "p")
    assert torch.equal(
        fs.sample(linear_denoiser, x, plan, seeds=range(5)),
        fs.sample(linear_denoiser, x, Plan.load(tmp_path / "p"), seeds=range(5)),
    )


def test_plans_are_frozen():
    plan = full_plan()
    with pytest.raises(ValueError, match="read-only"):
        plan.grid[0] = 0.5
    with pytest.raises(ValueError, match="read-only"):
        plan.rows[0].weights[0][0, 0] = 1.0
    with pytest.raises(AttributeError):
        plan.grid = plan.grid
    with pytest.raises(TypeError):
        plan.provenance["x"] = 1


def dense_run(plan, dense, x, xi):
    states, outputs = [x], []
    A, B, C, e = (torch.from_numpy(array.copy()) for array in (dense.A, dense.B, dense.C, dense.e))
    for i, t in enumerate(plan.tau):
        outputs.append(linear_denoiser(states[-1], t))
        z = A[i + 1] * x + e[i + 1]
        for j in range(i + 1):
            z = z + B[i + 1, j] * outputs[j] + C[i + 1, j] * xi[j]
        states.append(z)
    return states[-1]


@pytest.mark.parametrize("name", ["full", "ddpm", "dpmpp_3m", "dpmpp_3m_sde"])
def test_dense_equals_recurrent(name):
    plan = full_plan() if name == "full" else fs.make_plan(name, fs.schedules.VPLinear(t_end=0.05), 6)
    x = fs.draw_noise((2, 3), range(4), dtype=torch.float64)
    path = fs.noise.BrownianPath(range(4), (2, 3))
    xi = [
        torch.zeros_like(x) if r.noise is None else torch.from_numpy(path.normalised(r.noise.begin, r.noise.end)) for r in plan.rows
    ]
    run = fs.sample(linear_denoiser, x, plan, seeds=range(4))
    start = fs.sampler._transform(plan.start, x) if plan.start else x
    torch.testing.assert_close(dense_run(plan, plan.dense(), start, xi), run, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "dpmpp_3m", "ddpm", "dpmpp_2m_sde"])
def test_a_dense_plan_runs_recurrently(name):
    plan = fs.make_plan(name, fs.schedules.VPLinear(), 8, grid="lambda")
    clock = [(r.noise.begin, r.noise.end) if r.noise else (0.0, 1.0) for r in plan.rows]
    again = Plan.from_dense(plan.dense(), plan.schedule, plan.grid, tau=plan.tau, clock=clock)
    x = fs.draw_noise((5,), range(4), dtype=torch.float64)
    seeds = range(4) if plan.stochastic else None
    torch.testing.assert_close(
        fs.sample(linear_denoiser, x, again, seeds=seeds), fs.sample(linear_denoiser, x, plan, seeds=seeds), rtol=1e-11, atol=1e-11
    )


def test_dense_of_states_that_reach_back():
    plan = full_plan()
    clock = [(0.0, 1.0), (0.1, 0.2), (0.2, 0.7)]
    again = Plan.from_dense(plan.dense(), VP, plan.grid, tau=plan.tau, clock=clock, start=plan.start)
    x = fs.draw_noise((2, 3), range(4), dtype=torch.float64)
    torch.testing.assert_close(
        fs.sample(linear_denoiser, x, again, seeds=range(4)),
        fs.sample(linear_denoiser, x, plan, seeds=range(4)),
        rtol=1e-11,
        atol=1e-11,
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 3), st.floats(1e-4, 0.3), st.sampled_from(["lambda", "time", "karras"]))
def test_constant_data_is_exact(nfe, order, t_end, grid):
    schedule = fs.schedules.VPLinear(t_end=t_end)
    dense = fs.solvers.DPMSolverPP(order=order).plan(schedule, nfe, grid).dense()
    (a0, a1), (s0, s1) = schedule.alpha([1.0, t_end]), schedule.sigma([1.0, t_end])
    np.testing.assert_allclose(dense.A[-1], s1 / s0, rtol=1e-9)
    np.testing.assert_allclose(dense.B[-1].sum(), a1 - a0 * s1 / s0, rtol=1e-8)


GRID = np.array([0.9, 0.5])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan(VP, GRID, ()), "at least 1 call"),
        (lambda: Plan(VP, np.array([0.9]), (Row(0.9, (1.0,), ()),)), "one more time"),
        (lambda: Plan(VP, GRID[[0, 0]], (Row(0.9, (1.0,), ()),)), "repeats"),
        (lambda: Plan(VP, GRID, (Row(0.9, (float("nan"),), ()),)), "carry of call 0 is nan"),
        (lambda: Plan(VP, GRID, (Row(0.9, (np.array([1.0, np.inf]),), ()),)), "carry of call 0"),
        (lambda: Plan(VP, GRID, (Row(0.9, (1.0, 1.0), ()),)), "only 1 exist"),
        (lambda: Plan(VP, GRID, (Row(0.9, (1.0,), (1.0,), memory=(1.0,)),)), "only 0 exist"),
        (lambda: Plan(VP, GRID, (Row(0.9, (1.0,), (), noise=Interval(1.0, 2.0, 1.0)),)), "0 <= begin < end"),
        (lambda: StartTransform(basis=np.ones((2, 3))), "both a basis"),
        (lambda: StartTransform(basis=np.ones((2, 3)), gains=np.ones(3)), "rank"),
        (lambda: Dense(np.ones(2), np.ones((2, 1)), np.zeros((2, 1)), np.zeros(2)), "before it exists"),
        (lambda: Dense(np.ones(2), np.ones((2, 2)), np.zeros((2, 1)), np.zeros(2)), "need A"),
        (lambda: Dense(np.array([2.0, 1.0]), np.zeros((2, 1)), np.zeros((2, 1)), np.zeros(2)), "row 0"),
    ],
)
def test_malformed_plans_cannot_be_made(make, message):
    with pytest.raises(PlanError if message != "repeats" else FewstepError, match=message):
        make()


def test_show_is_a_table():
    text = fs.make_plan("dpmpp_2m_sde", VP, 3).show()
    assert len(text.splitlines()) == 2 + 3 + 1
    assert "xi1" in text
    assert "d0" in text
    assert "o1 = +0.1 z1 +0.9 d1 +0.2 o0" in full_plan().show()


def damaged_files(content: bytes, count: int):
    rng = random.Random(0)
    header = struct.unpack("<Q", content[:8])[0]
    for i in range(count):
        data = bytearray(content)
        kind = i % 5
        if kind == 0:  # one byte flipped anywhere
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:  # truncated
            del data[rng.randrange(len(data)) :]
        elif kind == 2:  # a byte of the header
            data[8 + rng.randrange(header)] = rng.randrange(256)
        elif kind == 3:  # a digit somewhere in the header
            digits = [j for j in range(8, 8 + header) if 48 <= data[j] < 58]
            data[rng.choice(digits)] = rng.choice(b"0123456789")
        else:  # a run of random bytes, or some inserted
            place = rng.randrange(len(data))
            data[place : place + rng.choice((0, 9))] = rng.randbytes(9)
        yield bytes(data)


def test_500_damaged_files_are_refused(tmp_path):
    plan = full_plan()
    plan.save(tmp_path / "p")
    content, seen = (tmp_path / "p").read_bytes(), 0
    for data in damaged_files(content, 500):
        (tmp_path / "q").write_bytes(data)
        try:
            loaded = Plan.load(tmp_path / "q")
        except ArtefactError:
            seen += 1
            continue
        assert loaded == plan, "a file with another content was accepted"
        seen += 1
    assert seen == 500


def test_a_valid_file_with_an_impossible_plan_is_refused(tmp_path):
    artefact = full_plan()._artefact()
    for key, value in [
        ("tau", np.full(3, np.nan)),
        ("grid", np.zeros(2)),
        ("carry", np.zeros((2, 2))),
        ("clock", np.zeros((1, 2))),
    ]:
        forged = fs.artefacts.Artefact("plan", artefact.meta, {**artefact.tensors, key: value})
        forged.save(tmp_path / "q")
        with pytest.raises(ArtefactError, match="no valid plan"):
            Plan.load(tmp_path / "q")
    for meta in (
        {},
        {"schedule": {"kind": "nope"}, "provenance": {}},
        {"schedule": {"kind": "EDM", "sigma_max": "x"}, "provenance": {}},
    ):
        fs.artefacts.Artefact("plan", json.loads(json.dumps(meta)), artefact.tensors).save(tmp_path / "q")
        with pytest.raises(ArtefactError, match="no valid plan"):
            Plan.load(tmp_path / "q")


def test_the_provenance_cannot_be_changed(tmp_path):
    plan = fs.make_plan("dpmpp_2m", fs.schedules.EDM(), 4)
    with pytest.raises(TypeError):
        plan.provenance["solver"]["name"] = "other"
    plan.save(tmp_path / "a")
    assert fs.Plan.load(tmp_path / "a") == plan
    with pytest.raises(PlanError, match="a mapping"):
        Plan(plan.schedule, plan.grid, plan.rows, provenance="words")


def test_a_file_with_more_than_a_plan_is_refused(tmp_path):
    from fewstep.artefacts import Artefact

    plan = fs.make_plan("dpmpp_2m", fs.schedules.EDM(), 4)
    plan.save(tmp_path / "a")
    good = Artefact.load(tmp_path / "a", kind="plan")
    for tensors, meta in [
        ({**good.tensors, "more": np.zeros(1)}, good.meta),
        ({**good.tensors, "tau": good.tensors["tau"].astype(np.float32)}, good.meta),
        ({**good.tensors, "clock": good.tensors["clock"].astype(np.complex64)}, good.meta),
        (good.tensors, {**good.meta, "provenance": "words"}),
        (good.tensors, {**good.meta, "schedule": list(good.meta["schedule"].items())}),
    ]:
        Artefact("plan", meta, tensors).save(tmp_path / "b")
        with pytest.raises(ArtefactError):
            Plan.load(tmp_path / "b")
