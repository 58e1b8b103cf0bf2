"""Sub-networks: residual blocks found by tracing, left out without being called, and searched: better than the same blocks at all calls."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

import fewstep as fs
from fewstep.errors import ArtefactError, FewstepError, PlanError
from fewstep.evaluate import MMD
from fewstep.identity import identity
from fewstep.train import DenoisingLoss, fit
from fewstep.tuners import LayerSkips, Skipping, layer_skips, skippable, trace_paths
from fewstep.tuners.skipping import without

FLOW = fs.schedules.Flow()


class Block(nn.Module):
    """h + F(h, time), divided by a number; counts how often F is computed."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down, self.runs = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width), 0

    def forward(self, h, time):
        self.runs += 1
        return (h + self.down(nn.functional.silu(self.up(self.norm(h) + time)))) / 1.0


class Residual(nn.Module):
    """A residual network ``network(x, time, label=None)``; every call of it is counted."""

    def __init__(self, blocks, width, size=64):
        super().__init__()
        self.register_buffer("omega", torch.logspace(-0.3, 2.0, 32))
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(3, width)
        self.stem, self.head = nn.Linear(size, width), nn.Linear(width, size)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x, time, label=None):
        angle = time[:, None] * self.omega
        told = self.time(torch.cat([angle.cos(), angle.sin()], 1))
        told = told if label is None else told + self.label(label)
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, told)
        return self.head(h)


