"""A small character-level transformer and the text that it learns: Python's own documentation of its language, part of every installation.

Not a diffusion model, but what optimizers, number formats and sparse training are usually measured on. Used by the benchmarks of training:

    batch = sampler(text("train"), 128)(32, generator)        # {"x": "32 128", "y": "32 128"}
    loss, info = next_character(model, batch, generator)      # an objective for `fewstep.train.fit`
    nats = held_out_loss(model)                               # a number, on text that training never sees
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

HELD_OUT = 0.1
"""The last part of the text."""
CHARACTERS = 128
"""All others are left out."""


def text(part: str = "train") -> Tensor:
    """Codes of characters, ``"n"``: the first nine tenths of the documentation ("train") or the rest ("held_out")."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics))
    codes = torch.tensor([code for code in whole.encode("ascii", "ignore") if code < CHARACTERS])
    border = int((1.0 - HELD_OUT) * len(codes))
    return codes[:border] if part == "train" else codes[border:]


def sampler(codes: Tensor, length: int) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """A source of random pieces of a text, and the same one character later."""

    def draw(batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        first = torch.randint(len(codes) - length, (batch_size, 1), generator=generator)
        rows = first + torch.arange(length)
        return {"x": codes[rows], "y": codes[rows + 1]}

    return draw


class Block(nn.Module):
    """Causal attention and a network of two layers, each after a normalisation and beside a skip."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mixing = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.queries_keys_values(self.before_attention(x)).chunk(3, -1)
        query, key, value = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.before_mixing(x))))


class CharacterModel(nn.Module):
    """Logits of the next character, ``"batch length 128"``, from codes ``"batch length"``."""

    def __init__(self, width: int = 96, depth: int = 3, heads: int = 4, longest: int = 128):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(CHARACTERS, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.normalisation, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embedding(codes) + self.positions(torch.arange(codes.shape[1], device=codes.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.normalisation(x))


def next_character(model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean cross entropy of the next character, in nats."""
    return functional.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten()), {}


@torch.no_grad()
def held_out_loss(model: nn.Module, length: int = 128, pieces: int = 256) -> float:
    """The mean cross entropy on held-out text, in nats, always on the same pieces."""
    model.eval()
    batch = sampler(text("held_out"), length)(pieces, torch.Generator().manual_seed(0))
    losses = [
        next_character(model, {"x": x, "y": y}, torch.Generator())[0]
        for x, y in zip(batch["x"].split(64), batch["y"].split(64), strict=True)
    ]
    model.train()
    return float(torch.stack(losses).mean())
