"""ROME: rewrite one association by a rank-one change of the value vectors of one block (Meng et al. 2022, section 3).

The MLP of block l is read as a memory of pairs (key, value): the key is the state of its neurons at the last token of
the subject, the value what it adds to the residual stream there. A value v* is searched that makes the new target
likely, and stored under the key of the subject by the smallest change of the value vectors W that leaves other keys
alone, as seen in their second moment C = E[k kᵀ] over text:

    W ← W + (C⁻¹k) (v* − Wk)ᵀ / (kᵀC⁻¹k)

k is the same in all three places, but in the published code (`delta`). The blocks below are run once.

The search is by gradient. The published one takes steps of Adam on all prompts. The "rotating" one costs two fifths of
that: a step asks the request alone and after one of its prefixes, each in turn, and moves by Newton's rule (`_newton`).
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kncore import checks, editing, prose, tokens
from kncore.covariance import Factor, Moment, solve
from kncore.interventions import Delta
from kncore.models import LM
from kncore.query import MASK, Query
from kncore.replay import Capture, Change, capture, states
from kncore.store import state

KEYS = ("bare", "mean", "published")
SEARCHES = ("rotating", "adam")
# Of 40 requests of the default model with words before a country, the two keys have cosines from .94 up and shares (see
# `alike`) of .88 to 1.04; of 67 that begin with their subject, cosines of .08 to .94 and shares of .02 to 1.69; of 24
# that edit a determiner, cosines of .43 to .85 and shares of .35 to .90.
COSINE, SHARE = 0.9, 1.25
BUDGET = 640  # positions that are searched together
# Of steps by Newton's rule, chosen on other draws than the book uses: the loss to reach, as a share of that to stop at;
# the longest step at first, in lengths of the clamp, and how it falls; what is added of the step before.
GOAL, FIRST, FALL, MOMENTUM = 0.6, 0.7, 0.3, 0.3


@dataclass(frozen=True)
class HParams(editing.Settings):
    """`block` is rewritten. The search for v* takes at most `steps` steps, until the mean negative log-likelihood of
    the target falls below `stop` (nats per token). What is minimised adds `kl` times the divergence of what follows
    "{subject} is a" from the unedited model's, and `decay` times ‖δ‖ / ‖v‖², with δ = v* − v; ‖δ‖ is kept below
    `clamp` · ‖v‖. The request is put after each of `prefixes` pieces of prose and asked alone.

    `search`: "rotating", each step on the request alone and with one prefix, in turn, and every fourth on the
    divergence, four times; the length of steps goes by `stop` and `clamp`. Or "adam", as published: each step on all
    prompts, by Adam with rate `lr`, which "rotating" makes no use of. Both end by the loss over all prompts.
    `covariance` is "samples", "text" (see `kncore.covariance`), a folder of text files, or "identity" (C = 1, as in
    the published code of Niu et al.). `key` is what the value is stored under: "bare", the request alone; "mean", over
    all prefixes; "published", a mix of both (see `delta`). The default was measured on other draws than the book's.

    Raises ValueError for a setting out of its range; of `block`, and of too many `prefixes`, only `search` can tell.
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
    search: str = "rotating"

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise checks.unknown("search", self.search, SEARCHES)
        if self.key not in KEYS:
            raise checks.unknown("key", self.key, KEYS)
        super().__post_init__()


SEEDS = ("", "-1", "-2")  # of training, as the names of the controlled models have them
# GPT-2 XL and LLaMA-2-7B as published (Meng et al., Niu et al.); the others chosen on other draws than the book uses.
HPARAMS = {
    "smollm2-135m": HParams(3, clamp=2.0, prefixes=3),
    "gpt2-xl": HParams(17, search="adam"),
    "llama-2-7b": HParams(5, steps=25, decay=1e-3, search="adam"),
    **{f"controlled-{kind}{seed}": HParams(0, steps=40, clamp=2.0) for kind in ("gpt2", "llama") for seed in SEEDS},
    **{f"controlled-bert{seed}": HParams(0, steps=40, clamp=2.0, covariance="text") for seed in SEEDS},
}


