"""Effects against the definition: the whole model run under `suppress` or `enhance`, and the full softmax."""

import contextlib
from dataclasses import replace

import naive
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kncore import models, zoo
from kncore.ablation import Ablation, capture_prompts, matched_controls, measure, most_active, read
from kncore.interventions import Delta, edited, enhance, suppress
from kncore.query import Query
from kncore.tokens import encode

MODELS = {family: tiny.lm(family) for family in tiny.FAMILIES}
on_all_families = pytest.mark.parametrize("family", tiny.FAMILIES)

# Prompt, target, words that compete. Some are of two tokens, "Paris cat" begins as its target, "these" is asked twice.
ASKED = [
    ("the capital of France is", "Paris", ["Madrid", "Paris cat", "Spain red"]),
    ("these", "books", []),
    ("Anna saw these red", "cats in", ["cat", "book", "cats", "books", "book red", "Anna"]),
    ("this cat is", "red", ["red"]),
    ("the capital of the book is in", "Spain", ["France"]),
    ("these", "book", ["books", "cats"]),
]
WORDS = [words for _, _, words in ASKED]
FACTORS = [0.0, 0.5, 2.0, 4.0, -1.0]


@pytest.fixture(autouse=True)
def models_stay_as_they_were():
    yield
    assert not any(lm.is_modified for lm in MODELS.values())


def queries(lm, foils=False) -> list[Query]:
    """ASKED; a masked model reads on after the mask. With foils, every second query has one."""
    tail = " [MASK] ." if lm.spec.masked else ""
    foil = ["", "Anna"] if foils else ["", ""]
    return [
        Query(prompt + tail, target, foil=foil[i % 2], task=f"task {i % 2}", item=target, value=str(i))
        for i, (prompt, target, _) in enumerate(ASKED)
    ]


def first_ids(lm, target: str, words) -> list[int]:
    """First tokens of the target and of the words, each once: the tiny tokenizer's tokens are words."""
    table = lm.tokenizer.get_vocab()
    return list(dict.fromkeys(table[word.split()[0]] for word in (target, *words)))


def whole_run(lm, query: Query, trial: Ablation | None = None):
    """Log-probabilities at the target position of the model run as a whole, on this prompt alone."""
    encoded = encode(lm, query)
    if trial is None:
        change = contextlib.nullcontext()
    elif trial.factor == 0:
        change = suppress(lm, trial.neurons)
    else:
        change = enhance(lm, trial.neurons, trial.factor)
    with torch.no_grad(), change:
        out = lm.model(torch.tensor([encoded.ids], device=lm.device)).logits[0, encoded.position]
    return out.double().log_softmax(-1)


@st.composite
def several_trials(draw) -> list[Ablation]:
    """Trials in any order, over a few sets of neurons that they share."""
    neuron = st.tuples(st.integers(0, 2), st.integers(0, 23))
    sets = draw(st.lists(st.lists(neuron, min_size=1, max_size=6, unique=True), min_size=1, max_size=4))
    places, chosen, factors = st.integers(0, len(ASKED) - 1), st.sampled_from(sets), st.sampled_from(FACTORS)
    return draw(st.lists(st.builds(Ablation, places, chosen, factors, st.sampled_from("ab")), min_size=1, max_size=12))


def some_trials() -> list[Ablation]:
    return [
        Ablation(4, [(1, 3), (0, 5)], 4.0, "one"),
        Ablation(0, [(2, 7)], 0.0, "two"),
        Ablation(2, [(2, 1), (0, 9), (1, 1)], -1.0, "one"),
        Ablation(0, [(0, 5)], 2.0, "three"),
    ]


# Reading


