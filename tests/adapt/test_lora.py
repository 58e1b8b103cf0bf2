"""Adapters: equal to the network at first, exact sums, and files that lose nothing."""

import json

import pytest
import torch
from torch import nn

from fewstep.errors import ArtefactError, FewstepError, UnknownNameError

pytest.importorskip("peft")

from fewstep.adapt import LoraOptions, add_adapter, fuse, load_adapter, save_adapter, set_adapters, sum_adapters, unfuse
from fewstep.adapt.lora import FILE, METADATA, adapters_of, bare, disabled


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(128, 6), nn.SiLU(), nn.Linear(6, 4)
        ).eval()


X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def ask(module):
    return module(X)


def trained(options=None, name="default", seed=0, module=None):
    """A network with an adapter whose numbers are not zero."""
    module = network() if module is None else module
    add_adapter(module, LoraOptions(rank=4, alpha=16.0) if options is None else options, name=name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for key, value in module.named_parameters():
        if f".{name}." in key:
            value.data = 0.2 * torch.randn(value.shape, generator=generator)
    return module


@torch.no_grad()
def test_a_new_adapter_changes_no_bit_and_trains_alone():
    module = network()
    before = ask(module)
    add_adapter(module, LoraOptions(rank=2))
    assert torch.equal(ask(module), before)
    assert {key.split(".")[1] for key, value in module.named_parameters() if value.requires_grad} == {"lora_A", "lora_B"}
    again = network()
    add_adapter(again, LoraOptions(rank=2))
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("form", ["peft", "kohya"])
@pytest.mark.parametrize("part", [None, "unet"])
def test_a_file_gives_the_same_outputs_alpha_included(tmp_path, form, part):
    module = trained()
    path = save_adapter(module, tmp_path, ask=ask, form=form, part=part)
    fresh = network()
    load_adapter(fresh, tmp_path)
    assert (ask(fresh) - ask(module)).abs().max() <= 1e-6
    assert (ask(fresh) - ask(network())).abs().max() > 0.1
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        told, keys = file.metadata(), list(file.keys())
    if form == "peft":
        prefix = "unet." if part else ""
        assert json.loads(told[METADATA])[f"{prefix}lora_alpha"] == 16.0
        assert all(key.startswith(prefix) for key in keys)
    else:
        assert {key.split(".", 1)[1] for key in keys} == {"lora_down.weight", "lora_up.weight", "alpha"}


@torch.no_grad()
def test_without_the_metadata_the_adapter_is_another(tmp_path):
    """The failure that the check on saving is against: alpha 16 is read as the rank 4."""
    from safetensors.torch import load_file, save_file

    module = trained()
    path = save_adapter(module, tmp_path, ask=ask)
    save_file(load_file(path), path)
    fresh = network()
    load_adapter(fresh, path)
    assert (ask(fresh) - ask(module)).abs().max() > 0.05
    changed = ask(module) - ask(network())
    assert fresh[5].scaling == {"default": 1.0}
    assert changed.abs().max() > 0.1


@torch.no_grad()
def test_what_a_file_cannot_hold_is_not_saved(tmp_path):
    module = trained()
    module[5].lora_alpha["default"] = 2.0  # not what its configuration, and so the file, says
    with pytest.raises(ArtefactError, match=r"was not saved.*differ by"):
        save_adapter(module, tmp_path, ask=ask)
    assert not (tmp_path / FILE).exists()
    with pytest.raises(UnknownNameError, match="unknown adapter 'style'"):
        save_adapter(module, tmp_path, ask=ask, name="style")


@torch.no_grad()
def test_ranks_and_alphas_of_single_layers_are_kept(tmp_path):
    options = LoraOptions(rank=4, alpha=8.0, others={"rank_pattern": {"3": 2}, "alpha_pattern": {"5": 1.0}, "use_rslora": True})
    module = trained(options)
    for form in ("peft", "kohya"):
        save_adapter(module, tmp_path / form, ask=ask, form=form)
        fresh = network()
        load_adapter(fresh, tmp_path / form)
        assert (ask(fresh) - ask(module)).abs().max() <= 1e-6


@torch.no_grad()
def test_dora_is_kept_and_refused_where_there_is_no_place_for_it(tmp_path):
    module = trained(LoraOptions(rank=2, targets=("3", "5"), others={"use_dora": True}))
    save_adapter(module, tmp_path, ask=ask)
    with pytest.raises(FewstepError, match="plain low-rank"):
        save_adapter(module, tmp_path, ask=ask, form="kohya")
    with pytest.raises(FewstepError, match="no exact sum"):
        sum_adapters(module, {"default": 1.0}, "sum")


@torch.no_grad()
def test_several_adapters_add_up_exactly():
    module = trained()
    trained(LoraOptions(rank=2, alpha=1.0), "style", 5, module)
    single = network()[3]  # one layer, where the sum of the changes can be written down
    inside = torch.randn(5, 128, generator=torch.Generator().manual_seed(2))
    layer = module[3]
    changes = {
        name: (layer.lora_B[name].weight @ layer.lora_A[name].weight) * scale for name, scale in (("default", 4.0), ("style", 0.5))
    }
    set_adapters(module, {"style": 0.8, "default": 1.0})
    wanted = inside @ (single.weight + 0.8 * changes["style"] + changes["default"]).T + single.bias
    assert (layer(inside) - wanted).abs().max() <= 1e-5
    both = ask(module)
    fuse(module)
    assert (ask(module) - both).abs().max() <= 1e-5
    unfuse(module)
    assert (ask(module) - both).abs().max() <= 1e-5
    sum_adapters(module, {"style": 0.8, "default": 1.0}, "sum")
    assert (ask(module) - both).abs().max() <= 1e-5
    assert adapters_of(module) == ["default", "style", "sum"]
    set_adapters(module, {"default": 1.0})
    alone = ask(module)
    assert (ask(trained()) - alone).abs().max() <= 1e-6
    set_adapters(module, {})
    assert (ask(module) - ask(network())).abs().max() <= 1e-6


@torch.no_grad()
def test_disabled_is_the_network_itself():
    module = trained()
    with disabled(module):
        assert torch.equal(ask(module), ask(network()))
    assert torch.equal(ask(bare(module)), ask(network()))
    assert not torch.equal(ask(module), ask(network()))


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rank of at least 1"):
        LoraOptions(rank=0)
    with pytest.raises(FewstepError, match="no linear layer"):
        add_adapter(nn.SiLU())
    with pytest.raises(FewstepError, match="modules_to_save"):
        add_adapter(network(), LoraOptions(others={"modules_to_save": ["5"]}))
    module = trained()
    with pytest.raises(FewstepError, match="already"):
        add_adapter(module)
    with pytest.raises(FileNotFoundError, match="there is no adapter"):
        load_adapter(network(), tmp_path / "none.safetensors")
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(ArtefactError, match="truncated"):
        load_adapter(network(), tmp_path)
    save_adapter(module, tmp_path, ask=ask)
    with pytest.raises(ArtefactError, match="does not fit"):
        load_adapter(nn.Sequential(nn.Linear(2, 2)), tmp_path)


def test_layers_within_attention_of_pytorch_are_left_out():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 8)

        def forward(self, x):
            return self.out(self.attention(x, x, x)[0])

    block = Block()
    add_adapter(block, LoraOptions(rank=2))
    assert [name for name, _ in block.named_parameters() if "lora_A" in name] == ["out.lora_A.default.weight"]


def test_a_file_names_layers_by_their_whole_names(tmp_path):
    """Not by the ends of their names: an adapter on ``a`` is none on ``b.a``."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.ModuleDict({"a": nn.Linear(2, 2)})

        def forward(self, x):
            return self.b["a"](self.a(x))

    network = Network()
    add_adapter(network, pytest.importorskip("peft").LoraConfig(r=2, target_modules="^a$"))
    fresh = bare(network)
    load_adapter(fresh, save_adapter(network, tmp_path, ask=lambda network: network(torch.ones(3, 2))))
    layers = [{name for name, _ in each.named_modules() if name.endswith("lora_A")} for each in (network, fresh)]
    assert layers == [{"a.lora_A"}, {"a.lora_A"}]
