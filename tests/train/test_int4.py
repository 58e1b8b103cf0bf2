"""4-bit training: the arithmetic is exact, the gradients are right in the mean, and a run goes on bit for bit."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from fewstep.train import Int4Linear, convert_to_int4_training, fit
from fewstep.train.int4 import (
    EXACT,
    STEP_RATE,
    Operations,
    _Rows,
    dyadic_probabilities,
    first_step,
    integer_product,
    keep_probabilities,
    quantise,
    rotate,
    search_block,
    split_bits,
)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def outliers(rows=512, width=64, factor=30.0):
    x = torch.randn(rows, width)
    x[:, 5] *= factor
    return x


# ---- forwards ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 4, 8, 32, 128, 1024])
def test_the_hadamard_matrix_is_orthogonal_symmetric_and_its_own_inverse(block):
    width = max(block, 2) * 2
    eye = torch.eye(width, dtype=torch.float64)
    matrix = rotate(eye, block)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=0)
    torch.testing.assert_close(matrix @ matrix, eye, rtol=0, atol=1e-14)
    if block > 1:
        assert matrix[:block, :block].abs().allclose(torch.tensor(block**-0.5, dtype=torch.float64))
        assert not matrix[:block, block:].any()


def test_rotating_both_changes_no_product():
    x, weight = torch.randn(7, 96, dtype=torch.float64), torch.randn(5, 96, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, 32) @ rotate(weight, 32).T, x @ weight.T, rtol=1e-13, atol=1e-13)


def test_with_many_levels_the_quantiser_changes_nothing():
    x = torch.randn(50, 64, dtype=torch.float64, requires_grad=True)
    step = torch.tensor(1e-9, dtype=torch.float64, requires_grad=True)
    values, codes = quantise(rotate(x, 32), step, -(2**40), 2**40)
    torch.testing.assert_close(rotate(values, 32), x, rtol=0, atol=1e-8)
    assert torch.equal(codes, codes.round())
    weights = torch.randn(50, 64, dtype=torch.float64)
    rotate(values, 32).mul(weights).sum().backward()
    torch.testing.assert_close(x.grad, weights, rtol=1e-12, atol=1e-12)  # H twice


def test_gradients_of_the_quantiser_are_those_of_learned_steps():
    x = torch.tensor([-9.0, -8.2, -2.3, 0.4, 3.5, 7.2, 8.0], dtype=torch.float64, requires_grad=True)
    step = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    gradient = torch.arange(1.0, 8.0, dtype=torch.float64)
    values, codes = quantise(x, step)
    assert codes.tolist() == [-8, -8, -3, 0, 4, 7, 7]
    (values * gradient).sum().backward()
    ratio = x.detach() / 0.9
    assert (x.grad != 0).tolist() == [False, False, True, True, True, False, False]
    assert torch.equal(x.grad[2:5], gradient[2:5])
    slope = [-8.0, -8.0, *(ratio.round() - ratio)[2:5].tolist(), 7.0, 7.0]
    wanted = sum(g * u for g, u in zip(gradient.tolist(), slope, strict=True)) / math.sqrt(7 * 7)
    assert float(step.grad) == pytest.approx(wanted, rel=1e-12)


def test_the_rotation_saves_data_with_an_outlier():
    """One of 64 channels thirty times as large: more than half the error goes, and the search finds that."""
    x, weight = outliers(), torch.randn(32, 64)

    def error(block):
        pairs = [(quantise(rotate(y, block), first_step(rotate(y, block)))[0], rotate(y, block)) for y in (x, weight)]
        exact = x @ weight.T
        return float((pairs[0][0] @ pairs[1][0].T - exact).norm() / exact.norm())

    assert error(64) < 0.3 < 0.6 < error(1)
    assert search_block(x, weight) >= 32


def test_the_layer_multiplies_exactly_what_integers_would():
    layer = Int4Linear(48, 20, block=16)
    x = torch.randn(3, 30, 48)
    y = layer(x)
    codes, steps = [], []
    for value, step in ((x.reshape(-1, 48), layer.input_step), (layer.weight, layer.weight_step)):
        steps.append(step.detach().abs() + 1e-10)
        codes.append(quantise(rotate(value.detach(), 16), steps[-1])[1].to(torch.int32))
        assert codes[-1].min() >= -8
        assert codes[-1].max() <= 7
    product = (codes[0] @ codes[1].T).float()  # in int32
    assert torch.equal(y.reshape(-1, 20), product * (steps[0] * steps[1]) + layer.bias)
    assert torch.equal(torch._int_mm(codes[0].to(torch.int8), codes[1].T.to(torch.int8)).float(), product)


def test_long_sums_are_exact_too():
    a, b = torch.full((1, 300_000), 7.0), torch.full((300_000, 1), -8.0)
    a[0, 0] = 1.0
    bound = 64 * 300_000
    assert bound > EXACT
    assert int(integer_product(a, b, bound)) == -56 * 299_999 - 8


# ---- backwards ---------------------------------------------------------------------------------------------------------------------


def test_split_bits_fit_four_bits_and_are_right_in_the_mean():
    gradient = torch.randn(6, 5, dtype=torch.float64)
    gradient[0, 0], gradient[0, 1] = 5.0, -5.0  # the largest reach 7 * 14
    draws = torch.stack([self_sum(gradient) for _ in range(20_000)])
    sigma = draws.std(0).clamp_min(1e-12)
    assert ((draws.mean(0) - gradient).abs() <= 4.0 * sigma / math.sqrt(len(draws)) + 1e-12).all()
    codes, _ = split_bits(gradient)
    assert codes.abs().max() == 7
    assert torch.equal(codes, codes.round())


def self_sum(gradient):
    codes, unit = split_bits(gradient)
    return unit * (14 * codes[: len(gradient)] + codes[len(gradient) :])


@pytest.mark.parametrize("count", [1, 7.5, 50, 99])
def test_probabilities_sum_to_what_is_kept(count):
    scores = torch.rand(100, dtype=torch.float64) ** 6
    p = keep_probabilities(scores, count)
    assert float(p.sum()) == pytest.approx(count, rel=1e-9)
    assert (p > 0).all()
    assert p.max() <= 1
    # the loop that the paper describes: clamp, and rescale the others
    loop = count * scores / scores.sum()
    while loop.max() > 1 + 1e-12:
        ones = loop >= 1 - 1e-12
        loop = torch.where(ones, 1.0, loop * (count - ones.sum()) / loop[~ones].sum())
    torch.testing.assert_close(p, loop, rtol=1e-9, atol=0)
    dyadic = dyadic_probabilities(scores, count)
    assert torch.equal(dyadic, torch.exp2(dyadic.log2().round()))
    assert 0.5 * count <= float(dyadic.sum()) <= count * 1.00001
    assert float(dyadic_probabilities(scores, 100).sum()) == 100


def test_probabilities_of_zeros():
    assert keep_probabilities(torch.zeros(4), 2.0).tolist() == [0, 0, 0, 0]
    assert dyadic_probabilities(torch.zeros(4), 2.0).tolist() == [0, 0, 0, 0]
    assert keep_probabilities(torch.tensor([0.0, 3.0, 1e-6, 0.0]), 2.0).tolist() == [0, 1, 1, 0]


def test_every_row_counts_as_much_as_its_probability_is_small():
    """Given the codes, weight times probability is the value of a row's unit: the mean over the sampling is exact, term by term."""
    codes, unit = split_bits(torch.randn(60, 9) * torch.rand(60, 1) ** 4)
    rows = _Rows(codes, unit, 60, 0.5)
    for probabilities in (keep_probabilities, dyadic_probabilities):
        chance = probabilities(rows._norms(), 60.0)
        assert ((chance > 0) == codes.any(1)).all()
        index, weight = rows._sample(rows._norms(), probabilities)
        torch.testing.assert_close(weight * chance[index], rows._units()[index])


