"""The equation of attribution written naively: one full forward and backward pass per block and node.

What `kncore.attribute` must reproduce, and the first row of the benchmark. Nothing here comes from the engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kncore import arch
from kncore.models import LM
from kncore.tokens import Encoded


def forward(lm: LM, encoded: Encoded, block: int, site: str, change=None) -> tuple[Tensor, Tensor]:
    """Logits at the target position, and the state of a site there before `change(state) -> state` was made."""
    seen = []

    def swap(x):
        seen.append(x[0, encoded.position])
        if change is not None:
            x = x.clone()
            x[0, encoded.position] = change(seen[0])
        return x

    with arch.at_site(lm.blocks[block], lm.spec.sites[site], swap):
        logits = lm.model(torch.tensor([encoded.ids], device=lm.device)).logits[0, encoded.position]
    return logits.float(), seen[0]


def attribution(
    lm: LM, encoded: Encoded, nodes: Sequence[float], weights: Sequence[float], site: str = "neuron", log: bool = False
) -> Float[Tensor, "block neuron"]:
    """Scores of every block for P (or log P) of the first target token."""
    out = []
    for block in range(len(lm.blocks)):
        with torch.no_grad():
            _, state = forward(lm, encoded, block, site)
        total = torch.zeros_like(state, dtype=torch.float32)
        for node, weight in zip(nodes, weights, strict=True):
            leaf = (float(node) * state).requires_grad_(True)
            logits, _ = forward(lm, encoded, block, site, lambda _, leaf=leaf: leaf)
            p = logits.log_softmax(-1)[encoded.target[0]]
            (slope,) = torch.autograd.grad(p if log else p.exp(), leaf)
            total += float(weight) * slope
        out.append(state.float() * total)
    return torch.stack(out)
