"""Attribution against the equation written naively, a peer library, completeness and a net computed by hand."""

import naive
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kncore import attribute, quadrature, tokens
from kncore.quadrature import rule
from kncore.query import Query
from kncore.store import cache, results

QUERIES = {
    False: [
        Query("the capital of France is", "Paris"),
        Query("Anna saw these", "books", foil="book"),
        Query("the capital of the cats is in", "Spain"),
    ],
    True: [
        Query("the capital of France is", "Paris"),
        Query("Anna saw [MASK] books .", "these"),
        Query("[MASK] is the capital of Spain", "Madrid"),
    ],
}


def close(got, want):
    """Within 1e-4 of the largest score of the query."""
    return float((got - want).abs().max() / want.abs().max()) < 1e-4


@pytest.mark.parametrize("site", ["neuron", "published"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_scores_equal_the_naive_equation(family, site):
    lm = tiny.lm(family)
    queries = QUERIES[lm.spec.masked]
    batched = attribute(lm, queries, site=site, quadrature="riemann", steps=20, store=False)
    for i, query in enumerate(queries):
        want = naive.attribution(lm, tokens.encode(lm, query), *rule("riemann", 20), site)
        single = attribute(lm, [query], site=site, quadrature="riemann", steps=20, store=False)
        assert want.abs().max() > 1e-4
        assert close(batched.scores[i], want)
        assert close(single.scores[0], want)


@pytest.mark.parametrize("site", ["neuron", "published"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_default_quadrature_converges_on_every_block(family, site):
    lm = tiny.lm(family)
    queries = QUERIES[lm.spec.masked]
    result = attribute(lm, queries, site=site, store=False)
    for i, query in enumerate(queries):
        want = naive.attribution(lm, tokens.encode(lm, query), *rule("gauss", 100), site)
        error = (result.scores[i] - want).norm(dim=1) / want.norm(dim=1)
        assert error.max() < 1e-3, error
    assert result.nodes.min() >= len(quadrature.START)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_query_is_attributed_as_if_alone(family):
    lm = tiny.lm(family, 1)
    queries = QUERIES[lm.spec.masked]
    together = attribute(lm, queries[::-1], store=False)
    for i, query in enumerate(queries[::-1]):
        alone = attribute(lm, [query], store=False)
        assert torch.equal(alone.nodes[0], together.nodes[i])
        assert close(alone.scores[0], together.scores[i])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_both_sites_are_off_together(family):
    """The activations map zero to zero, so the sites differ inside the path and agree at its ends."""
    lm = tiny.lm(family)
    one = tokens.encode(lm, QUERIES[lm.spec.masked][0])
    for block in range(len(lm.blocks)):
        off = [naive.forward(lm, one, block, site, torch.zeros_like)[0] for site in ("neuron", "published")]
        torch.testing.assert_close(*off, atol=1e-6, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(tiny.FAMILIES), st.integers(0, 5), st.floats(1e-4, 1e-2))
def test_completeness(family, seed, tol):
    """Σ scores = P(γ=1) − P(γ=0), with both ends from full forward passes."""
    lm = tiny.lm(family, seed)
    queries = QUERIES[lm.spec.masked]
    result = attribute(lm, queries, tol=tol, store=False)
    for i, query in enumerate(queries):
        one = tokens.encode(lm, query)
        for block in range(len(lm.blocks)):
            ends = [
                float(naive.forward(lm, one, block, "neuron", change)[0].softmax(-1)[one.target[0]])
                for change in (torch.zeros_like, torch.clone)
            ]
            gap = abs(float(result.scores[i, block].sum()) - (ends[1] - ends[0]))
            assert gap == pytest.approx(float(result.gap[i, block]), abs=2e-5)
            assert gap <= 2 * tol * float(result.scores[i, block].norm()) + 1e-3 * max(ends)


def steep_net(steep: float):
    """A model whose last MLP alone reaches the logits, `steep` times as far as at first, and a query for it."""
    lm = tiny.lm("gpt2")
    model = lm.model
    query, last = Query("Anna saw these", "books"), model.transformer.h[-1]
    with torch.no_grad():
        last.attn.c_proj.weight.zero_()
        last.attn.c_proj.bias.zero_()
        last.mlp.c_proj.weight.mul_(steep)
        model.transformer.ln_f = torch.nn.Identity()
    return lm, query, last


@pytest.mark.parametrize("target", ["first", "all"])
@pytest.mark.parametrize("steep", [1, 10, 100])
def test_hand_computed_net(steep, target):
    """A block whose MLP alone reaches the logits: the path is a softmax of a line, the integral has a closed form."""
    lm, query, last = steep_net(steep)
    one = tokens.encode(lm, query)
    logits, state = naive.forward(lm, one, 2, "neuron")
    values = last.mlp.c_proj.weight @ lm.model.lm_head.weight.T  # logits per unit of each neuron
    line = state @ values
    grid = torch.linspace(0, 1, 200_001, dtype=torch.double)
    path = (logits.double() - (1 - grid[:, None]) * line.double()).softmax(-1)
    token = one.target[0]
    # dP/dneuron_i = P_t (values[i, t] − Σ_v P_v values[i, v]), integrated with the trapezoid rule on a fine grid
    slope = values.double()[:, token] - path @ values.double().T
    if target == "first":
        slope *= path[:, token, None]
    want = state.double() * torch.trapezoid(slope, grid, dim=0)
    got = attribute(lm, [query], target=target, store=False).scores[0, 2]
    torch.testing.assert_close(got.double(), want, atol=1e-4 * float(want.abs().max()), rtol=1e-3)


def test_a_path_that_needs_more_than_the_most_nodes_ends_and_says_so(monkeypatch):
    lm, query, _ = steep_net(1000)
    free = attribute(lm, [query], store=False)
    assert int(free.nodes[0, 2]) > 20
    monkeypatch.setattr(quadrature, "MOST", 12)
    ended = attribute(lm, [query], store=False)
    assert int(ended.nodes.max()) == 12
    assert float(ended.gap[0, 2]) > 6e-3 * float(ended.scores[0, 2].norm())
    monkeypatch.setattr(quadrature, "MOST", 10_000)
    monkeypatch.setattr(quadrature, "SMALLEST", 2**-6)
    assert int(attribute(lm, [query], tol=1e-9, store=False).nodes.max()) <= 2**7


places = st.lists(st.integers(0, 1000), min_size=2, max_size=12, unique=True)


@given(places)
def test_local_polynomials_are_integrated_exactly_on_every_interval(places):
    nodes = np.array(sorted(places)) / 1000
    weights = quadrature.local(nodes)
    for degree in range(min(quadrature.NEAREST, len(nodes))):
        power = np.diff(nodes ** (degree + 1)) / (degree + 1)
        size = np.abs(weights) @ nodes**degree
        assert np.abs(weights @ nodes**degree - power).max() <= 1e-9 * max(1, size.max())


@given(st.data(), places)
def test_what_is_not_split_adds_up_to_what_is_allowed(data, places):
    nodes, size = np.array(sorted(places)) / 1000, st.floats(0, 1)
    gaps = np.array(data.draw(st.lists(size, min_size=len(nodes) - 1, max_size=len(nodes) - 1)))
    allowed = data.draw(size)
    new = quadrature.middles(nodes, gaps, allowed)
    inside = (nodes[:-1, None] < new) & (new < nodes[1:, None])
    assert (inside.sum(0) == 1).all() and (inside.sum(1) <= 1).all() and (np.diff(new) > 0).all()
    split = inside.any(1)
    allowed *= 2 if len(nodes) <= 8 else 1
    assert gaps[~split].sum() <= allowed * (1 + 1e-9)
    if len(nodes) <= 8:
        assert split.all() == split.any() == (np.sort(gaps).cumsum()[-1] > allowed)
    elif split.any():
        wide = np.diff(nodes) > np.maximum(0.01, 0.6 * nodes[:-1])
        assert split[wide].all()
        assert gaps[split & ~wide].min(initial=1) >= gaps[~split].max(initial=0)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_whole_targets_add_up_over_tokens(family):
    lm = tiny.lm(family)
    query = Query("the capital of France is", "red cats")
    first, whole = (attribute(lm, [query], target=t, store=False) for t in ("first", "all"))
    encoded = tokens.encode(lm, query)
    assert len(encoded.target) == 2
    want = sum(naive.attribution(lm, e, *rule("gauss", 200), log=True) for e in tokens.steps(lm, encoded))
    assert float((whole.scores[0] - want).norm() / want.norm()) < 1e-3
    torch.testing.assert_close(first.probability, whole.probability)


def test_fixed_nodes_of_ones_own():
    lm = tiny.lm("llama")
    nodes, weights = np.array([0.1, 0.5, 0.9]), np.array([0.3, 0.3, 0.4])
    got = attribute(lm, QUERIES[False][:1], quadrature=(nodes, weights), store=False)
    want = naive.attribution(lm, tokens.encode(lm, QUERIES[False][0]), nodes, weights)
    assert close(got.scores[0], want)
    assert (got.nodes == 3).all()


def test_the_budget_changes_nothing():
    lm = tiny.lm("llama")
    results = [attribute(lm, QUERIES[False], budget=b, store=False).scores for b in (1, 7, 1000)]
    assert close(results[0], results[2]) and close(results[1], results[2])


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_half_precision_is_near_float32(dtype, limit):
    exact = attribute(tiny.lm("llama"), QUERIES[False], quadrature="gauss", steps=32, store=False).scores
    half = attribute(tiny.lm("llama", dtype=dtype), QUERIES[False], quadrature="gauss", steps=32, store=False).scores
    assert half.dtype == torch.float32
    assert float((half - exact).norm() / exact.norm()) < limit


def test_the_adaptive_rule_starts_with_lobattos_nodes():
    inner = np.polynomial.legendre.Legendre.basis(4).deriv().roots()
    assert quadrature.START == pytest.approx([0, *(inner + 1) / 2, 1], abs=1e-14)


def test_rules_integrate_polynomials():
    for name, steps, degree in [("gauss", 4, 7), ("trapezoid", 3, 1), ("left", 5, 0), ("riemann", 20, 0)]:
        nodes, weights = rule(name, steps)
        for k in range(degree + 1):
            assert float((weights * nodes**k).sum()) == pytest.approx(1 / (k + 1))
    nodes, weights = rule("riemann", 20)
    assert nodes[-1] == 1 and (weights == 0.05).all()


def test_scores_are_stored_and_found(monkeypatch):
    lm, totals, bar = tiny.lm("llama"), [], results.tqdm
    monkeypatch.setattr(results, "tqdm", lambda *x, total, **y: totals.append(total) or bar(*x, total=total, **y))
    first = attribute(lm, QUERIES[False])
    again = attribute(lm, QUERIES[False])
    assert totals == [len(QUERIES[False]), 0]
    assert torch.equal(first.scores, again.scores) and torch.equal(first.rank, again.rank)


def test_a_changed_model_is_neither_looked_up_nor_stored():
    lm = tiny.lm("llama")
    before = attribute(lm, QUERIES[False])
    weight = lm.blocks[1].mlp.down_proj.weight
    weight[0] += 1
    assert lm.is_modified
    after = attribute(lm, QUERIES[False])
    assert not torch.equal(before.scores, after.scores)
    stored = attribute(tiny.lm("llama"), QUERIES[False])
    assert torch.equal(before.scores, stored.scores)


def test_a_damaged_entry_is_not_read():
    before = attribute(tiny.lm("llama"), QUERIES[False]).scores
    for file in cache.scores_folder().rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-5])
    assert torch.equal(attribute(tiny.lm("llama"), QUERIES[False]).scores, before)
    assert not list(cache.scores_folder().rglob("*.part"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"site": "mlp"}, "cannot attribute to site 'mlp'"),
        ({"quadrature": "simpson"}, "unknown quadrature 'simpson'"),
        ({"quadrature": "riemann", "steps": 0}, "needs more than 0 steps"),
        ({"quadrature": ([0.5], [0.5, 0.5])}, "two lists of one length"),
        ({"target": "last"}, "unknown target mode 'last'"),
        ({"tol": 0}, "must be positive"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attribute(tiny.lm("gpt2"), QUERIES[False], **options)


def test_no_queries_are_refused():
    with pytest.raises(ValueError, match="no queries"):
        attribute(tiny.lm("gpt2"), [])
