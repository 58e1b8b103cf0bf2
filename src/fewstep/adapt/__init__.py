"""Adapters: small files that change a network."""

from __future__ import annotations

from fewstep.adapt.lora import LoraOptions, add_adapter, fuse, load_adapter, save_adapter, set_adapters, sum_adapters, unfuse

__all__ = ["LoraOptions", "add_adapter", "fuse", "load_adapter", "save_adapter", "set_adapters", "sum_adapters", "unfuse"]