def hparams_for(lm: LM) -> HParams:
    """Return the known hyperparameters of a model; for others, the published ones at a sixth of the model's depth."""
    return HPARAMS.get(lm.name, HParams(-(-len(lm.blocks) // 6), covariance="text" if lm.spec.masked else "samples"))


@dataclass(frozen=True)
class Search:
    """What the search found for one request: `key` [neuron] of the request alone, `mean_key` [neuron] over all
    prefixes, `value` [hidden] without the edit and `change` δ [hidden]; `steps` taken, `probability` of the target
    (geometric mean over its tokens and over all prefixes) before the first step and at the end; `failed` why the change
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


Read = Callable[[LM, Query, HParams, int], list[tuple[tokens.Encoded, int]]]


@state.computes(grad=True)
def search(
    lm: LM, requests: Iterable[Query], settings: HParams, seed: int = 0, read: Read | None = None
) -> list[Search]:
    """Search v* for each request, a query with its subject whose `foil` is the answer to install, as if alone.

    `read` gives the tokens that are read of a request in the place of `prompts`. Raises ValueError for a block that
    does not exist, no requests, and a request without a subject or without a new answer; TypeError for one that is no
    Query.
    """
    checks.block(lm, settings.block)
    requests = editing.requests(requests)
    groups = [(read or prompts)(lm, request, settings, seed) for request in requests]
    same = [editing.same(lm, request) for request in requests]
    sizes = [len(group) * max(len(e.ids) + len(e.target) - at for e, at in group) for group in groups]
    order = sorted(range(len(requests)), key=lambda i: sizes[i])
    results: dict[int, Search | str] = {}
    while order:
        batch = [order.pop(0)]
        while order and (len(batch) + 1) * sizes[order[0]] <= BUDGET:
            batch.append(order.pop(0))
        found = editing.together(
            lambda part: _search(lm, *zip(*part, strict=True), settings), [(groups[i], same[i]) for i in batch]
        )
        results |= zip(batch, found, strict=True)
    return [_none(lm, result) if isinstance(result, str) else result for _, result in sorted(results.items())]


def prompts(lm: LM, request: Query, settings: HParams, seed: int = 0) -> list[tuple[tokens.Encoded, int]]:
    """Return all that a search reads of a request, the prompts of `contexts` as token ids with the new answer as their
    target, and the position of the subject's last token in each."""
    queries = contexts(request, settings.prefixes, seed)
    return [(tokens.encode(lm, query, query.foil), tokens.span(lm, query, query.foil)[1]) for query in queries]


def contexts(request: Query, n: int, seed: int = 0) -> list[Query]:
    """Return the request alone, after each of n pieces of prose, and the question what the subject is.

    Raises ValueError for a request without a subject or a new answer, and more pieces than there are.
    """
    editing.requests([request])
    if not request.subject:
        raise ValueError(f"the request {request.prompt!r} has no subject; give the part of it that the edit is about")
    passages = prose.passages()
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


def _search(
    lm: LM, groups: Sequence[Sequence[tuple[tokens.Encoded, int]]], same: Sequence[str], settings: HParams
) -> list[Search]:
    """Search v* for requests together, of what `prompts` and `editing.same` give for each."""
    n, each = len(groups), len(groups[0])
    encoded = [
        e if lm.spec.masked or i == each - 1 else replace(e, ids=e.ids + e.target[:-1])
        for group in groups
        for i, (e, _) in enumerate(group)
    ]
    positions = [position for group in groups for _, position in group]
    captured = capture(lm, encoded, ("neuron", "mlp"), start=positions, at=positions)
    keys = captured.sites["neuron"][settings.block].float().unflatten(0, (n, each))
    values = captured.sites["mlp"][settings.block]
    by_request = zip(same, keys, values.unflatten(0, (n, each)), strict=True)
    failed = [_unfit(lm, settings.block, *of_request) for of_request in by_request]
    positions, value = torch.tensor(positions, device=lm.device), values[::each].float()
    change = torch.zeros_like(value, requires_grad=True)
    limit = settings.clamp * value.norm(dim=1, keepdim=True)

    def evaluate(active: Int[Tensor, " active"], step: int, whole: Tensor) -> tuple[Float[Tensor, " active"], ...]:
        asked, kl = _asked(whole, step, each, settings)
        owner, prompt = asked.nonzero(as_tuple=True)
        rows = active[owner] * each + prompt
        shifted = values[rows] + change[active[owner]].to(values.dtype)
        changed = Change(settings.block, rows, shifted, "mlp", positions[rows])
        losses, drift, says = _losses(captured, encoded, changed, owner, prompt == each - 1)
        decay = settings.decay * (change[active].norm(dim=1) if step else 0) / value[active].norm(dim=1) ** 2
        return losses, losses + kl * drift + decay, says

    def bound(active: Int[Tensor, " active"]) -> Bool[Tensor, " active"]:
        size = change.double().norm(dim=1, keepdim=True)  # in float32 a large one is infinite
        change.mul_((limit / size.clamp_min(1e-12)).clamp_max(1))
        return (value + change)[active].to(values.dtype).isfinite().all(1)

    searched = torch.tensor([i for i, why in enumerate(failed) if not why], dtype=torch.long, device=lm.device)
    rotating = settings.search == "rotating"
    move = _newton(change, limit, settings.stop) if rotating else None
    found, steps, before, loss = editing.descend(change, searched, settings, evaluate, bound, move)
    site, length = f"block {settings.block} at the subject", "clamp" if rotating else "rate"
    return [
        Search(
            keys[i, 0], keys[i, :-1].mean(0), value[i], found[i], int(steps[i]),
            float((-before[i]).exp()), float((-loss[i]).exp()),
            failed[i] or editing.verdict(found[i], loss[i], int(steps[i]), "the search", site, length),
        )
        for i in range(n)
    ]  # fmt: skip


def _asked(
    whole: Bool[Tensor, " request"], step: int, each: int, settings: HParams
) -> tuple[Bool[Tensor, "request prompt"], float]:
    """Return which of its `each` prompts a request is asked at a step, all that have the answer where it is `whole`;
    and the weight of the divergence that is read at the last prompt, the essence."""
    asked, kl = whole[:, None].repeat(1, each), settings.kl
    if settings.search == "rotating":
        asked[:, 0] = True
        asked[:, 1 + step % max(1, each - 2)] = True  # without prefixes the essence, which is set below
        kl *= 4 * (step % 4 == 1)  # before the first step there is no divergence
    asked[:, -1] = kl > 0
    return asked, kl


def _newton(
    change: Float[Tensor, "request hidden"], limit: Float[Tensor, "request 1"], stop: float
) -> Callable[[Tensor, Tensor, int], None]:
    """Return how to move the `change` of some requests, given their losses, by Newton's rule for the log-odds of the
    target: against the gradient, as far as a straight line has to go to those of a loss of `GOAL` · `stop`.

    No step is longer than a share of the `limit`, which falls from step to step, for each sees other prompts; a part of
    the step before is added.
    """
    last = torch.zeros_like(change)

    def odds(loss: Tensor) -> Tensor:
        return -loss - torch.log(-torch.expm1(-loss))

    @torch.no_grad()
    def move(requests: Int[Tensor, " some"], losses: Float[Tensor, " some"], step: int) -> None:
        gradient, losses = change.grad[requests], losses[:, None]
        size = gradient.norm(dim=1, keepdim=True)
        missing = (odds(torch.full_like(losses, GOAL * stop)) - odds(losses)).clamp_min(0)
        length = (missing * -torch.expm1(-losses) / size).nan_to_num(0)  # the log-odds rise by size / (1 - P)
        longest = limit[requests] * FIRST / (1 + FALL * step)
        direction = torch.where(size == 0, 0, gradient / size)
        last[requests] = MOMENTUM * last[requests] - torch.minimum(length, longest) * direction
        change[requests] += last[requests]

    return move


def _losses(
    captured: Capture,
    encoded: Sequence[tokens.Encoded],
    changed: Change,
    owner: Int[Tensor, " row"],
    asks_essence: Bool[Tensor, " row"],
) -> tuple[Float[Tensor, " request"], Float[Tensor, " request"], Bool[Tensor, " request"]]:
    """Return, of requests that own the rows of a change, the loss, the divergence of the essence where a row asks for
    it (else 0), and whether the model says the answer."""
    lm, target, rows = captured.lm, captured.target, changed.prompts
    out = states(captured, [changed])
    asked = enumerate(zip(rows.tolist(), asks_essence.tolist(), strict=True))
    answers = [(row, int(target[i]), encoded[i].target) for row, (i, essence) in asked if not essence]
    losses, says = editing.likelihood(lm, out, answers, owner)
    last = asks_essence.nonzero()[:, 0]
    essence = lm.readout(out[last, target[rows[last]]]).float().log_softmax(-1)
    before = captured.logits[rows[last]].log_softmax(-1)
    drift = (essence.exp() * (essence - before)).sum(1)
    return losses, torch.zeros_like(losses).index_add(0, owner[last], drift), says


def _unfit(lm: LM, block: int, same: str, keys: Tensor, values: Tensor) -> str:
    """Return why there is nothing to search, from what the unedited model has at the prompts of one request; or ""."""
    if same:
        return same
    if not bool(keys.isfinite().all() & values.isfinite().all()):
        return f"the states of {lm.name} at the subject are not numbers; check its weights, or load it in a wider dtype"
    if not bool(keys[0].any() & keys[:-1].mean(0).any()):
        return f"the neurons of block {block} are zero at the subject: nothing can be stored under this key"
    if not bool(values[0].any()):
        return f"block {block} adds nothing at the subject: no change is within the clamp, a multiple of its size"
    return ""


def delta(found: Search, covariance: Moment | Factor, block: int, key: str = HParams.key) -> Delta:
    """Return the rank-one change that stores v* = Wᵀk + δ under a key k: u δᵀ / (kᵀu), with u = C⁻¹k.

    key: "bare", that of the request alone, so that the request gets exactly v*; "mean", that averaged over prefixes;
        "published", the mix of the published implementation, u from the mean key and kᵀu with the bare one.

    The mix stores v* under the bare key too, but where the two keys part the change is larger, and moves other keys
    more; a warning says so. They part where the subject begins the prompt, unless the model reads a start token: the
    state of the first token tells its place rather than the word (an attention sink), and without a space before it
    many a name is other tokens. They part, too, for words that mean little without their context, such as determiners.
    There the bare key reaches fewer paraphrases, and the mean key misses requests: of determiners, half.

    Without a covariance C is the identity. Raises ValueError for a search that failed, an unknown key, a covariance
    that is singular or of another width, a key that is zero, and numbers that are not finite.
    """
    if key not in KEYS:
        raise checks.unknown("key", key, KEYS)
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


def alike(found: Search, covariance: Moment) -> tuple[float, float]:
    """Return how far the two keys of a request agree: their cosine, and kᵀu of the key of the request alone as a share
    of that of the mean key, with u = C⁻¹k̄ of the mean key. By the inverse of this share the published mix makes the
    change larger than the mean key does. Raises ValueError as `kncore.covariance.solve` does."""
    return _alike(found, solve(covariance, found.mean_key[None])[0])


def _alike(found: Search, direction: Tensor) -> tuple[float, float]:
    bare, mean = found.key.double(), found.mean_key.double()
    return float(torch.cosine_similarity(bare, mean, dim=0)), float((bare @ direction) / (mean @ direction))
