"""Readers of the public data sets, on files made here; on samples of the real ones where KNCORE_DATA names them."""

import hashlib
import http.server
import json
import os
import re
import threading
from functools import partial
from pathlib import Path

import pytest

from kncore.query import Query
from knpaper.datasets import blimp, counterfact, files, known_1000, pararel
from knpaper.datasets.files import Source

SAMPLES = Path(os.environ.get("KNCORE_DATA") or "absent")
with_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="KNCORE_DATA names no folder of sample data")


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def pairs(paradigm, *sentences):
    rows = [
        {"sentence_good": good, "sentence_bad": bad, "UID": paradigm, "pairID": str(i)}
        for i, (good, bad) in enumerate(sentences)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


# ---- BLiMP ----

READINGS = [
    # paradigm, good, bad, then prompt, target, foil, noun, value of the causal form and the masked prompt
    (
        "determiner_noun_agreement_1",
        "Olga paints that barn.",
        "Olga paints that barns.",
        ("Olga paints that", "barn", "barns", "barn", "singular", "Olga paints that [MASK]."),
    ),
    (
        "determiner_noun_agreement_with_adjective_1",
        "This king paints those tiny barns.",
        "This king paints those tiny barn.",
        ("This king paints those tiny", "barns", "barn", "barn", "plural", "This king paints those tiny [MASK]."),
    ),
    (
        "determiner_noun_agreement_with_adj_2",
        "Olga paints this tiny barn.",
        "Olga paints these tiny barn.",
        ("Olga paints", "this", "these", "barn", "singular", "Olga paints [MASK] tiny barn."),
    ),
    (
        "anaphor_gender_agreement",
        "Olga painted herself.",
        "Olga painted itself.",
        ("Olga painted", "herself", "itself", "Olga", "feminine", "Olga painted [MASK]."),
    ),
    (
        "anaphor_number_agreement",
        "A lot of kings paint themselves.",
        "A lot of kings paint himself.",
        ("A lot of kings paint", "themselves", "himself", "kings", "plural", "A lot of kings paint [MASK]."),
    ),
    (
        "anaphor_number_agreement",
        "Kings paint themselves.",
        "Kings paint himself.",
        ("Kings paint", "themselves", "himself", "kings", "plural", "Kings paint [MASK]."),
    ),
    (
        "distractor_agreement_relational_noun",
        "The barns of most kings weren't burning.",
        "The barns of most kings isn't burning.",
        ("The barns of most kings", "weren't", "isn't", "barns", "plural", "The barns of most kings [MASK] burning."),
    ),
    (
        "regular_plural_subject_verb_agreement_1",
        "This king passes Olga.",
        "This king pass Olga.",
        ("This king", "passes", "pass", "king", "singular", "This king [MASK] Olga."),
    ),
    (
        "regular_plural_subject_verb_agreement_1",
        "The kings pass Olga.",
        "The kings passes Olga.",
        ("The kings", "pass", "passes", "kings", "plural", "The kings [MASK] Olga."),
    ),
    (
        "irregular_plural_subject_verb_agreement_2",
        "The mice run.",
        "The mouse run.",
        ("The", "mice", "mouse", "mouse", "plural", "The [MASK] run."),
    ),
]


@pytest.mark.parametrize(("paradigm", "good", "bad", "expected"), READINGS)
def test_blimp_readings(tmp_path, paradigm, good, bad, expected):
    file = write(tmp_path / "any.jsonl", pairs(paradigm, (good, bad)))
    prompt, target, foil, noun, value, masked = expected
    shared = {"target": target, "foil": foil, "task": paradigm, "item": f"{paradigm}:{noun}", "value": value}
    assert blimp.read(paradigm, file) == [Query(prompt, **shared)]
    assert blimp.read(paradigm, file, form="masked") == [Query(masked, **shared)]


def test_blimp_items_are_singular_where_the_file_shows_the_singular(tmp_path):
    name = "regular_plural_subject_verb_agreement_1"
    sentences = [
        ("The kings run.", "The kings runs."),
        ("A king runs.", "A king run."),
        ("The cows run.", "The cows runs."),
    ]
    file = write(tmp_path / "any.jsonl", pairs(name, *sentences))
    assert [query.item for query in blimp.read(name, file)] == [f"{name}:king", f"{name}:king", f"{name}:cows"]


def test_blimp_lines_end_where_json_lines_do(tmp_path):
    line = pairs("causative", ("Olga runs fast.", "Olga run fast.")).replace("fast.", "fast\u2028.")
    (query,) = blimp.read("causative", write(tmp_path / "any.jsonl", line))
    assert (query.prompt, query.target) == ("Olga", "runs")


def test_blimp_leaves_out_what_it_cannot_ask(tmp_path):
    rows = [
        ("Olga runs fast.", "Olga run fast."),
        ("Olga runs fast.", "Fast run Olga."),
        ("She runs.", "Her runs."),
        ("She runs.", "She runs fast."),
    ]
    file = write(tmp_path / "any.jsonl", pairs("causative", *rows))
    with pytest.warns(UserWarning, match="3 of 4 pairs of causative cannot be asked in the causal form"):
        causal = blimp.read("causative", file)
    assert [(query.prompt, query.target, query.item) for query in causal] == [("Olga", "runs", "causative:0")]
    with pytest.warns(UserWarning, match="2 of 4"):
        masked = blimp.read("causative", file, form="masked")
    assert [query.prompt for query in masked] == ["Olga [MASK] fast.", "[MASK] runs."]
    write(file, pairs("causative", *rows[1:2]))
    with pytest.raises(ValueError, match="1 of 1 pairs of causative"):
        blimp.read("causative", file)


BAD_LINES = [
    ("{nonsense", "line 2: not JSON"),
    ("[1]", "line 2: expected a JSON object, found list"),
    ('{"UID": "causative", "pairID": "1", "sentence_good": "A b."}', "line 2: the field 'sentence_bad' is missing"),
    (
        '{"UID": "causative", "pairID": "1", "sentence_good": "A b.", "sentence_bad": 3}',
        "line 2: the field 'sentence_bad' must be str, it is int",
    ),
    (
        '{"UID": "passive_1", "pairID": "1", "sentence_good": "A b.", "sentence_bad": "A c."}',
        "line 2: the paradigm is 'passive_1', expected 'causative'",
    ),
    ("", "line 2: not JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_blimp_malformed_line(tmp_path, line, message):
    good = pairs("causative", ("Olga runs.", "Olga run."))
    file = write(tmp_path / "bad{0}.jsonl", f"{good}{line}\n")
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}, {re.escape(message)}"):
        blimp.read("causative", file)


def test_blimp_empty_or_binary_file(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        blimp.read("causative", write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary.jsonl: not UTF-8"):
        blimp.read("causative", tmp_path / "binary.jsonl")


def test_blimp_names():
    names = blimp.paradigms()
    assert len(names) == len(set(names)) == 67
    # the trap in the names
    assert {"determiner_noun_agreement_with_adjective_1", "determiner_noun_agreement_with_adj_2"} <= set(names)
    with pytest.raises(ValueError, match="Did you mean .*'determiner_noun_agreement_with_adj_2'"):
        blimp.read("determiner_noun_agreement_with_adjective_2")
    with pytest.raises(ValueError, match="unknown form 'causl'. Did you mean 'causal'"):
        blimp.read("causative", form="causl")


# ---- ParaRel ----


def bag(subject, answer):
    prompts = [
        f"The flag of {subject} is [MASK] .",
        f"[MASK] is the flag of {subject}.",
        f"{subject}'s flag is [MASK] ",
    ]
    return [[prompt, answer, "P163(flag)"] for prompt in prompts]


def test_pararel(tmp_path):
    data = {"P163": [bag("Norland", "red"), bag("New Norway", "blue"), bag("Utopia", "green")]}
    file = write(tmp_path / "pararel" / "data_all_allbags.json", data)
    masked = pararel.read("P163", tmp_path)
    assert masked == pararel.read("P163", file) == pararel.read("P163", file.parent)
    assert len(masked) == 9
    assert masked[3:5] == [
        Query(
            "The flag of New Norway is [MASK] .",
            "blue",
            subject="New Norway",
            task="P163",
            item="P163:New Norway",
            template="The flag of {} is [MASK] .",
        ),
        Query(
            "[MASK] is the flag of New Norway.",
            "blue",
            subject="New Norway",
            task="P163",
            item="P163:New Norway",
            template="[MASK] is the flag of {}.",
        ),
    ]
    causal = pararel.read("P163", file, form="causal")
    assert [query.prompt for query in causal[:2]] == ["The flag of Norland is", "Norland's flag is"]
    assert [query.template for query in causal[:2]] == ["The flag of {} is", "{}'s flag is"]
    assert len(causal) == 6


def test_pararel_subjects_with_a_common_beginning_stay_whole(tmp_path):
    file = write(tmp_path / "p.json", {"P163": [bag("Norland", "red"), bag("Norway", "blue")]})
    assert {query.subject for query in pararel.read("P163", file)} == {"Norland", "Norway"}


def test_pararel_of_one_bag_has_no_subject(tmp_path):
    file = write(tmp_path / "p.json", {"P163": [bag("Norland", "red")]})
    assert {(query.subject, query.template, query.item) for query in pararel.read("P163", file)} == {("", "", "P163:0")}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected a JSON dict, found list"),
        ({"P163": []}, "P163 must be a list of bags"),
        ({"P163": [bag("A", "b"), bag("C", "d")[:2]]}, "P163, bag 1: expected 3 patterns"),
        ({"P163": [[["no mask", "b", "c"]]]}, r"P163, bag 0, pattern 0: expected \[MASK\] once"),
        ({"P163": [[["[MASK] a", "b"]]]}, "P163, bag 0, pattern 0: expected .prompt, answer, relation."),
        ({"P163": [[["[MASK] a", "", "c"]]]}, "P163, bag 0, pattern 0: .*the target is empty"),
        ('{"P163":\n[', r"line \d: not JSON"),
    ],
)
def test_pararel_malformed(tmp_path, data, message):
    file = write(tmp_path / "p.json", data)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{message}"):
        pararel.read("P163", file)


def test_pararel_unknown_relation(tmp_path):
    file = write(tmp_path / "p.json", {"P163": [bag("A", "b")], "P36": []})
    with pytest.raises(ValueError, match="unknown ParaRel relation 'P16'. Did you mean 'P163'.*Known: P163, P36"):
        pararel.read("P16", file)


# ---- CounterFact, known_1000 ----

FLAT = {
    "case_id": 7,
    "prompt": "Norland's flag is",
    "target_new": "blue",
    "subject": "Norland",
    "ground_truth": "red",
    "rephrase_prompt": "They say: the flag of Norland is",
    "locality_prompt": "Utopia's flag is",
    "locality_ground_truth": "green",
}
FULL = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{}'s flag is",
        "relation_id": "P163",
        "target_new": {"str": "blue", "id": "Q1"},
        "target_true": {"str": "red", "id": "Q2"},
        "subject": "Norland",
    },
    "paraphrase_prompts": ["They say: the flag of Norland is"],
    "neighborhood_prompts": ["Utopia's flag is"],
    "attribute_prompts": [],
    "generation_prompts": [],
}


