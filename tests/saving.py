"""Tiny models saved in folders."""

import json

import tiny
import torch

from kncore.arch import spec_for

IDS = torch.tensor([[5, 9, 11, 7], [2, 20, 6, 1]])


def save(folder, family, tokenizer=True):
    """A tiny model as a folder of the kind `save_pretrained` leaves; gives back the model."""
    model = tiny.model(family)
    model.save_pretrained(folder)
    if tokenizer:
        tiny.tokenizer(spec_for(family).masked).save_pretrained(folder)
    return model


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