@settings(max_examples=30, deadline=None)
@given(several_trials(), st.sampled_from([1, 7, 64, 512]), st.sampled_from([1, 2, 48]))
@on_all_families
def test_reading_equals_an_intervention_around_the_whole_model(family, trials, budget, batch):
    lm = MODELS[family]
    asked = queries(lm)
    held = capture_prompts(lm, asked, WORDS, batch)
    logp, said = read(held, trials, budget)
    assert logp.shape == (len(trials), 5) and said.shape == (len(trials),)
    for trial, got, top in zip(trials, logp, said.tolist(), strict=True):
        want = whole_run(lm, asked[trial.prompt], trial)
        ids = first_ids(lm, ASKED[trial.prompt][1], WORDS[trial.prompt])
        torch.testing.assert_close(got[: len(ids)].double(), want[ids], atol=2e-5, rtol=1e-5)
        assert (got[len(ids) :] == -torch.inf).all()
        assert want[top] > want.max() - 1e-5


def test_a_large_set_over_all_blocks_equals_an_intervention_around_the_whole_model():
    lm = MODELS["llama"]
    every = [(block, index) for index in range(24) for block in (2, 0, 1)]
    trials = [Ablation(4, every[:size], factor) for size in (1, 50, 72) for factor in (0.0, 1.5)]
    logp, _ = read(capture_prompts(lm, queries(lm)), trials)
    target = first_ids(lm, "Spain", [])[0]
    want = [whole_run(lm, queries(lm)[4], trial)[target] for trial in trials]
    torch.testing.assert_close(logp[:, 0].double(), torch.stack(want), atol=2e-5, rtol=1e-5)


@on_all_families
def test_the_order_of_trials_and_of_neurons_does_not_matter(family):
    lm = MODELS[family]
    held, trials = capture_prompts(lm, queries(lm), WORDS), some_trials()
    logp, said = read(held, trials)
    again, said_again = read(held, [trial._replace(neurons=trial.neurons[::-1]) for trial in trials[::-1]])
    torch.testing.assert_close(again.flip(0), logp, atol=1e-5, rtol=1e-5)
    assert torch.equal(said_again.flip(0), said)
    # Bit for bit: rows are in the order of the trials, wherever in memory their sets are.
    as_tensors = [trial._replace(neurons=torch.tensor(trial.neurons)) for trial in trials]
    assert torch.equal(read(held, as_tensors)[0], logp)


def test_an_edit_by_one_changes_nothing():
    lm = MODELS["gpt2"]
    held = capture_prompts(lm, queries(lm), WORDS)
    logp, said = read(held, [Ablation(i, [(0, 1), (2, 2)], 1.0) for i in range(len(ASKED))])
    torch.testing.assert_close(logp, held.logp, atol=1e-5, rtol=1e-5)
    assert torch.equal(said, held.predicted)


@pytest.mark.parametrize("family", ["bert", "gpt2", "mistral"])
def test_reading_happens_in_the_model_as_it_is(family):
    lm = MODELS[family]
    edit = Delta(1, torch.linspace(-1, 1, 24)[None], torch.linspace(1, -1, 16)[None])
    for change in (lambda: edited(lm, edit), lambda: suppress(lm, [(0, 2), (1, 4)], position="all")):
        with change():
            logp, _ = read(capture_prompts(lm, queries(lm)), some_trials())
            want = [whole_run(lm, queries(lm)[t.prompt], t)[encode(lm, queries(lm)[t.prompt]).target[0]]
                    for t in some_trials()]  # fmt: skip
        torch.testing.assert_close(logp[:, 0].double(), torch.stack(want), atol=2e-5, rtol=1e-5)
        plain, _ = read(capture_prompts(lm, queries(lm)), some_trials())
        assert (plain - logp).abs().max() > 1e-3


