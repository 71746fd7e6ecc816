"""Queries and the project's own facts."""

import collections
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kncore.query import Query
from knpaper import tasks

# Known independently of the tables: one fact a relation.
SPOT = {
    "birthplace": ("Barack Obama", "Honolulu"),
    "capital": ("the Netherlands", "Amsterdam"),
    "continent": ("New Zealand", "Oceania"),
    "country_of_capital": ("Addis Ababa", "Ethiopia"),
    "country_of_largest_city": ("Zurich", "Switzerland"),
    "element": ("Sb", "antimony"),
    "field_of_work": ("Noam Chomsky", "linguistics"),
    "largest_city": ("Kazakhstan", "Almaty"),
    "maker": ("the Game Boy", "Nintendo"),
    "native_language": ("Ingmar Bergman", "Swedish"),
    "occupation": ("Georg Cantor", "mathematician"),
    "official_language": ("Brazil", "Portuguese"),
    "postal_code": ("Mississippi", "MS"),
    "state_capital": ("Missouri", "Jefferson City"),
    "state_of_capital": ("Pierre", "South Dakota"),
    "state_of_postal_code": ("AK", "Alaska"),
    "symbol": ("tungsten", "W"),
}
# Relations both ways, with the number of pairs that there are: all but Oklahoma, all states, the elements up to
# plutonium without He, Be, In, As, At and I.
INVERSES = {("state_capital", "state_of_capital"): 49, ("postal_code", "state_of_postal_code"): 50}
INVERSES |= {("symbol", "element"): 94 - 6}
NO_PROPERTY = {"country_of_largest_city", "element", "largest_city", "postal_code", "state_of_postal_code"}
BAD_QUERIES = [
    ({"prompt": ""}, "prompt is empty"),
    ({"target": " "}, "target is empty"),
    ({"prompt": "The capital of France is "}, "ends with white space"),
    ({"target": " Paris"}, "target ' Paris' has white space"),
    ({"foil": "Rome "}, "foil 'Rome ' has white space"),
    ({"prompt": "[MASK] is [MASK]"}, "more than once"),
    ({"foil": "Paris"}, "the same"),
    ({"subject": "Spain"}, "'Spain' does not occur"),
]


@pytest.mark.parametrize(("change", "message"), BAD_QUERIES)
def test_a_query_that_breaks_the_rules_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Query(**{"prompt": "The capital of France is", "target": "Paris", **change})


def test_a_query_is_a_value():
    query = Query("The capital of France is", "Paris", subject="France")
    assert query == Query("The capital of France is", "Paris", subject="France")
    assert len({query, query}) == 1
    assert not query.masked and Query("[MASK] is in France.", "Paris").masked
    with pytest.raises(AttributeError):
        query.target = "Rome"


def test_the_relations_that_are_promised_exist():
    assert tasks.relations() == sorted(SPOT)


@pytest.mark.parametrize("name", sorted(SPOT))
def test_relation(name):
    relation = tasks.describe(name)
    subjects = [subject for subject, _ in relation.pairs]
    objects = [target for _, target in relation.pairs]
    assert SPOT[name] in relation.pairs
    assert len(subjects) >= 40 and len(set(subjects)) == len(subjects)
    assert len(relation.templates) >= 4 and len(set(relation.templates)) == len(relation.templates)
    assert relation.description and re.fullmatch(r"P\d+" if name not in NO_PROPERTY else "", relation.wikidata)
    for subject, target in relation.pairs:
        assert subject == subject.strip() and target == target.strip()
        assert len(target.split()) <= 3 and subject.isascii() and target.isascii()
        # A subject that contains its object would give the answer away.
        assert not set(target.lower().split()) & set(subject.lower().split())
    for template in relation.templates:
        # The object comes next: no room for punctuation other than a comma, and no a/an before it.
        assert template.count("{}") == 1 and not template.endswith("{}")
        assert template[-1].isalpha() or template[-1] == ","
        assert template.split()[-1] not in ("a", "an")
    # No constant answer: the commonest object is well below half of the facts.
    assert max(collections.Counter(objects).values()) < 0.4 * len(objects)
    assert tasks.candidates(name) == sorted(set(objects))


def test_inverse_relations_hold_the_same_facts():
    capital, country = tasks.describe("capital"), tasks.describe("country_of_capital")
    assert (capital.inverse, country.inverse) == (country.name, capital.name)
    assert len({target for _, target in capital.pairs}) == len(capital.pairs)
    assert {(target, subject) for subject, target in country.pairs} <= set(capital.pairs)


@pytest.mark.parametrize(("one", "other"), sorted(INVERSES))
def test_further_relations_are_one_to_one_and_whole_in_both_directions(one, other):
    there, back = tasks.describe(one), tasks.describe(other)
    assert (there.inverse, back.inverse) == (other, one)
    assert sorted((target, subject) for subject, target in back.pairs) == list(there.pairs)
    assert len({target for _, target in there.pairs}) == len(there.pairs) == INVERSES[one, other]


def test_states_are_the_same_in_their_relations():
    states = {subject for subject, _ in tasks.describe("postal_code").pairs}
    assert states - {subject for subject, _ in tasks.describe("state_capital").pairs} == {"Oklahoma"}
    for state, code in tasks.describe("postal_code").pairs:
        assert re.fullmatch("[A-Z]{2}", code) and code[0] == state[0]
        # the second letter comes later in the name, or it is the initial of the second word
        assert code[1].lower() in state[1:].lower()


