"""Mixed sparsity: counts are exact, no sparsity is dense training bit for bit, and a run goes on bit for bit."""

import copy
import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fewstep.errors import ArtefactError, UnknownNameError
from fewstep.train import HybridSparseAttention, Int4Linear, MixedSparsity, SparsitySchedule, convert_to_int4_training, fit
from fewstep.train.sparse import layer_counts

ADAMW = functools.partial(torch.optim.AdamW, betas=(0.9, 0.99))
SCHEDULE = SparsitySchedule(warmup=8, peak=0.9, restore=(30, 36), levels=2)
LENGTH = 24


class Block(nn.Module):
    """Attention and a network of two layers."""

    def __init__(self, width=16, heads=2, causal=True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        parts = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.mixed(x).chunk(3, -1)]
        y = functional.scaled_dot_product_attention(*parts, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(x)))


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block())


def objective(model, batch, generator):
    return (model(batch["x"]) - batch["x"].flip(1)).square().mean(), {}


DATA = {"x": torch.randn(32, LENGTH, 16, generator=torch.Generator().manual_seed(0))}
OPTIONS = {"steps": 40, "batch_size": 4, "learning_rate": 3e-3, "warmup": 0, "ema": 0.9, "checkpoint_every": 9, "log_every": 10}


def train(seed=0, *, folder=None, optimizer=None, **options):
    model = make(seed)
    options = {"schedule": SCHEDULE, "interval": 4, **options}
    sparse = MixedSparsity(model, ADAMW if optimizer is None else optimizer, **options)
    result = fit(objective, model, DATA, optimizer=sparse.build, folder=folder, **OPTIONS)
    return model, sparse, result


# ---- shares and schedules ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=8), st.floats(0.0, 0.999))
def test_layer_counts_have_the_sum_that_is_asked_for(shapes, sparsity):
    sizes = [rows * columns for rows, columns in shapes]
    counts = layer_counts(shapes, sparsity)
    assert sum(counts) == round((1.0 - sparsity) * sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    shares = [count / sum(shape) for count, shape, size in zip(counts, shapes, sizes, strict=True) if count < size]
    for i, share in enumerate(shares):  # one epsilon for all layers that are not full, up to the rounding
        for other in shares[:i]:
            assert abs(share - other) <= 1.0


def test_no_sparsity_is_full():
    assert layer_counts([(3, 5), (100, 2)], 0.0) == [15, 200]


def test_stages():
    schedule = SparsitySchedule(10, 0.8, restore=(50, 60), levels=4, start=0.4)
    found = [schedule.sparsity(step) for step in range(1, 70)]
    assert found[:10] == pytest.approx([0.4] * 3 + [0.5] * 2 + [0.6] * 3 + [0.7] * 2)
    assert found[10:49] == [0.8] * 39
    assert found[49:59] == pytest.approx([0.64] * 3 + [0.48] * 2 + [0.32] * 3 + [0.16] * 2)
    assert set(found[59:]) == {0.0}
    assert schedule.stage(30) == (11, 50)
    assert schedule.stage(65) == (60, math.inf)
    assert SparsitySchedule(0, 0.7, None).stages == ((1, 0.7),)


@pytest.mark.parametrize(("length", "width", "stride"), [(1, 1, 1), (7, 2, 3), (32, 4, 4), (33, 5, 8), (16, 40, 7)])
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_of_sparse_attention(length, width, stride, causal):
    attention = HybridSparseAttention(width, stride)
    mask = attention.mask(length, causal=causal)
    assert int(mask.sum()) == attention.pairs(length, causal=causal)
    for q in range(length):
        for k in range(length):
            near = abs(q - k) < width or (q - k) % stride == 0
            assert bool(mask[q, k]) == (near and (k <= q or not causal))
    assert mask.diagonal().all()


# ---- training ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grow", ["mixed", "gradient", "random"])
def test_masks_have_the_counts_after_every_step(grow):
    model = make()
    optimizer = ADAMW(model.parameters(), lr=1e-2)
    sparse = MixedSparsity(model, optimizer, schedule=SCHEDULE, interval=4, grow=grow)
    sizes = [layer.weight.numel() for layer in sparse.layers.values()]
    seen, moved = set(), 0
    for step in range(1, 41):
        before = [mask.clone() for mask in sparse._masks()]
        optimizer.zero_grad()
        objective(model, {"x": DATA["x"][:4]}, None)[0].backward()
        optimizer.step()
        wanted = SCHEDULE.sparsity(step)
        seen.add(wanted)
        masks = sparse._masks()
        assert sum(int(mask.sum()) for mask in masks) == round((1 - wanted) * sum(sizes))
        assert [int(mask.sum()) for mask in masks] == sparse._counts(step)
        assert all(not layer.weight[~mask].any() for layer, mask in zip(sparse.layers.values(), masks, strict=True))
        moved += sum(int((mask != old).sum()) for mask, old in zip(masks, before, strict=True)) if wanted == 0.9 else 0
    assert seen == {0.0, 0.45, 0.9, 0.6, 0.3}
    assert moved > 100  # the topology moves while the counts stay
    assert all(mask.all() for mask in sparse._masks())
    assert sum(int((layer.weight == 0).sum()) for layer in sparse.layers.values()) == 0


def test_without_sparsity_training_is_dense_training_bit_for_bit():
    model, sparse, result = train(schedule=SparsitySchedule(0, 0.0, None))
    plain = make()
    wanted = fit(objective, plain, DATA, optimizer=ADAMW, **OPTIONS)
    assert [record["loss"] for record in result.log] == [record["loss"] for record in wanted.log]
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert sparse.counted == sparse.dense
    sparse.remove()
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_resumes_bit_for_bit(tmp_path, monkeypatch):
    options = {"attention": HybridSparseAttention(4, 6)}
    whole, counts, wanted = train(**options)
    for stop in (7, 22, 33):  # in the warm-up, at the peak, while it is restored: after checkpoints 0, 18 and 27
        calls = []

        def stops(model, batch, generator, calls=calls, stop=stop):
            calls.append(1)
            if len(calls) > stop:
                raise SystemError
            return (model(batch["x"]) - batch["x"].flip(1)).square().mean(), {}

        stops.__qualname__ = "objective"
        folder = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            patch.setitem(globals(), "objective", stops)
            with pytest.raises(SystemError):
                train(folder=folder, **options)
        model, sparse, result = train(0 if stop < 9 else 99, folder=folder, **options)
        assert result.step == 40
        for name, value in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), (stop, name)
        assert all(torch.equal(result.averages[0.9][name], value) for name, value in wanted.averages[0.9].items())
        assert (sparse.counted, sparse.dense, sparse.step) == (counts.counted, counts.dense, 40)


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    train(folder=tmp_path)
    with pytest.raises(ArtefactError, match="optimizer was"):
        train(folder=tmp_path, schedule=SparsitySchedule(8, 0.8, (30, 36)))