@pytest.mark.parametrize(
    ("kept", "draws"),
    [(0.5, 3000), pytest.param(0.25, 20_000, marks=pytest.mark.slow), pytest.param(0.5, 20_000, marks=pytest.mark.slow)],
)
def test_gradients_are_unbiased(kept, draws):
    """Of the input, the weight and the steps: the mean is that of an exact backward pass, within 4 standard errors."""
    layer = Int4Linear(16, 6, block=8, kept=kept, dtype=torch.float64)
    x, pull = outliers(12, 16, 5.0).double(), torch.randn(12, 6, dtype=torch.float64) * (0.1 + torch.rand(12, 1).double())
    layer(x)
    parameters = [layer.weight, layer.input_step, layer.weight_step]
    sums = None
    for _ in range(draws):
        leaf = x.clone().requires_grad_()
        found = [g.clone() for g in torch.autograd.grad((layer(leaf) * pull).sum(), [leaf, *parameters])]
        pairs = [(g, g.square()) for g in found]
        sums = pairs if sums is None else [(a + c, b + d) for (a, b), (c, d) in zip(sums, pairs, strict=True)]
    exact = exact_gradients(layer, x, pull)
    total = beyond = 0
    for (first, second), wanted in zip(sums, exact, strict=True):
        mean = first / draws
        error = ((second / draws - mean.square()).clamp_min(0.0) / draws).sqrt()
        beyond += int(((mean - wanted).abs() > 4.0 * error + 1e-9).sum())
        total += wanted.numel()
    assert total == 12 * 16 + 6 * 16 + 2
    assert beyond == 0  # expected: 0.02 of them