@contextlib.contextmanager
def watched(block, see):
    hook = block.register_forward_pre_hook(lambda _, x: see(x[0]))
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_budget_bounds_the_positions_held_at_once(family):
    lm = MODELS[family]
    held, trials = capture_prompts(lm, queries(lm)), [trial for _ in range(4) for trial in some_trials()]
    cost = held.captures[0].inputs[0].shape[1]
    for budget, most in ((1, 1), (cost, 1), (4 * cost - 1, 3), (10**6, 16)):
        rows = []
        with watched(lm.blocks[2], lambda x, rows=rows: rows.append(len(x))):
            read(held, trials, budget)
        assert max(rows) == most and sum(rows) == len(trials)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_trials_that_differ_only_in_what_is_read_are_one_row(family):
    lm = MODELS[family]
    held, neurons = capture_prompts(lm, queries(lm), WORDS), [(1, 3), (2, 0)]
    assert held.rows[1] == held.rows[5] and sum(len(c.logits) for c in held.captures) == len(ASKED) - 1
    trials = [Ablation(i, neurons, factor, label) for label in "ab" for factor in (0.0, 2.0) for i in (5, 0, 1)]
    rows = []
    with watched(lm.blocks[2], lambda x: rows.append(len(x))):
        logp, _ = read(held, trials)
    assert rows == [4]
    for trial, got in zip(trials, logp, strict=True):
        ids = first_ids(lm, ASKED[trial.prompt][1], WORDS[trial.prompt])
        want = whole_run(lm, queries(lm)[trial.prompt], trial)[ids]
        torch.testing.assert_close(got[: len(ids)].double(), want, atol=2e-5, rtol=1e-5)


def test_only_what_an_edit_can_reach_is_run():
    lm = MODELS["llama"]
    held = capture_prompts(lm, queries(lm))
    seen = {block: [] for block in range(3)}
    with contextlib.ExitStack() as hooks:
        for number, block in enumerate(lm.blocks):
            hooks.enter_context(watched(block, lambda x, n=number: seen[n].append(tuple(x.shape))))
        read(held, [Ablation(0, [(2, 1)]), Ablation(1, [(1, 1), (2, 1)]), Ablation(4, [(1, 2)])])
    assert seen == {0: [], 1: [(2, 1, 16)], 2: [(3, 1, 16)]}


# Capturing


@on_all_families
def test_held_words_are_first_tokens_and_their_probabilities_before_any_edit(family):
    lm = MODELS[family]
    for foils, words in ((False, None), (True, None), (True, WORDS), (False, WORDS)):
        asked = queries(lm, foils)
        held = capture_prompts(lm, asked, words, batch=2)
        rivals = words or [[query.foil] if query.foil else [] for query in asked]
        for i, query in enumerate(asked):
            ids = first_ids(lm, query.target, rivals[i])
            assert held.words[i].tolist() == ids + [-1] * (held.words.shape[1] - len(ids))
            want = whole_run(lm, query)
            torch.testing.assert_close(held.logp[i, : len(ids)].double(), want[ids], atol=2e-5, rtol=1e-5)
            assert (held.logp[i, len(ids) :] == -torch.inf).all()
            assert int(held.predicted[i]) == int(want.argmax())
        assert held.words.shape[1] == (5 if words else 1 + foils)


def test_queries_of_one_template_may_have_different_targets_and_words():
    lm = MODELS["gpt2"]
    asked = [
        Query(f"the capital of {country} is", city, country, template="the capital of {} is")
        for country, city in (("France", "Paris"), ("Spain", "Madrid"), ("Spain", "Paris"))
    ]
    words = [["Paris", "Madrid"], ["Paris", "Madrid"], ["red cat"]]
    table = lm.tokenizer.get_vocab()
    want = [[table[a], table[b]] for a, b in (("Paris", "Madrid"), ("Madrid", "Paris"), ("Paris", "red"))]
    assert capture_prompts(lm, asked, words).words.tolist() == want


@on_all_families
def test_activations_are_what_a_hook_reads(family):
    lm = MODELS[family]
    asked = queries(lm)
    held = capture_prompts(lm, asked, batch=2)
    prompts = [4, 0, 3, 3, 1, 2, 5]
    got = held.activations(prompts)
    assert got.shape == (7, 3, 24)
    for prompt, states in zip(prompts, got, strict=True):
        for block in range(3):
            _, want = naive.forward(lm, encode(lm, asked[prompt]), block, "neuron")
            torch.testing.assert_close(states[block], want, atol=1e-5, rtol=1e-4)


# The table


