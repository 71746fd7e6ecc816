"""Shapes of the registry's hub models, from which it is said what they need before their weights are there."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from kncore import arch
from knpaper import resources


class Size(NamedTuple):
    """Weights of all parts together, of the linear layers of a block, of its output projection, and of the head."""

    whole: int
    block: int
    projection: int
    head: int
    blocks: int
    neurons: int

    @property
    def passed(self) -> int:
        """Weights of linear layers that a position passes on its way to the logits."""
        return self.blocks * self.block + self.head


@functools.cache
def known() -> dict[str, dict]:
    """Return, by registered name, the published configurations: what in them is not the default of transformers."""
    return resources.toml("shapes.toml")


def config(name: str) -> transformers.PretrainedConfig:
    """Return the published configuration of a hub model of the registry; KeyError for another name."""
    return transformers.AutoConfig.for_model(**known()[name])


def size(config: transformers.PretrainedConfig) -> Size:
    """Return the numbers of weights of a model of this configuration; none are made."""
    spec = arch.spec_for(config.model_type)
    kind = transformers.AutoModelForMaskedLM if spec.masked else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    blocks = arch.module_at(model, spec.blocks, "blocks")
    linear = [module.weight.numel() for module in blocks[0].modules() if isinstance(module, nn.Linear | Conv1D)]
    values = arch.value_vectors(model, spec, 0)
    whole = sum(p.numel() for p in model.parameters())
    head = values.shape[1] * config.vocab_size
    return Size(whole, sum(linear), values.numel(), head, len(blocks), values.shape[0])
