"""The registry of editors: what each gives, what it keeps on disk, and that its edits do what was asked."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import whole

from kncore import attribution, editors, finetune, neurons, rome, tokens
from kncore.covariance import covariance
from kncore.editors import EDITORS, Edit, edit
from kncore.interventions import Delta, edited
from kncore.models import LM, load
from kncore.query import Query
from kncore.store import cache
from knpaper import cases, tasks

MODELS = {family: tiny.lm(family) for family in tiny.FAMILIES}
WEIGHTS = {family: [p.clone() for p in lm.model.parameters()] for family, lm in MODELS.items()}
SMALL = rome.HParams(1, steps=3, lr=0.1, prefixes=1, stop=0.0)
WRITING = [name for name in EDITORS if name != "context"]


@pytest.fixture(autouse=True)
def models_stay_as_they_were():
    yield
    for family, lm in MODELS.items():
        assert not lm.is_modified
        assert all(torch.equal(p, was) for p, was in zip(lm.model.parameters(), WEIGHTS[family], strict=True))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Settings that take a moment, and a covariance of the passages."""
    monkeypatch.setattr(rome, "hparams_for", lambda lm: replace(SMALL, covariance="text"))


@pytest.fixture
def searched(monkeypatch):
    """How many requests each call of the search was given."""
    seen, search = [], rome.search

    @functools.wraps(search)  # the store looks at the code of the wrapped one
    def counted(lm, some, *rest):
        seen.append(len(some))
        return search(lm, some, *rest)

    monkeypatch.setattr(rome, "search", counted)
    return seen


def requests(lm) -> list[Query]:
    end = " [MASK] ." if lm.spec.masked else ""
    return [
        Query("the capital of red France is" + end, "Paris", "red France", "Madrid"),
        Query("Spain is in" + end, "Madrid", "Spain", "red cats"),
        Query("Anna saw these books , the cats . in France is the" + end, "Paris", "France", "Spain"),
    ]


def same(one: Edit, other: Edit) -> bool:
    pairs = zip(one.deltas, other.deltas, strict=True)
    return (one.context, one.failed) == (other.context, other.failed) and all(
        a.block == b.block and torch.equal(a.neurons, b.neurons) and torch.equal(a.hidden, b.hidden) for a, b in pairs
    )


def files():
    return sorted(cache.scores_folder().rglob("*.safetensors"))


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_every_editor_gives_an_edit_for_each_request_and_finds_it_again(family, name, monkeypatch):
    lm = MODELS[family]
    edits = edit(lm, requests(lm), name)
    assert len(edits) == 3 and not any(one.failed for one in edits)
    for one in edits:
        assert bool(one.deltas) != bool(one.context)
        if one.deltas:
            with edited(lm, *one.deltas):
                assert lm.is_modified
    before = {file: file.stat().st_ino for file in files()}  # a file written again is another one
    for module, name_there in ((rome, "search"), (finetune, "finetune"), (attribution, "attribute")):

        @functools.wraps(getattr(module, name_there))
        def never(*_):
            raise AssertionError("computed again")

        monkeypatch.setattr(module, name_there, never)
    assert all(map(same, edit(lm, requests(lm), name), edits))
    assert before == {file: file.stat().st_ino for file in files()}