@settings(max_examples=10, deadline=None)
@given(several_trials(), st.sampled_from(["foils", "words", "neither"]))
@on_all_families
def test_the_columns_are_what_they_are_said_to_be(family, trials, rivals):
    lm = MODELS[family]
    asked = queries(lm, foils=rivals == "foils")
    words = WORDS if rivals == "words" else None
    table = measure(capture_prompts(lm, asked, words), trials)
    assert len(table) == len(trials)
    for row, trial in zip(table.itertuples(), trials, strict=True):
        query = asked[trial.prompt]
        others = words[trial.prompt] if words else [query.foil] if query.foil else []
        target, *ids = first_ids(lm, query.target, others)
        told = (trial.label, trial.prompt, query.task, query.item, query.value, query.template)
        assert (row.label, row.prompt, row.task, row.item, row.value, row.template) == told
        want = {}
        for when, found in (("before", whole_run(lm, query)), ("after", whole_run(lm, query, trial))):
            p = found.exp().numpy()
            want[f"logp_{when}"] = np.log(p[target])
            want[f"mass_{when}"] = np.log(p[target] + p[ids].sum())
            want[f"margin_{when}"] = np.log(p[target] / p[ids].max()) if ids else np.inf
            if not ids or abs(want[f"margin_{when}"]) > 1e-4:
                assert getattr(row, f"prefers_{when}") == all(p[target] > p[i] for i in ids)
            if np.diff(np.sort(p)[-2:]) > 1e-4:
                assert getattr(row, f"says_{when}") == (p.argmax() == target)
                want[f"top_{when}"] = int(p.argmax())
        if "top_before" in want and "top_after" in want:
            assert row.changed == (want["top_before"] != want["top_after"])
        want = {name: value for name, value in want.items() if not name.startswith("top")}
        for name, loss in (("logp", "loss"), ("margin", "loss_margin"), ("mass", "loss_mass")):
            if np.isfinite(want[f"{name}_before"]):
                want[loss] = want[f"{name}_before"] - want[f"{name}_after"]
            else:
                assert np.isnan(getattr(row, loss))
        got = {name: getattr(row, name) for name in want}
        assert got == pytest.approx(want, abs=5e-5)


def test_the_columns_of_one_trial_worked_out_by_hand(monkeypatch):
    """The target and its two rivals have probabilities .5, .25, .2 before the edit and .1, .4, .2 after it."""
    lm = MODELS["gpt2"]
    held = capture_prompts(lm, queries(lm)[:1], [["Madrid", "Spain"]])
    before, after = np.log([0.5, 0.25, 0.2]), np.log([0.1, 0.4, 0.2])
    target, madrid, _ = held.words[0].tolist()
    held = replace(held, logp=torch.tensor(before)[None], predicted=torch.tensor([target]))
    monkeypatch.setattr("kncore.ablation.read", lambda *_: (torch.tensor(after)[None], torch.tensor([madrid])))
    row = measure(held, [Ablation(0, [(0, 0)])]).iloc[0]
    assert row.loss == pytest.approx(np.log(5)) and row.logp_after == pytest.approx(np.log(0.1))
    assert row.margin_before == pytest.approx(np.log(2)) and row.margin_after == pytest.approx(-np.log(4))
    assert row.loss_margin == pytest.approx(np.log(8)) and row.loss_mass == pytest.approx(np.log(0.95 / 0.7))
    assert row.prefers_before and row.says_before and not row.prefers_after and not row.says_after and row.changed


def test_no_trials_make_an_empty_table_with_the_same_columns():
    lm = MODELS["gpt2"]
    held = capture_prompts(lm, queries(lm), WORDS)
    empty = measure(held, [])
    assert len(empty) == 0 and list(empty) == list(measure(held, some_trials()))


# Bad input and failures


def test_bad_queries_are_refused():
    lm = MODELS["gpt2"]
    with pytest.raises(ValueError, match="at least one"):
        capture_prompts(lm, [])
    with pytest.raises(ValueError, match="6 queries but 4 lists of words"):
        capture_prompts(lm, queries(lm), WORDS[:4])
    with pytest.raises(ValueError, match="6 queries but 0 lists of words"):
        capture_prompts(lm, queries(lm), [])
    with pytest.raises(ValueError, match="mask must come last"):
        capture_prompts(lm, [*queries(lm), Query("the [MASK] is red", "cat")])