def small(size=8, blocks=4, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Residual(blocks, 16, size)
    return fs.Denoiser(network.eval(), FLOW, "flow")


def some_skips(denoiser, plan, table=None, blocks=None):
    blocks = blocks or skippable(denoiser, fs.draw_noise((8,), [0]))
    table = np.eye(plan.nfe, len(blocks), dtype=bool) if table is None else table
    return LayerSkips(blocks, plan.tau, table, identity(denoiser), plan.digest, plan.nfe)


# ---- what can be left out ----------------------------------------------------------------------------------------------------------


def test_residual_blocks_are_found_and_nothing_else():
    assert skippable(small(), fs.draw_noise((8,), [0])) == tuple(f"blocks.{k}" for k in range(4))
    unet = skippable(fs.load("digits"), fs.draw_noise((1, 8, 8), [0]), {"label": torch.tensor([3])})
    levels = ["down.0.blocks.0", "down.0.blocks.1", *(f"bottom.{part}.{k}" for k in range(3) for part in ("blocks", "attentions"))]
    assert unet == (*levels, "up.0.blocks.1")  # up.0.blocks.0 halves the channels


def test_tracing_leaves_the_network_as_it_was():
    denoiser, x = small(), fs.draw_noise((8,), range(3))
    before = denoiser(x, 0.5)
    skippable(denoiser, x)
    assert torch.equal(denoiser(x, 0.5), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.network.modules())


def test_blocks_by_name_are_checked():
    denoiser, noise = small(), fs.draw_noise((8,), [0])
    assert skippable(denoiser, noise, blocks=["blocks.2", "blocks.0.norm"]) == ("blocks.2", "blocks.0.norm")
    for name, message in (
        ("stem", r"takes \(1, 8\) and returns \(1, 16\)"),
        ("label", "is not called"),
        ("nine", "no module 'nine'"),
    ):
        with pytest.raises(ValueError, match=message):
            skippable(denoiser, noise, blocks=[name])
    plain = fs.Denoiser(nn.Sequential(nn.Linear(8, 8)), FLOW, "flow")
    plain.network.forward = lambda x, time: plain.network[0](x)
    with pytest.raises(FewstepError, match="no residual blocks"):
        skippable(plain, noise)
    with pytest.raises(FewstepError, match=r"torch\.nn\.Module only"):
        skippable(fs.Denoiser(lambda x, time: x, FLOW, "flow"), noise)


# ---- leaving out -------------------------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_not_computed_and_the_rest_is_the_sub_network():
    denoiser, noise, plan = small(), fs.draw_noise((8,), range(5)), fs.make_plan("dpmpp_2m", FLOW, 4)
    skips = some_skips(denoiser, plan)  # block k at call k
    for block in denoiser.network.blocks:
        block.runs = 0
    samples = fs.sample(Skipping(denoiser, skips), noise, plan)
    assert [block.runs for block in denoiser.network.blocks] == [3, 3, 3, 3]
    networks = [small() for _ in range(4)]
    for k, other in enumerate(networks):
        other.network.blocks = nn.ModuleList(block for j, block in enumerate(other.network.blocks) if j != k)
    wanted = fs.sample(denoiser, noise, plan, hooks=fs.Hooks(denoiser=lambda i: networks[i]))
    assert torch.equal(samples, wanted)
    assert not any("forward" in module.__dict__ for module in denoiser.network.modules())


def test_nothing_left_out_changes_nothing():
    denoiser, noise, plan = small(), fs.draw_noise((8,), range(5)), fs.make_plan("dpmpp_2m", FLOW, 4)
    skips = some_skips(denoiser, plan, np.zeros((4, 4), bool))
    assert torch.equal(fs.sample(Skipping(denoiser, skips), noise, plan), fs.sample(denoiser, noise, plan))


def test_modules_are_restored_after_an_error():
    layer = nn.Linear(2, 2)
    own = layer.__dict__["forward"] = lambda x: 2.0 * x

    def fails(x):
        raise RuntimeError(f"stop at {x.item():g}")

    other = nn.Sequential(layer, nn.Identity())
    other[1].forward = fails
    with without([layer]), pytest.raises(RuntimeError, match="stop at 1"):  # layer would have made a 2 of it
        other(torch.ones(1))
    with pytest.raises(RuntimeError, match="stop at 2"):
        other(torch.ones(1))
    assert layer.__dict__["forward"] is own
    assert layer(torch.ones(1)).item() == 2.0


def test_threads_leave_out_their_own():
    """Each thread sees its own sub-network while others run theirs or the whole, and at the end the modules are as they were."""
    denoiser, noise, plan = small(), fs.draw_noise((8,), range(2)), fs.make_plan("dpmpp_2m", FLOW, 4)
    tables = [np.zeros((4, 4), bool), np.eye(4, dtype=bool), np.ones((4, 4), bool), np.eye(4, dtype=bool)[::-1]]
    runs = [Skipping(denoiser, some_skips(denoiser, plan, table)) for table in tables]
    wanted = [fs.sample(run, noise, plan) for run in runs]
    wrong = []

    def work(k):
        for _ in range(25):
            if not torch.equal(fs.sample(runs[k], noise, plan), wanted[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any("forward" in module.__dict__ for module in denoiser.network.modules())


def test_both_halves_of_a_guided_pair_leave_out_the_same():
    denoiser, noise, plan = small(), fs.draw_noise((8,), range(5)), fs.make_plan("dpmpp_2m", FLOW, 4)
    cond = {"label": torch.arange(5) % 2}
    samples = []
    for batched in (True, False):
        guided = fs.guidance.ClassifierFree(denoiser, 2.0, {"label": 2}, batched=batched)
        for block in denoiser.network.blocks:
            block.runs = 0
        skips = some_skips(guided, plan, blocks=tuple(f"blocks.{k}" for k in range(4)))
        samples.append(fs.sample(Skipping(guided, skips), noise, plan, cond=cond))
        assert [block.runs for block in denoiser.network.blocks] == [3 if batched else 6] * 4
    torch.testing.assert_close(*samples)


# ---- the artefact ------------------------------------------------------------------------------------------------------------------


def test_another_model_guidance_or_plan_is_refused_and_both_are_named():
    denoiser, noise, plan = small(), fs.draw_noise((8,), range(2)), fs.make_plan("dpmpp_2m", FLOW, 4)
    skips = some_skips(denoiser, plan)
    mine, other = (identity(each)["fingerprint"][:12] for each in (denoiser, small(seed=1)))
    with pytest.raises(PlanError, match=rf"found for network \({mine}\), but the denoiser is network \({other}\)"):
        Skipping(small(seed=1), skips)
    with pytest.raises(PlanError, match=r"but the denoiser is .* with guidance"):
        Skipping(fs.guidance.ClassifierFree(denoiser, 2.0, {"label": 2}), skips)
    longer, third = fs.make_plan("dpmpp_2m", FLOW, 5), fs.make_plan("dpmpp_3m", FLOW, 4)
    for wrong in (longer, third):
        with pytest.raises(
            PlanError, match=rf"{plan.digest[:12]} of 4 calls, but this is {wrong.digest[:12]} of {wrong.nfe} calls"
        ):
            fs.sample(Skipping(denoiser, skips), noise, wrong)
    with pytest.raises(PlanError, match=r"4 calls at 1, .* but the network is called at 0.123"):
        Skipping(denoiser, skips)(noise, 0.123)


def test_a_file_gives_back_what_was_saved(tmp_path):
    denoiser, plan = small(), fs.make_plan("dpmpp_2m", FLOW, 4)
    skips = some_skips(denoiser, plan)
    skips.save(tmp_path / "skips.safetensors")
    loaded = LayerSkips.load(tmp_path / "skips.safetensors")
    assert loaded.digest == skips.digest
    assert loaded.skips == skips.skips == (("blocks.0",), ("blocks.1",), ("blocks.2",), ("blocks.3",))
    plan.save(tmp_path / "plan.safetensors")
    with pytest.raises(ArtefactError, match="holds a 'plan' artefact"):
        LayerSkips.load(tmp_path / "plan.safetensors")
    content = (tmp_path / "skips.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-3])
    with pytest.raises(ArtefactError):
        LayerSkips.load(tmp_path / "cut.safetensors")


def test_a_table_must_fit():
    with pytest.raises(ValueError, match="need a table of their sizes"):
        LayerSkips(("a",), [1.0, 0.5], [[True]], {}, "", 2)
    with pytest.raises(ValueError, match="there twice"):
        LayerSkips(("a",), [1.0, 1.0], [[True], [True]], {}, "", 2)


# ---- the search --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """8 x 8 digits, and a network of 12 residual blocks trained on them as a flow."""
    from sklearn.datasets import load_digits

    data = torch.from_numpy(load_digits().data.astype(np.float32)) / 8.0 - 1.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Residual(12, 96)
    result = fit(DenoisingLoss(FLOW, "flow"), network, {"x": data}, steps=1200, ema=0.995, seed=0)
    network.load_state_dict(result.averages[0.995])
    denoiser = fs.Denoiser(network.eval().requires_grad_(False), FLOW, "flow")
    return data, denoiser, trace_paths(denoiser, fs.draw_noise((64,), range(192)), FLOW, calls=64)


def test_a_fifth_of_the_blocks_costs_a_tenth_of_the_mmd_at_most(digits):
    """The bar for AutoDiffusion's second stage; and better than the same blocks at all calls, on noise the search did not see."""
    data, denoiser, paths = digits
    plan = fs.make_plan("auto", FLOW, 10)
    skips = layer_skips(denoiser, plan, paths=paths, share=0.2, evaluations=200)
    assert skips.table.shape == (10, 12)
    assert skips.table.sum() == 24
    noise = fs.draw_noise((64,), range(9000, 9000 + len(data)))
    whole, thin = (MMD()(fs.sample(each, noise, plan), data) for each in (denoiser, Skipping(denoiser, skips)))
    assert thin < 1.1 * whole
    told = skips.report["held_out"]
    assert told["skips"]["mean"] < 0.8 * told["same"]["mean"]


def test_the_search_is_the_same_for_the_same_seed_and_ends_with_its_evaluations(digits):
    _, denoiser, paths = digits
    plan, few = fs.make_plan("auto", FLOW, 3), paths.take(slice(16))
    options = {"paths": few, "share": 0.25, "evaluations": 12}
    first, again = (layer_skips(denoiser, plan, **options) for _ in range(2))
    assert first.table.tolist() == again.table.tolist()
    assert 0 < first.report["tried"] <= 12


def test_calls_at_the_same_time_leave_out_the_same():
    denoiser, noise = small(), fs.draw_noise((8,), range(16))
    paths = trace_paths(denoiser, noise, FLOW, calls=16)
    plan = fs.make_plan("flow_heun", FLOW, 5)
    skips = layer_skips(denoiser, plan, paths=paths, share=0.2, evaluations=8)
    assert len(skips.times) == len(set(plan.tau.tolist())) < plan.nfe == skips.calls
    assert fs.sample(Skipping(denoiser, skips), noise, plan).shape == noise.shape


def test_what_cannot_be_searched_is_refused(digits):
    _, denoiser, paths = digits
    plan = fs.make_plan("auto", FLOW, 3)
    with pytest.raises(ValueError, match="leaves out 36: it must leave out some, and not all"):
        layer_skips(denoiser, plan, paths=paths, share=1.0)
    with pytest.raises(ValueError, match="4 paths are too few"):
        layer_skips(denoiser, plan, paths=paths.take(slice(4)))
    stochastic = fs.solvers.SASolver().plan(FLOW, nfe=3)
    with pytest.raises(ValueError, match="draws noise"):
        layer_skips(denoiser, stochastic, paths=paths)
