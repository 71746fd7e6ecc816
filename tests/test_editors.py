"""The registry of editors: what each gives, what it keeps on disk, and that its edits do what was asked."""

from dataclasses import replace

import pytest
import tiny
import torch
import whole

from kncore import attribution, cache, cases, editors, finetune, neurons, rome, tasks, tokens
from kncore.covariance import covariance
from kncore.editors import EDITORS, Edit, edit
from kncore.interventions import Delta, edited
from kncore.models import LM, _state, load
from kncore.tasks import Query

MODELS = {family: tiny.lm(family) for family in tiny.FAMILIES}
WEIGHTS = {family: [p.clone() for p in lm.model.parameters()] for family, lm in MODELS.items()}
SMALL = rome.Hyper(1, steps=3, lr=0.1, prefixes=1, stop=0.0)
WRITING = [name for name in EDITORS if name != "context"]


@pytest.fixture(autouse=True)
def models_stay_as_they_were():
    yield
    for family, lm in MODELS.items():
        assert not lm.touched
        assert all(torch.equal(p, was) for p, was in zip(lm.model.parameters(), WEIGHTS[family], strict=True))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Settings that take a moment, and a covariance of the passages."""
    monkeypatch.setattr(rome, "hyper", lambda lm: replace(SMALL, covariance="text"))


@pytest.fixture
def searched(monkeypatch):
    """How many requests each call of the search was given."""
    seen, search = [], rome.search
    monkeypatch.setattr(rome, "search", lambda lm, some, *rest: seen.append(len(some)) or search(lm, some, *rest))
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
                assert lm.touched
    before = {file: file.stat().st_ino for file in files()}  # a file written again is another one
    for module, function in ((rome, "search"), (finetune, "finetune"), (attribution, "attribute")):
        monkeypatch.setattr(module, function, None)
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


@pytest.mark.parametrize(("name", "source"), [("rome", "text"), ("rome-identity", "identity")])
def test_rome_is_the_search_written_with_the_covariance(name, source, searched):
    lm = MODELS["llama"]
    got = edit(lm, requests(lm), name)
    c = covariance(lm, 1, source)
    for one, found in zip(got, rome.search(lm, requests(lm), SMALL), strict=True):
        assert same(one, Edit((rome.delta(found, c, 1),)))


def test_both_kinds_of_rome_and_memit_share_the_search(searched):
    lm = MODELS["gpt2"]
    for name in ("rome", "rome-identity", "memit"):
        edit(lm, requests(lm), name)
    assert searched == [3]


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


def test_the_value_update_looks_for_neurons_in_all_templates_of_a_relation(monkeypatch):
    lm, seen, attribute = MODELS["llama"], [], attribution.attribute
    monkeypatch.setattr(attribution, "attribute", lambda lm, asked: seen.extend(asked) or attribute(lm, asked))
    relation = tasks.describe("capital")
    query = replace(tasks.ask(relation, ("France", "Paris"), relation.templates[0]), foil="Madrid")
    editors.neuron_edits(lm, [query])
    assert [one.prompt for one in seen] == [
        tasks.ask(relation, ("France", "Paris"), text).prompt for text in relation.templates
    ]
    del seen[:]
    editors.neuron_edits(lm, [replace(query, task="P36")])
    assert [one.prompt for one in seen] == [query.prompt]


@pytest.mark.parametrize("name", WRITING)
def test_inside_an_edit_the_edited_model_is_edited_and_nothing_is_stored(name):
    lm, second = MODELS["llama"], requests(MODELS["llama"])[1]
    base = Delta(0, torch.ones(1, 24), torch.linspace(-1, 1, 16)[None])
    edit(lm, [second], name)
    before = files()
    with edited(lm, base):
        (inside,) = edit(lm, [second], name)
    assert files() == before
    fresh = tiny.lm("llama")
    with torch.no_grad():
        whole.vectors(fresh, 0).add_(base.neurons.T @ base.hidden)
    written = LM(fresh.name, "written", fresh.model, fresh.tokenizer, fresh.spec, _state(fresh.model))
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
        editors.fine_tuning(lm, requests(lm), finetune.Hyper(1, stop=stop)),
    ):
        assert [bool(one.failed) for one in made] == [loss < stop for loss in losses]
        assert all(one.deltas if not one.failed else one.deltas == () for one in made)


def test_memit_leaves_out_what_failed(monkeypatch):
    lm = MODELS["llama"]
    losses = [float(whole.loss(lm, whole.ask(lm, query, query.foil)).detach()) for query in requests(lm)]
    stop = sum(sorted(losses)[:2]) / 2
    monkeypatch.setattr(rome, "hyper", lambda lm: replace(SMALL, prefixes=0, stop=stop, covariance="text"))
    made = edit(lm, requests(lm), "memit")
    assert [bool(one.failed) for one in made] == [loss < stop for loss in losses]
    assert {len(delta.neurons) for one in made for delta in one.deltas} == {2}
    worst = [query for query, loss in zip(requests(lm), losses, strict=True) if loss < stop]
    assert [one.deltas for one in edit(lm, worst, "memit")] == [()]


def test_a_search_that_diverged_stays_a_failure_in_the_store():
    lm = MODELS["gpt2"]
    hyper = replace(SMALL, lr=float("inf"), covariance="text")
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


# The store


def test_a_killed_run_goes_on_where_it_was(searched, monkeypatch):
    lm = MODELS["llama"]
    monkeypatch.setattr(editors, "BATCH", 1)
    search = rome.search

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
        chosen, editors.rome_edits(lm, chosen, replace(rome.hyper(lm), covariance="text")), strict=True
    ):
        assert one.failed == ""
        ids = torch.tensor([lm.tokenizer(query.prompt)["input_ids"]])
        with edited(lm, *one.deltas), torch.no_grad():
            said = int(lm.model(ids).logits[0, -1].argmax())
        assert said == tokens.encode(lm, query, query.foil).target[0]