@pytest.mark.parametrize(
    ("prompt", "neurons", "match"),
    [
        (0, [], "prompt 0: no neurons given"),
        (6, [(0, 0)], "prompt of an ablation must be from 0 to 5, got 6"),
        (-1, [(0, 0)], "prompt of an ablation must be from 0 to 5, got -1"),
        (0, [(0, 1), (3, 0)], r"neuron \(3, 0\) does not exist; tiny-\w+ has blocks 0 to 2, neurons 0 to 23"),
        (0, [(2, 24)], r"neuron \(2, 24\) does not exist"),
        (0, [(-1, 0)], r"neuron \(-1, 0\) does not exist"),
        (0, [(0, 1), (0, -2)], r"neuron \(0, -2\) does not exist"),
        (0, [(0, 1.0)], r"whole numbers, got \(0, 1.0\)"),
        (0, (0, 1), r"a pair .* got \(0,\)"),
        (0, [(0, 1, 2)], "a pair"),
    ],
)
@pytest.mark.parametrize("what", [read, measure])
def test_bad_trials_are_refused_before_anything_is_run(monkeypatch, what, prompt, neurons, match):
    lm = MODELS["llama"]
    held = capture_prompts(lm, queries(lm))
    monkeypatch.setattr("kncore.ablation.replay", lambda *_: pytest.fail("something was run"))
    with pytest.raises(ValueError, match=match):
        what(held, [*some_trials(), Ablation(prompt, neurons), *some_trials()])


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
@on_all_families
def test_a_factor_that_is_not_a_number_is_an_error_that_names_the_prompt(family, factor):
    lm = MODELS[family]
    held = capture_prompts(lm, queries(lm))
    for budget in (1, 512):
        with pytest.raises(
            ValueError, match=f"factor of an ablation of prompt 2 must be a finite number.* got {factor}"
        ):
            read(held, [*some_trials(), Ablation(2, [(1, 3), (2, 1)], factor), *some_trials()], budget)
    assert not lm.is_modified


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_factor_too_large_for_half_precision_is_an_error(family):
    lm = tiny.lm(family, dtype=torch.float16)
    held = capture_prompts(lm, queries(lm))
    read(held, [Ablation(1, [(0, 2), (1, 3)], 4.0)])
    with pytest.raises(ValueError, match="prompt 1 must be a finite number of torch.float16, got 1000000.0"):
        read(held, [Ablation(1, [(0, 2), (1, 3)], 1e6)])
    many = [(block, index) for block in range(3) for index in range(24)]
    with pytest.raises(ValueError, match="factor 60000 .*'these.*wider dtype"):
        read(held, [Ablation(1, many, 6e4)])
    assert not lm.is_modified


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@on_all_families
def test_the_model_is_left_as_it_was_when_reading_fails(family, error):
    lm = MODELS[family]
    held = capture_prompts(lm, queries(lm), WORDS)
    parameters = [(p, p.clone()) for p in lm.model.parameters()]
    want = read(held, some_trials())
    after = iter([None, error, None])

    def fail(x):
        stop = next(after)
        if stop:
            raise stop("in the middle")

    with pytest.raises(error, match="in the middle"), watched(lm.blocks[2], fail):
        read(held, some_trials(), budget=1)
    assert not lm.is_modified
    assert all(p is q and torch.equal(p, old) for q, (p, old) in zip(lm.model.parameters(), parameters, strict=True))
    assert all(map(torch.equal, read(held, some_trials()), want))


@on_all_families
def test_trials_under_an_intervention_at_the_target_position_are_refused(family):
    lm = MODELS[family]
    held = capture_prompts(lm, queries(lm))
    with suppress(lm, [(0, 1), (1, 1), (2, 1)]), pytest.raises(RuntimeError, match="position='all'"):
        read(held, some_trials())


# Sets to compare with


