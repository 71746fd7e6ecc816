"""ROME: rewrite one association by a rank-one change of the value vectors of one block (Meng et al. 2022, section 3).

The MLP of block l is read as a memory of pairs (key, value): the key is the state of its neurons at the last token of
the subject, the value what it adds to the residual stream there. To make the model answer a request with a new target,
a value v* is searched that makes the target likely, and stored under the subject's key by the smallest change of the
value vectors W that leaves other keys alone, as seen in their second moment C = E[k kᵀ] over text:

    W ← W + (C⁻¹k) (v* − Wk)ᵀ / (kᵀC⁻¹k)

Everything below the block is run once; the search replays the blocks above it, for many requests in one batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kncore import tokens, words
from kncore.covariance import solve
from kncore.interventions import Delta
from kncore.models import LM
from kncore.replay import Capture, Change, capture, states
from kncore.tasks import MASK, Query


@dataclass(frozen=True)
class Hyper:
    """Hyperparameters of ROME.

    `block` is rewritten. The search for v* takes at most `steps` steps of Adam with rate `lr`, and ends where the mean
    negative log-likelihood of the target falls below `stop` (nats per token). The loss adds `kl` times the divergence
    of what follows "{subject} is a" from the unedited model's, and `decay` times ‖δ‖ / ‖v‖², with δ = v* − v; ‖δ‖ is
    kept below `clamp` · ‖v‖. The request is put after each of `prefixes` pieces of prose and asked alone.
    `covariance` is "samples", "text" (see `kncore.covariance`), a folder of text files, or "identity" (C = 1, as in
    the published code of Niu et al.).
    """

    block: int
    steps: int = 20
    lr: float = 0.5
    decay: float = 0.5
    clamp: float = 4.0
    kl: float = 0.0625
    stop: float = 0.05
    prefixes: int = 5
    covariance: str = "samples"


SEEDS = ("", "-1", "-2")  # of training, as the names of the controlled models have them
# GPT-2 XL and LLaMA-2-7B as published (Meng et al., Niu et al.); the others chosen on other draws than the book uses.
HYPER = {
    "smollm2-135m": Hyper(3, clamp=2.0, prefixes=3),
    "gpt2-xl": Hyper(17),
    "llama-2-7b": Hyper(5, steps=25, decay=1e-3),
    **{f"controlled-{kind}{seed}": Hyper(0, steps=40, clamp=2.0) for kind in ("gpt2", "llama") for seed in SEEDS},
    **{f"controlled-bert{seed}": Hyper(0, steps=40, clamp=2.0, covariance="text") for seed in SEEDS},
}


def hyper(lm: LM) -> Hyper:
    """The known hyperparameters of a model; for others, the published ones at a sixth of the model's depth."""
    return HYPER.get(lm.name, Hyper(-(-len(lm.blocks) // 6), covariance="text" if lm.spec.masked else "samples"))


@dataclass(frozen=True)
class Search:
    """What the search found for one request: `key` [neuron] of the request alone, `mean_key` [neuron] over all
    prefixes, `value` [hidden] without the edit and `change` δ [hidden]; `steps` taken, `probability` of the target
    (geometric mean over its tokens and over prefixes) before the first step and at the end; `failed` why the change
    is not to be used, or "".
    """

    key: Tensor
    mean_key: Tensor
    value: Tensor
    change: Tensor
    steps: int
    before: float
    probability: float
    failed: str = ""


def search(lm: LM, requests: Sequence[Query], settings: Hyper, seed: int = 0, budget: int = 640) -> list[Search]:
    """Search v* for each request: a query with its subject, whose `foil` is the answer to install.

    Requests are searched in batches of at most `budget` positions, each as if alone. Raises ValueError for a block that
    does not exist, and a request without a subject or without a new answer.
    """
    if not 0 <= settings.block < len(lm.blocks):
        raise ValueError(f"block {settings.block} does not exist; {lm.name} has blocks 0 to {len(lm.blocks) - 1}")
    asked = [contexts(request, settings.prefixes, seed) for request in requests]
    found: list[Search | None] = [None] * len(requests)
    encoded = [[(tokens.encode(lm, q, q.foil), tokens.span(lm, q, q.foil)[1]) for q in group] for group in asked]
    sizes = [len(group) * max(len(e.ids) + len(e.target) - at for e, at in group) for group in encoded]
    order = sorted(range(len(requests)), key=lambda i: sizes[i])
    while order:
        here = [order.pop(0)]
        while order and (len(here) + 1) * sizes[order[0]] <= budget:
            here.append(order.pop(0))
        for i, result in zip(here, _search(lm, [encoded[i] for i in here], settings), strict=True):
            found[i] = result
    return found


def contexts(request: Query, n: int, seed: int = 0) -> list[Query]:
    """The request alone, after each of n pieces of prose, and the question what the subject is."""
    if not request.foil:
        raise ValueError(f"the request {request.prompt!r} has no new answer; give it as the foil")
    texts = random.Random(f"prefixes {seed}").sample(words.passages(), n)
    prefixes = ["", *(" ".join(text.split()[: 5 + 5 * (i % 2)]).rstrip(",.;:") + ". " for i, text in enumerate(texts))]
    essence = f"{request.subject} is a {MASK}." if request.masked else f"{request.subject} is a"
    return [replace(request, prompt=p + request.prompt) for p in prefixes] + [
        Query(essence, request.target, request.subject, request.foil)
    ]


def _search(lm: LM, groups: Sequence[Sequence[tuple[tokens.Encoded, int]]], settings: Hyper) -> list[Search]:
    n, each = len(groups), len(groups[0])  # each: the prefixed prompts of one request, and the essence prompt last
    encoded = [
        e if lm.spec.masked or i == each - 1 else replace(e, ids=e.ids + e.target[:-1])
        for group in groups
        for i, (e, _) in enumerate(group)
    ]
    places = torch.tensor([at for group in groups for _, at in group], device=lm.device)
    captured = capture(lm, encoded, ("neuron", "mlp"), start=places.tolist(), at=places.tolist())
    keys = captured.sites["neuron"][settings.block].float().unflatten(0, (n, each))
    values = captured.sites["mlp"][settings.block]
    value = values.float().unflatten(0, (n, each))[:, 0]
    limit = settings.clamp * value.norm(dim=1, keepdim=True)
    essence = captured.logits.unflatten(0, (n, each))[:, -1].log_softmax(-1)

    change = torch.zeros_like(value, requires_grad=True)
    optimiser = torch.optim.Adam([change], lr=settings.lr)
    best = torch.zeros_like(value)
    before, loss_now = [torch.full((n,), float("nan"), device=lm.device) for _ in range(2)]
    steps = torch.zeros(n, dtype=torch.long)
    active = torch.arange(n, device=lm.device)
    for step in range(settings.steps + 1):
        losses, drift = _losses(lm, captured, settings.block, encoded, places, values, change, active, essence)
        with torch.no_grad():
            best[active], loss_now[active], steps[active.cpu()] = change[active], losses, step
            if step == 0:
                before.copy_(losses)
        open_ = torch.isfinite(losses) & (losses >= settings.stop)
        if step == settings.steps or not bool(open_.any()):
            break
        weight = settings.decay * (change[active].norm(dim=1) if step else 0) / value[active].norm(dim=1) ** 2
        total = losses + settings.kl * drift + weight
        optimiser.zero_grad()
        total[open_].sum().backward()
        optimiser.step()
        with torch.no_grad():
            change.mul_((limit / change.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1))
        active = active[open_]
    return [
        Search(
            keys[i, 0], keys[i, :-1].mean(0), value[i], best[i], int(steps[i]),
            float((-before[i]).exp()), float((-loss_now[i]).exp()), _verdict(best[i], loss_now[i], steps[i]),
        )
        for i in range(n)
    ]  # fmt: skip


def _verdict(change: Tensor, loss: Tensor, steps: Tensor) -> str:
    if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(change).all()):
        return f"the search diverged after {int(steps)} steps; use a smaller rate"
    return "" if steps else "the model gives the new answer already; there is nothing to write"


def _losses(
    lm: LM,
    captured: Capture,
    block: int,
    encoded: Sequence[tokens.Encoded],
    places: Int[Tensor, " prompt"],
    values: Float[Tensor, "prompt hidden"],
    change: Float[Tensor, "request hidden"],
    active: Int[Tensor, " active"],
    essence: Float[Tensor, "request vocab"],
) -> tuple[Float[Tensor, " active"], Float[Tensor, " active"]]:
    """Negative log-likelihood of the target, per token, and divergence of the essence, of the active requests."""
    each = len(encoded) // len(essence)
    rows = (active[:, None] * each + torch.arange(each, device=active.device)).flatten()
    shifted = values[rows] + change[active].repeat_interleave(each, 0).to(values.dtype)
    out = states(captured, [Change(block, rows, shifted, "mlp", places[rows])])
    picked, wanted, owner = [], [], []
    for r, row in enumerate(rows.tolist()):
        target = encoded[row].target
        if row % each == each - 1:
            continue
        for k, token in enumerate(target):
            picked.append((r, int(captured.target[row]) + k))
            wanted.append(token)
            owner.append((r // each, 1 / (len(target) * (each - 1))))
    r, at = torch.tensor(picked, device=lm.device).T
    logp = lm.readout(out[r, at]).float().log_softmax(-1)[range(len(wanted)), wanted]
    share = torch.tensor([part for _, part in owner], device=lm.device)
    index = torch.tensor([who for who, _ in owner], device=lm.device)
    losses = torch.zeros(len(active), device=lm.device).index_add(0, index, -logp * share)
    last = torch.arange(each - 1, len(rows), each, device=lm.device)
    now = lm.readout(out[last, captured.target[rows[last]]]).float().log_softmax(-1)
    reference = essence[active]
    return losses, (now.exp() * (now - reference)).sum(1)


def delta(found: Search, covariance: Float[Tensor, "neuron neuron"] | None, block: int) -> Delta:
    """The rank-one change that stores δ under the request's key: u δᵀ / (kᵀu), with u = C⁻¹ k̄.

    k is the key of the request alone, k̄ that averaged over prefixes, as in the published implementation; for k̄ = k it
    is the equation above. Without a covariance C is the identity. Raises ValueError for a covariance that is singular,
    and a key that is zero.
    """
    direction = solve(covariance, found.mean_key[None])[0]
    scale = found.key.double() @ direction
    if not bool(scale.abs() > 0):
        raise ValueError("the key of the request is zero where the covariance counts: nothing can be stored under it")
    return Delta(block, (direction / scale).float()[None], found.change[None])
