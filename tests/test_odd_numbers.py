"""Numbers as arguments: what is none, or out of range, is refused; those of NumPy and PyTorch count as Python's."""

import json
import math
import pickle
import warnings
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from kncore import ablation, arch, neurons, predictions
from kncore import attribution as attribution_module
from kncore.ablation import Ablation
from kncore.attribution import attribute
from kncore.interventions import Delta, edited, edited_rows, enhance, set_neurons, suppress, value_update
from kncore.neurons import Neuron
from kncore.quadrature import rule
from kncore.query import Query
from kncore.replay import Change, capture, replay, states
from kncore.store import cache
from kncore.tokens import encode
from kncore.tracing import Restore, trace
from knpaper import claims, corpus, frequencies, grammar, stats, words
from knpaper.stats import Estimate
from knpaper.traceable import agreement, facts, replacements

LLAMA = tiny.lm("llama")
CAUSAL = Query("the capital of France is in", "Paris", "France", "Madrid")
MASKED = Query("the capital of France is in [MASK] .", "Paris", "France", "Madrid")
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 99)


def asked(lm):
    return MASKED if lm.spec.masked else CAUSAL


def stored():
    return [path for path in cache.scores_folder().rglob("*") if path.is_file()]


def refused(call, *, match="", error=(ValueError, TypeError)):
    """That a call is refused with one line of this package's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error, match=match) as caught:
            call()
    assert type(caught.value) in (ValueError, TypeError) and "\n" not in str(caught.value)
    home = caught.traceback[-1].path
    assert {"kncore", "knpaper", "knbook"} & set(home.parts) and "site-packages" not in home.parts, f"raised by {home}"


# --------------------------------------------------------------------------------- models that compute no numbers


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(
    "what", ["attribute", "attribute all", "predict", "log_probabilities", "trace", "capture_prompts"]
)
def test_a_weight_that_is_not_a_number_gives_no_result_and_stores_none(family, what):
    lm = tiny.lm(family)
    with torch.no_grad():
        arch.projection(lm.model, lm.spec, 1).weight[3, 2] = NAN
    calls = {
        "attribute": lambda: attribute(lm, [asked(lm)]),
        "attribute all": lambda: attribute(lm, [asked(lm)], target="all", steps=3),
        "predict": lambda: predictions.predict(lm, [asked(lm)]),
        "log_probabilities": lambda: predictions.log_probabilities(lm, [asked(lm)]),
        "trace": lambda: trace(lm, [asked(lm)]),
        "capture_prompts": lambda: ablation.capture_prompts(lm, [asked(lm)]),
    }
    refused(calls[what], match=r"of tiny-\w+ for '.*the capital.*' are not numbers; check its weights")
    assert not stored()


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("value", [INF, 1e38])
def test_weights_that_overflow_give_no_scores_and_no_trace(value):
    lm = tiny.lm("gpt2")
    with torch.no_grad():
        lm.model.lm_head.weight[5] = value
    for call in (attribute, trace, ablation.capture_prompts, predictions.predict):
        refused(lambda call=call: call(lm, [CAUSAL]), match="not numbers")
    assert not stored()


@pytest.mark.kind("not-a-number", own=True)
def test_scores_that_half_precision_cannot_hold_are_refused_where_the_prediction_itself_is_a_number(monkeypatch):
    def overflown(*args):
        return [{name: value * (INF if name == "scores" else 1) for name, value in one.items()} for one in own(*args)]

    own = attribution_module._scores
    monkeypatch.setattr(attribution_module, "_scores", overflown)
    refused(lambda: attribute(LLAMA, [CAUSAL], steps=2), match="the scores of tiny-llama for 'the capital.*not numbers")
    assert not stored()


@pytest.mark.kind("not-a-number", own=True)
def test_contexts_and_promoted_words_of_a_neuron_that_is_not_a_number_are_refused():
    lm = tiny.lm("llama")
    with torch.no_grad():
        lm.blocks[0].mlp.up_proj.weight[4] = NAN
        lm.blocks[1].mlp.down_proj.weight[:, 7] = NAN
    refused(lambda: neurons.contexts(lm, ["Anna saw the red cat"], [(0, 4)]), match=r"neuron \(0, 4\) is not a number")
    refused(lambda: neurons.promoted(lm, Neuron(1, 7)), match=r"neuron \(1, 7\) raises logits by what is no number")


# --------------------------------------------------------------------------------- attribution


BAD_ATTRIBUTION = {
    "steps 2.5": dict(steps=2.5),
    "steps True": dict(steps=True),
    "nodes nan": dict(quadrature=([NAN, 0.5], [0.5, 0.5])),
    "weights nan": dict(quadrature=([0.1, 0.5], [0.5, NAN])),
    "nodes outside": dict(quadrature=([0.1, 1.5], [0.5, 0.5])),
}
OWN_BAD_ATTRIBUTION = {
    "steps nan": dict(steps=NAN),
    "steps tensor of floats": dict(steps=torch.tensor(3.0)),
    "tol inf": dict(tol=INF),
    "budget nan": dict(budget=NAN),
    "budget True": dict(budget=True),
    "nodes below": dict(quadrature=([-0.1, 0.5], [0.5, 0.5])),
    "weights inf": dict(quadrature=([0.1, 0.5], [0.5, INF])),
    "nodes text": dict(quadrature=(["0.1", "0.5"], [0.5, 0.5])),
    "nodes and steps": dict(quadrature=([0.1, 0.5], [0.5, 0.5]), steps=5),
    "masked": dict(quadrature=(np.ma.array([0.1, 0.5], mask=[0, 1]), [0.5, 0.5])),
}


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("name", BAD_ATTRIBUTION)
def test_attribution_refuses_what_is_no_number_or_out_of_range(name):
    refused(lambda: attribute(LLAMA, [CAUSAL], **BAD_ATTRIBUTION[name]))
    assert not stored()


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("name", OWN_BAD_ATTRIBUTION)
def test_attribution_refuses_further_settings_that_mean_nothing(name):
    refused(lambda: attribute(LLAMA, [CAUSAL], **OWN_BAD_ATTRIBUTION[name]))
    assert not stored()


@pytest.mark.kind("raw-errors")
@pytest.mark.parametrize("queries", ["the capital", CAUSAL, None, 3, ["the capital"], [CAUSAL, None], b"x"])
@pytest.mark.parametrize("what", ["attribute", "trace", "capture_prompts"])
def test_what_is_no_list_of_queries_is_refused_as_such(what, queries):
    calls = {"attribute": attribute, "trace": trace, "capture_prompts": ablation.capture_prompts}
    refused(lambda: calls[what](LLAMA, queries), match="expected a list of Query as queries", error=TypeError)


@pytest.mark.kind("raw-errors")
def test_queries_from_a_generator_are_those_of_a_list_and_none_once_it_is_used_up():
    given = [CAUSAL, replace(CAUSAL, prompt="the capital of Spain is in", subject="Spain", target="Madrid", foil="")]
    once = (query for query in given)
    want = attribute(LLAMA, given, steps=3, store=False)
    assert torch.equal(attribute(LLAMA, once, steps=3, store=False).scores, want.scores)
    refused(lambda: attribute(LLAMA, once, steps=3), match="no queries")
    got = ablation.capture_prompts(LLAMA, (query for query in given))
    assert torch.equal(got.logp, ablation.capture_prompts(LLAMA, given).logp) and len(got.queries) == 2


@pytest.mark.kind("numpy-numbers")
def test_whole_numbers_of_numpy_and_torch_are_python_numbers_for_attribution():
    want = attribute(LLAMA, [CAUSAL], quadrature="gauss", steps=3)
    written = stored()
    for kind in (np.int64, np.uint8, torch.tensor, np.array):
        got = attribute(LLAMA, [CAUSAL], quadrature="gauss", steps=kind(3), budget=kind(100), tol=np.float32(3e-4))
        assert torch.equal(got.scores, want.scores) and stored() == written  # found under the same key
        nodes, weights = rule("gauss", kind(3))
        given = attribute(LLAMA, [CAUSAL], quadrature=(torch.tensor(nodes), np.float64(weights)), store=False)
        torch.testing.assert_close(given.scores, want.scores)


@pytest.mark.kind("raw-errors")
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_gradient_checkpointing_changes_nothing(family):
    lm, other = tiny.lm(family), tiny.lm(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm.model.gradient_checkpointing_enable()
    query = asked(lm)
    for training in (False, True):
        lm.model.train(training)
        plain, found = (attribute(model, [query], store=False) for model in (other, lm))
        assert torch.equal(found.scores, plain.scores)
        plain, found = (trace(model, [query], store=False)[0] for model in (other, lm))
        assert torch.equal(found.restored, plain.restored)
        with suppress(lm, [(1, 2)]), suppress(other, [(1, 2)]):
            plain, found = (predictions.log_probabilities(model, [query]) for model in (other, lm))
        assert torch.equal(found, plain)


# --------------------------------------------------------------------------------- coarse and refined sets


SCORES = torch.tensor([[[1.0, 0.5, 0.1], [0.0, 0.3, 0.9]], [[1.0, 0.4, 0.1], [0.2, 0.1, 0.9]]])
BAD_SCORES = SCORES.clone().index_put((torch.tensor(0), torch.tensor(1), torch.tensor(2)), torch.tensor(NAN))
BAD_SETS = {
    "coarse nan": lambda: neurons.coarse(SCORES, NAN),
    "coarse 1": lambda: neurons.coarse(SCORES, 1.0),
    "coarse 2": lambda: neurons.coarse(SCORES, 2.0),
    "coarse negative": lambda: neurons.coarse(SCORES, -0.2),
    "find threshold": lambda: neurons.find_neurons(SCORES, threshold=NAN),
    "p 1": lambda: neurons.find_neurons(SCORES, p=1),
    "p negative": lambda: neurons.find_neurons(SCORES, p=-0.7),
    "step negative": lambda: neurons.find_neurons(SCORES, step=-0.05),
    "at_least 3 at_most 2": lambda: neurons.find_neurons(SCORES, at_least=3, at_most=2),
    "at_least nan": lambda: neurons.find_neurons(SCORES, at_least=NAN),
    "top nan": lambda: neurons.top(BAD_SCORES[0], 3),
    "top k 0": lambda: neurons.top(SCORES[0], 0),
}
OWN_BAD_SETS = {
    "coarse complex": lambda: neurons.coarse(SCORES.to(torch.complex64)),
    "coarse nothing": lambda: neurons.coarse(SCORES[:, :, :0]),
    "step 1": lambda: neurons.find_neurons(SCORES, step=1.0),
    "at_most 2.5": lambda: neurons.find_neurons(SCORES, at_most=2.5),
    "moves True": lambda: neurons.find_neurons(SCORES, moves=True),
    "top of three axes": lambda: neurons.top(SCORES, 3),
    "top k negative": lambda: neurons.top(SCORES[0], -1),
    "gram one axis": lambda: neurons.gram(torch.ones(3)),
    "gram complex": lambda: neurons.gram(torch.ones(3, 2, dtype=torch.complex64)),
    "gram ragged": lambda: neurons.gram([[1.0, 2.0], [1.0]]),
    "sets twice": lambda: neurons.similarity_of_sets(torch.eye(3), [[0, 0]]),
    "sets negative": lambda: neurons.similarity_of_sets(torch.eye(3), [[0, -1]]),
    "sets outside": lambda: neurons.similarity_of_sets(torch.eye(3), [[0, 3]]),
    "sets bool": lambda: neurons.similarity_of_sets(torch.eye(3), [[True, False]]),
    "sets nan": lambda: neurons.similarity_of_sets(torch.eye(3) * NAN, [[0, 1]]),
    "no cosines": lambda: neurons.similarity_of_sets(9 * torch.eye(3), [[0, 1]]),
    "one triangle": lambda: neurons.similarity_of_sets(torch.tensor([[1.0, 0.5], [0.0, 1.0]]), [[0, 1]]),
    "not square": lambda: neurons.similarity_of_sets(torch.ones(2, 3), [[0, 1]]),
    "promoted negative": lambda: neurons.promoted(LLAMA, Neuron(-1, 0)),
    "promoted sign 0": lambda: neurons.promoted(LLAMA, Neuron(0, 0), sign=0),
    "promoted k 0": lambda: neurons.promoted(LLAMA, Neuron(0, 0), 0),
    "contexts k -1": lambda: neurons.contexts(LLAMA, ["Anna saw the cat"], [(0, 0)], k=-1),
    "contexts number": lambda: neurons.contexts(LLAMA, [3], [(0, 0)]),
}


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("name", BAD_SETS)
def test_sets_and_similarity_refuse_what_is_no_number_or_out_of_range(name):
    refused(BAD_SETS[name])


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("name", OWN_BAD_SETS)
def test_sets_and_similarity_refuse_further_input_that_means_nothing(name):
    refused(OWN_BAD_SETS[name])


@pytest.mark.kind("raw-errors")
@pytest.mark.parametrize("change", [dict(step=0), dict(moves=-1), dict(at_least=0), dict(step=0.0, moves=0)])
def test_a_search_that_cannot_move_is_refused(change):
    refused(lambda: neurons.find_neurons(SCORES, **change))


def by_singular_values(rows):
    rows = np.array(rows, dtype=np.longdouble)
    rows = rows / np.abs(rows).max(1, keepdims=True)
    rows = np.array(rows / np.sqrt((rows**2).sum(1, keepdims=True)), dtype=float)
    return (np.linalg.svd(rows, compute_uv=False)[0] ** 2 - 1) / (len(rows) - 1)


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize(
    "rows", [torch.tensor([[1, 2], [2, 1]]), torch.tensor([[3e38, 0.0], [3e38, 3e38]]), torch.tensor([[3, 1, 1]] * 2)]
)
def test_similarity_of_whole_and_of_huge_numbers_is_that_of_their_directions(rows):
    assert neurons.similarity(rows) == pytest.approx(by_singular_values(rows.tolist()), abs=1e-9)


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("size", [1e-300, 1e300])
@pytest.mark.parametrize("kind", [np.array, lambda rows: torch.tensor(rows, dtype=torch.float64)])
def test_similarity_does_not_depend_on_the_size_of_vectors_as_far_as_floating_point_reaches(size, kind):
    rows = [[1.0, 2.0, -1.0], [0.5, 1.0, 1.0], [3.0, 0.0, 0.1]]
    want = by_singular_values(rows)
    assert neurons.similarity(kind([[x * size for x in row] for row in rows])) == pytest.approx(want, abs=1e-12)


@pytest.mark.kind("not-a-number", own=True)
def test_similarity_in_half_precision_and_of_small_integers_is_computed_in_double():
    rows = torch.tensor([[100, 120, -90], [110, 127, 3]], dtype=torch.int8)
    want = by_singular_values(rows.tolist())
    assert neurons.similarity(rows) == pytest.approx(want, abs=1e-12)
    assert neurons.similarity(rows.half() * 500) == pytest.approx(by_singular_values((rows.half() * 500).tolist()))


def in_share(*shares, n=100):
    flat = torch.zeros(n, 1, len(shares))
    for k, part in enumerate(shares):
        flat[: round(part * n), 0, k] = 1
    return flat


@pytest.mark.kind("not-a-number")
def test_the_search_begins_at_the_p_that_was_given():
    found = neurons.find_neurons(in_share(0.34, 0.34, 0.34), p=0.33)
    assert found.p == 0.33 and found.converged and len(found.neurons) == 3
    assert neurons.find_neurons(in_share(0.34, 0.34, 0.34), p=0.35, moves=0).neurons == []


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("p, step", [(0.33, 0.05), (0.7, 0.04), (0.5, 0.3), (0.123, 0.01)])
@pytest.mark.parametrize("shares", [(0.2, 0.2), (0.9,) * 8, (0.5,) * 3, (0.02,) * 4, (1.0,) * 9])
def test_the_search_walks_from_p_in_steps_as_in_exact_fractions(p, step, shares):
    """The rule step by step in exact fractions of what was written."""
    start, by = Fraction(str(p)), Fraction(str(step))
    exact = [Fraction(str(share)) for share in shares]
    at, before = start, 0
    for _ in range(21):
        count = sum(share > at for share in exact)
        turn = -1 if count < 2 else 1 if count > 5 else 0
        if not turn or turn == -before or not 0 <= at + turn * by < 1:
            break
        at, before, last = at + turn * by, turn, at
    else:
        at = last
    found = neurons.find_neurons(in_share(*shares), p=p, step=step)
    assert found.p == pytest.approx(float(at), abs=1e-12) and found.converged == (turn == 0)
    assert len(found.neurons) == sum(share > at for share in exact)


@pytest.mark.kind("numpy-numbers")
def test_scores_and_settings_of_numpy_are_those_of_torch():
    want = neurons.find_neurons(SCORES)
    settings = dict(p=np.float32(0.7), at_least=np.int64(2), at_most=torch.tensor(5), moves=np.uint8(20))
    found = neurons.find_neurons(SCORES.numpy(), **settings)
    assert found.neurons == want.neurons and found.shares == want.shares and found.p == pytest.approx(want.p)
    assert neurons.top(SCORES[0].numpy(), np.int64(3)) == neurons.top(SCORES[0], 3)
    assert neurons.top(SCORES[0].tolist(), torch.tensor(3)) == [
        (Neuron(0, 0), 1.0), (Neuron(1, 2), pytest.approx(0.9)), (Neuron(0, 1), 0.5)
    ]  # fmt: skip
    assert torch.equal(neurons.gram(SCORES[0].numpy()), neurons.gram(SCORES[0]))
    assert neurons.promoted(LLAMA, np.array([1, 4]), np.int64(3)) == neurons.promoted(LLAMA, Neuron(1, 4), 3)
    texts = ["Anna saw the red cat", "the capital of France"]
    plain = neurons.contexts(LLAMA, texts, [(0, 3), (1, 2)])
    for given in (np.array([[0, 3], [1, 2]]), torch.tensor([[0, 3], [1, 2]]), [Neuron(0, np.int64(3)), (1, 2)]):
        assert neurons.contexts(LLAMA, (text for text in texts), given, k=np.int64(5)) == plain


# --------------------------------------------------------------------------------- statistics


BAD_ESTIMATES = {
    "low above high": (0.7, 0.9, 0.6, 40),
    "value nan": (NAN, 0.6, 0.9, 40),
    "low nan": (0.8, NAN, 0.9, 40),
    "high nan": (0.8, 0.6, NAN, 40),
    "n negative": (0.8, 0.6, 0.9, -1),
    "n fractional": (0.8, 0.6, 0.9, 30.5),
    "n nan": (0.8, 0.6, 0.9, NAN),
}
OWN_BAD_ESTIMATES = {
    "n inf": (0.8, 0.6, 0.9, INF),
    "n True": (0.8, 0.6, 0.9, True),
    "n text": (0.8, 0.6, 0.9, "40"),
    "n None": (0.8, 0.6, 0.9, None),
    "value inf": (INF, 0.6, INF, 40),
    "value text": ("0.8", 0.6, 0.9, 40),
    "value None": (None, 0.6, 0.9, 40),
    "value list": ([0.8], 0.6, 0.9, 40),
    "value complex": (0.8 + 1j, 0.6, 0.9, 40),
    "all nan of 40": (NAN, NAN, NAN, 40),
    "some nan of none": (0.5, NAN, NAN, 0),
}


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("name", BAD_ESTIMATES)
def test_an_estimate_that_is_none_cannot_be_made_and_has_no_verdict(name):
    refused(lambda: Estimate(*BAD_ESTIMATES[name]))
    fields = dict(zip(("value", "low", "high", "n"), BAD_ESTIMATES[name], strict=True))
    refused(lambda: Estimate(0.8, 0.6, 0.9, 40)._replace(**fields))
    refused(lambda: Estimate._make(BAD_ESTIMATES[name]))


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("name", OWN_BAD_ESTIMATES)
def test_further_estimates_that_are_none_cannot_be_made(name):
    refused(lambda: Estimate(*OWN_BAD_ESTIMATES[name]))


@pytest.mark.kind("not-a-number", own=True)
def test_estimates_that_are_some_are_as_before():
    one = Estimate(np.float32(0.5), torch.tensor(0.25), Fraction(3, 4), np.int64(40))
    assert one == (0.5, 0.25, 0.75, 40) == Estimate(0.5, 0.25, 0.75, 40.0)
    assert [type(x) for x in one] == [float, float, float, int]
    assert pickle.loads(pickle.dumps(one)) == one and json.loads(json.dumps(one._asdict()))["n"] == 40
    assert one._replace(n=3).n == 3 and isinstance(one._replace(n=3), Estimate)
    assert Estimate(0.0, -INF, INF, 1).high == INF and Estimate(0.0, 1e-17, 0.3, 9).value == 0  # Wilson's rounding
    assert math.isnan(Estimate(NAN, NAN, NAN, 0).value)  # no units, so nothing is known
    with pytest.raises(ValueError, match="not a number"):
        next(iter(claims.CLAIMS.values())).verdict(Estimate(NAN, NAN, NAN, 0))


FUNCTIONS = {
    "cluster_means": lambda x: stats.cluster_means(x),
    "mean": lambda x: stats.mean(x),
    "share": lambda x: stats.share(x),
    "runs": lambda x: stats.runs(x),
    "difference": lambda x: stats.difference([0.0, 1.0, 1.0], x),
    "difference first": lambda x: stats.difference(x, [0.0, 1.0, 1.0]),
    "paired": lambda x: stats.paired([0.0, 1.0, 1.0], x),
    "relative_change": lambda x: stats.relative_change([0.5, 1.0, 1.0], x),
    "ratio": lambda x: stats.ratio(x, [0.5, 1.0, 1.0]),
    "relative_difference": lambda x: stats.relative_difference(x, [0.5, 1.0, 1.0]),
    "separation": lambda x: stats.separation([0.5, 1.0, 1.0], x),
    "rank_correlation": lambda x: stats.rank_correlation([0.5, 1.0, 0.2], x),
    "regression": lambda x: stats.regression(x, {"a": [0.5, 1.0, 0.2]}),
    "regression predictor": lambda x: stats.regression([0.5, 1.0, 0.2], {"a": x}),
    "holm": lambda x: stats.holm(x),
}
NO_NUMBERS = {
    "huge integer": [0, 10**400, 1],
    "objects": np.array([0.0, object(), 1.0], dtype=object),
    "number": 1.0,
}
OWN_NO_NUMBERS = {
    "texts": ["0", "1", "1"],
    "dates": np.array(["2020-01-01", "2020-01-02", "2020-01-03"], dtype="datetime64[D]"),
    "masked": np.ma.array([0.0, 1.0, 1.0], mask=[0, 1, 0]),
    "complex": torch.tensor([0.0, 1j, 1.0]),
    "mapping": {0: 0.0, 1: 1.0, 2: 1.0},
    "set": {0.0, 1.0, 0.5},
    "table": pd.DataFrame({"x": [0.0, 1.0, 1.0]}),
}
SAID = "expected a list of numbers|masked|not finite|true or false|from 0 to 1|no number"


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("name", NO_NUMBERS)
def test_statistics_refuse_what_is_no_list_of_numbers(name):
    for function in FUNCTIONS.values():
        refused(lambda function=function: function(NO_NUMBERS[name]), match=SAID)


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("name", OWN_NO_NUMBERS)
def test_statistics_refuse_further_things_that_are_no_list_of_numbers(name):
    for function in FUNCTIONS.values():
        refused(lambda function=function: function(OWN_NO_NUMBERS[name]), match=SAID)


ALIKE = {
    "arrays": np.array,
    "float32": lambda x: np.array(x, dtype=np.float32),
    "tensor": torch.tensor,
    "with gradients": lambda x: torch.tensor(x, requires_grad=True),
    "column": lambda x: pd.Series(x, index=range(7, 7 + len(x))),
    "missing dtype": lambda x: pd.Series(x, dtype="Float64"),
    "objects": lambda x: np.array(x, dtype=object),
    "fractions": lambda x: [Fraction(value) for value in x],
    "numpy scalars": lambda x: list(map(np.float64, x)),
    "tensors": lambda x: list(map(torch.tensor, x)),
    "generator": lambda x: (value for value in x),
    "values of a mapping": lambda x: dict(enumerate(x)).values(),
}


@pytest.mark.kind("numpy-numbers")
@pytest.mark.parametrize("function", [stats.paired, stats.relative_change, stats.ratio, stats.difference])
def test_statistics_take_the_numbers_of_other_libraries_as_pythons(function):
    before, after = [0.25, 0.5, 1.0, 0.125, 0.75], [0.5, 0.75, 1.0, 0.5, 0.25]
    want = function(before, after), stats.mean(before, seed=3), stats.regression(before, {"a": after})
    for kind, make in ALIKE.items():
        got = function(make(before), make(after)), stats.mean(make(before), seed=np.int64(3))
        assert (*got, stats.regression(make(before), {"a": make(after)})) == want, kind


@pytest.mark.kind("numpy-numbers")
def test_p_values_of_other_libraries_are_pythons():
    p_values = [0.01, 0.04, 0.5]
    for make in (torch.tensor, iter):
        assert stats.holm(make(p_values)) == pytest.approx([0.03, 0.08, 0.5])
    assert stats.holm(iter(())) == stats.holm(np.array([])) == []


@pytest.mark.kind("numpy-numbers")
@pytest.mark.parametrize("kind", [np.array, torch.tensor, lambda x: list(map(np.bool_, x)), pd.Series, iter])
def test_yes_and_no_of_other_libraries_are_pythons(kind):
    flags = [True, False, True, True]
    assert stats.share(kind(flags)) == stats.share(flags)
    assert stats.share(kind(flags), iter("abba")) == stats.share(flags, list("abba"))


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("clusters", [[1, NAN, 2], [1, None, 2], [1, pd.NA, 2], [1, "1", 2]], ids=str)
def test_clusters_without_a_name_or_with_one_that_reads_alike_are_refused(clusters):
    for call in (
        lambda: stats.mean([0.1, 0.2, 0.3], clusters),
        lambda: stats.share([0, 1, 1], clusters),
        lambda: stats.paired([0.1, 0.2, 0.3], [0.2, 0.2, 0.4], clusters),
        lambda: stats.regression([0.1, 0.2, 0.3], {"a": [0.2, 0.2, 0.4]}, clusters=clusters),
    ):
        refused(call, match="cluster")


@pytest.mark.kind("numpy-numbers", own=True)
def test_clusters_of_one_value_are_one_cluster_whatever_their_type():
    values = [0.1, 0.2, 0.4, 0.3]
    want = stats.mean(values, ["1", "1", "2", "2"])
    for clusters in ([1, 1.0, 2, np.int64(2)], np.array([1, 1, 2, 2]), torch.tensor([1, 1, 2, 2]), [True, 1, 2, 2.0]):
        assert stats.mean(values, clusters) == want or clusters[0] is True
        assert len(stats.cluster_means(values, clusters)) == 2


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("size", [1e-200, 1e200, 1e308])
def test_values_whose_squares_are_no_numbers_are_refused_rather_than_given_an_effect(size):
    values = [1.0 * size, 1.25 * size, 1.5 * size]
    for call in (
        lambda: stats.paired([0.0] * 3, values),
        lambda: stats.runs(values),
        lambda: stats.mean(values),
        lambda: stats.regression(values, {"a": [1.0, 2.0, 4.0]}),
        lambda: stats.regression([1.0, 2.0, 4.0], {"a": values}),
    ):
        refused(call, match="give them in another unit")
    scaled = [value / size for value in values]
    assert stats.paired([0.0] * 3, scaled).effect == pytest.approx(np.mean(scaled) / np.std(scaled, ddof=1))


@pytest.mark.kind("not-a-number", own=True)
def test_a_relative_change_beyond_floating_point_is_refused():
    refused(lambda: stats.relative_change([1e-290, 2e-290], [0.5, 0.6]), match="e\\^600")


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("seed", [None, -1, 1.0, True, "0", NAN])
def test_a_seed_is_a_whole_number_from_0_on(seed):
    refused(lambda: stats.mean([0.1, 0.2, 0.4], seed=seed), match="seed")
    refused(lambda: ablation.matched_controls(torch.rand(2, 30), [(0, 1)], 2, seed=seed), match="seed")
    refused(lambda: words.next_words(3, seed=seed), match="seed")


@pytest.mark.kind("raw-errors", own=True)
def test_groups_of_clusters_and_predictors_of_another_form_are_refused():
    refused(lambda: stats.difference([0.1, 0.2], [0.2, 0.3], (["a", "b"],)), match="two lists, one for each group")
    refused(lambda: stats.regression([0.1, 0.2, 0.4], [[0.1, 0.2, 0.3]]), match="a mapping")
    one, two = [0.1, 0.2, 0.4], [0.3, 0.4, 0.2]
    pair = np.array([["a", "a", "b"], ["c", "d", "d"]])
    assert stats.difference(one, two, pair) == stats.difference(one, two, tuple(map(list, pair)))


# --------------------------------------------------------------------------------- effects of edits


HELD = ablation.capture_prompts(LLAMA, [CAUSAL, replace(CAUSAL, prompt="the capital of Spain is in", subject="Spain")])
SIZES = torch.rand(3, 24, generator=torch.Generator().manual_seed(0))
NAN_SIZES = SIZES.clone().index_put((torch.tensor(1), torch.tensor(5)), torch.tensor(NAN))
BAD_EFFECTS = {
    "activations -1": lambda: HELD.activations([-1]),
    "activations 2": lambda: HELD.activations([2]),
    "activations True": lambda: HELD.activations([True]),
    "measure prompt True": lambda: ablation.measure(HELD, [Ablation(True, [(0, 1)])]),
    "budget 0": lambda: ablation.read(HELD, [Ablation(0, [(0, 1)])], 0),
    "budget 0.5": lambda: ablation.read(HELD, [Ablation(0, [(0, 1)])], 0.5),
    "matched_controls nan": lambda: ablation.matched_controls(NAN_SIZES, [(1, 2)], 2),
    "matched_controls -1": lambda: ablation.matched_controls(SIZES, [(1, -1)], 2),
    "matched_controls draws": lambda: ablation.matched_controls(SIZES, [(1, 2)], -1),
    "most_active nan": lambda: ablation.most_active(NAN_SIZES, 3),
    "most_active 0": lambda: ablation.most_active(SIZES, 0),
    "most_active -1": lambda: ablation.most_active(SIZES, -1),
}
OWN_BAD_EFFECTS = {
    "activations of none": lambda: HELD.activations([]),
    "factor None": lambda: ablation.read(HELD, [Ablation(0, [(0, 1)], None)]),
    "a neuron twice": lambda: ablation.read(HELD, [Ablation(0, [(0, 1), (0, 1)], 2.0)]),
    "neurons bool": lambda: ablation.read(HELD, [Ablation(0, torch.tensor([[True, False]]))]),
    "trials of pairs": lambda: ablation.read(HELD, [(0, [(0, 1)])]),
    "one trial": lambda: ablation.read(HELD, Ablation(0, [(0, 1)])),
    "words are texts": lambda: ablation.capture_prompts(LLAMA, [CAUSAL], ["Paris"]),
    "words are numbers": lambda: ablation.capture_prompts(LLAMA, [CAUSAL], [[3]]),
    "negative sizes": lambda: ablation.most_active(SIZES - 1, 3),
    "matched_controls of none": lambda: ablation.matched_controls(SIZES, [], 2),
    "matched_controls twice": lambda: ablation.matched_controls(SIZES, [(1, 2), (1, 2)], 2),
    "matched_controls inf": lambda: ablation.matched_controls(SIZES / 0, [(1, 2)], 2),
    "most_active one axis": lambda: ablation.most_active(SIZES[0], 2),
}


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("name", BAD_EFFECTS)
def test_effects_refuse_what_is_no_number_or_out_of_range(name):
    refused(BAD_EFFECTS[name])


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("name", OWN_BAD_EFFECTS)
def test_effects_refuse_further_input_that_means_nothing(name):
    refused(OWN_BAD_EFFECTS[name])


@pytest.mark.kind("numpy-numbers")
def test_effects_take_numbers_of_numpy_and_torch():
    plain = [Ablation(0, [(0, 1), (1, 3)], 2.0), Ablation(1, [(2, 5), (0, 2)])]
    want, said = ablation.read(HELD, plain)
    for make in (np.array, torch.tensor):
        trials = [
            Ablation(make(0), make([[0, 1], [1, 3]]), np.float32(2)),
            Ablation(np.uint8(1), [Neuron(2, np.int64(5)), (make(0), make(2))], torch.tensor(0.0)),
        ]
        got, says = ablation.read(HELD, (trial for trial in trials), np.int64(512))
        assert torch.equal(got, want) and torch.equal(says, said)
        pd.testing.assert_frame_equal(ablation.measure(HELD, iter(trials)), ablation.measure(HELD, plain))
        given = make([[1, 2], [0, 3]])
        drawn = ablation.matched_controls(SIZES.numpy(), given, np.int64(3), make(7))
        assert drawn == ablation.matched_controls(SIZES, [(1, 2), (0, 3)], 3, 7)
        assert all(type(x) is int for some in drawn for pair in some for x in pair)
    assert ablation.most_active(SIZES.double().numpy(), np.int64(4)) == ablation.most_active(SIZES, 4)
    assert torch.equal(HELD.activations(np.array([1, 0])), HELD.activations([1, 0]))


# --------------------------------------------------------------------------------- interventions


BAD_INTERVENTIONS = {
    "suppress bool": lambda: suppress(LLAMA, [(0, True)]),
    "values text": lambda: set_neurons(LLAMA, [(0, 1)], "1"),
    "value beyond float32": lambda: set_neurons(LLAMA, [(0, 1)], 1e39),
    "factor beyond float32": lambda: enhance(LLAMA, [(0, 1)], 1e39),
    "factor huge integer": lambda: enhance(LLAMA, [(0, 1)], 10**400),
    "update nan": lambda: value_update(LLAMA, CAUSAL, "Madrid", [(0, 1)], (NAN, 8.0)),
    "update three": lambda: value_update(LLAMA, CAUSAL, "Madrid", [(0, 1)], (1.0, 8.0, 2.0)),
    "delta nan": lambda: Delta(1, torch.full((1, 24), NAN), torch.ones(1, 16)),
    "delta block 1.0": lambda: Delta(1.0, torch.ones(1, 24), torch.ones(1, 16)),
    "delta block True": lambda: Delta(True, torch.ones(1, 24), torch.ones(1, 16)),
    "delta of no rank": lambda: Delta(1, torch.ones(0, 24), torch.ones(0, 16)),
    "delta complex": lambda: Delta(1, torch.ones(1, 24, dtype=torch.complex64), torch.ones(1, 16)),
}
OWN = {"value beyond float32", "factor beyond float32", "delta of no rank", "delta complex", "factor huge integer"}


def marked(name):
    return pytest.mark.kind("numpy-numbers" if "suppress" in name else "not-a-number", own=name in OWN)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marked(name)) for name in BAD_INTERVENTIONS])
def test_interventions_refuse_what_is_no_number_before_anything_changes(name):
    def enter():
        found = BAD_INTERVENTIONS[name]()
        with found:
            pytest.fail("the body ran")

    refused(enter)
    assert not LLAMA.is_modified


@pytest.mark.kind("not-a-number", own=True)
def test_a_delta_that_rows_cannot_hold_and_no_rows_are_refused():
    lm = tiny.lm("llama", dtype=torch.float16)
    big = Delta(1, torch.ones(1, 24), torch.full((1, 16), 1e5))
    with pytest.raises(ValueError, match="block 1 is not finite in torch.float16"), edited_rows(lm, [[big]]):
        pytest.fail("the body ran")
    with pytest.raises(ValueError, match="no rows"), edited_rows(lm, []):
        pytest.fail("the body ran")


def logits_under(context):
    with context:
        return predictions.log_probabilities(LLAMA, [CAUSAL])


NEURONS = [(0, 3), (1, 8), (2, 1)]
SAME_NEURONS = {
    "numpy pairs": lambda: [(np.int64(0), np.int32(3)), (np.uint8(1), 8), (2, np.int64(1))],
    "torch pairs": lambda: [(torch.tensor(0), torch.tensor(3)), (1, torch.tensor(8)), (2, 1)],
    "array": lambda: np.array(NEURONS),
    "tensor": lambda: torch.tensor(NEURONS),
    "uint8": lambda: torch.tensor(NEURONS, dtype=torch.uint8),
    "lists": lambda: [[0, 3], [1, 8], [2, 1]],
    "neurons": lambda: [Neuron(*pair) for pair in NEURONS],
    "generator": lambda: (pair for pair in NEURONS),
}


@pytest.mark.kind("numpy-numbers")
@pytest.mark.parametrize("kind", SAME_NEURONS)
@pytest.mark.parametrize("position", ["target", "all"])
def test_neurons_of_numpy_and_torch_are_those_of_python(kind, position):
    make = SAME_NEURONS[kind]
    plain = logits_under(suppress(LLAMA, NEURONS, position=position))
    assert torch.equal(logits_under(suppress(LLAMA, make(), position=position)), plain)
    want = logits_under(enhance(LLAMA, NEURONS, 3.0, position=position))
    for factor in (3, np.float32(3), np.int64(3), torch.tensor(3.0), np.array(3.0), Fraction(3)):
        assert torch.equal(logits_under(enhance(LLAMA, make(), factor, position=position)), want)
    want = logits_under(set_neurons(LLAMA, NEURONS, [0.5, -1.0, 2.0], position=position))
    for values in (np.array([0.5, -1, 2]), np.float32([0.5, -1, 2]), torch.tensor([0.5, -1, 2]), iter([0.5, -1, 2])):
        assert torch.equal(logits_under(set_neurons(LLAMA, make(), values, position=position)), want)
    want = logits_under(set_neurons(LLAMA, NEURONS, 1.0, position=position))
    for value in (1, True, np.bool_(True), np.float32(1), np.int64(1), torch.tensor(1.0), np.ones(3, bool)):
        assert torch.equal(logits_under(set_neurons(LLAMA, make(), value, position=position)), want)


@pytest.mark.kind("numpy-numbers", own=True)
def test_values_are_not_given_to_neurons_that_have_no_order():
    plain = logits_under(set_neurons(LLAMA, NEURONS, 0.5))
    refused(lambda: set_neurons(LLAMA, set(NEURONS), [0.5, -1.0, 2.0]), match="a set have no order")
    assert torch.equal(logits_under(set_neurons(LLAMA, set(NEURONS), 0.5)), plain)
    given = {pair: value for pair, value in zip(NEURONS, [0.5, -1.0, 2.0], strict=True)}
    got = logits_under(set_neurons(LLAMA, given, list(given.values())))
    assert torch.equal(got, logits_under(set_neurons(LLAMA, NEURONS, [0.5, -1.0, 2.0])))


@pytest.mark.kind("raw-errors")
def test_a_generator_of_neurons_that_is_used_up_is_said_to_be_so():
    once = (pair for pair in NEURONS)
    suppress(LLAMA, once)
    refused(lambda: suppress(LLAMA, once), match="no neurons given .or an iterator that is used up")


@pytest.mark.kind("numpy-numbers")
def test_deltas_of_one_block_add_up_whatever_the_type_of_its_number():
    made = torch.Generator().manual_seed(3)
    parts = [(torch.randn(1, 24, generator=made), torch.randn(1, 16, generator=made)) for _ in range(2)]
    want = logits_under(edited(LLAMA, *(Delta(1, *part) for part in parts)))
    for kind in (np.int64, torch.tensor, np.array):
        assert torch.equal(logits_under(edited(LLAMA, *(Delta(kind(1), *part) for part in parts))), want)
        arrays = [Delta(kind(1), *(half.numpy() for half in part)) for part in parts]
        assert torch.equal(logits_under(edited(LLAMA, *arrays)), want)
        rows = [[Delta(kind(1), *part) for part in parts]]
        torch.testing.assert_close(logits_under(edited_rows(LLAMA, rows)), want, atol=2e-4, rtol=1e-4)
    given = value_update(LLAMA, CAUSAL, "Madrid", np.array([[0, 1], [1, 2]]), np.array([1.0, 8.0]))
    plain = value_update(LLAMA, CAUSAL, "Madrid", [(0, 1), (1, 2)])
    for one, two in zip(given, plain, strict=True):
        assert one.block == two.block and torch.equal(one.hidden, two.hidden) and torch.equal(one.neurons, two.neurons)


# --------------------------------------------------------------------------------- replay


def two_prompts(lm, **options):
    return capture(lm, [encode(lm, Query(text, "cats")) for text in ("the capital of France", "Anna saw")], **options)


CAPTURED = two_prompts(LLAMA, start=[1, 1])
ROW = torch.ones(1, 24)
FIRST = torch.tensor([0])
BAD_CHANGES = {
    "prompt -1": Change(0, torch.tensor([-1]), ROW),
    "prompt 2": Change(0, torch.tensor([2]), ROW),
    "prompts as a mask": Change(0, torch.tensor([True, False]), torch.ones(2, 24)),
    "prompts 0.0": Change(0, torch.tensor([0.0]), ROW),
    "values nan": Change(0, FIRST, ROW * NAN),
    "values inf": Change(0, FIRST, ROW * INF),
}
OWN_BAD_CHANGES = {
    "block True": Change(True, FIRST, ROW),
    "values beyond float32": Change(0, FIRST, torch.full((1, 24), 1e39, dtype=torch.float64)),
    "values complex": Change(0, FIRST, ROW.to(torch.complex64)),
    "width of a site not kept": Change(0, FIRST, torch.ones(1, 24), "mlp"),
    "positions too many": Change(0, FIRST, ROW, "neuron", torch.tensor([1, 2])),
    "position 1.0": Change(0, FIRST, ROW, "neuron", torch.tensor([1.0])),
    "no change": (0, FIRST, ROW),
}


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("name", BAD_CHANGES)
@pytest.mark.parametrize("what", [replay, states])
def test_replay_refuses_what_is_no_number_or_out_of_range(what, name):
    refused(lambda: what(CAPTURED, [BAD_CHANGES[name]]))


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("name", OWN_BAD_CHANGES)
@pytest.mark.parametrize("what", [replay, states])
def test_replay_refuses_further_changes_that_mean_nothing(what, name):
    refused(lambda: what(CAPTURED, [OWN_BAD_CHANGES[name]]))


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize(
    "options",
    [dict(start=[-1, 0]), dict(start=[0]), dict(start=[0.0, 0.0]), dict(at=[-1, 0]), dict(at=[0, 9]), dict(at=[0])],
    ids=str,
)
def test_capture_refuses_positions_that_prompts_do_not_have(options):
    refused(lambda: two_prompts(LLAMA, **options))


@pytest.mark.kind("raw-errors")
def test_nothing_to_capture_or_to_replay_is_refused():
    refused(lambda: capture(LLAMA, []), match="no prompts")
    refused(lambda: replay(CAPTURED, iter(())), match="no changes")
    encoded = encode(LLAMA, CAUSAL)
    refused(lambda: capture(LLAMA, [replace(encoded, position=-1)]), match="position that predicts")


@pytest.mark.kind("numpy-numbers")
@pytest.mark.parametrize("kind", [np.array, torch.tensor, list])
def test_changes_made_of_numpy_and_lists_are_those_of_torch(kind):
    made = torch.Generator().manual_seed(1)
    values = torch.randn(3, 24, generator=made)
    plain = [Change(0, torch.tensor([1, 0, 1]), values), Change(2, FIRST, ROW, "neuron", torch.tensor([2]))]
    given = [
        Change(np.int64(0), kind([1, 0, 1]), kind(values.tolist())),
        Change(np.uint8(2), kind([0]), kind(ROW.tolist()), "neuron", kind([2])),
    ]
    assert torch.equal(replay(CAPTURED, iter(given)), replay(CAPTURED, plain))
    assert torch.equal(states(CAPTURED, given), states(CAPTURED, plain))
    other = two_prompts(LLAMA, start=np.array([1, 1]), at=torch.tensor([2, 1]))
    same = two_prompts(LLAMA, start=[1, 1], at=[2, 1])
    assert all(torch.equal(a, b) for a, b in zip(other.sites["neuron"], same.sites["neuron"], strict=True))


# --------------------------------------------------------------------------------- tracing


BAD_TRACES = {
    "noise inf": dict(noise=INF),
    "samples 2.5": dict(samples=2.5),
    "samples True": dict(samples=True),
    "stride True": dict(stride=True),
    "seed 0.0": dict(seed=0.0),
    "seed True": dict(seed=True),
    "budget 0": dict(budget=0),
    "window True": dict(restores=[Restore(window=True)]),
    "one restore": dict(restores=Restore()),
}
OWN_BAD_TRACES = {
    "seed nan": dict(seed=NAN),
    "seed None": dict(seed=None),
    "budget -5": dict(budget=-5),
    "restores of tuples": dict(restores=[("mlp", 1, "")]),
}


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("name", BAD_TRACES)
def test_tracing_refuses_what_is_no_number_or_out_of_range(name):
    refused(lambda: trace(LLAMA, [CAUSAL], **BAD_TRACES[name]))
    assert not stored()


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("name", OWN_BAD_TRACES)
def test_tracing_refuses_further_settings_that_mean_nothing(name):
    refused(lambda: trace(LLAMA, [CAUSAL], **OWN_BAD_TRACES[name]))
    assert not stored()


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_a_number_of_facts_to_trace_is_a_whole_one_from_1_on(n):
    refused(lambda: facts(LLAMA, "capital", n), match="n must be")
    refused(lambda: agreement(LLAMA, "subject_verb", n), match="n must be")


@pytest.mark.kind("numpy-numbers")
@pytest.mark.parametrize("kind", [np.int64, torch.tensor, np.array])
def test_tracing_takes_numbers_of_numpy_and_torch_and_finds_the_same_trace(kind):
    (want,) = trace(LLAMA, [CAUSAL], [Restore("mlp", 3)], noise=2.0, samples=2, seed=4, stride=2)
    written = stored()
    numbers = dict(noise=np.float32(2), samples=kind(2), seed=kind(4), stride=kind(2), budget=kind(900))
    (got,) = trace(LLAMA, iter([CAUSAL]), iter([Restore("mlp", kind(3))]), **numbers)
    assert torch.equal(got.restored, want.restored) and got.blocks == want.blocks == (0, 2)
    assert written and stored() == written
    queries = [replace(CAUSAL, template="the capital of {} is in", target=x) for x in ("Paris", "cats", "red")]
    assert replacements(LLAMA, queries, kind(3)) == replacements(LLAMA, queries, 3)


# --------------------------------------------------------------------------------- words, grammar, corpus


BAD_WORDS = {
    "next_words 2.0": lambda: words.next_words(2.0),
    "next_words True": lambda: words.next_words(True),
    "count of a text": lambda: frequencies.count("Anna saw the cat"),
    "total 0": lambda: frequencies.Counts({"a": 1}, {}, 0, 1).frequency("a"),
    "total nan": lambda: frequencies.Counts({"a": 1}, {}, NAN, 1).frequency("a"),
    "count nan": lambda: frequencies.Counts({"a": NAN}, {}, 9, 1).frequency("a"),
    "pairs seed True": lambda: grammar.minimal_pairs("subject_verb", 2, seed=True),
    "pairs seed 0.0": lambda: grammar.minimal_pairs("subject_verb", 2, seed=0.0),
    "plural of nothing": lambda: grammar.plural(""),
    "corpus seed 1.0": lambda: corpus.pairs(1.0),
    "corpus seed True": lambda: corpus.world(True),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.kind("not-a-number", own=name.startswith(("count", "total", "corpus"))))
        for name in BAD_WORDS
    ],
)
def test_words_and_grammar_refuse_what_is_no_number_or_out_of_range(name):
    refused(BAD_WORDS[name])


@pytest.mark.kind("not-a-number")
def test_a_count_of_zero_says_that_a_word_or_pair_is_not_in_the_table():
    found = frequencies.Counts({"this": 4, "book": 0, "cat": 2}, {"this cat": 0, "this book": 1}, 16, 1)
    assert found.frequency("book") is None and found.pair_count("this", "cat") is None
    assert found.association("this", "cat") is None and found.association("this", "book") is None
    assert found.frequency("cat") == pytest.approx(math.log10(2 / 16 * 1e9))


@pytest.mark.kind("numpy-numbers")
def test_counts_of_numpy_do_not_overflow():
    plain = frequencies.Counts({"of": 10**10, "the": 2 * 10**10}, {"of the": 3 * 10**9}, 10**12, 1)
    given = frequencies.Counts({"of": np.int64(10**10), "the": np.int64(2 * 10**10)}, {"of the": np.int64(3 * 10**9)},
                         np.int64(10**12), 1)  # fmt: skip
    want = math.log2(3e9 * 1e12 / (1e10 * 2e10))
    assert plain.association("of", "the") == pytest.approx(want) == given.association("of", "the")
    assert given.frequency("the") == plain.frequency("the")


@pytest.mark.kind("numpy-numbers")
@pytest.mark.parametrize("kind", [np.int64, torch.tensor, np.array])
def test_stimuli_are_the_same_for_numbers_of_numpy_and_torch(kind):
    assert words.next_words(kind(3), seed=kind(2)) == words.next_words(3, seed=2)
    assert grammar.minimal_pairs("subject_verb", kind(4), kind(3)) == grammar.minimal_pairs("subject_verb", 4, 3)
    assert corpus.pairs(kind(3)) == corpus.pairs(3)
    assert corpus.world(kind(3)).speaks == corpus.world(3).speaks


@pytest.mark.kind("not-a-number", own=True)
def test_a_seed_that_equals_another_does_not_take_its_place():
    for bad in (True, 1.0):
        refused(lambda bad=bad: corpus.pairs(bad))
        refused(lambda bad=bad: corpus.world(bad))
    with pytest.raises(ValueError):
        corpus.pairs(7.0)
    assert corpus.pairs(7) == corpus.pairs(np.int64(7))
    assert grammar.plural("y") == "ys"
