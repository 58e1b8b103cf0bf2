"""The small network and the model folder: independence of samples, round trip, and every way a folder can be wrong."""

import contextlib
import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fewstep.errors import ArtefactError
from fewstep.models import SmallUNet, SmallUNetConfig, read_model, save_model
from fewstep.schedules import EDM, Flow, FromBetas, VPCosine, VPLinear

TINY = SmallUNetConfig(in_channels=2, image_size=8, channels=(16, 32), blocks=(1, 2), patch=2, classes=3, embedding=16)


def make(config=TINY, seed=0):
    """A network whose last layers are not zero, so that everything in it matters."""
    torch.manual_seed(seed)
    network = SmallUNet(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def inputs(batch=6, config=TINY, seed=1):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(config.classes + 1, (batch,), generator=generator)
    return torch.randn(batch, *config.shape, generator=generator), torch.rand(batch, generator=generator), label


# ---- the network -------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_samples_are_independent():
    network, (x, time, label) = make(), inputs()
    together = network(x, time, label)
    assert together.std() > 0.1
    alone = torch.cat([network(x[i : i + 1], time[i : i + 1], label[i : i + 1]) for i in range(len(x))])
    assert (together - alone).abs().max() < 1e-5
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert (network(x[order], time[order], label[order]) - together[order]).abs().max() < 1e-5


@torch.no_grad()
def test_time_and_label_matter_and_no_label_is_the_null_label():
    network, (x, time, label) = make(), inputs()
    null = torch.full_like(label, 3)
    torch.testing.assert_close(network(x, time), network(x, time, null), rtol=0, atol=0)
    assert (network(x, time, label * 0) - network(x, time, label * 0 + 1)).abs().max() > 1e-3
    assert (network(x, time, label) - network(x, time + 0.05, label)).abs().max() > 1e-3


@torch.no_grad()
def test_untrained_network_returns_zeros_and_smooth_in_time():
    x, time, label = inputs()
    assert not SmallUNet(TINY)(x, time, label).any()
    network = make().double()
    fine = torch.stack([network(x.double(), time * 0 + 0.5 + 1e-4 * k, label) for k in range(3)])
    second = fine[0] - 2 * fine[1] + fine[2]
    assert second.abs().max() < 0.1 * (fine[2] - fine[0]).abs().max()  # a curve, not noise, at the scale of a ten-thousandth


def test_gradients_reach_every_weight():
    network, (x, time, label) = make(), inputs()
    network(x, time, label).square().mean().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@torch.no_grad()
def test_half_precision_runs():
    network, (x, time, label) = make(), inputs()
    exact = network(x, time, label)
    half = network.bfloat16()(x.bfloat16(), time, label).float()
    assert (half - exact).abs().max() < 0.1 * exact.abs().max()  # eight bits of mantissa through some twenty layers


def test_wrong_inputs():
    x, time, label = inputs()
    with pytest.raises(ValueError, match="shape"):
        make()(x[:, :1], time, label)
    with pytest.raises(ValueError, match="time"):
        make()(x, time[:2], label)
    with pytest.raises(ValueError, match="without labels"):
        SmallUNet(dataclasses.replace(TINY, classes=None))(x, time, label)


@pytest.mark.parametrize(
    "wrong",
    [
        {"in_channels": 0},
        {"in_channels": True},
        {"image_size": 10**9},
        {"image_size": 8.0},
        {"channels": ()},
        {"channels": (12, 32)},
        {"channels": (16, 40)},
        {"channels": (16, 4096)},
        {"channels": "ab"},
        {"blocks": (1,)},
        {"blocks": (1, 1000)},
        {"patch": 3},
        {"classes": 0},
        {"classes": 10**12},
        {"embedding": 15},
        {"dropout": 1.0},
        {"dropout": float("nan")},
        {"time_scale": 0.0},
        {"attention": 1},
    ],
)
def test_wrong_options(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        dataclasses.replace(TINY, **wrong)


# ---- the folder --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "m", make(), schedule=VPLinear(), predicts="noise", licence="mine", training={"seed": 3})
    return tmp_path / "m"


@pytest.mark.parametrize(
    "schedule", [VPLinear(beta_max=12.0), VPCosine(), EDM(), Flow(shift=3.0), FromBetas([0.1, 0.2, 0.3])], ids=str
)
def test_round_trip(tmp_path, schedule):
    network = make()
    save_model(tmp_path, network, schedule=schedule, predicts="flow", data_range=(0, 1), dtype=torch.float32, licence="©")
    again, config = read_model(tmp_path)
    assert again.config == network.config
    assert again.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in again.state_dict().items())
    assert (config.schedule, config.predicts, config.shape, config.data_range) == (schedule, "flow", (2, 8, 8), (0.0, 1.0))
    assert config.conditions == {"label": {"classes": 3, "null": 3}}
    assert config.extra["licence"] == "©"
    x, time, label = inputs()
    assert torch.equal(again(x, time, label), network(x, time, label))


def test_half_precision_on_disk(folder):
    network, config = read_model(folder)
    assert {v.dtype for v in network.parameters()} == {torch.float32}
    assert {v.dtype for v in load_file(folder / "model.safetensors").values()} == {torch.float16}
    wanted = make().half().float().state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in network.state_dict().items())
    assert len(config.fingerprint) == 64


