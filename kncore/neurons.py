"""From attribution scores to knowledge neurons: coarse and refined sets, similarity, and what value vectors promote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kncore import arch, checks, tokens
from kncore.models import LM
from kncore.replay import record


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
    """Return neurons as pairs of Python ints, in their order, from pairs or a two-column array of whole numbers.

    Raises ValueError for none, for one that `name` (of `n_blocks` blocks of `width` neurons) does not have and, with
    `once`, for one that is given twice.
    """
    if isinstance(given, np.ndarray | torch.Tensor):
        given = given.tolist()
    if not isinstance(given, Iterable):
        raise ValueError(f"expected a list of neurons, pairs (block, index), got {given!r:.80}")
    neurons: list[Neuron] = []
    for pair in given:
        pair = tuple(pair) if isinstance(pair, Iterable) else (pair,)
        try:
            neurons.append(Neuron(*(checks.whole(x, "block and index") for x in pair)))
        except (ValueError, TypeError):
            raise ValueError(f"a neuron is a pair (block, index) of whole numbers, got {pair}") from None
    if not neurons:
        raise ValueError("no neurons given (or an iterator that is used up); the set must not be empty")
    for neuron, count in Counter(neurons).items():
        if not (0 <= neuron.block < n_blocks and 0 <= neuron.index < width):
            raise ValueError(
                f"neuron {tuple(neuron)} does not exist; {name} has blocks 0 to {n_blocks - 1}, "
                f"neurons 0 to {width - 1}"
            )
        if once and count > 1:
            raise ValueError(f"neuron {tuple(neuron)} is given twice")
    return neurons


def coarse(scores: Float[Tensor, "query block neuron"], threshold: float = 0.2) -> Tensor:
    """Return which neurons score above `threshold` times the largest score of their own prompt; boolean, same shape.

    Raises ValueError for scores of another shape or not finite, and for a threshold that is not from 0 to below 1.
    """
    scores = checks.tensor(scores, "query block neuron", "scores")
    threshold = checks.share(threshold, "threshold")
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
    """Return the refined neurons of prompts that share a fact or phenomenon (Dai et al. 2022, section 3.3).

    A neuron is refined if it is in the coarse set of more than a share `p` of the prompts. p moves by `step`, down
    while too few neurons remain and up while too many, until between `at_least` and `at_most` do. The search ends
    after `moves` moves, at the ends of [0, 1], or when it turns back, and then says that it did not converge and
    returns the set it ended with. Neurons come with the largest share first, ties by their mean score.

    Raises ValueError for scores and thresholds as `coarse` does, and for a `p` that is not from 0 to below 1, a `step`
    not between 0 and 1, and limits that are not whole numbers, 1 <= at_least <= at_most and moves >= 0.
    """
    inside = coarse(scores, threshold)
    start, step = checks.share(p, "p"), checks.share(step, "step")
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


def _moved(start: float, moves: int, step: float) -> float:
    return round(start + moves * step, 12)  # 0.7 - 14 * 0.05 is 0, which floating point misses


def top(scores: Float[Tensor, "block neuron"], k: int = 10) -> list[tuple[Neuron, float]]:
    """Return the k neurons with the largest scores, largest first; all of them where there are fewer.

    Raises ValueError for scores of another shape or that are not finite, and for a k below 1.
    """
    scores = checks.tensor(scores, "block neuron", "scores")
    values, flat = scores.flatten().topk(min(checks.whole(k, "k", 1), scores.numel()))
    return [(Neuron(*divmod(i, scores.shape[1])), v) for i, v in zip(flat.tolist(), values.tolist(), strict=True)]


def gram(vectors: Float[Tensor, "vector width"]) -> Float[Tensor, "vector vector"]:
    """Return the cosines between vectors, in float64. Raises ValueError where one of them is zero or not finite."""
    vectors = checks.tensor(vectors, "vector width", "vectors").double()
    size = vectors.abs().amax(1, keepdim=True)  # divided by first, so that no square overflows or vanishes
    zero = (size == 0).nonzero()[:, 0].tolist()
    if zero:
        raise ValueError(f"vectors {zero} are zero: they have no direction; leave them out")
    rows = torch.nn.functional.normalize(vectors / size)
    return rows @ rows.T


def similarity(vectors: Float[Tensor, "vector width"]) -> float:
    """Return R₁², how much n attribution vectors point along one line (Niu et al. 2024, section 3).

    Rows are normalised; with s₁ the largest singular value, R₁² = (s₁² − 1)/(n − 1): 1 if they are identical up to
    sign, 0 if orthogonal, and `|cos|` of the angle for n = 2. Raises ValueError for fewer than two vectors, and as
    `gram` does.
    """
    cosines = gram(vectors)
    return float(similarity_of_sets(cosines, [range(len(cosines))])[0])


def similarity_of_sets(cosines: Float[Tensor, "vector vector"], sets: Sequence[Sequence[int]]) -> Float[Tensor, " set"]:
    """Return R₁² of sets of one size, each a list of rows of the Gram matrix `cosines` (its largest eigenvalue is s₁²).

    Raises ValueError for a matrix that is not one of cosines, for sets of unlike sizes or fewer than two members, and
    for a row that does not exist or comes twice in a set.
    """
    cosines = checks.tensor(cosines, "vector vector", "cosines")
    square = cosines.shape[0] == cosines.shape[1] and torch.allclose(cosines, cosines.T, atol=1e-5)
    if not square or not torch.allclose(cosines.diagonal(), torch.ones_like(cosines[0]), atol=1e-5):
        raise ValueError(f"expected a square matrix of cosines, as `gram` gives; got shape {tuple(cosines.shape)}")
    sets = [[checks.whole(row, "a row", 0, len(cosines) - 1) for row in members] for members in sets]
    if len({len(members) for members in sets}) != 1 or len(sets[0]) < 2:
        raise ValueError("R₁² compares two or more vectors; give sets of one size, of at least two")
    for members in sets:
        if len(set(members)) < len(members):
            raise ValueError(f"set {members} holds a vector twice; it would be compared with itself")
    rows = torch.tensor(sets, device=cosines.device)
    parts = cosines[rows[:, :, None], rows[:, None, :]]
    return (torch.linalg.eigvalsh(parts)[:, -1] - 1) / (rows.shape[1] - 1)


def promoted(lm: LM, neuron: Neuron, k: int = 8, sign: int = 1) -> list[str]:
    """Return the k tokens whose logits the value vector of a neuron raises most (lowers most, for sign −1), as words.

    The value vector read through the head, without the rest of the network (Geva et al. 2021); tokens that are no text
    by themselves are passed over. Causal models only: the head of a masked model is not linear in it. Raises ValueError
    for a neuron that does not exist, a k below 1, another sign, and weights that are not finite.
    """
    if lm.spec.masked:
        raise ValueError(f"{lm.name} is masked: its head is a network, through which no value vector is read directly")
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
    """Return where in texts each neuron is most active, without regard to sign: its k top tokens, at most one a text.

    The first token of a text is passed over (it has no context, and in many models enormous activations of its own),
    and so are special tokens. `words` says how many words before the token are kept. Raises ValueError for no texts or
    neurons, a neuron that does not exist, and a text of fewer than two tokens or longer than the context.
    """
    texts = checks.items(texts, str, "texts", 1)
    k, words, batch = (checks.whole(x, what, 1) for x, what in ((k, "k"), (words, "words"), (batch, "batch")))
    neurons = listed(neurons, len(lm.blocks), lm.n_neurons, lm.name, once=False)
    special = torch.tensor(lm.tokenizer.all_special_ids, dtype=torch.long, device=lm.device)
    found: dict[Neuron, list[Context]] = {neuron: [] for neuron in neurons}
    for i in range(0, len(texts), batch):
        ids, lengths = tokens.pad_texts(lm, texts[i : i + batch])
        real = tokens.real_tokens(ids, lengths)
        shown = real & (torch.arange(ids.shape[1], device=lm.device) > 0) & ~torch.isin(ids, special)
        states, _ = record(lm, ids, lengths, [(neuron.block, "neuron") for neuron in neurons])
        for neuron, contexts_of_neuron in found.items():
            activation = states[neuron.block, "neuron"][..., neuron.index].float()
            if not bool(torch.isfinite(activation[real]).all()):
                raise ValueError(f"neuron {tuple(neuron)} is not a number in some text; check the weights of {lm.name}")
            _, positions = activation.abs().masked_fill(~shown, -1).max(1)
            for row, position in enumerate(positions.tolist()):
                if bool(shown[row, position]):  # else there are only special tokens after the first
                    before = lm.tokenizer.decode(ids[row, :position], skip_special_tokens=True).split()[-words:]
                    token = lm.tokenizer.decode(ids[row, position : position + 1])
                    value = float(activation[row, position])
                    contexts_of_neuron.append(Context(" ".join(before), token.strip(), value))
    return {neuron: sorted(places, key=lambda c: -abs(c.activation))[:k] for neuron, places in found.items()}