def test_counterfact_schemas_agree(tmp_path):
    flat, full = (write(tmp_path / f"{name}.json", [record]) for name, record in (("flat", FLAT), ("full", FULL)))
    (one,), (other,) = counterfact.read(flat), counterfact.read(full)
    rewrite = {"target": "red", "foil": "blue", "subject": "Norland", "item": "counterfact:7"}
    assert one.rewrite == Query("Norland's flag is", task="counterfact", template="{}'s flag is", **rewrite)
    assert other.rewrite == Query("Norland's flag is", task="P163", template="{}'s flag is", **rewrite)
    for case in (one, other):
        (paraphrase,), (neighbour,) = case.paraphrases, case.neighbours
        assert paraphrase.prompt == "They say: the flag of Norland is"
        assert paraphrase.template == "They say: the flag of {} is"
        assert (paraphrase.target, paraphrase.foil, paraphrase.subject) == ("red", "blue", "Norland")
        assert (neighbour.prompt, neighbour.subject) == ("Utopia's flag is", "")
    assert one.neighbours[0].target == "green"
    assert other.neighbours[0].target == "red"  # neighbours share the true object in the full form


def test_counterfact_neighbour_whose_answer_is_the_new_object_has_no_foil(tmp_path):
    file = write(tmp_path / "c.json", [{**FLAT, "locality_ground_truth": "blue"}])
    assert counterfact.read(file)[0].neighbours[0].foil == ""


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([FLAT, {**FLAT, "prompt": 3}], "index 1: the field 'prompt' must be str, it is int"),
        ([FLAT, FULL], "index 1: the field 'prompt' is missing"),
        ([FLAT, "x"], "index 1: expected a JSON object, found str"),
        ([{**FLAT, "target_new": "red"}], "index 0: .*target and foil are the same"),
        ([{**FLAT, "subject": "Atlantis"}], "index 0: .*'Atlantis' does not occur"),
        ([FULL, {**FULL, "requested_rewrite": {}}], "index 1, requested_rewrite: the field 'prompt' is missing"),
        ([{**FULL, "neighborhood_prompts": [1]}], "index 0: expected a prompt, found int"),
        ({}, "expected a JSON list, found dict"),
    ],
)
def test_counterfact_malformed(tmp_path, records, message):
    file = write(tmp_path / "c.json", records)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{message}"):
        counterfact.read(file)