def test_reading_draws_no_random_numbers_and_leaves_nothing_behind(folder):
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    state = torch.get_rng_state()
    read_model(folder)
    assert torch.equal(state, torch.get_rng_state())


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        *way, last = path.split("__")
        part = config
        for step in way:
            part = part[step]
        if value is ...:
            del part[last]
        else:
            part[last] = value
    (folder / "config.json").write_text(json.dumps(config))


BAD_CONFIGS = {
    "newer format": ({"format": 2}, "Upgrade"),
    "format no number": ({"format": "1"}, "format"),
    "other architecture": ({"architecture": "os.system"}, "architecture"),
    "entry missing": ({"predicts": ...}, "predicts"),
    "entry unknown": ({"surprise": 1}, "surprise"),
    "unknown option": ({"network__layers": 7}, "layers"),
    "huge": ({"network__channels": [10**9, 10**9]}, "channels"),
    "huge image": ({"network__image_size": 2**40}, "image_size"),
    "options no mapping": ({"network": [1, 2]}, "not valid"),
    "wider than its weights": ({"network__channels": [64, 128]}, "do not fit"),
    "deeper than its weights": ({"network__blocks": [16, 16]}, "do not fit"),
    "unknown schedule": ({"schedule__kind": "eval"}, "noise schedule"),
    "schedule no mapping": ({"schedule": 3}, "not valid"),
    "unknown schedule option": ({"schedule__x": 1}, "not valid"),
    "unknown prediction": ({"predicts": "colour"}, "prediction"),
    "prediction no text": ({"predicts": [1]}, "not valid"),
    "other shape": ({"data__shape": [1, 8, 8]}, "shape"),
    "range reversed": ({"data__range": [1, -1]}, "range"),
    "range no numbers": ({"data__range": ["a", "b"]}, "range"),
    "range infinite": ({"data__range": [0, float("inf")]}, "range"),
    "other conditions": ({"conditions": {}}, "conditions"),
    "licence no text": ({"licence": 5}, "licence"),
    "unknown dtype": ({"weights__dtype": "int8"}, "not valid"),
    "dtype no text": ({"weights__dtype": []}, "not valid"),
    "other dtype": ({"weights__dtype": "float32"}, "float32"),
    "wrong checksum": ({"weights__sha256": "0" * 64}, "checksum"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_is_refused(folder, case):
    changes, message = BAD_CONFIGS[case]
    edit(folder, **changes)
    with pytest.raises(ArtefactError, match=message):
        read_model(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b" " * 1_100_000])
def test_config_that_is_no_config(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"config\.json"):
        read_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(ArtefactError, match=name):
        read_model(folder)


def test_damaged_weights(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for broken in (content[:-10], content[:100], b"", content + b"x", content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(broken)
        with pytest.raises(ArtefactError, match=r"model\.safetensors"):
            read_model(folder)
        edit(folder, weights__sha256="?")
        config = json.loads((folder / "config.json").read_text())
        config["weights"].pop("sha256")
        (folder / "config.json").write_text(json.dumps(config))
        if broken[:-1] != content[:-1]:  # without a checksum, a flipped bit cannot be told
            with pytest.raises(ArtefactError, match=r"model\.safetensors"):
                read_model(folder)
        edit(folder, weights__sha256="?")


def test_weights_of_another_network(folder):
    tensors = load_file(folder / "model.safetensors")
    for change in (
        {"stem.bias": tensors["stem.bias"][:-1].clone()},
        {"stem.bias": None},
        {"stem.extra": tensors["stem.bias"]},
        {"stem.bias": tensors["stem.bias"].float()},
        {"stem.bias": tensors["stem.bias"] * float("nan")},
    ):
        save_file({k: v.clone() for k, v in {**tensors, **change}.items() if v is not None}, folder / "model.safetensors")
        edit(folder, weights={"dtype": "float16"})
        with pytest.raises(ArtefactError, match=next(iter(change))):
            read_model(folder)


def test_weights_that_do_not_fit_half_precision_are_not_written(tmp_path):
    network = make()
    with torch.no_grad():
        network.head.bias[0] = 1e6
    with pytest.raises(ValueError, match="not finite"):
        save_model(tmp_path, network, schedule=VPLinear(), predicts="noise")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=30)
@given(data=st.data())
def test_no_edit_of_the_config_escapes_as_another_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("m")
    save_model(folder, make(), schedule=VPLinear(), predicts="noise")
    path = folder / "config.json"
    text = path.read_bytes()
    position = data.draw(st.integers(0, len(text) - 1))
    path.write_bytes(text[:position] + data.draw(st.binary(min_size=1, max_size=3)) + text[position + 1 :])
    with contextlib.suppress(ArtefactError):  # most edits are refused, some change a number that is still legal
        read_model(folder)
