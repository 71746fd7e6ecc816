"""Coarse and refined sets where the answer is known, similarity against singular values, value vectors by hand."""

from fractions import Fraction

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kncore import arch
from kncore.neurons import Neuron, coarse, contexts, find_neurons, gram, promoted, similarity, similarity_of_sets, top


def scores_with(shares, n=20, width=4):
    """Scores of n prompts, in which the k-th neuron is in the coarse set of a share `shares[k]` of them."""
    blocks = -(-len(shares) // width)
    flat = torch.zeros(n, blocks * width)
    for k, share in enumerate(shares):
        assert abs(share * n - round(share * n)) < 1e-9
        flat[: round(share * n), k] = 1.0
    return flat.reshape(n, blocks, width)


def at(*places, width=4):
    return [Neuron(*divmod(k, width)) for k in places]


# Coarse sets


def test_coarse_sets_by_hand():
    scores = torch.tensor(
        [
            [[1.0, 0.2, 0.21], [0.0, -5.0, 0.5]],  # threshold 0.2: 0.2 itself is not above it
            [[10.0, 1.0, 2.1], [0.0, -0.5, 9.0]],
            [[-1.0, -2.0, -0.1], [0.0, -3.0, -0.2]],  # no positive score: no neuron
        ],
        dtype=torch.float64,
    )
    want = [
        [[True, False, True], [False, False, True]],
        [[True, False, True], [False, False, True]],
        [[False] * 3] * 2,
    ]
    assert coarse(scores).tolist() == want
    assert coarse(scores, 0.5).tolist()[0] == [[True, False, False], [False, False, False]]
    assert coarse(scores, 0.0)[0].sum() == 4


@settings(deadline=None)
@given(arrays.arrays(np.float64, (3, 2, 5), elements=st.integers(-80, 80)), st.floats(0.01, 0.99), st.integers(-5, 9))
def test_each_prompt_has_its_own_threshold(scores, threshold, power):
    scores = torch.from_numpy(scores).clone()
    first = coarse(scores, threshold)
    scores[1] *= 2.0**power  # exact in floating point
    assert torch.equal(coarse(scores, threshold), first)
    for i in range(3):
        assert first[i].any() == bool(scores[i].max() > 0)


def test_scores_that_are_not_finite_or_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="not all finite"):
        coarse(torch.tensor([[[1.0, float("nan")]]]))
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected query, block, neuron"):
        find_neurons(torch.zeros(2, 3))


# Refined sets


@pytest.mark.parametrize(
    "shares, kept, p, converged",
    [
        pytest.param([1.0, 0.75, 0.9, 0.7, 0.3], at(0, 2, 1), 0.7, True, id="at-once"),
        pytest.param([1.0, 0.7, 0.7], at(0, 1, 2), 0.65, True, id="more-than-p-is-meant"),
        pytest.param([0.1, 0.5, 0.45], at(1, 2), 0.40, True, id="p-falls"),
        pytest.param([0.05, 0.05], at(0, 1), 0.0, True, id="p-falls-to-zero"),
        pytest.param([0.8] * 8 + [0.95] * 3, at(8, 9, 10), 0.8, True, id="p-rises"),
        pytest.param([1.0] * 5 + [0.95] * 3, at(0, 1, 2, 3, 4), 0.95, True, id="p-rises-to-the-end"),
        pytest.param([1.0] + [0.7] * 7, at(*range(8)), 0.65, False, id="turns-back-from-below"),
        pytest.param([0.75] * 6, [], 0.75, False, id="turns-back-from-above"),
        pytest.param([1.0], at(0), 0.0, False, id="too-few-at-any-p"),
        pytest.param([1.0] * 6, at(*range(6)), 0.95, False, id="too-many-at-any-p"),
        pytest.param([0.0, 0.0], [], 0.0, False, id="none"),
    ],
)
def test_the_search_where_the_answer_is_known(shares, kept, p, converged):
    found = find_neurons(scores_with(shares))
    assert found.neurons == kept
    assert found.shares == pytest.approx([shares[n.block * 4 + n.index] for n in kept])
    assert found.p == pytest.approx(p)
    assert found.converged is converged