def exact_gradients(layer, x, pull):
    """With products in floating point; the quantiser is the same."""
    leaf = x.clone().requires_grad_()
    steps = [layer.input_step, layer.weight_step]
    x_hat, weight_hat = (
        quantise(rotate(y, 8), step.abs().double() + 1e-10)[0] for y, step in zip((leaf, layer.weight), steps, strict=True)
    )
    return torch.autograd.grad((x_hat @ weight_hat.T * pull).sum(), [leaf, layer.weight, *steps])


def test_keeping_all_rows_leaves_only_the_rounding():
    gradient, other = torch.randn(40, 9, dtype=torch.float64), torch.randint(-8, 8, (9, 11))
    codes, unit = split_bits(gradient)
    rows = _Rows(codes, unit, 40, 1.0)
    rounded = unit * (14 * codes[:40] + codes[40:])
    counted = Operations()
    torch.testing.assert_close(rows.times(other, counted), rounded @ other.double(), rtol=1e-12, atol=1e-12)
    x = torch.randint(-8, 8, (40, 11))
    torch.testing.assert_close(rows.transposed_times(x, counted), rounded.T @ x.double(), rtol=1e-12, atol=1e-12)
    assert (rounded - gradient).abs().max() <= unit


def test_the_gradient_of_the_weight_is_one_integer_product_for_each_power_of_two():
    gradient, x = torch.randn(200, 9) * torch.rand(200, 1) ** 2, torch.randint(-8, 8, (200, 11))
    codes, unit = split_bits(gradient)
    rows = _Rows(codes, unit, 200, 0.5)
    state = torch.get_rng_state()
    got = rows.transposed_times(x, Operations())
    torch.set_rng_state(state)
    norms = rows._norms() * x.float().norm(dim=1).repeat(2)
    index, weight = rows._sample(norms, dyadic_probabilities)
    total = torch.zeros(9, 11, dtype=torch.int64)
    for value in weight.unique():
        some = index[weight == value]
        total += int(value) * (codes[some].to(torch.int32).T @ x[some % 200].to(torch.int32))
    assert len(weight.unique()) > 3
    assert torch.equal(got, total.float() * unit)


