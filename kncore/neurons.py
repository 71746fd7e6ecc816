"""From attribution scores to knowledge neurons: coarse and refined sets, similarity, and what value vectors promote."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kncore import arch, checks, tokens
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


def listed(given: Iterable, n_blocks: int, width: int, name: str, once: bool = True) -> list[Neuron]:
    """Neurons as pairs of Python ints, from pairs or a two-column array or tensor of whole numbers, in their order.

    Raises ValueError for none, for one that `name` (of `n_blocks` blocks of `width` neurons) does not have and, with
    `once`, for one that is given twice.
    """
    if isinstance(given, np.ndarray | torch.Tensor):
        given = given.tolist()
    if not isinstance(given, Iterable):
        raise ValueError(f"expected a list of neurons, pairs (block, index), got {given!r:.80}")
    found, seen = [], set()
    for neuron in given:
        neuron = tuple(neuron) if isinstance(neuron, Iterable) else (neuron,)
        try:
            if len(neuron) != 2:
                raise ValueError
            neuron = Neuron(*(checks.whole(x, "block and index") for x in neuron))
        except ValueError:
            raise ValueError(f"a neuron is a pair (block, index) of whole numbers, got {neuron}") from None
        if not (0 <= neuron.block < n_blocks and 0 <= neuron.index < width):
            raise ValueError(
                f"neuron {tuple(neuron)} does not exist; {name} has blocks 0 to {n_blocks - 1}, "
                f"neurons 0 to {width - 1}"
            )
        if once and neuron in seen:
            raise ValueError(f"neuron {tuple(neuron)} is given twice")
        found.append(neuron)
        seen.add(neuron)
    if not found:
        raise ValueError("no neurons given (or an iterator that is used up); the set must not be empty")
    return found


def coarse(scores: Float[Tensor, "query block neuron"], threshold: float = 0.2) -> Tensor:
    """Which neurons score above `threshold` times the largest score of their own prompt; boolean, same shape.

    Raises ValueError for scores of another shape or that are not finite, and for a threshold that is not from 0 to
    below 1: nothing is above the largest score.
    """
    scores = checks.tensor(scores, "query block neuron", "scores")
    threshold = _share(threshold, "threshold")
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

    Raises ValueError for scores and thresholds as `coarse` does, a `p` that is not from 0 to below 1, a `step` that is
    not between 0 and 1, and limits that are not whole numbers, 1 <= at_least <= at_most and moves >= 0.
    """
    inside = coarse(scores, threshold)
    start, step = _share(p, "p"), _share(step, "step")
    if not step:
        raise ValueError("step is 0, so p would never move; give a number between 0 and 1")
    at_least = checks.whole(at_least, "at_least", 1)
    at_most, moves = checks.whole(at_most, "at_most", at_least), checks.whole(moves, "moves", 0)
    share = inside.float().mean(0)
    moved, direction = 0, 0
    for _ in range(moves + 1):
        p = _moved(start, moved, step)
        count = int((share > p + 1e-6).sum())
        turn = -1 if count < at_least else 1 if count > at_most else 0
        if turn == 0 or turn == -direction or not 0 <= _moved(start, moved + turn, step) < 1:
            break
        moved, direction = moved + turn, turn
    kept = (share > p + 1e-6).nonzero().tolist()
    mean = torch.as_tensor(scores).double().mean(0)
    kept.sort(key=lambda at: (-float(share[*at]), -float(mean[*at])))
    return Found([Neuron(*at) for at in kept], [float(share[*at]) for at in kept], p, turn == 0)


def _share(x, what: str) -> float:
    share = checks.finite(x, what)
    if not 0 <= share < 1:
        raise ValueError(f"{what} must be from 0 to below 1, got {share:g}")
    return share


def _moved(start: float, moves: int, step: float) -> float:
    return round(start + moves * step, 12)  # 0.7 - 14 * 0.05 is 0, which floating point misses


def top(scores: Float[Tensor, "block neuron"], k: int = 10) -> list[tuple[Neuron, float]]:
    """The k neurons with the largest scores, largest first; all of them where there are fewer.

    Raises ValueError for scores of another shape or that are not finite, and for a k below 1.
    """
    scores = checks.tensor(scores, "block neuron", "scores")
    values, places = scores.flatten().topk(min(checks.whole(k, "k", 1), scores.numel()))
    return [(Neuron(*divmod(i, scores.shape[1])), v) for i, v in zip(places.tolist(), values.tolist(), strict=True)]


def gram(vectors: Float[Tensor, "vector width"]) -> Float[Tensor, "vector vector"]:
    """Cosines of the angles between vectors, in float64. Raises ValueError where one of them is zero or not finite."""
    try:
        vectors = torch.as_tensor(vectors)
        vectors = vectors if vectors.is_complex() else vectors.double()
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"expected vectors of one width: {str(error).splitlines()[0]}") from error
    if vectors.dim() != 2 or not vectors.shape[1] or vectors.is_complex():
        raise ValueError(f"vectors are {vectors.dtype}, shape {tuple(vectors.shape)}; expected real, (vector, width)")
    size = vectors.abs().amax(1, keepdim=True)  # divided by first, so that no square overflows or vanishes
    bad = (~((size > 0) & torch.isfinite(size))).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"vectors {bad} are zero or not finite: they have no direction; leave them out")
    rows = torch.nn.functional.normalize(vectors / size)
    return rows @ rows.T


