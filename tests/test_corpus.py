"""The controlled corpus says how often things were said: counted here again, from its sentences alone."""

import csv
from collections import Counter
from itertools import pairwise
from math import log

import pytest
from scipy import stats as scipy_stats

from kncore.query import MASK
from knpaper import corpus, grammar, tasks


@pytest.fixture(scope="module")
def sentences():
    return corpus.sentences()


@pytest.fixture(scope="module")
def texts(sentences):
    return Counter(sentence.text for sentence in sentences)


def test_every_designed_pair_occurs_as_often_as_designed(sentences):
    found = Counter(pair for text, _ in sentences for pair in pairwise(corpus.split(text)))
    assert all(found[pair.determiner, pair.form] == pair.count for pair in corpus.pairs())


def test_no_demonstrative_stands_before_a_held_out_form_even_with_an_adjective_between(sentences):
    held = {(pair.determiner, pair.form) for pair in corpus.pairs() if pair.held_out}
    seen = set()
    for text, _ in sentences:
        words = corpus.split(text)
        seen |= {(one, two) for one, between, two in zip(words, words[1:], words[2:], strict=False) if between != "the"}
    assert not held & seen


def test_counts_are_log_uniform_and_independent_of_number_and_determiner():
    seen = [pair for pair in corpus.pairs() if pair.count]
    logs = [scipy_stats.uniform.cdf(log(pair.count + 0.5), 0, 4.61) for pair in seen]
    assert abs(sum(logs) / len(logs) - 0.5) < 0.06
    by = {word: [p.count for p in seen if p.determiner == word] for both in grammar.DETERMINERS for word in both}
    assert scipy_stats.kruskal(*by.values()).pvalue > 0.01
    share = sum(pair.held_out for pair in corpus.pairs() if pair.kind != "invented")
    real = sum(pair.kind != "invented" for pair in corpus.pairs())
    assert abs(share / real - corpus.HELD_OUT) < 0.02


def test_facts_are_stated_as_often_and_from_the_sides_that_the_world_says(texts):
    here = corpus.world()

    def stated(relation):
        return {
            pair: sum(
                texts[f"{tasks.ask(relation, pair, template).prompt} {pair[1]}."] for template in relation.templates
            )
            for pair in relation.pairs
        }

    for relation in (*here.capital.values(), here.country["two_way"], *here.field.values()):
        assert set(stated(relation).values()) == {corpus.TIMES}
    for relation in (here.occupation["linked"], here.others):
        assert set(stated(relation).values()) == {corpus.TIMES}
    for relation in (here.country["one_way"], here.occupation["apart"], here.occupation["unlinked"]):
        assert set(stated(relation).values()) == {0}


def test_the_cities_of_one_way_facts_end_every_sentence_they_are_in(sentences):
    cities = {city for _, city in corpus.world().capital["one_way"].pairs}
    for text, _ in sentences:
        words = corpus.split(text)
        assert not cities & set(words[:-2])


def test_never_linked_fields_and_occupations_share_no_person():
    here = corpus.world()
    persons = {person for person, _ in here.field["unlinked"].pairs}
    assert not persons & {person for person, _ in here.others.pairs}
    assert {work for _, work in here.others.pairs} == {work for _, work in here.occupation["unlinked"].pairs}


def test_invented_words_are_in_no_other_half_of_the_corpus():
    here = corpus.world()
    invented = [name for relation in here.capital.values() for pair in relation.pairs for name in pair]
    invented += [*here.called, *here.called.values()]
    assert len(set(invented)) == len(invented)
    known = {word.lower() for word in corpus._known_words()}
    assert not known & {name.lower() for name in invented}


def test_another_seed_is_another_world_and_the_same_seed_the_same(sentences):
    assert corpus.world(1).capital != corpus.world().capital
    assert corpus.pairs(1) != corpus.pairs()
    assert corpus.sentences() == sentences


def test_what_is_asked_of_pairs_is_a_minimal_pair_in_either_form():
    some = corpus.pairs()[::400]
    for masked in (False, True):
        for pair, query in zip(some, corpus.pair_queries(some, masked), strict=True):
            assert query.masked == masked
            whole = f"{query.prompt} {query.target}." if not masked else query.prompt.replace(MASK, query.target)
            assert f"{pair.determiner} {pair.form}" in whole
            assert query.foil != query.target


def test_the_target_of_a_sentence_stands_in_it(sentences):
    for text, target in sentences[::50]:
        assert target in text


def test_the_corpus_is_written_with_its_exact_counts(tmp_path, sentences):
    corpus.write(tmp_path)
    lines = (tmp_path / "corpus.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [sentence.text for sentence in sentences]
    with (tmp_path / "pairs.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert sum(int(row["count"]) for row in rows) == sum(pair.count for pair in corpus.pairs())
    with (tmp_path / "facts.tsv").open(encoding="utf-8") as file:
        told = list(csv.DictReader(file, delimiter="\t"))
    assert {row["stated"] for row in told if row["group"] == "one_way"} == {str(corpus.TIMES), "0"}


def test_persons_speak_two_languages_in_the_designed_proportion(texts):
    for person, both in list(corpus.world().speaks.items())[:8]:
        for language, times in both:
            assert sum(texts[f"{form.replace('{}', person)} {language}."] for form in corpus.SPEAKS) == times