@pytest.mark.parametrize("name", [name for name in EDITORS if name != "memit"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_masked_models_can_be_edited_too(family, name):
    edits = edit(MODELS[family], requests(MODELS[family]), name)
    assert len(edits) == 3 and all((one.deltas or one.context) and not one.failed for one in edits)


def test_masked_models_have_no_memit_and_say_so_before_any_work(searched):
    with pytest.raises(ValueError, match="use a causal model"):
        edit(MODELS["bert"], requests(MODELS["bert"]), "memit")
    assert not searched


# What they write


@pytest.mark.kind("rome-one-key")
@pytest.mark.filterwarnings("ignore:the key of the request alone")
@pytest.mark.parametrize(
    ("name", "source", "key"),
    [("rome", "text", "bare"), ("rome-published", "text", "published"), ("rome-identity", "identity", "published")],
)
def test_rome_is_the_search_written_with_the_covariance_under_the_key(name, source, key, searched):
    lm = MODELS["llama"]
    got = edit(lm, requests(lm), name)
    c = covariance(lm, 1, source)
    for one, found in zip(got, rome.search(lm, requests(lm), SMALL), strict=True):
        assert same(one, Edit((rome.delta(found, c, 1, key),)))


@pytest.mark.filterwarnings("ignore:the key of the request alone")
def test_searches_are_written_under_a_key_and_failures_say_why():
    lm = MODELS["llama"]
    found = rome.search(lm, requests(lm), SMALL)
    c = covariance(lm, 1, "text")
    for key in rome.KEYS:
        for one, search in zip(editors.write_searches(found, c, 2, key), found, strict=True):
            assert same(one, Edit((rome.delta(search, c, 2, key),)))
    failed, zero, fine = editors.write_searches(
        [replace(found[0], failed="it diverged"), replace(found[1], change=0 * found[1].change), found[2]], None, 1
    )
    assert failed == Edit(failed="it diverged") and "change of the value is zero" in zero.failed
    assert same(fine, Edit((rome.delta(found[2], None, 1),)))
    assert all("singular" in one.failed for one in editors.write_searches(found, torch.zeros(24, 24), 1))


@pytest.mark.filterwarnings("ignore:the key of the request alone")
def test_all_kinds_of_rome_and_memit_share_the_search(searched):
    lm = MODELS["gpt2"]
    for name in ("rome", "rome-published", "rome-identity", "memit"):
        edit(lm, requests(lm), name)
    editors.rome_edits(lm, requests(lm), replace(SMALL, covariance="identity", key="mean"))
    assert searched == [3]


def test_the_published_search_is_another_one_in_the_store(searched):
    lm = MODELS["gpt2"]
    new, old = (
        editors.rome_edits(lm, requests(lm), replace(SMALL, search=name, covariance="text")) for name in rome.SEARCHES
    )
    assert searched == [3, 3]
    found = rome.search(lm, requests(lm), replace(SMALL, search="adam"))
    for one, other, adam in zip(new, old, found, strict=True):
        assert not same(one, other) and same(other, Edit((rome.delta(adam, covariance(lm, 1, "text"), 1),)))


def test_memit_writes_all_requests_together():
    lm = MODELS["llama"]
    first, *others = edit(lm, requests(lm), "memit")
    assert all(one is first for one in others)
    assert [delta.block for delta in first.deltas] == [0, 1]
    assert all(len(delta.neurons) == 3 for delta in first.deltas)


def test_the_new_fact_is_one_sentence_before_the_prompt():
    query = requests(MODELS["llama"])[0]
    (one,) = edit(MODELS["llama"], [query], "context")
    assert one == Edit(context="the capital of red France is Madrid. ")
    (one,) = edit(MODELS["bert"], [requests(MODELS["bert"])[0]], "context")
    assert one == Edit(context="the capital of red France is Madrid . ")


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_the_value_update_moves_the_facts_neurons_towards_the_new_answer(family):
    """Each row of the update is ± the embeddings that the paper names, by the sign that the neuron has there."""
    lm, query = MODELS[family], requests(MODELS[family])[0]
    (one,) = editors.neuron_edits(lm, [query], scale=0.5)
    table = lm.model.get_output_embeddings().weight
    ids = lm.tokenizer.get_vocab()
    vector = 4 * table[ids["Madrid"]] - 0.5 * table[ids["Paris"]]
    scores = attribution.attribute(lm, [query]).scores
    wanted = neurons.find_neurons(scores).neurons
    asked = whole.ask(lm, query, query.target)
    told = {}
    for delta in one.deltas:
        with torch.no_grad():
            _, state, _ = whole.run(lm, asked._replace(at=asked.places[0]), delta.block)
        change = delta.neurons.T @ delta.hidden
        for i in change.abs().sum(1).nonzero()[:, 0].tolist():
            told[delta.block, i] = True
            torch.testing.assert_close(change[i], state[i].sign() * vector, atol=1e-5, rtol=1e-4)
            # what the neuron adds where the answer is due grows along the new answer
            assert float((state[i] * change[i]) @ vector) > 0
    assert sorted(told) == sorted(map(tuple, wanted))


def test_the_value_update_looks_for_neurons_in_all_paraphrases(monkeypatch):
    lm, seen, attribute = MODELS["llama"], [], attribution.attribute
    monkeypatch.setattr(attribution, "attribute", lambda lm, asked: seen.extend(asked) or attribute(lm, asked))
    relation = tasks.describe("capital")
    query = replace(tasks.ask(relation, ("France", "Paris"), relation.templates[0]), foil="Madrid")
    editors.neuron_edits(lm, [query], paraphrases=tasks.paraphrases)
    assert [one.prompt for one in seen] == [
        tasks.ask(relation, ("France", "Paris"), text).prompt for text in relation.templates
    ]
    del seen[:]
    editors.neuron_edits(lm, [replace(query, task="P36")], paraphrases=tasks.paraphrases)
    assert [one.prompt for one in seen] == [query.prompt]


@pytest.mark.parametrize("name", WRITING)
def test_inside_an_edit_the_edited_model_is_edited_and_what_is_stored_of_the_other_stays(name):
    lm, second = MODELS["llama"], requests(MODELS["llama"])[1]
    base = Delta(0, torch.ones(1, 24), torch.linspace(-1, 1, 16)[None])
    edit(lm, [second], name)
    before = {file: file.read_bytes() for file in files()}
    with edited(lm, base):
        (inside,) = edit(lm, [second], name)
    assert all(file.read_bytes() == content for file, content in before.items())
    fresh = tiny.lm("llama")
    with torch.no_grad():
        whole.vectors(fresh, 0).add_(base.neurons.T @ base.hidden)
    written = LM(fresh.name, "written", fresh.model, fresh.tokenizer, fresh.spec)
    (want,) = edit(written, [second], name)
    (plain,) = edit(lm, [second], name)
    apart = [difference(inside, other) for other in (want, plain)]
    assert apart[0] < 0.2 * apart[1]


def difference(one: Edit, other: Edit) -> float:
    """The largest difference between two changes of the model."""
    total = torch.zeros(3, 24, 16)
    for some, sign in ((one, 1), (other, -1)):
        for delta in some.deltas:
            total[delta.block] += sign * delta.neurons.T @ delta.hidden
    return float(total.abs().max())


# Failures


def test_a_failure_is_one_items_alone():
    lm = MODELS["llama"]
    losses = [float(whole.loss(lm, whole.ask(lm, query, query.foil)).detach()) for query in requests(lm)]
    stop = sum(sorted(losses)[:2]) / 2
    hyper = replace(SMALL, prefixes=0, stop=stop, covariance="identity")
    for made in (
        editors.rome_edits(lm, requests(lm), hyper),
        editors.fine_tuning(lm, requests(lm), finetune.HParams(1, stop=stop)),
    ):
        assert [bool(one.failed) for one in made] == [loss < stop for loss in losses]
        assert all(one.deltas if not one.failed else one.deltas == () for one in made)


def test_memit_leaves_out_what_failed(monkeypatch):
    lm = MODELS["llama"]
    losses = [float(whole.loss(lm, whole.ask(lm, query, query.foil)).detach()) for query in requests(lm)]
    stop = sum(sorted(losses)[:2]) / 2
    monkeypatch.setattr(rome, "hparams_for", lambda lm: replace(SMALL, prefixes=0, stop=stop, covariance="text"))
    made = edit(lm, requests(lm), "memit")
    assert [bool(one.failed) for one in made] == [loss < stop for loss in losses]
    assert {len(delta.neurons) for one in made for delta in one.deltas} == {2}
    worst = [query for query, loss in zip(requests(lm), losses, strict=True) if loss < stop]
    assert [one.deltas for one in edit(lm, worst, "memit")] == [()]


def test_a_search_that_diverged_stays_a_failure_in_the_store():
    lm = MODELS["gpt2"]
    hyper = replace(SMALL, search="adam", lr=1e30, clamp=float("inf"), covariance="text")
    for _ in range(2):
        assert all(one.deltas == () and "diverged" in one.failed for one in editors.rome_edits(lm, requests(lm), hyper))


def test_too_little_text_is_a_failure_of_every_item(tmp_path):
    (tmp_path / "text.txt").write_text("the capital of France is Paris")
    hyper = replace(SMALL, covariance=str(tmp_path))
    lm = MODELS["llama"]
    made = editors.rome_edits(lm, requests(lm), hyper)
    assert all(one.deltas == () and "24 neurons is singular" in one.failed for one in made)


def test_wrong_arguments_are_refused():
    lm = MODELS["llama"]
    with pytest.raises(ValueError, match="unknown editor 'rom'. Did you mean 'rome'.*memit"):
        edit(lm, requests(lm), "rom")
    with pytest.raises(ValueError, match="no requests"):
        edit(lm, [])
    for name in EDITORS:
        with pytest.raises(ValueError, match="no new answer; give it as the foil"):
            edit(lm, [replace(requests(lm)[0], foil="")], name)
    for name in ("rome", "memit"):
        with pytest.raises(ValueError, match="no subject"):
            edit(lm, [replace(requests(lm)[0], subject="")], name)


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("name", EDITORS)
def test_requests_come_in_any_iterable_or_are_refused(name):
    lm = MODELS["llama"]
    got = edit(lm, iter(requests(lm)[:1]), name)
    assert all(map(same, got, edit(lm, requests(lm)[:1], name))) and len(got) == 1
    for editor in (lambda lm, some: edit(lm, some, name), EDITORS[name]):
        for nothing in ([], iter(()), {}):
            with pytest.raises(ValueError, match="no requests given; give at least one"):
                editor(lm, nothing)
        for wrong in (requests(lm)[0], None, 7, "text", [None], [requests(lm)[0], "text"], [["a", "b"]]):
            with pytest.raises(TypeError, match="expected a list of Query as requests"):
                editor(lm, wrong)


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_block_that_adds_nothing_is_a_failure_of_every_edit_of_it(family, name, monkeypatch):
    """All MLPs of the model are zero: no key, no value, no neuron bears on the answer, and no change is written."""
    lm = tiny.lm(family)
    monkeypatch.setattr(rome, "hparams_for", lambda lm: replace(SMALL, covariance="identity"))
    with torch.no_grad():
        for block in range(3):
            for parameter in lm.model.get_submodule(whole.PLACES[family][0])[block].mlp.parameters():
                parameter.zero_()
    made = edit(lm, requests(lm), name)
    assert all(one.failed and not one.deltas for one in made)
    assert any(word in made[0].failed for word in ("zero", "nothing", "does not depend"))


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("name", ["rome", "fine-tuning", "memit"])
def test_a_request_without_numbers_fails_alone_and_from_the_store_too(name):
    lm = tiny.lm("llama")
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[lm.tokenizer.get_vocab()["Spain"]] = float("nan")
    for _ in range(2):
        made = edit(lm, requests(lm), name)
        assert [bool(one.failed) for one in made] == [False, True, False]
        assert "are not numbers" in made[1].failed and made[0].deltas and made[2].deltas


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("name", WRITING)
def test_what_the_model_says_already_is_a_failure(name):
    lm = MODELS["llama"]
    query = requests(lm)[0]
    with torch.no_grad():
        top = int(lm.model(torch.tensor([lm.tokenizer(query.prompt)["input_ids"]])).logits[0, -1].argmax())
    (one,) = edit(lm, [replace(query, foil=lm.tokenizer.convert_ids_to_tokens(top), target="Spain")], name)
    assert one.deltas == () and "gives the new answer already" in one.failed


@pytest.mark.kind("not-a-number")
@pytest.mark.filterwarnings("ignore:.*not in the vocabulary")
def test_answers_that_begin_alike_have_no_update_of_neurons_and_the_same_tokens_none_at_all():
    lm = MODELS["llama"]
    query = replace(requests(lm)[0], target="red France", foil="red Spain")
    assert "begin with the same token" in edit(lm, [query], "neurons")[0].failed
    assert not any(edit(lm, [query], name)[0].failed for name in WRITING if name != "neurons")
    for name in WRITING:
        assert "the same token" in edit(lm, [replace(query, target="Oslo", foil="Bergen")], name)[0].failed


@pytest.mark.kind("not-a-number", own=True)
def test_deltas_that_are_zero_are_a_failure_and_not_an_edit():
    some, none = torch.ones(1, 24), torch.zeros(1, 16)
    assert "zero" in editors.written(Delta(0, some, none), Delta(1, torch.zeros(1, 24), none + 1)).failed
    assert editors.written(Delta(0, some, none + 1)).deltas


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("scale", [0, -0.1, float("nan"), float("inf"), "1", True, None])
def test_a_scale_that_writes_nothing_is_refused(scale):
    with pytest.raises(ValueError, match="scale"):
        editors.neuron_edits(MODELS["llama"], requests(MODELS["llama"]), scale)


@pytest.mark.kind("raw-errors")
def test_settings_of_numpy_and_wrong_blocks(searched):
    lm = MODELS["llama"]
    want = editors.rome_edits(lm, requests(lm), SMALL)
    got = editors.rome_edits(lm, requests(lm), replace(SMALL, block=np.int64(1), lr=np.float64(0.1)))
    assert all(map(same, got, want)) and searched == [3]
    for block in (-1, 3):
        with pytest.raises(ValueError, match="has blocks 0 to 2"):
            editors.rome_edits(lm, requests(lm), replace(SMALL, block=block))
        with pytest.raises(ValueError, match="has blocks 0 to 2"):
            editors.fine_tuning(lm, requests(lm), finetune.HParams(block))
    for wrong in (None, ["rome"], 3):
        with pytest.raises(ValueError, match="unknown editor"):
            edit(lm, requests(lm), wrong)
    assert searched == [3]


@pytest.mark.kind("raw-errors")
@pytest.mark.parametrize("name", WRITING)
def test_gradient_checkpointing_of_the_model_changes_no_edit(name):
    lm, other = tiny.lm("gpt2"), tiny.lm("gpt2")
    other.model.gradient_checkpointing_enable()
    with torch.no_grad():
        for one, two in zip(edit(lm, requests(lm), name), edit(other, requests(lm), name), strict=True):
            assert same(one, two) and one.deltas


# The store


def test_a_killed_run_goes_on_where_it_was(searched, monkeypatch):
    lm = MODELS["llama"]
    monkeypatch.setattr(editors, "BATCH", 1)
    search = rome.search

    @functools.wraps(search)
    def killed(lm, some, *rest):
        if len(searched) == 2:
            raise KeyboardInterrupt
        return search(lm, some, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(rome, "search", killed)
        with pytest.raises(KeyboardInterrupt):
            edit(lm, requests(lm))
    assert searched == [1, 1]
    made = edit(lm, requests(lm))
    assert searched == [1, 1, 1]
    monkeypatch.setenv("KNCORE_SCORES", str(cache.scores_folder()) + "-other")
    assert all(map(same, made, edit(lm, requests(lm))))
    assert searched == [1] * 6


def test_an_edit_is_stored_under_all_it_depends_on(searched):
    lm, query = MODELS["llama"], requests(MODELS["llama"])[0]
    editors.rome_edits(lm, [query], SMALL)
    others = [
        (lm, replace(query, foil="Spain"), SMALL),
        (lm, replace(query, subject="France"), SMALL),
        (lm, query, replace(SMALL, lr=0.2)),
        (lm, query, replace(SMALL, prefixes=2)),
        (replace(lm, revision="other"), query, SMALL),
    ]
    for model, asked, hyper in others:
        n = len(searched)
        for _ in range(2):
            editors.rome_edits(model, [asked], replace(hyper, covariance="identity"))
        assert len(searched) == n + 1


@pytest.mark.parametrize("left", [0, 50, 400])
@pytest.mark.parametrize("name", ["rome-identity", "fine-tuning", "neurons"])
def test_a_half_written_edit_is_made_again(name, left):
    lm = MODELS["llama"]
    query = requests(lm)[:1]
    want = edit(lm, query, name)
    for file in files():
        file.write_bytes(file.read_bytes()[:left])
    assert all(map(same, edit(lm, query, name), want))


def test_a_bar_says_what_is_left(capsys):
    lm = MODELS["llama"]
    edit(lm, requests(lm), "fine-tuning", progress=True)
    assert "0/3" in capsys.readouterr().err
    edit(lm, requests(lm), "neurons")
    assert not capsys.readouterr().err


# The default model


@pytest.mark.model
def test_the_default_model_takes_a_capital_in(monkeypatch):
    """ROME on two facts: the new answer is what the model says, here counted by hand from its logits."""
    monkeypatch.undo()
    lm = load()
    chosen = [case.request for case in cases.bijective("capital", 2)]
    for query, one in zip(
        chosen, editors.rome_edits(lm, chosen, replace(rome.hparams_for(lm), covariance="text")), strict=True
    ):
        assert one.failed == ""
        ids = torch.tensor([lm.tokenizer(query.prompt)["input_ids"]])
        with edited(lm, *one.deltas), torch.no_grad():
            said = int(lm.model(ids).logits[0, -1].argmax())
        assert said == tokens.encode(lm, query, query.foil).target[0]