def test_symbols_begin_as_their_element_does_or_as_its_latin_or_german_name():
    names = {"Na": "natrium", "K": "kalium", "Fe": "ferrum", "Cu": "cuprum", "Ag": "argentum", "Sn": "stannum"}
    names |= {"Sb": "stibium", "W": "wolfram", "Au": "aurum", "Hg": "hydrargyrum", "Pb": "plumbum"}
    for name, symbol in tasks.describe("symbol").pairs:
        letters = names.get(symbol, name)
        assert letters[0] == symbol[0].lower() and (len(symbol) == 1 or symbol[1] in letters[1:])
        assert re.fullmatch("[A-Z][a-z]?", symbol) and name.islower()


def test_largest_cities_are_a_control_in_which_many_capitals_are_not_the_largest():
    city, country, capital = map(tasks.describe, ("largest_city", "country_of_largest_city", "capital"))
    assert (city.inverse, country.inverse) == (country.name, city.name)
    assert all("control" in relation.description for relation in (city, country))
    plain = [pair for pair in city.pairs if not pair[0].startswith("the ")]
    assert sorted((target, subject) for subject, target in country.pairs) == plain
    assert len({target for _, target in city.pairs}) == len(city.pairs)
    capitals = dict(capital.pairs)
    differ = {subject for subject, target in city.pairs if capitals.get(subject, target) != target}
    assert {"Turkey", "Australia", "Canada", "Brazil", "Nigeria"} <= differ
    assert len(differ) >= 10 and len({subject for subject, _ in city.pairs} & capitals.keys() - differ) >= 40
    # A city that is a capital is the capital of the country whose largest it is.
    where = dict(tasks.describe("country_of_capital").pairs)
    assert all(where.get(target, subject) == subject for subject, target in city.pairs)


@pytest.mark.parametrize("name", sorted(name for names in INVERSES for name in names) + ["largest_city"])
def test_the_subject_of_a_new_relation_is_not_first_and_is_the_last_that_reads_like_it(name):
    for query in tasks.facts(name):
        assert query.template.index("{}") == query.prompt.rindex(query.subject) > 0


def test_fields_of_work_and_occupations_agree():
    """Whoever is in both tables has the occupation that belongs to the field."""
    fields, occupations = (dict(tasks.describe(name).pairs) for name in ("field_of_work", "occupation"))
    both = collections.defaultdict(set)
    for person in fields.keys() & occupations.keys():
        both[fields[person]].add(occupations[person])
    assert len(both) >= 10 and all(len(names) == 1 for names in both.values())
    assert both["physics"] == {"physicist"} and both["linguistics"] == {"linguist"}


def test_countries_agree_between_relations():
    """A country is written the same way everywhere, with its article."""
    names = {
        s for r in ("capital", "continent", "largest_city", "official_language") for s, _ in tasks.describe(r).pairs
    }
    assert not {name for name in names if f"the {name}" in names}


@given(st.sampled_from(sorted(SPOT)), st.integers(1, 40), st.integers(0, 2**32))
def test_facts_are_deterministic_nested_and_whole(name, n, seed):
    relation = tasks.describe(name)
    queries = tasks.facts(name, n=n, seed=seed)
    assert queries == tasks.facts(name, n=n, seed=seed)
    assert queries == tasks.facts(name, seed=seed)[: len(queries)]
    assert len(queries) == n * len(relation.templates) == len(set(queries))
    by_item = collections.defaultdict(list)
    for query in queries:
        by_item[query.item].append(query)
        assert query.template.replace("{}", query.subject) == query.prompt
        assert query.prompt[0].isupper() and query.task == name and query.foil == query.value == ""
    assert len(by_item) == n
    # facts-major, templates in their order, one answer a fact
    assert list(by_item.values()) == [
        queries[i : i + len(relation.templates)] for i in range(0, len(queries), len(relation.templates))
    ]
    for item, asked in by_item.items():
        assert tuple(query.template for query in asked) == relation.templates
        assert {(item.removeprefix(f"{name}:"), query.target) for query in asked} <= set(relation.pairs)
        assert len({query.target for query in asked}) == 1


def test_another_seed_is_another_order():
    one, two = (tasks.facts("capital", seed=seed) for seed in (0, 1))
    assert one != two and set(one) == set(two)


def test_a_subject_is_capitalised_where_it_starts_the_sentence():
    queries = tasks.facts("capital", templates=["{} has its capital in", "The capital of {} is"])
    asked = {query.prompt: query for query in queries}
    query = asked["The Netherlands has its capital in"]
    assert (query.subject, query.target, query.item) == ("The Netherlands", "Amsterdam", "capital:the Netherlands")
    assert asked["The capital of the Netherlands is"].item == query.item
    assert "the Netherlands has its capital in" not in asked


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="unknown relation 'captial'. Did you mean 'capital'.*Known: birthplace,"):
        tasks.facts("captial")
    with pytest.raises(ValueError, match="unknown relation"):
        tasks.candidates("colour")
    exist = len(tasks.describe("maker").pairs)
    for n in (0, -1, exist + 1):
        with pytest.raises(ValueError, match=f"n={n} .*there are {exist}"):
            tasks.facts("maker", n=n)
    for template in ("The capital is", "{} and {} are"):
        with pytest.raises(ValueError, match="exactly once"):
            tasks.facts("capital", templates=[template])


def test_paraphrases_of_a_fact_are_all_templates_of_its_relation():
    relation = tasks.describe("capital")
    query = replace(tasks.ask(relation, ("France", "Paris"), relation.templates[0]), foil="Madrid")
    found = [other.prompt for other in tasks.paraphrases(query)]
    assert found == [text.replace("{}", "France") for text in relation.templates]
    assert tasks.paraphrases(replace(query, task="P36")) == []
    assert tasks.paraphrases(replace(query, prompt=f"{query.prompt} [MASK].")) == []