def test_a_step_of_evolution_is_none_of_the_optimizer():
    """It drops the smallest, grows three quarters by gradient, begins at zero, and forgets; all other weights and states stay."""
    model = nn.Linear(40, 30, bias=False)
    optimizer = torch.optim.AdamW([model.weight], lr=1e-2, weight_decay=0.1)
    holder = nn.Sequential(model)
    sparse = MixedSparsity(holder, optimizer, schedule=SparsitySchedule(0, 0.8, None), interval=3, drop=0.5, seed=5)
    for _ in range(3):
        optimizer.zero_grad()
        holder(torch.randn(64, 40)).square().sum().backward()
        optimizer.step()
    mask, weight = model.sparsity_mask.clone(), model.weight.detach().clone()
    moments = {name: value.clone() for name, value in optimizer.state[model.weight].items()}
    optimizer.zero_grad()
    holder(torch.randn(64, 40)).square().sum().backward()
    gradient = model.weight.grad.clone()
    assert (gradient != 0).all()  # of all weights
    optimizer.step()
    new, n = model.sparsity_mask, int(mask.sum())
    assert n == 240
    drop = int(0.5 * n * 0.5 * (1 + math.cos(0.0)))
    order = weight.abs().masked_fill(~mask, math.inf).flatten().argsort()
    kept = mask.flatten().clone()
    kept[order[:drop]] = False
    assert (new.flatten() | ~kept).all()  # what is kept stays
    grown = new.flatten() & ~kept
    assert int(grown.sum()) == drop
    best = gradient.abs().flatten().masked_fill(kept, -1).topk(3 * drop // 4).indices
    assert grown[best].all()
    assert torch.equal(model.weight.flatten(), weight.flatten() * kept)
    for name in ("exp_avg", "exp_avg_sq"):
        value = optimizer.state[model.weight][name].flatten()
        assert torch.equal(value, moments[name].flatten() * kept)
    assert optimizer.state[model.weight]["step"] == moments["step"]
    assert sparse.step == 4


def test_remove_says_what_is_still_sparse():
    linear = nn.Linear(64, 32)
    optimizer = ADAMW(linear.parameters(), lr=1e-3)
    sparse = MixedSparsity(linear, optimizer, schedule=SparsitySchedule(0, 0.9, (5, 8)), interval=2)
    for _ in range(3):
        linear(torch.ones(1, 64)).sum().backward()
        optimizer.step()
    with pytest.warns(
        RuntimeWarning, match=r"still sparse: 90.0% of the weights of 1 layers are 0 after step 3, .* from step 8 on"
    ):
        sparse.remove()
    assert float((linear.weight == 0).float().mean()) >= 0.9  # what has just grown begins at 0
    never = MixedSparsity(linear, ADAMW(linear.parameters(), lr=1e-3), schedule=SparsitySchedule(0, 0.9, None))
    assert never.remove() is linear  # sparse, as was asked for


def test_gradients_are_masked_on_other_steps():
    model = make()
    optimizer = ADAMW(model.parameters(), lr=1e-3)
    sparse = MixedSparsity(model, optimizer, schedule=SparsitySchedule(0, 0.9, None), interval=3)
    objective(model, DATA, None)[0].backward()
    for layer, mask in zip(sparse.layers.values(), sparse._masks(), strict=True):
        assert not layer.weight.grad[~mask].any()
        assert layer.weight.grad[mask].any()


def test_a_static_topology_stays():
    model = make()
    before = MixedSparsity(model, ADAMW, schedule=SparsitySchedule(0, 0.8, None), drop=0.0, interval=2)
    masks = [mask.clone() for mask in before._masks()]
    fit(objective, model, DATA, optimizer=before.build, **OPTIONS)
    assert all(torch.equal(mask, old) for mask, old in zip(before._masks(), masks, strict=True))
    assert before.counted < before.dense


# ---- counting and attention --------------------------------------------------------------------------------------------------------


def test_operations_are_those_of_a_count_by_hand():
    model = nn.Sequential(Block(16, 2), nn.Linear(16, 5))
    attention = HybridSparseAttention(3, 5)
    optimizer = ADAMW(model.parameters(), lr=1e-3)
    schedule = SparsitySchedule(0, 0.75, None)
    sparse = MixedSparsity(model, optimizer, schedule=schedule, attention=attention, interval=2, skip=["1"])
    linear = [(48, 16), (16, 16), (32, 16), (16, 32)]
    size, tokens = sum(rows * columns for rows, columns in linear), 4 * LENGTH
    kept = round(0.25 * size)
    every = LENGTH * (LENGTH + 1) // 2
    pairs = sum(1 for q in range(LENGTH) for k in range(q + 1) if q - k < 3 or (q - k) % 5 == 0)
    head = 6 * tokens * 16 * 5
    fixed = 3 * 4 * 2 * 2 * (8 + 8)  # three passes, four sequences, two heads, keys and values of width 8
    for step in (1, 2, 3):
        optimizer.zero_grad()
        model(DATA["x"][:4]).square().sum().backward()
        optimizer.step()
        evolved = step == 3
        assert evolved == bool(sparse._changes(step))
    dense = 3 * (6 * tokens * size + head + fixed * every)
    sparsely = 3 * (6 * tokens * kept + head + fixed * pairs) + 2 * tokens * (size - kept)  # once the gradient of all weights
    assert (sparse.counted, sparse.dense) == (sparsely, dense)
    with torch.no_grad():
        model(DATA["x"][:4])
    assert sparse.counted == sparsely
    assert "no time is saved" in str(sparse)


@pytest.mark.parametrize("given", [None, "bool", "float"])
def test_sparse_attention_is_attention_with_its_mask(given):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 12, 8)
    attention, allowed = HybridSparseAttention(2, 4, steps=(1, 5)), torch.rand(12, 12) > 0.3
    allowed[5] = False
    allowed[5, 2] = True  # a key that the sparse mask does not have: the query keeps its own
    masks = {None: None, "bool": allowed, "float": torch.zeros(12, 12).masked_fill(~allowed, -math.inf)}

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, query):
            return functional.scaled_dot_product_attention(self.layer(query), key, value, masks[given])

    model = Attention()
    plain = copy.deepcopy(model)
    sparse = MixedSparsity(model, ADAMW, schedule=SparsitySchedule(0, 0.0, None), attention=attention)
    both = attention.mask(12, causal=False)
    if given:
        both = torch.where((both & allowed).any(-1, keepdim=True), both, True) & allowed
    wanted = functional.scaled_dot_product_attention(plain.layer(query), key, value, both)
    torch.testing.assert_close(model(query), wanted)
    assert torch.isfinite(model(query)).all()
    sparse.step = 5  # the interval is over
    torch.testing.assert_close(model(query), plain(query), rtol=0, atol=0)
    copied = copy.deepcopy(model)
    sparse.step, counted = 0, sparse.counted
    torch.testing.assert_close(copied(query), plain(query), rtol=0, atol=0)  # hooks do not follow copies
    assert sparse.counted == counted


