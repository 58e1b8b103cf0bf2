"""What the page on 4-bit optimizers says of `torch.optim.AdamW`: what it cannot load, and arguments that are not there."""

import pytest
import torch

from fewstep.train import AdamW4bit


def stepped(make):
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 64)
    optimizer = make(layer.parameters())
    layer(torch.ones(1, 128)).square().sum().backward()
    optimizer.step()
    return optimizer


def test_states_go_to_4_bits_and_not_back():
    mine, theirs = stepped(AdamW4bit), stepped(torch.optim.AdamW)
    saved = mine.state_dict()
    mine.load_state_dict(theirs.state_dict())
    mine.step()
    theirs.load_state_dict(saved)
    with pytest.raises(KeyError, match="exp_avg"):
        theirs.step()


@pytest.mark.parametrize("name", ["amsgrad", "fused", "foreach", "capturable", "differentiable"])
def test_arguments_that_are_not_there(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        AdamW4bit([torch.zeros(1)], **{name: True})
