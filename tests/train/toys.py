"""Small things to train, for the tests of the loop, in this process and in others."""

import copy
import functools
from dataclasses import dataclass

import torch
from torch import nn

from fewstep.train import AdamW4bit, MixedSparsity, SparsitySchedule, Stage, convert_to_int4_training

DATA = {"x": torch.randn(48, 4, generator=torch.Generator().manual_seed(0))}


class Smooth(nn.Module):
    """Without anything that looks at other samples or at the ambient generator."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Dropout(dropout), nn.Linear(16, 4))

    def forward(self, x, time):
        return self.layers(torch.cat([x, time[:, None].to(x)], 1))


def make(dropout=0.0):
    torch.manual_seed(7)
    return Smooth(dropout)


@dataclass(frozen=True)
class Drawn:
    """Denoising, with everything random drawn for the whole batch."""

    def draw_whole(self, batch, generator):
        x = batch["x"]
        return {
            "x": x,
            "noise": torch.randn(x.shape, generator=generator),
            "time": torch.rand(len(x), generator=generator),
            "scale": torch.tensor(1.0),
        }

    def __call__(self, model, batch, generator):
        time = batch["time"][:, None]
        error = model((1 - time) * batch["x"] + time * batch["noise"], batch["time"]) - batch["noise"]
        return batch["scale"] * error.square().mean(), {"largest": error.detach().abs().mean()}


def undrawn(model, batch, generator):
    """The same, drawn from the generator of the piece."""
    return Drawn()(model, Drawn().draw_whole(batch, generator), generator)


# ---- wider ones --------------------------------------------------------------------------------------------------------------------

WIDE = {"x": torch.randn(48, 32, generator=torch.Generator().manual_seed(2))}
WIDE["x"][:, 5] *= 10.0 * torch.exp(2.0 * torch.randn(48, generator=torch.Generator().manual_seed(3)))  # parts of a batch differ
WIDER = {"x": torch.randn(48, 96, generator=torch.Generator().manual_seed(4))}


def flipped(model, batch, generator):
    """To learn its input the other way round."""
    return (model(batch["x"]) - batch["x"].flip(1)).clamp(-3.0, 3.0).square().mean(), {}


def layers(width, hidden):
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))


def int4():
    """A network with 4-bit products, and its optimizer."""
    model = layers(32, 16)
    return model, {"optimizer": convert_to_int4_training(model).optimizer(torch.optim.AdamW, step_rate=2e-3)}


def sparse():
    model = layers(32, 64)
    return model, {
        "optimizer": MixedSparsity(model, torch.optim.AdamW, schedule=SparsitySchedule(3, 0.8, restore=(9, 11)), interval=2).build
    }


def four_bits(second_moment):
    """4-bit states, rounded at random."""
    make = functools.partial(AdamW4bit, second_moment=second_moment, rounding="stochastic")
    return layers(96, 257), {"optimizer": make}


# ---- two players -------------------------------------------------------------------------------------------------------------------


def generated(model, batch, generator):
    noise = torch.randn(len(batch["x"]), 4, generator=generator)
    return model["student"](noise, torch.zeros(len(noise)))


def adversary_loss(model, batch, generator):
    with torch.no_grad():
        fake = generated(model, batch, generator)
    zero = torch.zeros(len(fake))
    real, found = model["adversary"](batch["x"], zero), model["adversary"](fake, zero)
    return nn.functional.softplus(-real).mean() + nn.functional.softplus(found).mean(), {"real": real.detach().mean()}


def student_loss(model, batch, generator):
    fake = generated(model, batch, generator)
    return nn.functional.softplus(-model["adversary"](fake, torch.zeros(len(fake)))).mean(), {}


def players():
    model = {"student": make(), "adversary": make()}
    torch.manual_seed(8)
    model["adversary"].layers[3] = nn.Linear(16, 1)
    return model


def turns():
    return [
        Stage(adversary_loss, "adversary", averaged=False, learning_rate=3e-3, watched=False),
        Stage(student_loss, "student", every=3, watched=False),
    ]


# ---- an optimizer around another, with states of every kind -------------------------------------------------------------------------


class Coded:
    """Signs with momentum kept as bytes and a scale, and a record of nested things: what `load_state_dict` of PyTorch would not give
    back."""

    def __init__(self, parameters, lr):
        self.inner = CodedSigns(parameters, lr)
        self.rounds = {"history": [], "pair": (1, None)}

    param_groups = property(lambda self: self.inner.param_groups)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def step(self):
        self.inner.step()
        self.rounds["history"] = [*self.rounds["history"], len(self.rounds["history"]) / 3.0][-5:]
        self.rounds["pair"] = (self.rounds["pair"][0] + 1, None)

    def state_dict(self):
        return {"inner": self.inner.state_dict(), "rounds": self.rounds}

    def load_state_dict(self, state):
        self.inner.load_state_dict(state["inner"])
        self.rounds = copy.deepcopy(state["rounds"])


class CodedSigns(torch.optim.Optimizer):
    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["moment"] = {
                        "codes": torch.full_like(p, 128, dtype=torch.uint8),
                        "scale": torch.ones((), dtype=torch.float64),
                    }
                    state["half"] = torch.zeros(3, dtype=torch.bfloat16)
                moment = state["moment"]
                value = 0.9 * (moment["codes"].double() - 128) / 127 * moment["scale"] + 0.1 * p.grad.double()
                moment["scale"] = value.abs().max().clamp_min(1e-12)
                moment["codes"] = (value / moment["scale"] * 127 + 128).round().to(torch.uint8)
                state["half"] += 1 / 3
                p.sub_((group["lr"] * value / moment["scale"]).to(p))


class Rounds:
    """Local steps of AdamW, and an average of the weights of all processes at every fourth."""

    def __init__(self, parameters, lr):
        self.parameters = list(parameters)
        self.inner = torch.optim.AdamW(self.parameters, lr=lr)
        self.done = 0

    param_groups = property(lambda self: self.inner.param_groups)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self):
        self.inner.step()
        self.done += 1
        if self.done % 4 == 0:
            for p in self.parameters:
                torch.distributed.all_reduce(p)
                p /= torch.distributed.get_world_size()

    def state_dict(self):
        return {"inner": self.inner.state_dict(), "done": self.done}

    def load_state_dict(self, state):
        self.inner.load_state_dict(state["inner"])
        self.done = state["done"]