def test_at_most_twenty_moves():
    scores = scores_with([0.5, 0.45], n=20)
    assert find_neurons(scores, step=0.01).p == pytest.approx(0.5)
    assert not find_neurons(scores, step=0.01).converged
    assert find_neurons(scores, step=0.01, moves=26).neurons == at(0, 1)
    assert find_neurons(scores, moves=3).p == pytest.approx(0.55)
    assert find_neurons(scores, moves=0).p == pytest.approx(0.7)


def test_ties_go_to_the_larger_mean_score():
    scores = scores_with([1.0, 1.0, 1.0])
    scores[:, 0, 1] = 3.0
    scores[:, 0, 2] = 2.0
    assert find_neurons(scores).neurons == at(1, 2, 0)


@settings(deadline=None)
@given(arrays.arrays(bool, st.tuples(st.integers(1, 24), st.integers(1, 3), st.integers(1, 5))))
def test_refined_neurons_are_exactly_those_above_p(inside):
    found = find_neurons(torch.from_numpy(inside).float())
    n = len(inside)
    p = Fraction(round(found.p * 20), 20)
    assert found.p == pytest.approx(float(p)) and 0 <= p < 1
    share = {
        Neuron(*map(int, place)): Fraction(int(inside[:, *place].sum()), n) for place in np.ndindex(inside.shape[1:])
    }
    assert set(found.neurons) == {neuron for neuron, part in share.items() if part > p}
    assert len(found.neurons) == len(set(found.neurons))
    assert found.converged == (2 <= len(found.neurons) <= 5)
    assert found.shares == pytest.approx([float(share[neuron]) for neuron in found.neurons])
    assert found.shares == sorted(found.shares, reverse=True)


@settings(deadline=None)
@given(arrays.arrays(bool, st.tuples(st.integers(1, 24), st.just(2), st.integers(1, 6))))
def test_the_search_takes_the_first_p_on_its_way_that_gives_two_to_five(inside):
    """The rule of the paper followed step by step in exact fractions."""
    counts = inside.sum(0).ravel()

    def size(twentieths):
        return int(sum(Fraction(int(c), len(inside)) > Fraction(twentieths, 20) for c in counts))

    way = range(14, -1, -1) if size(14) < 2 else range(14, 20)
    ends = next((tick for tick in way if 2 <= size(tick) <= 5), None)
    found = find_neurons(torch.from_numpy(inside).float())
    passed = [tick for tick in way if ends is None or (tick - ends) * (14 - ends) >= 0]
    jumped = any(
        size(a) < 2 and size(b) > 5 or size(a) > 5 and size(b) < 2 for a, b in zip(passed, passed[1:], strict=False)
    )
    assert found.converged == (ends is not None and not jumped)
    if found.converged:
        assert found.p == pytest.approx(ends / 20)


# Ranked lists and histograms


@settings(deadline=None)
@given(arrays.arrays(np.float32, (3, 4), elements=st.floats(-5, 5, width=32), unique=True), st.integers(1, 20))
def test_top_is_a_sort(scores, k):
    order = np.argsort(-scores, axis=None)[:k]
    want = [(Neuron(*divmod(int(i), 4)), float(scores.ravel()[i])) for i in order]
    assert top(torch.from_numpy(scores), k) == want


# Similarity

VECTORS = arrays.arrays(
    np.float64, st.tuples(st.integers(2, 6), st.integers(1, 8)), elements=st.floats(-10, 10).map(lambda x: round(x, 3))
).filter(lambda a: (np.abs(a).max(1) > 0).all())


def by_singular_values(vectors):
    rows = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (np.linalg.svd(rows, compute_uv=False)[0] ** 2 - 1) / (len(rows) - 1)


@settings(deadline=None)
@given(VECTORS)
def test_similarity_equals_the_singular_value_formula(vectors):
    got = similarity(torch.from_numpy(vectors))
    assert got == pytest.approx(by_singular_values(vectors), abs=1e-9)
    assert similarity(torch.from_numpy(vectors).float()) == pytest.approx(got, abs=1e-5)
    assert -1e-9 <= got <= 1 + 1e-9


@settings(deadline=None)
@given(VECTORS, st.lists(st.sampled_from([-1.0, 1.0, 0.5, -300.0]), min_size=6, max_size=6))
def test_similarity_knows_neither_length_nor_sign(vectors, factors):
    scaled = vectors * np.array(factors)[: len(vectors), None]
    assert similarity(torch.from_numpy(scaled)) == pytest.approx(similarity(torch.from_numpy(vectors)), abs=1e-9)