def test_zeros_and_empty_batches():
    layer = Int4Linear(8, 4)
    assert torch.equal(layer(torch.zeros(3, 8)), layer.bias.expand(3, 4))
    assert int(layer.hadamard_block) == 0  # zeros say nothing about steps
    x = torch.randn(5, 8, requires_grad=True)
    (0.0 * layer(x)).sum().backward()
    assert int(layer.hadamard_block) > 0
    assert not x.grad.any()
    assert not layer.weight.grad.any()
    layer(x[:0]).sum().backward()
    nothing = Int4Linear(8, 4)
    nn.init.zeros_(nothing.weight)  # as the last layers of diffusion transformers begin
    nothing(x).sum().backward()
    assert 0.05 < float(nothing.weight_step.detach()) < 0.5
    assert nothing.weight.grad.abs().min() > 0


def test_counts():
    layer = Int4Linear(32, 16, block=8)
    x = torch.randn(64, 32, requires_grad=True)
    layer(x).square().sum().backward()
    assert layer.operations.dense == 3 * 64 * 32 * 16
    assert 2.0 * 64 * 32 * 16 < layer.operations.integer < 3.6 * 64 * 32 * 16  # 64 rows in the mean of 128
    assert layer.operations.rotation == 2 * (64 * 32 + 16 * 32) * 3
    Int4Linear(32, 16)(x.detach()).sum().backward()  # no gradient of the input is made
    with torch.no_grad():
        layer(x)
    assert layer.operations.rotation == 3 * (64 * 32 + 16 * 32) * 3  # nothing goes backward
    layer(x.detach())
    assert layer.operations.rotation == (4 * 64 * 32 + 5 * 16 * 32) * 3  # but to the weight
    layer.operations.dense -= 64 * 32 * 16
    assert layer.operations.dense == 4 * 64 * 32 * 16


def test_dtypes():
    layer = Int4Linear(32, 16)
    x = torch.randn(10, 32)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.01, atol=0.01)
    half = Int4Linear(32, 16, dtype=torch.bfloat16)
    half(x.bfloat16()).float().sum().backward()
    assert half.input_step.dtype == torch.float32
    assert half.weight.grad.dtype == torch.bfloat16


# ---- models ------------------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(12, 16), nn.Linear(16, 12, bias=False)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x)
        return self.head(self.body(x) + self.attention(x, x, x)[0])


def test_conversion_and_back():
    model = Tied()
    before, state = dict(model.named_parameters()), torch.get_rng_state()
    conversion = convert_to_int4_training(model)
    assert sorted(conversion.layers) == ["body.0", "body.2"]
    assert set(conversion.left) == {"head", "attention.out_proj"}
    assert "tied" in conversion.left["head"]
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn
    after = dict(model.named_parameters())
    assert all(after[name] is value for name, value in before.items())
    assert after.keys() - before.keys() == {f"body.{k}.{which}_step" for k, which in itertools.product((0, 2), ("input", "weight"))}
    model(torch.arange(12)[None]).sum().backward()
    assert "Emulated" in str(conversion)
    assert str(conversion).endswith("another gives the learned steps the weights' learning rate and decay.")
    groups = conversion.optimizer(torch.optim.AdamW)(model.parameters(), lr=0.5).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.5, 0.01), (2e-4, 0.0)]
    conversion.revert()
    assert type(model.body[0]) is nn.Linear
    assert dict(model.named_parameters()).keys() == before.keys()


def test_back_with_the_weights_that_the_products_saw():
    """On inputs that rounding leaves alone, the ordinary model is then the trained one exactly; with unquantised weights it is not."""
    x, y = torch.randn(256, 64), torch.randn(256, 16)
    model = nn.Sequential(nn.Linear(64, 16))
    conversion = convert_to_int4_training(model)

    def objective(model, batch, generator):
        return (model(batch["x"]) - batch["y"]).square().mean(), {}

    assert torch.equal(conversion.layers["0"].quantised_weight(), model[0].weight)  # nothing is chosen yet
    fit(
        objective,
        model,
        {"x": x, "y": y},
        steps=30,
        batch_size=64,
        optimizer=conversion.optimizer(step_rate=2e-3),
        warmup=0,
        ema=(),
    )
    layer = conversion.layers["0"]
    block, weight = int(layer.hadamard_block), layer.weight.detach().clone()
    codes = rotate(layer.quantised_weight(), block) / layer.weight_step.detach().abs()
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.round().unique().tolist() == sorted(set(range(-8, 8)) & set(codes.round().unique().tolist()))
    with torch.no_grad():
        rounded = rotate(quantise(rotate(x, block), layer.input_step.abs())[0], block)
        trained = model(rounded)
        assert conversion.revert(quantised=True) is model
        torch.testing.assert_close(model(rounded), trained, rtol=1e-4, atol=1e-5)
        assert type(model[0]) is nn.Linear
        model[0].weight.copy_(weight)
        assert (model(rounded) - trained).norm() > 0.02 * trained.norm()


