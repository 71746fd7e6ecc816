"""ROME: rewrite one association by a rank-one change of the value vectors of one block (Meng et al. 2022, section 3).

The MLP of block l is read as a memory of pairs (key, value): the key is the state of its neurons at the last token of
the subject, the value what it adds to the residual stream there. To make the model answer a request with a new target,
a value v* is searched that makes the target likely, and stored under the subject's key by the smallest change of the
value vectors W that leaves other keys alone, as seen in their second moment C = E[k kᵀ] over text:

    W ← W + (C⁻¹k) (v* − Wk)ᵀ / (kᵀC⁻¹k)

k is one vector in all three places: the key of the request alone, or its mean over prefixes. The published code mixes
the two (`delta`).

Everything below the block is run once; the search replays the blocks above it, for many requests in one batch.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kncore import checks, editing, state, tokens, words
from kncore.covariance import solve
from kncore.interventions import Delta
from kncore.models import LM
from kncore.replay import Capture, Change, capture, states
from kncore.tasks import MASK, Query, unknown

KEYS = ("bare", "mean", "published")
# Of 40 requests of the default model with words before a country, the two keys have cosines from .94 up and shares (see
# `alike`) of .88 to 1.04; of 67 that begin with their subject, cosines of .08 to .94 and shares of .02 to 1.69; of 24
# that edit a determiner, cosines of .43 to .85 and shares of .35 to .90.
COSINE, SHARE = 0.9, 1.25


@dataclass(frozen=True)
class Hyper:
    """Hyperparameters of ROME.

    `block` is rewritten. The search for v* takes at most `steps` steps of Adam with rate `lr`, and ends where the mean
    negative log-likelihood of the target falls below `stop` (nats per token). The loss adds `kl` times the divergence
    of what follows "{subject} is a" from the unedited model's, and `decay` times ‖δ‖ / ‖v‖², with δ = v* − v; ‖δ‖ is
    kept below `clamp` · ‖v‖. The request is put after each of `prefixes` pieces of prose and asked alone.
    `covariance` is "samples", "text" (see `kncore.covariance`), a folder of text files, or "identity" (C = 1, as in
    the published code of Niu et al.). `key` is what the value is stored under: "bare", the request alone; "mean", over
    all prefixes; "published", a mix of both (see `delta`). The default was measured on other draws than the book's.

    Raises ValueError for a setting out of its range; of `block`, only `search` can tell.
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
    key: str = "bare"

    def __post_init__(self) -> None:
        if self.key not in KEYS:
            raise unknown("key", self.key, KEYS)
        plain = {
            "block": checks.whole(self.block, "block"),
            "steps": checks.whole(self.steps, "steps", 1),
            "lr": editing.rate(self.lr),
            "decay": editing.number(self.decay, "decay"),
            "clamp": editing.number(self.clamp, "clamp", above=True, endless=True),
            "kl": editing.number(self.kl, "kl"),
            "stop": editing.number(self.stop, "stop"),
            "prefixes": checks.whole(self.prefixes, "prefixes", 0, len(words.passages())),
            "covariance": str(self.covariance),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)


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


@state.computes(grad=True)
def search(lm: LM, requests: Iterable[Query], settings: Hyper, seed: int = 0, budget: int = 640) -> list[Search]:
    """Search v* for each request: a query with its subject, whose `foil` is the answer to install.

    Requests are searched in batches of at most `budget` positions, each as if alone. Raises ValueError for a block that
    does not exist, no requests, and a request without a subject or without a new answer; TypeError for one that is no
    Query.
    """
    editing.block(lm, settings.block)
    requests, budget = editing.requests(requests), checks.whole(budget, "budget", 1)
    encoded = [prompts(lm, request, settings, seed) for request in requests]
    same = [editing.alike(lm, request) == "all" for request in requests]
    found: list[Search | None] = [None] * len(requests)
    sizes = [len(group) * max(len(e.ids) + len(e.target) - at for e, at in group) for group in encoded]
    order = sorted(range(len(requests)), key=lambda i: sizes[i])
    while order:
        here = [order.pop(0)]
        while order and (len(here) + 1) * sizes[order[0]] <= budget:
            here.append(order.pop(0))
        results = editing.together(lambda some: _search(lm, some, settings), [(encoded[i], same[i]) for i in here])
        for i, result in zip(here, results, strict=True):
            found[i] = _none(lm, result) if isinstance(result, str) else result
    return found


def prompts(lm: LM, request: Query, settings: Hyper, seed: int = 0) -> list[tuple[tokens.Encoded, int]]:
    """All that a search reads of a request: its token ids alone, after each prefix, and those of the question what the
    subject is, with the new answer as their target; each with the position of the subject's last token."""
    asked = contexts(request, settings.prefixes, seed)
    return [(tokens.encode(lm, query, query.foil), tokens.span(lm, query, query.foil)[1]) for query in asked]