SIZES = st.lists(st.lists(st.integers(0, 50), min_size=30, max_size=30), min_size=2, max_size=2).map(
    lambda rows: torch.tensor(rows, dtype=torch.float32)
)
GIVEN = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 29)), min_size=1, max_size=12, unique=True)


@settings(deadline=None)
@given(SIZES, GIVEN, st.integers(1, 5), st.integers(0, 9))
def test_matched_controls_are_others_of_the_same_block_and_nearly_as_active(sizes, neurons, pool, seed):
    sets = matched_controls(sizes, neurons, 3, seed, pool)
    assert len(sets) == 3 and sets == matched_controls(sizes, neurons, 3, seed, pool)
    assert sets[:2] == matched_controls(sizes, neurons, 2, seed, pool)
    for drawn in sets:
        assert [block for block, _ in drawn] == [block for block, _ in neurons]
        assert len({*drawn, *neurons}) == 2 * len(neurons)
        before = []
        for (block, index), (_, other) in zip(neurons, drawn, strict=True):
            free = [i for i in range(30) if (block, i) not in neurons and (block, i) not in before]
            far = sorted(abs(float(sizes[block, i] - sizes[block, index])) for i in free)[:pool][-1]
            assert abs(float(sizes[block, other] - sizes[block, index])) <= far
            before.append((block, other))


def test_matched_controls_are_drawn_from_the_whole_pool_and_from_no_more():
    sizes = torch.arange(40.0).repeat(2, 1)
    drawn = [one for (one,) in matched_controls(sizes, [(1, 10)], 200, pool=6)]
    assert set(drawn) == {(1, i) for i in (7, 8, 9, 11, 12, 13)}
    assert all(20 <= drawn.count(one) <= 50 for one in set(drawn))
    assert matched_controls(sizes, [(1, 10)], 5, seed=1) != matched_controls(sizes, [(1, 10)], 5, seed=2)


def test_more_matched_controls_than_a_block_has_are_an_error():
    sizes = torch.rand(2, 10)
    half = [(1, i) for i in range(5)]
    (drawn,) = matched_controls(sizes, half, 1)
    assert set(drawn) == {(1, i) for i in range(5, 10)}
    with pytest.raises(ValueError, match="block 1 has no neurons left"):
        matched_controls(sizes, [*half, (1, 5)], 1)


@given(st.permutations(range(20)), st.integers(1, 20))
def test_the_most_active_neurons_are_those_of_the_largest_size(order, k):
    sizes = torch.tensor(order, dtype=torch.float32).view(4, 5)
    ranked = sorted(((block, index) for block in range(4) for index in range(5)), key=lambda n: -sizes[n])
    assert most_active(sizes, k) == ranked[:k]


# The default model


@pytest.mark.model
def test_on_the_default_model_reading_equals_suppressing_around_the_whole_model():
    entry = zoo.REGISTRY[zoo.DEFAULT]
    if not (zoo.cache_folder() / "models" / f"{zoo.DEFAULT}-{entry.sha256[:16]}").is_dir():
        pytest.skip("the default model is not in the cache; `make install` puts it there")
    lm = models.load()
    asked = [
        Query("The capital of France is", "Paris", foil="Madrid"),
        Query("These", "books", foil="book"),
        Query("The official language of Brazil, a large country, is", "Portuguese"),
    ]
    held = capture_prompts(lm, asked)
    sizes = held.activations(range(3)).abs()
    trials = [Ablation(i, most_active(sizes[i], 5) + [(29 - i, 0)]) for i in range(3)]
    logp, said = read(held, trials)
    assert (logp[:, 0] - held.logp[:, 0]).abs().max() > 0.01
    for trial, got, top in zip(trials, logp, said.tolist(), strict=True):
        want = whole_run(lm, asked[trial.prompt], trial)
        ids = held.words[trial.prompt]
        torch.testing.assert_close(got[ids >= 0].double(), want[ids[ids >= 0]], atol=1e-4, rtol=0)
        assert top == int(want.argmax())
    assert not lm.is_modified
