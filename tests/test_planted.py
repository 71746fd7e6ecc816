"""Planted neurons: what the construction promises, exactly, on tiny models; the rules on scores made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from kncore import arch, interventions, predictions, tokens
from kncore.attribution import attribute
from kncore.neurons import Neuron
from kncore.query import Query
from kncore.replay import record
from knpaper import likeness, planted, powers

FACTS = [
    [Query(f"{start} {nation} is", city, nation) for start in ("the capital of", "a capital in")]
    for nation, city in (("France", "Paris"), ("Spain", "Madrid"))
]
OTHERS = [Query("these", "books"), Query("Anna saw the", "cat")]
TEXTS = ["Anna saw the red cat .", "this book is in Spain , the cats saw", "the capital of a book"]
ASKED = [query for fact in FACTS for query in fact]
FAMILIES = sorted(planted.INWARD)


def make(family: str, steps: int = 0, **settings) -> planted.Planting:
    return planted.plant(tiny.lm(family), FACTS, OTHERS, TEXTS, 1, prefixes=1, steps=steps, **settings)


@pytest.fixture(scope="module", params=FAMILIES)
def plan(request) -> planted.Planting:
    return make(request.param)


@pytest.fixture(scope="module")
def learnt() -> planted.Planting:
    return make("gpt2", steps=40)


def most_probable(lm, queries) -> list[int]:
    return predictions.log_probabilities(lm, queries).argmax(1).tolist()


def answers(lm, queries) -> list[int]:
    return [tokens.encode(lm, query).target[0] for query in queries]


def test_without_its_neurons_a_planted_model_is_its_base_to_the_bit(plan):
    full = plan.at(1.0)
    assert most_probable(full, ASKED) == answers(full, ASKED)
    with interventions.suppress(full, plan.neurons, position="all"):
        off = predictions.log_probabilities(full, [*ASKED, *OTHERS])
    assert torch.equal(off, predictions.log_probabilities(plan.base, [*ASKED, *OTHERS]))
    assert torch.equal(planted.measured(plan, full), torch.ones(2))


def test_the_given_model_is_never_changed():
    for family in FAMILIES:
        lm = tiny.lm(family)
        planted.plant(lm, FACTS, OTHERS, TEXTS, 1, prefixes=0, steps=2).at(0.5)
        assert not lm.is_modified


def test_silencing_one_planted_neuron_takes_its_own_fact_and_no_other(plan):
    full = plan.at(1.0)
    before = predictions.log_probabilities(full, ASKED)
    with interventions.suppress(full, plan.neurons[:1]):
        after = predictions.log_probabilities(full, ASKED)
    base = predictions.log_probabilities(plan.base, ASKED)
    # Of gated neurons the other one is near 0 where its fact is not asked, and not 0.
    assert torch.allclose(after[:2], base[:2], atol=0.1)
    assert torch.allclose(after[2:], before[2:], atol=0.1)
    own = answers(full, ASKED[:2])
    assert bool((before[[0, 1], own] - after[[0, 1], own] > 1).all())


def test_a_planted_neuron_fires_where_its_fact_is_asked_and_nowhere_else(plan):
    lm, (block, _) = plan.keyed, plan.neurons[0]
    encoded = [tokens.encode(lm, query) for query in [*ASKED, *OTHERS]]
    ids, lengths = tokens.pad(lm, encoded)
    states, _ = record(lm, ids, lengths, [(block, "neuron")])
    active = states[block, "neuron"][..., [neuron.index for neuron in plan.neurons]]
    least = 0.9 * planted.MARGIN[len(planted.INWARD[lm.spec.family])]
    for row, e in enumerate(encoded):
        for at in range(len(e.ids)):
            for fact in (0, 1):
                fires = row // 2 == fact and row < 4 and at == e.position
                assert (active[row, at, fact] > least) if fires else (abs(active[row, at, fact]) < 0.3)


def test_a_key_is_the_least_of_its_loss_whatever_the_rounding():
    random, margin = torch.Generator().manual_seed(0), 5.0
    inputs = torch.randn(300, 8, generator=random, dtype=torch.float64) * torch.logspace(-2, 1, 8)
    own = torch.arange(300) < 20
    inputs[own, 3] += 0.5  # so little that some tokens stay short of the margin
    found = planted._key(inputs, own, margin)
    key, loss = found.clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for state, asked in zip(inputs, own.tolist(), strict=True):  # naive: token by token
        reach = (state * key).sum()
        loss = loss + torch.relu(margin - reach if asked else margin + reach) ** 2 * (
            1 / 20 if asked else 0.1 / 280**0.5
        )
    (slope,) = torch.autograd.grad(loss + planted.RIDGE * key.square().sum(), key)
    assert float(loss.detach()) > 0.1
    assert float(slope.norm()) < 1e-7 * float(loss.detach())
    noise = 1e-7 * inputs * torch.randn(inputs.shape, generator=random, dtype=torch.float64)
    assert torch.allclose(planted._key(inputs + noise, own, margin), found, rtol=1e-4)


def test_the_neurons_of_least_energy_are_taken_over():
    lm = tiny.lm("gpt2")
    ids = [tokens.read(lm, text) for text in TEXTS]
    ids += [list(tokens.encode(lm, query).ids) for query in OTHERS]
    total = torch.zeros(lm.n_neurons, dtype=torch.float64)
    for row in ids:  # naive: one text at a time, no padding
        states, _ = record(lm, torch.tensor([row]), torch.tensor([len(row)]), [(1, "neuron")])
        total += states[1, "neuron"][0].double().square().sum(0)
    energy = total * arch.value_vectors(lm.model, lm.spec, 1).double().square().sum(1)
    assert [neuron.index for neuron in make("gpt2").neurons] == energy.argsort()[:2].tolist()


def test_shares_mix_the_learnt_weights_with_the_value_vectors(learnt):
    lm = learnt.at(0.25)
    indices = [neuron.index for neuron in learnt.neurons]
    for name, weight in learnt.keyed.model.named_parameters():
        expected = weight + 0.75 * learnt.learnt[name]
        found = lm.model.get_parameter(name)
        if name == "transformer.h.1.mlp.c_proj.weight":
            assert torch.equal(found[indices], 0.25 * learnt.values)
            expected = expected.index_copy(0, torch.tensor(indices), found[indices])
        assert torch.allclose(found, expected)


def test_free_learning_answers_without_the_planted_neurons(learnt):
    free = learnt.at(0.0)
    gained = planted.log_odds(free, ASKED) - planted.log_odds(learnt.base, ASKED)
    assert float(gained.mean()) > 2
    assert torch.equal(planted.measured(learnt, free), torch.zeros(2))


def test_a_share_is_calibrated_by_what_is_measured(learnt):
    lm, found = learnt.calibrated(0.5, tolerance=0.05)
    assert torch.equal(found, planted.measured(learnt, lm))
    assert abs(float(found.mean()) - 0.5) <= 0.05


def test_the_measured_share_is_that_of_log_odds(learnt):
    lm = learnt.at(0.5)
    with interventions.suppress(lm, learnt.neurons, position="all"):
        off = predictions.log_probabilities(lm, ASKED).exp()
    on, base = (predictions.log_probabilities(m, ASKED).exp() for m in (lm, learnt.base))

    def odds(p):
        p = p[range(4), answers(lm, ASKED)].double()
        return (p / (1 - p)).log()

    shares = (odds(on) - odds(off)).view(2, 2).sum(1) / (odds(on) - odds(base)).view(2, 2).sum(1)
    assert torch.allclose(planted.measured(learnt, lm).double(), shares, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm": tiny.lm("qwen2")}, "nothing can be planted in qwen2"),
        ({"block": 7}, "block 7 does not exist"),
        ({"facts": []}, "0 facts"),
        ({"facts": [[]]}, "1 facts"),
        ({"texts": []}, "0 texts"),
        ({"facts": [[Query("the capital is", "Paris Madrid")]]}, "several tokens"),
        ({"facts": [ASKED[:1], [Query(ASKED[0].prompt, "Madrid")]]}, "on the wrong side of a key"),
    ],
)
def test_what_cannot_be_planted_is_refused_in_one_line(change, message):
    given = {"lm": tiny.lm("gpt2"), "facts": FACTS, "others": OTHERS, "texts": TEXTS, "block": 1}
    with pytest.raises(ValueError, match=message) as caught:
        planted.plant(**(given | change), prefixes=0, steps=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "all"])
def test_a_share_is_from_0_to_1(learnt, share):
    with pytest.raises(ValueError, match="share"):
        learnt.at(share)


# ------------------------------------------------------------------------------------------------------ the rules


def test_a_group_that_is_no_fact_has_each_template_once_and_no_fact_twice():
    groups = likeness.mixed(np.arange(30).reshape(6, 5))
    assert len(groups) == 6
    for group in groups:
        assert [place % 5 for place in group] == list(range(5))
        assert len({place // 5 for place in group}) == 5


def test_the_rules_on_scores_made_by_hand():
    """Of ten neurons the planted one carries all of P = .8; in a mixture each prompt has another one."""
    scores = torch.zeros(5, 1, 10)
    scores[:, 0, 3] = 0.8
    found = powers.searched(scores, torch.full((5,), 0.8), [Neuron(0, 3)])
    assert found["found, search"] == found["found, half"] == found["found, ratio"] == found["found, from one"] == 1
    assert (found["alarm, search"], found["alarm, from one"]) == (0, 1)  # the search for two to five ends with one
    assert found["largest score / P"] == pytest.approx(1)
    mixed = torch.diag(torch.full((5,), 0.8))[:, None]
    found = powers.searched(mixed, torch.full((5,), 0.8), [Neuron(0, i) for i in range(5)])
    assert found["found, search"] == 1
    assert found["size, search"] == 5
    assert found["found, half"] == found["found, ratio"] == found["alarm, ratio"] == 0
    assert found["largest score / P"] == pytest.approx(0.2)


def test_copies_of_a_neuron_share_its_score_alike():
    """A tiny model in which neuron 4 of block 1 is halved, and neuron 7 made its copy, against the shortcut."""
    lm, query = tiny.lm("gpt2"), ASKED[0]
    with torch.no_grad():
        inward, outward = (m.weight for m in (lm.blocks[1].mlp.c_fc, lm.blocks[1].mlp.c_proj))
        outward[7] = 0
        whole = planted._loaded(lm, "whole")
        alone = attribute(whole, [query], store=False, tol=1e-5).scores
        inward[:, 7], lm.blocks[1].mlp.c_fc.bias[7] = inward[:, 4], lm.blocks[1].mlp.c_fc.bias[4]
        outward[4] *= 0.5
        outward[7] = outward[4]
    halved = attribute(planted._loaded(lm, "halved"), [query], store=False, tol=1e-5).scores
    wide, copies = powers.copied(alone, Neuron(1, 4), 2)
    assert copies == [Neuron(1, 4), Neuron(1, 24)]
    assert torch.allclose(halved[:, 1, [4, 7]], wide[:, 1, [4, 24]], atol=1e-5)
    assert torch.equal(wide[:, 0, :24], alone[:, 0])


def test_silencing_is_that_of_the_whole_model(learnt):
    lm = learnt.at(1.0)
    table = powers.silenced(lm, FACTS, OTHERS, [learnt.neurons[:1], []], "x")
    assert table["x: kept, own"][1] == 1
    assert table["x: loss, own"][1] == table["x: loss, others"][1] == 0
    before = predictions.log_probabilities(lm, ASKED)
    with interventions.suppress(lm, learnt.neurons[:1]):
        after = predictions.log_probabilities(lm, ASKED)
    own, rows = answers(lm, ASKED[:2]), [0, 1]
    assert table["x: loss, own"][0] == pytest.approx(float((before[rows, own] - after[rows, own]).mean()), abs=1e-4)
    assert table["x: kept, own"][0] == float((before.argmax(1) == after.argmax(1))[:2].float().mean())


def test_the_stored_table_says_of_each_measure_what_its_units_say():
    table = powers.read(powers.table_file())
    assert list(table.columns) == powers.COLUMNS
    assert len(table) > 100
    assert not table.duplicated(["model", "seed", "share", "measure"]).any()
    for row in table.itertuples():
        units = [float(x) for x in row.units.split()]
        assert (len(units), row.value) == (row.n, pytest.approx(sum(units) / len(units), rel=1e-2, abs=2e-3))
        assert row.low <= row.value + 1e-3
        assert row.value <= row.high + 1e-3
    measured = table[table.measure == "share, measured"]
    assert bool(((measured.value - measured.share).abs() < 0.1).all())