def contexts(request: Query, n: int, seed: int = 0) -> list[Query]:
    """The request alone, after each of n pieces of prose, and the question what the subject is.

    Raises ValueError for a request without a subject or a new answer, and more pieces than there are.
    """
    editing.requests([request])
    if not request.subject:
        raise ValueError(f"the request {request.prompt!r} has no subject; give the part of it that the edit is about")
    passages = words.passages()
    texts = random.Random(f"prefixes {seed}").sample(passages, checks.whole(n, "prefixes", 0, len(passages)))
    prefixes = ["", *(" ".join(text.split()[: 5 + 5 * (i % 2)]).rstrip(",.;:") + ". " for i, text in enumerate(texts))]
    essence = f"{{}} is a {MASK}." if request.masked else "{} is a"
    return [replace(request, prompt=p + request.prompt) for p in prefixes] + [
        Query(essence.replace("{}", request.subject), request.target, request.subject, request.foil, template=essence)
    ]


def _none(lm: LM, failed: str) -> Search:
    neurons, hidden = lm.n_neurons, lm.model.config.hidden_size
    nothing = [torch.full((size,), torch.nan, device=lm.device) for size in (neurons, neurons, hidden, hidden)]
    return Search(*nothing, 0, torch.nan, torch.nan, failed)


def _search(lm: LM, some: Sequence[tuple[Sequence[tuple[tokens.Encoded, int]], bool]], settings: Hyper) -> list[Search]:
    """`some`: what `prompts` gives for each request, and whether its new answer has the tokens of the old one."""
    groups, same = zip(*some, strict=True)
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
    essence = captured.logits.unflatten(0, (n, each))[:, -1].log_softmax(-1)
    limit = settings.clamp * value.norm(dim=1, keepdim=True)
    parts = zip(same, keys, values.unflatten(0, (n, each)), strict=True)
    failed = [_unfit(lm, settings.block, *one) for one in parts]

    change = torch.zeros_like(value, requires_grad=True)
    optimiser = torch.optim.Adam([change], lr=settings.lr)
    best = torch.zeros_like(value)
    before, loss_now = [torch.full((n,), float("nan"), device=lm.device) for _ in range(2)]
    steps = torch.zeros(n, dtype=torch.long)
    active = torch.tensor([i for i, why in enumerate(failed) if not why], dtype=torch.long, device=lm.device)
    for step in range(settings.steps + 1) if len(active) else ():
        losses, drift, says = _losses(lm, captured, settings.block, encoded, places, values, change, active, essence)
        with torch.no_grad():
            best[active], loss_now[active], steps[active.cpu()] = change[active], losses, step
            if step == 0:
                before.copy_(loss_now)
        open_ = torch.isfinite(losses) & (losses >= settings.stop)
        if step == 0:
            open_ &= ~says
        if step == settings.steps or not bool(open_.any()):
            break
        weight = settings.decay * (change[active].norm(dim=1) if step else 0) / value[active].norm(dim=1) ** 2
        total = losses + settings.kl * drift + weight
        optimiser.zero_grad()
        total[open_].sum().backward()
        optimiser.step()
        with torch.no_grad():
            size = change.double().norm(dim=1, keepdim=True)  # in float32 a large one is infinite
            change.mul_((limit / size.clamp_min(1e-12)).clamp_max(1))
            sound = (value + change)[active].to(lm.dtype).isfinite().all(1)
            lost = active[open_ & ~sound]
            loss_now[lost], steps[lost.cpu()] = torch.nan, step + 1
        active = active[open_ & sound]
        if not len(active):
            break
    return [
        Search(
            keys[i, 0], keys[i, :-1].mean(0), value[i], best[i], int(steps[i]),
            float((-before[i]).exp()), float((-loss_now[i]).exp()),
            failed[i] or _verdict(best[i], loss_now[i], steps[i], settings.block),
        )
        for i in range(n)
    ]  # fmt: skip


def _unfit(lm: LM, block: int, same: bool, keys: Tensor, values: Tensor) -> str:
    """Why there is nothing to search, from what the unedited model has at the prompts of one request; or ""."""
    if same:
        return f"the new answer and the present one are the same tokens for {lm.name}"
    if not bool(keys.isfinite().all() & values.isfinite().all()):
        return f"the states of {lm.name} at the subject are not numbers; check its weights, or load it in a wider dtype"
    if not bool(keys[0].any() & keys[:-1].mean(0).any()):
        return f"the neurons of block {block} are zero at the subject: nothing can be stored under this key"
    if not bool(values[0].any()):
        return f"block {block} adds nothing at the subject: no change is within the clamp, a multiple of its size"
    return ""


