"""Four-bit states: the quantisers on closed forms, the steps beside those of PyTorch, and files."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import OPTIMIZERS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fewstep.errors import ArtefactError, UnknownNameError
from fewstep.models import SmallUNet
from fewstep.train import RECIPES, fit
from fewstep.train.checkpoints import pack as packed
from fewstep.train.optim4bit import SECOND_MOMENTS, AdamW4bit, Quantized, SGD4bit, optimizer_state_bytes
from fewstep.train.quantization import LINEAR, SIGNED_DYNAMIC, BlockScale, Codebook, Layout, Quantizer, Rank1Scale, pack, unpack
from fewstep.train.trainer import CHECKPOINT, read_checkpoint

BLOCKS, RANK1 = Quantizer(SIGNED_DYNAMIC, BlockScale()), Quantizer(LINEAR, Rank1Scale())
CODEBOOKS = {
    "signed dynamic": SIGNED_DYNAMIC,
    "linear": LINEAR,
    "linear with zero": Codebook(tuple(i / 15 for i in range(16))),
    "linear, signed": Codebook(tuple((i - 8) / 8 for i in range(16))),
}


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- quantisers --------------------------------------------------------------------------------------------------------------------


def test_the_maps_are_those_of_the_paper():
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]  # by hand from the recipe: midpoints of 1, 2 and 4 cells
    assert SIGNED_DYNAMIC.values == tuple(sorted([-value for value in positive] + [0.0, *positive, 1.0]))
    assert LINEAR.values == tuple(i / 16 for i in range(1, 17))


@given(st.lists(st.integers(0, 15), max_size=40))
def test_packing_is_undone(codes):
    codes = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(codes)
    assert len(packed) == (len(codes) + 1) // 2
    assert torch.equal(unpack(packed, len(codes)), codes)


def test_eight_codes_at_once_are_packed_as_two(monkeypatch):
    codes = torch.randint(16, (64,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(codes)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert torch.equal(pack(codes), packed)
    assert torch.equal(unpack(packed, 64), codes)


@pytest.mark.parametrize("shape", [(48, 256), (7, 128), (32, 4, 8, 16), (5, 3, 2), (67, 131), (130,)])
def test_rank_one_codes_of_compiled_steps_are_those_of_eager_ones(shape, monkeypatch):
    x, layout = seeded(*shape) ** 2, Layout((shape,), 128)
    flat = layout.join([x])
    codes, (scales,) = RANK1.quantize_flat(flat, layout)
    back = RANK1.dequantize_flat(codes, [scales], layout)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    again, (alike,) = RANK1.quantize_flat(flat, layout)
    assert torch.equal(again, codes)
    assert torch.equal(alike, scales)
    assert torch.equal(RANK1.dequantize_flat(codes, [scales], layout).view(-1), back)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_code_is_that_of_the_nearest_value(name):
    codebook = CODEBOOKS[name]
    x = torch.linspace(-1 if codebook.signed else 0, 1, 20_001)
    distance = (x[:, None] - torch.tensor(codebook.values)).abs()
    chosen = distance.gather(1, codebook.encode(x)[:, None].long())[:, 0]
    assert float((chosen - distance.amin(1)).max()) < 1e-6  # at a midpoint either neighbour, within rounding
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(codebook.encode(codebook.decode(codes)), codes)
    assert torch.equal(codebook.decode_packed(pack(codes)), torch.tensor(codebook.values))


@pytest.mark.parametrize("codebook", [SIGNED_DYNAMIC, LINEAR], ids=["signed dynamic", "linear"])
def test_choices_of_compiled_steps_are_look_ups_in_the_table(codebook, monkeypatch):
    x = torch.linspace(codebook.values[0], 1, 20_001)
    codes, uniform = torch.arange(16, dtype=torch.uint8), torch.full_like(x, 0.5)
    table = codebook.encode(x), codebook.encode(x, uniform=uniform), codebook.decode(codes)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    for found, wanted in zip((codebook.encode(x), codebook.encode(x, uniform=uniform)), table, strict=False):
        assert int((found != wanted).sum()) <= 15  # at a midpoint either neighbour
    assert torch.equal(codebook.decode(codes), table[2])
    assert torch.equal(codebook.decode_packed(pack(codes)), table[2])


@pytest.mark.parametrize("name", CODEBOOKS)
def test_rounding_at_random_is_right_on_average(name):
    codebook = CODEBOOKS[name]
    x = torch.linspace(codebook.values[0], codebook.values[-1], 41)
    uniform = torch.rand(41, 20_000, generator=torch.Generator().manual_seed(0))
    rounded = codebook.decode(codebook.encode(x[:, None].expand(41, 20_000), uniform=uniform))
    error = rounded.std(1) / math.sqrt(20_000)
    assert bool(((rounded.mean(1) - x).abs() <= 4.0 * error + 1e-6).all())  # 4 sigma, 41 points
    assert float((rounded - x[:, None]).abs().max()) <= max(b - a for a, b in itertools.pairwise(codebook.values)) + 1e-6


def test_rank_one_scale_of_a_product():
    a, b = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([3.0, 0.5, 4.0, 1.0])
    x = torch.outer(a, b)
    scales = Rank1Scale().measure(x.view(-1), RANK1.layout(x.shape))[0]
    assert torch.equal(scales, torch.cat([a * b.max(), b * a.max()]))
    spread = Rank1Scale().spread([scales], RANK1.layout(x.shape), torch.minimum).view(x.shape)
    assert torch.equal(spread, torch.minimum(a[:, None] * b.max(), b * a.max()))


@settings(max_examples=40)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 1000))
def test_a_round_trip_errs_by_half_a_step(shape, seed):
    x = seeded(*shape, seed=seed).abs() ** 3
    layout = RANK1.layout(x.shape)
    codes, scales = RANK1.quantize(x)
    axes = range(x.ndim)
    expected = [x.amax([other for other in axes if other != axis]) if x.ndim > 1 else x for axis in axes]
    assert torch.equal(scales, torch.cat(expected))
    scale = Rank1Scale().spread([scales], layout, torch.minimum)[: x.numel()].view(x.shape)
    assert bool((scale >= x).all())
    error = (RANK1.dequantize(codes, scales, x.shape) - x).abs()
    assert bool((error <= scale / 32 * (1 + 1e-5) + (x < scale / 32) * scale / 16).all())  # below the least value: up to that value


@settings(max_examples=40)
@given(st.integers(1, 700), st.sampled_from([2, 64, 128]), st.integers(0, 1000))
def test_blocks_err_by_half_the_widest_gap(count, size, seed):
    x = seeded(count, seed=seed) ** 3
    quantizer = Quantizer(SIGNED_DYNAMIC, BlockScale(size))
    codes, scales = quantizer.quantize(x)
    padded = torch.nn.functional.pad(x, (0, -count % size)).view(-1, size)
    assert torch.equal(scales, padded.abs().amax(1))
    assert len(codes) == padded.numel() // 2
    error = (quantizer.dequantize(codes, scales, x.shape) - x).abs()
    bound = (
        scales.repeat_interleave(size)[:count] * 0.1125 * (1 + 1e-5)
    )  # between -1, which is missing, and -0.8875; else 0.1125 as well
    assert bool((error <= bound).all())


@pytest.mark.parametrize("quantizer", [BLOCKS, RANK1, Quantizer(LINEAR, BlockScale(64))])
def test_zero_comes_back_as_zero_and_nan_as_nan(quantizer):
    x = torch.zeros(8, 256)
    assert torch.equal(quantizer.dequantize(*quantizer.quantize(x), x.shape), x)
    x[2], x[5, 7] = 3.0, math.nan
    back = quantizer.dequantize(*quantizer.quantize(x), x.shape)
    assert bool(back[5, 7].isnan())
    assert torch.equal(back[2, :7], x[2, :7])
    assert torch.equal(back[0, :7], x[0, :7])
    tiny = torch.full((2, 128), 1e-38)  # subnormal: nothing overflows
    assert bool((quantizer.dequantize(*quantizer.quantize(tiny), tiny.shape) <= 1e-38).all())


def test_a_codebook_is_checked():
    with pytest.raises(ValueError, match="16 ascending values"):
        Codebook((0.0, 1.0))
    with pytest.raises(ValueError, match=r"lie in \[-1, 1\]"):
        Codebook(tuple(float(i) for i in range(16)))
    with pytest.raises(ValueError, match="is 1, got 0"):
        Codebook(tuple(i / 16 for i in range(16)))
    with pytest.raises(ValueError, match="even number"):
        BlockScale(3)


def test_blocks_are_those_of_torchao():
    torchao = pytest.importorskip("torchao.optim.quant_utils", exc_type=ImportError)
    x = seeded(64, 128).view(-1) ** 3
    for codebook, signed in ((SIGNED_DYNAMIC, True), (LINEAR, False)):
        values = torch.tensor(codebook.values)
        y = x if signed else x.square()
        scaled, scale = torchao.scale_tensor(y, 128)
        theirs = torchao.quantize_4bit_with_qmap(scaled, values)
        codes, scales = Quantizer(codebook, BlockScale()).quantize(y)
        assert torch.equal(scales, scale)
        ours = unpack(codes, len(y))
        near = (scaled.view(-1)[:, None] - torch.tensor([float(m) for m in codebook.midpoints])).abs().amin(1) < 1e-6
        assert torch.equal(ours[~near], theirs.view(-1)[~near].to(torch.uint8))
        assert int(near.sum()) < 3


# ---- steps -------------------------------------------------------------------------------------------------------------------------


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 33), nn.ReLU(), nn.Linear(33, 10)).to(dtype)


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        x = seeded(16, 3, 8, 8, seed=step).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = (model(x).float() - x.float().mean((1, 2, 3))[:, None]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_step_is_that_of_full_states(name):
    case = OPTIMIZERS[name]
    models = network(), network()
    train(models[0], case.make(models[0].parameters()), 1)
    train(models[1], case.ancestor(models[1].parameters()), 1)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        ours, theirs = ours.detach(), theirs.detach()
        assert float((ours - theirs).abs().max()) <= case.first_step * float(theirs.abs().max())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_nothing_rounded_it_is_its_ancestor(name):
    case = OPTIMIZERS[name]
    models = network(), network()
    ours = case.make(models[0].parameters(), min_quantized_numel=math.inf)
    theirs = case.ancestor(models[1].parameters())
    losses = train(models[0], ours, 12), train(models[1], theirs, 12)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    state = theirs.state[next(models[1].parameters())]
    for moment in ours.moments:
        torch.testing.assert_close(ours.moment(next(models[0].parameters()), moment), state[moment], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_stays_near_that_with_full_states(name):
    case = OPTIMIZERS[name]
    models = network(), network()
    ours, theirs = (
        train(models[0], case.make(models[0].parameters()), 60),
        train(models[1], case.ancestor(models[1].parameters()), 60),
    )
    assert sum(theirs[-10:]) < 0.5 * sum(theirs[:10])
    assert sum(ours[-10:]) < 1.25 * sum(theirs[-10:])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_are_those_of_the_formula(name):
    case = OPTIMIZERS[name]
    parameters = [nn.Parameter(torch.ones(512, 512)), nn.Parameter(torch.ones(128, 64, 3, 3)), nn.Parameter(torch.ones(4096))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = case.make(parameters)
    optimizer.step()
    found = optimizer_state_bytes(optimizer)
    wanted = case.bytes((512, 512)) + case.bytes((128, 64, 3, 3))
    assert (found.quantized, found.quantized_parameters) == (wanted, 512 * 512 + 128 * 64 * 9)
    assert found.total == wanted + 4 * 4096 * len(optimizer.moments)
    assert found.per_quantized_parameter < 1.05 or "block" in name


@pytest.mark.parametrize(("kind", "wanted"), [("auto", 1.0464), ("rank1", 1.0519), ("block", 1.0625)])
def test_bytes_on_the_network_of_digits(kind, wanted):
    model = SmallUNet(RECIPES["digits"].network)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = AdamW4bit(model.parameters(), second_moment=kind)
    optimizer.step()
    found = optimizer_state_bytes(optimizer)
    assert found.per_quantized_parameter == pytest.approx(wanted, abs=1e-4)
    assert found.quantized_parameters > 0.99 * found.parameters


def test_small_vectors_and_excluded_groups_keep_full_states():
    large, excluded, small = (nn.Parameter(torch.ones(shape)) for shape in ((128, 64), (128, 64), (64, 64)))
    optimizer = AdamW4bit([{"params": [large, small]}, {"params": [excluded], "min_quantized_numel": math.inf, "lr": 0.5}])
    for parameter in (large, excluded, small):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert set(optimizer.state[large]) == {"step", *(f"exp_avg{a}_{b}" for a in ("", "_sq") for b in ("codes", "scales"))}
    assert set(optimizer.state[excluded]) == set(optimizer.state[small]) == {"step", "exp_avg", "exp_avg_sq"}
    assert float(excluded.detach()[0, 0]) == pytest.approx(1.0 - 0.5 * 0.01 - 0.5)


def test_results_do_not_depend_on_what_shares_a_bucket(monkeypatch):
    def trained(bucket):
        monkeypatch.setattr("fewstep.train.optim4bit.BUCKET", bucket)
        model = network()
        train(model, AdamW4bit(model.parameters(), rounding="stochastic"), 5)
        return nn.utils.parameters_to_vector(model.parameters())

    torch.testing.assert_close(trained(1), trained(1 << 20), rtol=1e-4, atol=1e-6)


def test_steps_may_begin_late_and_gradients_be_missing():
    a, b = nn.Parameter(torch.ones(128, 64)), nn.Parameter(torch.ones(128, 64))
    optimizer = AdamW4bit([a, b], lr=0.1, weight_decay=0.0)
    a.grad = torch.ones_like(a)
    optimizer.step()
    assert torch.equal(b, torch.ones_like(b))
    b.grad = torch.ones_like(b)
    optimizer.step()
    assert float(b.detach()[0, 0]) == pytest.approx(0.9, abs=1e-5)  # its own first step
    assert (optimizer.state[a]["step"], optimizer.state[b]["step"]) == (2, 1)


def test_maximize_closure_and_rate_zero():
    weight = nn.Parameter(torch.ones(128, 64))
    optimizer = AdamW4bit([weight], lr=0.0, weight_decay=0.0, maximize=True)

    def closure():
        optimizer.zero_grad()
        loss = weight[:64].sum()  # half of the gradients are zero
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 64 * 64
    assert torch.equal(weight, torch.ones_like(weight))
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step(closure)
    assert float(weight.detach()[0, 0]) > 1.0
    assert torch.equal(weight[64:], torch.ones_like(weight[64:]))


def test_other_strides_and_odd_sizes():
    torch.manual_seed(0)
    plain = [nn.Parameter(torch.randn(67, 131)), nn.Parameter(torch.randn(32, 16, 3, 3)), nn.Parameter(torch.randn(4099))]
    other = [
        nn.Parameter(plain[0].detach().t().contiguous().t()),
        nn.Parameter(plain[1].detach().to(memory_format=torch.channels_last)),
    ]
    other.append(nn.Parameter(plain[2].detach().clone()))
    optimizers = AdamW4bit(plain), AdamW4bit(other)
    for step in range(3):
        for a, b in zip(plain, other, strict=True):
            a.grad = seeded(*a.shape, seed=step)
            b.grad = torch.empty_like(b).copy_(a.grad)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_zero_in_the_map_of_the_second_moment_is_the_failure_that_the_paper_found(monkeypatch):
    """Uneven gradients: with a zero, small entries of v vanish, and their steps are divided by epsilon alone."""
    scale = seeded(64, 128, seed=1).exp() ** 2

    def largest_move(name):
        weight = nn.Parameter(torch.zeros(64, 128))
        optimizer = AdamW4bit([weight], lr=1.0, weight_decay=0.0, second_moment=name)
        for step in range(3):
            before = weight.detach().clone()
            weight.grad = scale * seeded(64, 128, seed=step + 2)
            optimizer.step()
        return float((weight.detach() - before).abs().max())

    zero = Quantized(Quantizer(CODEBOOKS["linear with zero"], Rank1Scale()))
    monkeypatch.setitem(SECOND_MOMENTS, "with zero", lambda shape, size: zero)
    assert largest_move("rank1") < 10.0  # Adam's moves are of the order of the rate
    assert largest_move("with zero") > 100.0


def test_bfloat16_weights_by_random_rounding_keep_small_steps():
    def moved(how):
        weight = nn.Parameter(torch.ones(256, 64, dtype=torch.bfloat16))
        optimizer = AdamW4bit([weight], lr=1e-4, weight_decay=0.0, round_bfloat16=how)
        for _ in range(50):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return 1.0 - weight.detach().float()

    assert float(moved("nearest").abs().max()) == 0.0  # a step is a fortieth of what bfloat16 can tell from 1
    drop = moved("stochastic")
    assert float(drop.mean()) == pytest.approx(0.005, abs=4 * float(drop.std()) / 128)


# ---- saving ------------------------------------------------------------------------------------------------------------------------


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_goes_round_bit_for_bit(name, dtype, tmp_path):
    from safetensors.torch import load_file, save_file

    case, options = OPTIMIZERS[name], {"rounding": "stochastic", "round_bfloat16": "stochastic", "seed": 3}
    model = network(dtype=dtype)
    optimizer = case.make(model.parameters(), **options)
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    tensors = {f"{index}/{key}": value for index, entries in saved["state"].items() for key, value in entries.items()}
    save_file(tensors, tmp_path / "state.safetensors")
    read = {index: {} for index in saved["state"]}
    for key, value in load_file(tmp_path / "state.safetensors").items():
        index, _, entry = key.partition("/")
        read[int(index)][entry] = value
    again = copy.deepcopy(model)
    other = case.make(again.parameters(), **options)
    other.load_state_dict({**saved, "state": read})
    for ours, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert set(ours) == set(theirs)
        assert all(same(ours[key], theirs[key]) and ours[key].data_ptr() != theirs[key].data_ptr() for key in ours)
    assert train(model, optimizer, 3, first=3) == train(again, other, 3, first=3)
    assert all(same(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_copy_is_independent():
    model = network()
    optimizer = AdamW4bit(model.parameters())
    train(model, optimizer, 2)
    twin = copy.deepcopy((model, optimizer))
    assert train(model, optimizer, 2, first=2) == train(*twin, 2, first=2)


def test_the_state_of_full_optimizers_is_taken_over():
    for ancestor, ours in ((torch.optim.AdamW, AdamW4bit), (lambda p: torch.optim.SGD(p, momentum=0.9), SGD4bit)):
        model = network()
        full = ancestor(model.parameters())
        train(model, full, 3)
        optimizer = ours(model.parameters())
        optimizer.load_state_dict(full.state_dict())
        weight = model[3].weight
        for moment in optimizer.moments:
            exact, kept = full.state[weight][moment], optimizer.moment(weight, moment)
            assert float((kept - exact).abs().max()) <= 0.12 * float(exact.abs().max())
            assert not torch.equal(kept, exact)
        if ours is AdamW4bit:
            assert optimizer.state[weight]["step"] == 3
        train(model, optimizer, 1, first=3)


def test_what_does_not_fit_is_refused():
    model = network()
    optimizer = AdamW4bit(model.parameters())
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    foreign = copy.deepcopy(saved)
    foreign["param_groups"][0]["packing"] = "high nibble first"
    with pytest.raises(ArtefactError, match="high nibble first"):
        optimizer.load_state_dict(foreign)
    short = copy.deepcopy(saved)
    short["state"][2]["exp_avg_codes"] = short["state"][2]["exp_avg_codes"][:-1]
    with pytest.raises(ArtefactError, match="exp_avg_codes for a parameter of shape"):
        optimizer.load_state_dict(short)
    del short["state"][2]["exp_avg_codes"]
    with pytest.raises(ArtefactError, match="'exp_avg_codes' is wanted"):
        optimizer.load_state_dict(short)


class Stop(Exception):
    pass


def test_fit_goes_on_bit_for_bit(tmp_path):
    data = {"x": seeded(64, 96), "y": seeded(64, 96, seed=1)}

    def run(folder, stop=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 96))
        done = []

        def objective(model, batch, generator):
            done.append(1)
            if len(done) == stop:
                raise Stop
            return (model(batch["x"]) - batch["y"]).square().mean(), {}

        def optimizer(parameters, lr):
            return AdamW4bit(parameters, lr=lr, rounding="stochastic")

        fit(
            objective, model, data, steps=12, batch_size=8, warmup=2, optimizer=optimizer, ema=(), folder=folder, checkpoint_every=5
        )
        return packed(read_checkpoint(folder / CHECKPOINT)[1])[1]

    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "parts", stop=8)
    parts = run(tmp_path / "parts")
    assert any(key.endswith("_codes") for key in whole)
    assert set(whole) == set(parts)
    assert all(same(whole[key], parts[key]) for key in whole)


def test_shards_of_two_processes_train_and_resume(tmp_path):
    pytest.importorskip("torch.distributed.fsdp", reason="needs fully_shard, PyTorch 2.6")
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("needs fully_shard, PyTorch 2.6")
    command = [sys.executable, str(Path(__file__).parent / "sharded_optimizer.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:3] == [f"{kind}: trained and resumed" for kind in ("auto", "rank1", "factored")]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of PyTorch's own compiler
@pytest.mark.slow
def test_compiled_steps_are_eager_ones_but_for_rounding():
    shapes = [(64, 64, 3, 3), (96, 288), (4,), (67, 131), (48, 256)]

    def trained(make, compiled):
        parameters = [nn.Parameter(seeded(*shape)) for shape in shapes]
        optimizer = make(parameters, compiled=compiled, min_quantized_numel=1000)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
            for index, parameter in enumerate(parameters):
                parameter.grad = seeded(*parameter.shape, seed=10 * step + index)
            optimizer.step()
        return parameters

    for name in ("adamw4bit", "adamw4bit, rank1", "adamw4bit, factored", "sgd4bit, nesterov"):
        make = OPTIMIZERS[name].make
        for eager, compiled in zip(trained(make, False), trained(make, True), strict=True):
            apart = (eager - compiled).detach().abs()
            assert float((apart > 1e-5).float().mean()) < 1e-3  # a code at a midpoint may fall to either side
            assert float(apart.max()) < 0.02


# ---- options -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr is a number of at least 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas are two numbers"),
        ({"second_moment": "rank2"}, UnknownNameError, "rank1"),
        ({"rounding": "up"}, UnknownNameError, "nearest"),
        ({"block_size": 127}, ValueError, "even number"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        AdamW4bit([nn.Parameter(torch.ones(2))], **options)


def test_other_faults_are_named():
    weight = nn.Parameter(torch.ones(8192, dtype=torch.complex64))
    with pytest.raises(TypeError, match="view_as_real"):
        AdamW4bit([weight])
    with pytest.raises(ValueError, match=r"torch\.optim\.SGD"):
        SGD4bit([nn.Parameter(torch.ones(2))], momentum=0.0)
    embedding = nn.Embedding(100, 64, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse_coo"):
        AdamW4bit(embedding.parameters()).step()
    with pytest.raises(UnknownNameError, match="exp_avg"):
        AdamW4bit([nn.Parameter(torch.ones(2))]).moment(weight, "v")