def test_known_1000(tmp_path):
    record = {
        "known_id": 0,
        "subject": "Norland",
        "attribute": "red",
        "template": "{}'s flag has the",
        "prediction": " color red",
        "prompt": "Norland's flag has the color",
        "relation_id": "P163",
    }
    file = write(tmp_path / "known_1000.json", [record])
    assert known_1000.read(tmp_path) == [
        Query(
            "Norland's flag has the color",
            "red",
            subject="Norland",
            task="P163",
            item="P163:Norland",
            template="{}'s flag has the color",
        )
    ]
    del record["attribute"]
    write(file, [record])
    with pytest.raises(ValueError, match="index 0: the field 'attribute' is missing"):
        known_1000.read(file)


# ---- finding and fetching ----


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="known_1000.json"):
        known_1000.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing.json"):
        known_1000.read(tmp_path / "nothing.json")


def test_every_pin_is_complete():
    sources = [files.source(name) for name in ("pararel", "counterfact", "known_1000")]
    sources += [files.source("blimp", paradigm) for paradigm in blimp.paradigms()]
    assert len({source.sha256 for source in sources}) == len({source.url for source in sources}) == 70
    for source in sources:
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)
        assert re.fullmatch(r"https://raw\.githubusercontent\.com/[\w-]+/[\w-]+/[0-9a-f]{40}/[\w/.-]+", source.url)
        assert source.url.rpartition("/")[2] == Path(source.file).name