def _verdict(change: Tensor, loss: Tensor, steps: Tensor, block: int) -> str:
    if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(change).all()):
        if not steps:
            return "the probability of the new answer is not a number before any change; check the model's weights"
        return f"the search diverged after {int(steps)} steps; use a smaller rate"
    if not steps:
        return "the model gives the new answer already; there is nothing to write"
    return (
        "" if bool(change.any()) else f"the answer does not depend on block {block} at the subject; use a lower block"
    )


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
) -> tuple[Float[Tensor, " active"], Float[Tensor, " active"], Bool[Tensor, " active"]]:
    """Of the active requests: negative log-likelihood of the target, per token; divergence of the essence; and whether
    every token of the target is the most probable one after the request alone."""
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
    logits = lm.readout(out[r, at]).float()
    logp = logits.log_softmax(-1)[range(len(wanted)), wanted]
    share = torch.tensor([part for _, part in owner], device=lm.device)
    index = torch.tensor([who for who, _ in owner], device=lm.device)
    losses = torch.zeros(len(active), device=lm.device).index_add(0, index, -logp * share)
    last = torch.arange(each - 1, len(rows), each, device=lm.device)
    now = lm.readout(out[last, captured.target[rows[last]]]).float().log_softmax(-1)
    reference = essence[active]
    missed = (logits.argmax(-1) != torch.tensor(wanted, device=lm.device)) & (r % each == 0)
    says = torch.zeros(len(active), device=lm.device).index_add(0, index, missed.float()) == 0
    return losses, (now.exp() * (now - reference)).sum(1), says


def delta(found: Search, covariance: Float[Tensor, "neuron neuron"] | None, block: int, key: str = Hyper.key) -> Delta:
    """The rank-one change that stores v* = Wᵀk + δ under a key k: u δᵀ / (kᵀu), with u = C⁻¹k.

    key: "bare", that of the request alone, so that the request gets exactly v*; "mean", that averaged over prefixes;
        "published", the mix of the published implementation, u from the mean key and kᵀu with the bare one.

    The mix stores v* under the bare key too, but where the two keys part the change is larger, and moves other keys
    more; a warning says so. They part where the subject begins the prompt, unless the model reads a start token: the
    first token attends to itself alone, and later ones attend to it where they look for nothing, so that its state
    tells its place rather than the word (an attention sink); and many a name without a space before it is other tokens.
    They part, too, for words that mean little without their context, such as determiners. There the bare key reaches
    fewer paraphrases, and the mean key misses requests: of determiners, half.

    Without a covariance C is the identity. Raises ValueError for a search that failed, an unknown key, a covariance
    that is singular or of another width, a key that is zero, and numbers that are not finite.
    """
    if key not in KEYS:
        raise unknown("key", key, KEYS)
    if found.failed:
        raise ValueError(found.failed)
    if not all(bool(x.isfinite().all()) for x in (found.key, found.mean_key, found.change)):
        raise ValueError("the key of the request or its change is not finite: nothing can be stored")
    if not bool(found.change.any()):
        raise ValueError("the change of the value is zero: there is nothing to store")
    direction = solve(covariance, (found.key if key == "bare" else found.mean_key)[None])[0]
    scale = (found.mean_key if key == "mean" else found.key).double() @ direction
    if not bool(scale.abs() > 0):
        raise ValueError("the key of the request is zero where the covariance counts: nothing can be stored under it")
    if key == "published":
        cosine, share = _alike(found, direction)
        if cosine < COSINE or not 1 / SHARE <= share <= SHARE:
            warnings.warn(
                f"the key of the request alone and the mean key part (cosine {cosine:.2f}, kᵀu {share:.3g} of that of "
                "the mean key), so that the published mix of both moves other keys too; use key='bare'",
                stacklevel=2,
            )
    neurons = (direction / scale).float()
    if not bool(neurons.isfinite().all()):
        raise ValueError("the change is too large for float32: the key is tiny, or the two keys have nothing in common")
    return Delta(checks.whole(block, "block", 0), neurons[None], found.change[None])


def alike(found: Search, covariance: Float[Tensor, "neuron neuron"] | None) -> tuple[float, float]:
    """How far the two keys of a request agree: their cosine, and kᵀu of the key of the request alone as a share of that
    of the mean key, with u = C⁻¹k̄ of the mean key. By the inverse of this share the published mix makes the change
    larger than the mean key does. Raises ValueError as `kncore.covariance.solve` does."""
    return _alike(found, solve(covariance, found.mean_key[None])[0])


def _alike(found: Search, direction: Float[Tensor, " neuron"]) -> tuple[float, float]:
    bare, mean = found.key.double(), found.mean_key.double()
    return float(torch.cosine_similarity(bare, mean, dim=0)), float((bare @ direction) / (mean @ direction))
