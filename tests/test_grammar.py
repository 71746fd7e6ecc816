"""Minimal pairs of the small grammars."""

import collections
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knpaper import grammar
from knpaper.grammar import minimal_pairs, phenomena, plural

ALL = [
    "determiner_noun",
    "determiner_noun_adjective",
    "determiner_noun_irregular",
    "subject_verb",
    "subject_verb_distractor",
    "anaphor_number",
    "anaphor_gender",
]
SINGULAR_TO_PLURAL = {"this": "these", "that": "those"}


def test_phenomena():
    assert phenomena() == ALL


def test_plurals_by_hand():
    by_hand = {
        "castle": "castles", "city": "cities", "boy": "boys", "church": "churches", "brush": "brushes", "box": "boxes",
        "dress": "dresses", "peach": "peaches", "story": "stories", "essay": "essays", "bus": "buses",
        "coach": "coaches", "child": "children", "wolf": "wolves", "phenomenon": "phenomena", "thesis": "theses",
    }  # fmt: skip
    assert {noun: plural(noun) for noun in by_hand} == by_hand


def test_lexicon():
    """A noun belongs to one class; regular and irregular nouns do not mix; no plural is spelled by a wrong rule."""
    words = grammar.lexicon()
    regular = [noun for kind in words["objects"].values() for noun in kind["nouns"]]
    irregular = [noun for kind in words["irregular_objects"].values() for noun in kind["nouns"]]
    assert len(regular) == len(set(regular)) >= 200
    assert len(irregular) == len(set(irregular)) >= 25
    assert set(irregular) <= set(words["irregular"]) and not set(regular) & set(words["irregular"])
    # Regular rules are wrong for -f, -fe and for most of -o: such nouns are listed or absent.
    assert all(not noun.endswith(("f", "fe")) for noun in regular)
    assert [noun for noun in regular if noun.endswith("o")] == ["piano"]
    names = words["names"]["feminine"] + words["names"]["masculine"]
    assert len(names) == len(set(names)) == 80
    for kind in (*words["objects"].values(), *words["irregular_objects"].values()):
        # after these verbs "that" could open a clause
        assert not {"saw", "found", "said", "knew", "noticed", "read", "wrote", "thought", "heard"} & set(kind["verbs"])


@pytest.mark.parametrize("form, sizes", [("causal", (8, 8, 8)), ("masked", (9, 7, 8))])
def test_no_word_of_number_is_in_two_groups_and_all_are_single_words(form, sizes):
    groups = grammar.number_words(form)
    assert list(groups) == ["plural", "singular", "neutral"]
    assert tuple(map(len, groups.values())) == sizes
    every = [word for group in groups.values() for word in group]
    assert len(every) == len(set(every)) and all(re.fullmatch("[a-z]+", word) for word in every)


def test_verbs_of_number_are_pairs_and_determiners_stand_on_the_side_of_their_own():
    verbs, determiners = grammar.number_words("causal"), grammar.number_words("masked")
    irregular = {"are": "is", "were": "was", "have": "has", "do": "does"}
    assert verbs["singular"] == [irregular.get(verb, verb + "s") for verb in verbs["plural"]]
    for singular, plural_one in SINGULAR_TO_PLURAL.items():
        assert singular in determiners["singular"] and plural_one in determiners["plural"]
    assert set(sum(verbs.values(), [])).isdisjoint(sum(determiners.values(), []))
    with pytest.raises(ValueError, match="unknown form 'mask'. Did you mean 'masked'"):
        grammar.number_words("mask")


@pytest.mark.parametrize("form", ["causal", "masked"])
@pytest.mark.parametrize("phenomenon", ALL)
def test_default_size_and_uniqueness(phenomenon, form):
    queries = minimal_pairs(phenomenon, form=form)
    assert len(queries) == 400 == len(set(queries))
    assert len({(query.prompt, query.target) for query in queries}) == 400
    assert len({query.item for query in queries}) >= 25
    counts = collections.Counter(query.item for query in queries)
    if phenomenon != "anaphor_gender":
        assert max(counts.values()) - min(counts.values()) <= 2