def similarity(vectors: Float[Tensor, "vector width"]) -> float:
    """R₁²: how much n attribution vectors point along one line (Niu et al. 2024, section 3).

    Rows are normalised; with s₁ the largest singular value, R₁² = (s₁² − 1)/(n − 1): 1 if they are identical up to
    sign, 0 if orthogonal, and |cos| of the angle for n = 2. Raises ValueError for fewer than two vectors or a zero one.
    """
    cosines = gram(vectors)
    return float(similarity_of_sets(cosines, [range(len(cosines))])[0])


def similarity_of_sets(cosines: Float[Tensor, "vector vector"], sets: Sequence[Sequence[int]]) -> Float[Tensor, " set"]:
    """R₁² of sets of one size, each a list of places in the Gram matrix `cosines` (its largest eigenvalue is s₁²).

    Raises ValueError for a matrix that is not one of cosines, and for sets of unlike sizes or fewer than two members,
    a place that does not exist, and a place that comes twice in a set.
    """
    cosines = checks.tensor(cosines, "vector vector", "cosines")
    ones = torch.ones_like(cosines[:, :1])[:, 0]
    if cosines.shape[0] != cosines.shape[1] or not (
        torch.allclose(cosines, cosines.T, atol=1e-5) and torch.allclose(cosines.diagonal(), ones, atol=1e-5)
    ):
        raise ValueError(f"expected a square matrix of cosines, as `gram` gives; got shape {tuple(cosines.shape)}")
    sets = [[checks.whole(place, "a place", 0, len(cosines) - 1) for place in members] for members in sets]
    if len({len(members) for members in sets}) != 1 or len(sets[0]) < 2:
        raise ValueError("R₁² compares two or more vectors; give sets of one size, of at least two")
    for members in sets:
        if len(set(members)) < len(members):
            raise ValueError(f"set {members} holds a vector twice; it would be compared with itself")
    places = torch.tensor(sets, device=cosines.device)
    parts = cosines[places[:, :, None], places[:, None, :]]
    return (torch.linalg.eigvalsh(parts)[:, -1] - 1) / (places.shape[1] - 1)


def per_block(neurons: Sequence[Neuron], n_blocks: int) -> Int[Tensor, " block"]:
    """How many of the neurons lie in each of `n_blocks` blocks. Raises ValueError for a neuron that lies in none."""
    n_blocks = checks.whole(n_blocks, "n_blocks", 1)
    blocks = [checks.whole(block, "the block of a neuron", 0, n_blocks - 1) for block, _ in neurons]
    return torch.bincount(torch.tensor(blocks, dtype=torch.long), minlength=n_blocks)


def promoted(lm: LM, neuron: Neuron, k: int = 8, sign: int = 1) -> list[str]:
    """The k tokens whose logits the value vector of a neuron raises most (lowers most, for sign −1), as words.

    The value vector read through the head, without the rest of the network (Geva et al. 2021). Tokens that
    are no text by themselves (parts of a character, white space) are passed over. Causal models only: the head of a
    masked model is not linear in it. Raises ValueError for a neuron that does not exist, a k below 1, another sign, and
    weights that are not finite.
    """
    if lm.spec.masked:
        raise ValueError(
            f"{lm.name} is masked: its head is a network of its own, value vectors cannot be read directly"
        )
    ((block, index),) = listed([neuron], len(lm.blocks), lm.n_neurons, lm.name)
    k, sign = checks.whole(k, "k", 1), checks.whole(sign, "sign")
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 (raised most) or -1 (lowered most), got {sign}")
    vector = arch.value_vectors(lm.model, lm.spec, block)[index]
    norm = arch.module_at(lm.model, lm.spec.norm, "final norm")
    if isinstance(norm, torch.nn.LayerNorm):
        vector = vector - vector.mean()
    head = arch.module_at(lm.model, lm.spec.head, "language-model head")
    logits = head.weight.float() @ (vector * norm.weight).float()
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"neuron {(block, index)} raises logits by what is no number; check the weights of {lm.name}")
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
    texts = checks.items(texts, str, "texts")
    if not texts:
        raise ValueError("no texts to look in; give at least one")
    k, words, batch = (checks.whole(x, what, 1) for x, what in ((k, "k"), (words, "words"), (batch, "batch")))
    neurons = listed(neurons, len(lm.blocks), lm.n_neurons, lm.name, once=False)
    special = torch.tensor(lm.tokenizer.all_special_ids, dtype=torch.long, device=lm.device)
    found: dict[Neuron, list[Context]] = {neuron: [] for neuron in neurons}
    by_block = {block: [n for n in neurons if n[0] == block] for block in {n[0] for n in neurons}}
    for i in range(0, len(texts), batch):
        encoded = [tokens.Encoded(tuple(tokens.read(lm, text)), 0, ()) for text in texts[i : i + batch]]
        ids, lengths = tokens.pad(lm, encoded)
        if bool((lengths < 2).any()):
            raise ValueError(f"text {texts[i + int(lengths.argmin())][:40]!r} has fewer than two tokens: no context")
        tokens.check_length(lm, ids.shape[1], f"text {texts[i + int(lengths.argmax())][:40]!r}")
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
            if not bool(torch.isfinite(activation[real]).all()):
                raise ValueError(f"neuron {tuple(neuron)} is not a number in some text; check the weights of {lm.name}")
            _, places = activation.abs().masked_fill(~shown, -1).max(1)
            for row, at in enumerate(places.tolist()):
                if not bool(shown[row, at]):
                    continue  # nothing but special tokens after the first
                before = lm.tokenizer.decode(ids[row, :at], skip_special_tokens=True).split()[-words:]
                token = lm.tokenizer.decode(ids[row, at : at + 1])
                found[neuron].append(Context(" ".join(before), token.strip(), float(activation[row, at])))
    return {neuron: sorted(some, key=lambda c: -abs(c.activation))[:k] for neuron, some in found.items()}