def test_similarity_of_one_line_of_right_angles_and_of_two():
    line = torch.tensor([[1.0, 2.0, -2.0]]) * torch.tensor([[1.0], [-3.0], [0.01], [7.0]])
    assert similarity(line) == pytest.approx(1, abs=1e-6)
    assert similarity(3 * torch.eye(5)) == pytest.approx(0, abs=1e-6)
    for degrees in (0, 30, 60, 90, 120, 180):
        angle = np.radians(degrees)
        pair = torch.tensor([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
        assert similarity(pair) == pytest.approx(abs(np.cos(angle)), abs=1e-6)


@settings(deadline=None)
@given(VECTORS, st.data())
def test_similarity_of_sets_is_that_of_each_set(vectors, data):
    n = len(vectors)
    size = data.draw(st.integers(2, n))
    members = st.lists(st.integers(0, n - 1), min_size=size, max_size=size, unique=True)
    sets = data.draw(st.lists(members, min_size=1, max_size=4))
    got = similarity_of_sets(gram(torch.from_numpy(vectors)), sets)
    assert got.tolist() == pytest.approx([by_singular_values(vectors[chosen]) for chosen in sets], abs=1e-9)


def test_vectors_without_direction_and_sets_without_pair_are_refused():
    vectors = torch.eye(4)
    vectors[2] = 0
    with pytest.raises(ValueError, match=r"vectors \[2\] are zero"):
        similarity(vectors)
    vectors[2, 1], vectors[0, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match="vectors are not all finite"):
        gram(vectors)
    with pytest.raises(ValueError, match="two or more vectors"):
        similarity(torch.ones(1, 3))
    with pytest.raises(ValueError, match="two or more vectors"):
        similarity_of_sets(torch.eye(3), [])


# What value vectors promote

WORDS = tiny.SPECIAL + tiny.WORDS


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_promoted_tokens_are_those_whose_logits_the_value_vector_raises(family):
    """The model's own norm and head, applied to the value vector and to its opposite: biases cancel, order remains."""
    lm = tiny.lm(family)
    for neuron in (Neuron(0, 0), Neuron(1, 17), Neuron(2, 23)):
        vector = arch.value_vectors(lm.model, lm.spec, neuron.block)[neuron.index] * 100
        order = (lm.readout(vector) - lm.readout(-vector)).argsort(descending=True).tolist()
        assert promoted(lm, neuron) == [WORDS[i] for i in order[:8]]
        assert promoted(lm, neuron, k=3, sign=-1) == [WORDS[i] for i in order[::-1][:3]]


def test_promoted_by_explicit_matrices():
    llama, gpt2 = tiny.lm("llama").model, tiny.lm("gpt2").model
    value = llama.model.layers[1].mlp.down_proj.weight[:, 4]
    logits = llama.lm_head.weight @ (llama.model.norm.weight * value)
    assert promoted(tiny.lm("llama"), Neuron(1, 4), 5) == [WORDS[i] for i in logits.argsort(descending=True)[:5]]
    value = gpt2.transformer.h[1].mlp.c_proj.weight[4]
    logits = gpt2.lm_head.weight @ (gpt2.transformer.ln_f.weight * (value - value.mean()))
    assert promoted(tiny.lm("gpt2"), Neuron(1, 4), 5) == [WORDS[i] for i in logits.argsort(descending=True)[:5]]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_masked_models_head_is_not_read_directly(family):
    with pytest.raises(ValueError, match=f"tiny-{family} is masked"):
        promoted(tiny.lm(family), Neuron(0, 0))


# Contexts

TEXTS = [
    "Paris is the capital of France",
    "Anna saw the red cat",
    "a cat is in Madrid",
    "these books",
    "Anna saw Anna saw Anna saw these red red books in the capital of Spain",
    "the cat cat cat cat",
    "this book is red",
]
SOME = [Neuron(block, index) for block in (2, 0, 1) for index in range(24)]


def activations(lm, text):
    """Words of one text, without padding, and the neurons' state at each: `[block, token, neuron]`."""
    ids = lm.tokenizer(text)["input_ids"]
    states = []
    hooks = [
        arch.projection(lm.model, lm.spec, block).register_forward_pre_hook(lambda _, args: states.append(args[0][0]))
        for block in range(3)
    ]
    lm.model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return [WORDS[i] for i in ids], torch.stack(states).detach()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_contexts_are_those_of_a_search_text_by_text(family, batch):
    lm = tiny.lm(family, dtype=torch.float64)  # rounding shall not choose between contexts of nearly one size
    found = contexts(lm, TEXTS, SOME, k=5, words=3, batch=batch)
    assert list(found) == SOME
    want = {neuron: [] for neuron in SOME}
    first = 0
    for text in TEXTS:
        words, states = activations(lm, text)
        for neuron in SOME:
            values = states[neuron.block, :, neuron.index].tolist()
            plain = [i for i, word in enumerate(words) if i > 0 and word not in tiny.SPECIAL]
            at = max(plain, key=lambda i: abs(values[i]))
            first += abs(values[0]) > abs(values[at])
            before = [word for word in words[:at] if word not in tiny.SPECIAL][-3:]
            want[neuron].append((" ".join(before), words[at], values[at]))
    assert first > 0  # else it would not matter that the first token is passed over
    for neuron, some in found.items():
        best = sorted(want[neuron], key=lambda context: -abs(context[2]))[:5]
        assert [context[:2] for context in some] == [context[:2] for context in best]
        assert [context.activation for context in some] == pytest.approx([c[2] for c in best], rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_text_gives_one_context_with_the_sign_of_its_activation(family):
    found = contexts(tiny.lm(family), TEXTS, SOME, k=99)
    sizes = [[abs(context.activation) for context in some] for some in found.values()]
    assert all(len(some) == len(TEXTS) and some == sorted(some, reverse=True) for some in sizes)
    signs = {context.activation > 0 for some in found.values() for context in some[:1]}
    assert signs == {True, False}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_padding_is_no_context_however_active_a_neuron_is_there(family):
    lm, short = tiny.lm(family), "these books"
    n = len(lm.tokenizer(short)["input_ids"])
    ids = torch.zeros(1, 16, dtype=torch.long)
    ids[0, :n] = torch.tensor(lm.tokenizer(short)["input_ids"])
    states = []
    with arch.at_site(lm.blocks[1], lm.spec.sites["neuron"], lambda x: states.append(x[0].detach().abs())):
        lm.model(ids, attention_mask=(torch.arange(16) < n)[None].long())
    louder = (states[0][n:].amax(0) > states[0][1:n].amax(0)).nonzero()[:, 0].tolist()
    assert louder  # neurons that would choose padding
    alone = contexts(lm, [short], [Neuron(1, i) for i in louder])
    beside = contexts(lm, [short, "the " * 16], [Neuron(1, i) for i in louder], k=2)
    for neuron, (context,) in alone.items():
        assert context.token != "[PAD]"
        (same,) = [other for other in beside[neuron] if "the" not in (*other.before.split(), other.token)]
        assert same[:2] == context[:2] and same.activation == pytest.approx(context.activation, rel=1e-3, abs=1e-5)


def test_no_texts_no_neurons_and_a_text_without_context_are_refused_and_leave_no_hook():
    lm = tiny.lm("gpt2")
    for texts, some, missing in (([], SOME, "no texts"), (TEXTS, [], "no neurons given")):
        with pytest.raises(ValueError, match=missing):
            contexts(lm, texts, some)
    for short in ("book", ""):
        with pytest.raises(ValueError, match=f"text '{short}' has fewer than two tokens"):
            contexts(lm, [*TEXTS[:3], short, TEXTS[4]], SOME, batch=2)
    for missing in (Neuron(1, 24), Neuron(3, 0), Neuron(0, -1)):
        with pytest.raises(ValueError, match=f"neuron \\({missing.block}, {missing.index}\\) does not exist"):
            contexts(lm, TEXTS, [Neuron(0, 0), missing])
    with pytest.raises(ValueError, match="the context of tiny-gpt2 is 64"):
        contexts(lm, ["the " * 65], SOME)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in lm.model.modules())
    with pytest.raises(ValueError, match="fewer than two tokens"):
        contexts(lm, [""], SOME)


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="none of them 0"):
        find_neurons(torch.zeros(0, 2, 3))