@given(st.sampled_from(ALL), st.integers(1, 60), st.integers(0, 2**32), st.sampled_from(["causal", "masked"]))
def test_deterministic_nested_balanced(phenomenon, half, seed, form):
    queries = minimal_pairs(phenomenon, n=2 * half, seed=seed, form=form)
    assert queries == minimal_pairs(phenomenon, n=2 * half, seed=seed, form=form)
    assert queries == minimal_pairs(phenomenon, n=2 * half + 20, seed=seed, form=form)[: 2 * half]
    assert len(set(queries)) == 2 * half
    values = ("feminine", "masculine") if phenomenon == "anaphor_gender" else ("singular", "plural")
    for first, second in zip(queries[::2], queries[1::2], strict=True):
        assert (first.value, second.value) == values
        # The two conditions of one frame: what is right in one is wrong in the other.
        assert (first.target, first.foil) == (second.foil, second.target)
        if phenomenon != "anaphor_gender":
            assert first.item == second.item
    for query in queries:
        assert query.task == phenomenon and query.item.startswith(f"{phenomenon}:")
        assert query.template.count("{}") == 1
        assert query.template.replace("{}", query.subject) == query.prompt
        assert re.search(rf"\b{re.escape(query.subject)}\b", query.prompt)
        assert query.masked == (form == "masked") == query.prompt.endswith(".")
        assert query.prompt[0].isupper() and "  " not in query.prompt
        if form == "masked":
            assert " " not in query.target


@pytest.mark.parametrize("phenomenon", ALL)
def test_both_forms_draw_the_same_frames(phenomenon):
    causal, masked = (minimal_pairs(phenomenon, n=60, seed=5, form=form) for form in ("causal", "masked"))
    for one, other in zip(causal, masked, strict=True):
        assert (one.item, one.value) == (other.item, other.value)
        sentence = other.prompt.replace("[MASK]", other.target)
        assert sentence.startswith(f"{one.prompt} {one.target}")


@pytest.mark.parametrize("phenomenon", ALL[:3])
def test_determiners_agree_with_nouns(phenomenon):
    queries = minimal_pairs(phenomenon)
    for query in queries:
        noun = query.item.split(":")[1]
        determiner = query.prompt.split()[2]
        assert query.subject == determiner and len(query.prompt.split()) == 3 + (phenomenon == ALL[1])
        if query.value == "singular":
            assert determiner in SINGULAR_TO_PLURAL and query.target == noun
        else:
            assert determiner in SINGULAR_TO_PLURAL.values() and query.target == plural(noun)
        assert (query.target == noun + "s") <= (phenomenon != "determiner_noun_irregular")
    assert {query.subject for query in queries} == {"this", "that", "these", "those"}
    for query in minimal_pairs(phenomenon, form="masked"):
        assert {query.target, query.foil} in ({"this", "these"}, {"that", "those"})
        assert (query.value == "singular") == (query.target in SINGULAR_TO_PLURAL)
        assert (query.value == "singular") == (query.subject == query.item.split(":")[1])


@pytest.mark.parametrize("phenomenon", ALL[3:5])
def test_verbs_agree_with_subjects(phenomenon):
    third_person = {"is", "was", "has", "does", "knows", "likes", "wants", "needs", "lives", "works", "plays", "comes"}
    for query in minimal_pairs(phenomenon):
        noun = query.item.split(":")[1]
        assert query.subject == (noun if query.value == "singular" else plural(noun))
        assert (query.target in third_person) == (query.value == "singular")
        assert (query.foil in third_person) == (query.value == "plural")
        if phenomenon.endswith("distractor"):
            between = query.prompt.partition(f" {query.subject} of the ")[2]
            # The distractor stands in the other number.
            assert between.endswith("s") == (query.value == "singular")


def test_reflexives_agree_with_antecedents():
    for query in minimal_pairs("anaphor_number"):
        assert query.target == {"singular": "himself", "plural": "themselves"}[query.value]
        assert query.subject == (noun := query.item.split(":")[1]) or query.subject == plural(noun) != noun
        assert (query.subject == noun) == (query.value == "singular")
    names = grammar.lexicon()["names"]
    for query in minimal_pairs("anaphor_gender"):
        assert query.target == {"feminine": "herself", "masculine": "himself"}[query.value]
        other = "masculine" if query.value == "feminine" else "feminine"
        assert query.subject not in names[other]
        assert query.item == f"anaphor_gender:{query.subject}"


def test_everything_there_is_can_be_asked_for():
    """At the upper limit every frame comes exactly once, and one more pair is refused."""
    with pytest.raises(ValueError) as refused:
        minimal_pairs("anaphor_number", n=10**6)
    limit = int(re.search(r"from 2 to (\d+)", str(refused.value)).group(1))
    queries = minimal_pairs("anaphor_number", n=limit)
    nouns = len({query.item for query in queries})
    assert len(set(queries)) == limit == 2 * nouns * 6 * 20  # openers and verbs of the lexicon
    with pytest.raises(ValueError, match="must be even"):
        minimal_pairs("anaphor_number", n=limit + 2)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="unknown phenomenon 'determiner-noun'. Did you mean 'determiner_noun'"):
        minimal_pairs("determiner-noun")
    with pytest.raises(ValueError, match="unknown form 'mask'. Did you mean 'masked'"):
        minimal_pairs("subject_verb", form="mask")
    for n in (0, -2, 3):
        with pytest.raises(ValueError, match=f"n={n} .*must be even, from 2 to"):
            minimal_pairs("subject_verb", n=n)