def test_one_layer_in_two_places_stays_one():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    convert_to_int4_training(model)
    assert isinstance(model[0], Int4Linear)
    assert model[0] is model[2]


def test_what_is_refused():
    with pytest.raises(ValueError, match="nowhere"):
        convert_to_int4_training(Tied(), skip=["nowhere"])
    with pytest.raises(ValueError, match="no linear layer"):
        convert_to_int4_training(nn.ReLU())
    with pytest.raises(ValueError, match="from_linear"):
        convert_to_int4_training(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="kept"):
        Int4Linear(8, 8, kept=0.0)
    with pytest.raises(ValueError, match="block"):
        Int4Linear(8, 8, block=0)
    assert Int4Linear(24, 8, block=32).block == 8


def classify(model, batch, generator):
    return functional.cross_entropy(model(batch["x"]), batch["y"]), {}


def train(folder=None, steps=12, seed=3, data_seed=0):
    torch.manual_seed(seed)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(data_seed))
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    conversion = convert_to_int4_training(model)
    result = fit(
        classify, model, {"x": x, "y": x[:, :4].argmax(1)}, steps=steps, batch_size=16, learning_rate=1e-2, warmup=0, decay="constant",
        optimizer=conversion.optimizer(), ema=0.9, folder=folder, checkpoint_every=5,
    )  # fmt: skip
    return model, result


def test_fit_resumes_bit_for_bit(tmp_path, monkeypatch):
    whole, wanted = train()
    calls = []

    def stops(model, batch, generator):
        calls.append(1)
        if len(calls) > 8:
            raise SystemError
        return original(model, batch, generator)

    original = classify
    stops.__qualname__ = original.__qualname__
    monkeypatch.setitem(globals(), "classify", stops)
    with pytest.raises(SystemError):
        train(tmp_path)
    monkeypatch.undo()
    model, result = train(tmp_path, seed=99)
    assert result.step == 12
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
        assert torch.equal(result.averages[0.9][name], wanted.averages[0.9][name]), name
    assert float(model[0].input_step.detach()) != 1.0


def test_steps_have_a_group_of_their_own():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    conversion = convert_to_int4_training(model)
    optimizer = conversion.optimizer(torch.optim.AdamW)(model.parameters(), lr=0.1)
    weights, steps = optimizer.param_groups
    assert (weights["lr"], steps["lr"], steps["weight_decay"]) == (0.1, STEP_RATE, 0.0)
    assert (len(weights["params"]), len(steps["params"])) == (4, 4)


def test_it_learns():
    model, _ = train(steps=200)
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(5))
    assert float((model(x).argmax(1) == x[:, :4].argmax(1)).float().mean()) > 0.6  # chance: 0.25


def test_a_transformer_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=4, num_attention_heads=2, in_channels=4, out_channels=4,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=10, norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )  # fmt: skip
    linears = sum(type(module) is nn.Linear for module in model.modules())
    conversion = convert_to_int4_training(model, skip=["proj_out_*"])
    assert len(conversion.layers) == linears - 2
    told = {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([1, 2])}
    model(torch.randn(2, 4, 8, 8), **told).sample.square().mean().backward()
    assert conversion.operations().integer > 0
    assert all(layer.weight.grad is not None for layer in conversion.layers.values())
    assert type(conversion.revert().transformer_blocks[0].attn1.to_q) is nn.Linear