def test_an_error_inside_the_model_leaves_nothing_behind():
    model = nn.Sequential(Block())
    sparse = MixedSparsity(model, ADAMW, schedule=SparsitySchedule(0, 0.5, None), attention=HybridSparseAttention(2, 4))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 7))
    assert not sparse._modes
    x = torch.randn(1, 2, 12, 8)
    full = functional.scaled_dot_product_attention(x, x, x)
    assert sparse.dense == 0
    torch.testing.assert_close(full, (x @ x.transpose(-1, -2) / 8**0.5).softmax(-1) @ x)


def test_attention_that_is_not_reached_is_said():
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = ADAMW(model.parameters(), lr=1e-3)
    MixedSparsity(model, optimizer, schedule=SparsitySchedule(0, 0.5, None), attention=HybridSparseAttention(2, 4))
    model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(ValueError, match="saw no call"):
        optimizer.step()


# ---- models and misuse -------------------------------------------------------------------------------------------------------------


def test_tied_weights_are_left_dense():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.embedding.weight

    assert list(MixedSparsity(Tied(), ADAMW, schedule=SparsitySchedule(0, 0.5, None)).layers) == ["body"]


def test_it_goes_with_4_bit_products():
    model = make()
    conversion = convert_to_int4_training(model)
    sparse = MixedSparsity(model, conversion.optimizer(ADAMW), schedule=SCHEDULE, interval=4)
    result = fit(objective, model, DATA, optimizer=sparse.build, **OPTIONS)
    assert isinstance(next(iter(sparse.layers.values())), Int4Linear)
    assert result.log[-1]["loss"] < result.log[0]["loss"]
    assert sparse.counted < sparse.dense
    assert conversion.operations().integer > 0


