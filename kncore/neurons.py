"""From attribution scores to knowledge neurons: coarse and refined sets, similarity, and what value vectors promote."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kncore import arch, tokens
from kncore.models import LM


class Neuron(NamedTuple):
    """Coordinate `index` of the neuron site of block `block`."""

    block: int
    index: int


class Found(NamedTuple):
    """Refined neurons, with the share of prompts each is in the coarse set of.

    `p` is the share at which the search ended, `converged` whether between `at_least` and `at_most` neurons remained.
    """

    neurons: list[Neuron]
    shares: list[float]
    p: float
    converged: bool


def coarse(scores: Float[Tensor, "query block neuron"], threshold: float = 0.2) -> Tensor:
    """Which neurons score above `threshold` times the largest score of their own prompt; boolean, same shape."""
    if scores.dim() != 3:
        raise ValueError(f"scores have shape {tuple(scores.shape)}, expected query, block, neuron")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores are not all finite; recompute them before looking for neurons")
    return scores > threshold * scores.amax((1, 2), keepdim=True).clamp_min(0)


def find_neurons(
    scores: Float[Tensor, "query block neuron"],
    *,
    threshold: float = 0.2,
    p: float = 0.7,
    step: float = 0.05,
    at_least: int = 2,
    at_most: int = 5,
    moves: int = 20,
) -> Found:
    """Refined neurons of prompts that share a fact or phenomenon (Dai et al. 2022, section 3.3; Niu et al. 2024).

    A neuron is refined if it is in the coarse set of more than a share `p` of the prompts. p moves by `step`, down
    while too few neurons remain and up while too many, until between `at_least` and `at_most` do. The search ends
    after `moves` moves, at the ends of [0, 1], or when it turns back, and then says that it did not converge and
    returns the set it ended with. Neurons come with the largest share first, ties by their mean score.
    """
    inside = coarse(scores, threshold)
    if not len(inside):
        raise ValueError("no prompts to find neurons in; give the scores of at least one")
    share = inside.float().mean(0)
    tick, direction = round(p / step), 0
    for _ in range(moves + 1):
        p = tick * step
        count = int((share > p + 1e-6).sum())
        turn = -1 if count < at_least else 1 if count > at_most else 0
        if turn == 0 or turn == -direction or not 0 <= (tick + turn) * step < 1:
            break
        tick, direction = tick + turn, turn
    kept = (share > p + 1e-6).nonzero().tolist()
    mean = scores.mean(0)
    kept.sort(key=lambda at: (-float(share[*at]), -float(mean[*at])))
    return Found([Neuron(*at) for at in kept], [float(share[*at]) for at in kept], p, turn == 0)


def top(scores: Float[Tensor, "block neuron"], k: int = 10) -> list[tuple[Neuron, float]]:
    """The k neurons with the largest scores, largest first."""
    values, places = scores.flatten().topk(min(k, scores.numel()))
    return [(Neuron(*divmod(i, scores.shape[1])), v) for i, v in zip(places.tolist(), values.tolist(), strict=True)]


def gram(vectors: Float[Tensor, "vector width"]) -> Float[Tensor, "vector vector"]:
    """Cosines of the angles between vectors. Raises ValueError where one of them is zero or not finite."""
    norms = vectors.double().norm(dim=1, keepdim=True)
    bad = (~(norms[:, 0] > 0) | ~torch.isfinite(norms[:, 0])).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"vectors {bad} are zero or not finite: they have no direction; leave them out")
    rows = vectors / norms.to(vectors.dtype)
    return (rows @ rows.T).double()


def similarity(vectors: Float[Tensor, "vector width"]) -> float:
    """R₁²: how much n attribution vectors point along one line (Niu et al. 2024, section 3).

    Rows are normalised; with s₁ the largest singular value, R₁² = (s₁² − 1)/(n − 1): 1 if they are identical up to
    sign, 0 if orthogonal, and |cos| of the angle for n = 2. Raises ValueError for fewer than two vectors or a zero one.
    """
    return float(similarity_of_sets(gram(vectors), [range(len(vectors))])[0])


def similarity_of_sets(cosines: Float[Tensor, "vector vector"], sets: Sequence[Sequence[int]]) -> Float[Tensor, " set"]:
    """R₁² of sets of one size, each a list of places in the Gram matrix `cosines` (its largest eigenvalue is s₁²)."""
    places = torch.tensor([list(members) for members in sets])
    if places.dim() != 2 or places.shape[1] < 2:
        raise ValueError("R₁² compares two or more vectors; give sets of one size, of at least two")
    parts = cosines[places[:, :, None], places[:, None, :]]
    return (torch.linalg.eigvalsh(parts)[:, -1] - 1) / (places.shape[1] - 1)


def per_block(neurons: Sequence[Neuron], n_blocks: int) -> Int[Tensor, " block"]:
    """How many of the neurons lie in each block."""
    return torch.bincount(torch.tensor([n.block for n in neurons], dtype=torch.long), minlength=n_blocks)


def promoted(lm: LM, neuron: Neuron, k: int = 8, sign: int = 1) -> list[str]:
    """The k tokens whose logits the value vector of a neuron raises most (lowers most, for sign −1), as words.

    The value vector read through the head, without the rest of the network (Geva et al. 2021). Tokens that
    are no text by themselves (parts of a character, white space) are passed over. Causal models only: the head of a
    masked model is not linear in it.
    """
    if lm.spec.masked:
        raise ValueError(
            f"{lm.name} is masked: its head is a network of its own, value vectors cannot be read directly"
        )
    vector = arch.value_vectors(lm.model, lm.spec, neuron.block)[neuron.index]
    norm = arch.module_at(lm.model, lm.spec.norm, "final norm")
    if isinstance(norm, torch.nn.LayerNorm):
        vector = vector - vector.mean()
    head = arch.module_at(lm.model, lm.spec.head, "language-model head")
    logits = head.weight.float() @ (vector * norm.weight).float()
    words = (lm.tokenizer.decode([i]).strip() for i in (sign * logits).argsort(descending=True).tolist())
    return list(islice((word for word in words if word and "\ufffd" not in word), k))


class Context(NamedTuple):
    """A place in a text: the words before a token and the token, with the activation of a neuron there."""

    before: str
    token: str
    activation: float


def contexts(
    lm: LM, texts: Sequence[str], neurons: Sequence[Neuron], k: int = 5, words: int = 4, batch: int = 20
) -> dict[Neuron, list[Context]]:
    """Where in texts each neuron is most active, without regard to sign: its k top tokens, at most one a text.

    The first token of a text is passed over: it has no context, and in many models enormous activations of its own;
    special tokens are too. `words` (at least 1) says how many words before the token are kept. Raises ValueError for no
    texts or neurons, a neuron that does not exist, and a text of fewer than two tokens or longer than the context.
    """
    if not texts or not neurons or words < 1:
        raise ValueError("give at least one text and one neuron, and one word of context or more")
    for block, index in neurons:
        if not (0 <= block < len(lm.blocks) and 0 <= index < lm.n_neurons):
            raise ValueError(
                f"neuron {(block, index)} does not exist; {lm.name} has blocks 0 to {len(lm.blocks) - 1}, neurons 0 to "
                f"{lm.n_neurons - 1}"
            )
    special = torch.tensor(lm.tokenizer.all_special_ids, dtype=torch.long, device=lm.device)
    limit = getattr(lm.model.config, "max_position_embeddings", None) or float("inf")
    found: dict[Neuron, list[Context]] = {neuron: [] for neuron in neurons}
    by_block = {block: [n for n in neurons if n[0] == block] for block in {n[0] for n in neurons}}
    for i in range(0, len(texts), batch):
        encoded = [tokens.Encoded(tuple(lm.tokenizer(text)["input_ids"]), 0, ()) for text in texts[i : i + batch]]
        ids, lengths = tokens.pad(lm, encoded)
        if bool((lengths < 2).any()):
            raise ValueError(f"text {texts[i + int(lengths.argmin())][:40]!r} has fewer than two tokens: no context")
        if ids.shape[1] > limit:
            text = texts[i + int(lengths.argmax())]
            raise ValueError(f"text {text[:40]!r} has {ids.shape[1]} tokens, the context of {lm.name} is {limit}")
        place = torch.arange(ids.shape[1], device=lm.device)
        real = place < lengths[:, None]
        shown = real & (place > 0) & ~torch.isin(ids, special)
        seen: dict[Neuron, Tensor] = {}

        def see(x, members):
            seen.update({neuron: x[..., neuron[1]].float() for neuron in members})  # noqa: B023 (used in this turn)

        with torch.no_grad(), contextlib.ExitStack() as hooks:
            for block, members in by_block.items():
                read = partial(see, members=members)
                hooks.enter_context(arch.at_site(lm.blocks[block], lm.spec.sites["neuron"], read))
            lm.model.base_model(input_ids=ids, attention_mask=real.long())
        for neuron, activation in seen.items():
            _, places = activation.abs().masked_fill(~shown, -1).max(1)
            for row, at in enumerate(places.tolist()):
                if not bool(shown[row, at]):
                    continue  # nothing but special tokens after the first
                before = lm.tokenizer.decode(ids[row, :at], skip_special_tokens=True).split()[-words:]
                token = lm.tokenizer.decode(ids[row, at : at + 1])
                found[neuron].append(Context(" ".join(before), token.strip(), float(activation[row, at])))
    return {neuron: sorted(some, key=lambda c: -abs(c.activation))[:k] for neuron, some in found.items()}