CONTENT = json.dumps([{"subject": "A", "attribute": "b", "prompt": "A is", "relation_id": "P1"}]).encode()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A file behind a web server of this machine, and an empty cache."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "known.json").write_bytes(CONTENT)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "web"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("KNCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def cached(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_fetch_keeps_a_checked_copy(tmp_path, served, monkeypatch):
    source = Source("known_1000/known_1000.json", f"{served}/known.json", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(files, "source", lambda *_: source)
    assert [query.prompt for query in known_1000.read()] == ["A is"]
    place = tmp_path / "cache" / "public" / "known_1000" / "known_1000.json"
    assert cached(tmp_path) == [place] and place.read_bytes() == CONTENT
    # the second time needs no server
    (tmp_path / "web" / "known.json").unlink()
    assert len(known_1000.read()) == 1
    # and a cached copy that went bad is not read
    place.write_bytes(b"[]")
    with pytest.raises(ConnectionError):
        known_1000.read()


@pytest.mark.parametrize(("address", "error"), [("/known.json", ValueError), ("/other.json", ConnectionError)])
def test_fetch_leaves_nothing_behind_when_it_fails(tmp_path, served, address, error):
    source = Source("known_1000/known_1000.json", served + address, "0" * 64)
    with pytest.raises(error) as failed:
        files.fetch(source)
    for part in (source.file, source.url, source.sha256, "path=", str(tmp_path / "cache")):
        assert part in str(failed.value)
    assert cached(tmp_path) == []


def test_fetch_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("KNCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(ConnectionError, match="Pass path=.* or fetch http://127.0.0.1:9/x.json on a machine with"):
        files.fetch(Source("x/x.json", "http://127.0.0.1:9/x.json", "0" * 64))
    assert cached(tmp_path) == []


# ---- samples of the real files ----


@with_samples
@pytest.mark.data
@pytest.mark.parametrize("file", sorted((SAMPLES / "blimp").glob("*.jsonl")), ids=lambda file: file.stem)
def test_blimp_samples(file):
    source = files.source("blimp", file.stem)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == source.sha256
    causal, masked = (blimp.read(file.stem, SAMPLES, form) for form in ("causal", "masked"))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(causal) == len(masked) == len(rows) == 1000
    for query, other, row in zip(causal, masked, rows, strict=True):
        # The authors' own fields, where a noun may be two words ("art gallery") and a verb bring its preposition.
        if row["one_prefix_method"]:
            good, bad = (f"{row['one_prefix_prefix']} {row[f'one_prefix_word_{side}']}" for side in ("good", "bad"))
        else:
            good, bad = (row[f"two_prefix_prefix_{side}"] for side in ("good", "bad"))
        assert good.startswith(f"{query.prompt} {query.target}") and bad.startswith(f"{query.prompt} {query.foil}")
        assert other.prompt.replace("[MASK]", other.target) == row["sentence_good"]
        assert other.prompt.replace("[MASK]", other.foil) == row["sentence_bad"]
        assert query.value in ("singular", "plural", "feminine", "masculine", "neuter")
    assert 25 <= len({query.item for query in causal}) <= 400


@with_samples
@pytest.mark.data
def test_pararel_sample():
    masked, causal = (pararel.read("P1376", SAMPLES, form) for form in ("masked", "causal"))
    assert len(masked) == 234 * 14
    assert all(query.subject and query.template.replace("{}", query.subject) == query.prompt for query in masked)
    assert masked[0].subject == "Edmonton" and masked[0].target == "Alberta"
    assert len({query.template for query in masked}) == 14
    assert {query.template for query in causal} < {query.template.partition(" [MASK]")[0] for query in masked}


@with_samples
@pytest.mark.data
def test_counterfact_samples():
    flat = counterfact.read(SAMPLES)
    full = counterfact.read(SAMPLES / "counterfact" / "counterfact_full_250.json")
    assert (len(flat), len(full)) == (10_000, 250)
    assert all(case.rewrite.subject and case.rewrite.template.count("{}") == 1 for case in flat + full)
    assert {len(case.paraphrases) for case in full} == {2} and {len(case.neighbours) for case in full} == {10}


@with_samples
@pytest.mark.data
def test_known_1000_sample():
    assert len(queries := known_1000.read(SAMPLES)) == 1209
    assert sum(query.prompt.endswith("continent of") for query in queries) > 0


@with_samples
@pytest.mark.data
def test_nothing_of_ours_is_theirs():
    """No template of this project is one of theirs, no minimal pair a sentence of the sampled paradigms."""
    from knpaper import grammar, tasks

    theirs = {query.template for query in known_1000.read(SAMPLES)}
    for relation in ("P36", "P1376", "P37", "P30", "P103", "P101", "P106", "P176", "P178", "P19"):
        theirs |= {query.template for query in pararel.read(relation, SAMPLES, "causal")}
    for case in counterfact.read(SAMPLES):
        theirs |= {query.template for query in (case.rewrite, *case.paraphrases)}
    ours = {template for name in tasks.relations() for template in tasks.describe(name).templates}
    assert len(theirs) > 100 and not ours & theirs

    sentences = set()
    for file in (SAMPLES / "blimp").glob("*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            sentences.add(json.loads(line)["sentence_good"].removesuffix("."))
    for name in grammar.phenomena():
        pairs_ = grammar.minimal_pairs(name, n=2000)
        assert not {f"{query.prompt} {query.target}" for query in pairs_} & sentences