def test_what_is_refused():
    model = make()
    with pytest.raises(UnknownNameError, match="gradient"):
        MixedSparsity(model, ADAMW, schedule=SCHEDULE, grow="gradent")
    with pytest.raises(ValueError, match="interval"):
        MixedSparsity(model, ADAMW, schedule=SCHEDULE, interval=0)
    with pytest.raises(ValueError, match="nowhere"):
        MixedSparsity(model, ADAMW, schedule=SCHEDULE, skip=["nowhere"])
    with pytest.raises(ValueError, match="peak"):
        SparsitySchedule(0, 1.0, None)
    with pytest.raises(ValueError, match="restore"):
        SparsitySchedule(10, 0.5, (10, 20))
    with pytest.raises(ValueError, match="width"):
        HybridSparseAttention(0)
    other = torch.optim.SGD(make().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="does not have the weights"):
        MixedSparsity(make(), other, schedule=SCHEDULE)
    sparse = MixedSparsity(model, torch.optim.SGD(model.parameters(), lr=0.1), schedule=SCHEDULE)
    with pytest.raises(ValueError, match="already"):
        sparse.build(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="already"):
        MixedSparsity(model, ADAMW, schedule=SCHEDULE)


def test_factored_states_are_refused():
    optimizer = functools.partial(torch.optim.Adafactor)
    with pytest.raises(ValueError, match="row_var"):
        train(optimizer=optimizer)


def test_a_transformer_of_diffusers():
    """With sparse attention and without: all weights are in use at the end, and the counts differ by the pairs of four steps."""
    attention = HybridSparseAttention(2, 4)  # 4 x 4 tokens: near ones and the column
    (sparse, names), (other, _) = trained_transformer(attention), trained_transformer(None)
    assert all(density == 1.0 for density in sparse.densities().values())
    for_a_pair = 3 * 2 * 2 * 2 * (4 + 4)  # three passes, two images, two heads, keys and values of width 4
    assert other.counted - sparse.counted == 4 * for_a_pair * (16 * 16 - attention.pairs(16, causal=False))
    assert other.dense == sparse.dense > other.counted
    assert set(sparse.remove().state_dict()) == names


def trained_transformer(attention):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=4, num_attention_heads=2, in_channels=4, out_channels=4,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=10, norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )  # fmt: skip
    names = set(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = SparsitySchedule(2, 0.9, restore=(7, 9))
    sparse = MixedSparsity(model, optimizer, schedule=schedule, attention=attention, interval=3, skip=["proj_out_*"])
    x, told = torch.randn(2, 4, 8, 8), {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([1, 2])}
    for _ in range(10):
        optimizer.zero_grad()
        (model(x, **told).sample - x).square().mean().backward()
        optimizer.step()
    return sparse, names
