"""Verdicts by truth table, records as files, what makes a record stale, the table that README and book show."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import nbformat
import pytest
import tiny
import toy
from hypothesis import given
from hypothesis import strategies as st

import kncore
from kncore import claims, grammar, resources, stats, tasks
from kncore.claims import CLAIMS, Claim, Verdict, read, record, table
from kncore.grammar import number_words
from kncore.models import REGISTRY
from kncore.stats import Estimate

LM = tiny.lm("gpt2")
ABOVE = Claim("a", "01", "A.", "2", "m", "above", 0.5, 30)
WITHIN = Claim("w", "01", "W.", "2", "m", "within", 0.5, 30)
CLEAR = Estimate(0.8, 0.6, 0.9, 40)
VERSIONS = {name: claims.package_version(name) for name in ("kncore", "torch", "transformers")}


# Rules


@pytest.mark.parametrize(
    "low, high, above, within",
    [
        (0.6, 0.9, "supported", "contradicted"),
        (0.51, 0.52, "supported", "contradicted"),
        (0.5, 0.9, "inconclusive", "inconclusive"),  # an end on the border is on neither side
        (0.4, 0.6, "inconclusive", "inconclusive"),
        (0.1, 0.5, "inconclusive", "inconclusive"),
        (0.1, 0.49, "contradicted", "supported"),
        (-0.49, 0.49, "contradicted", "supported"),
        (-0.5, 0.3, "contradicted", "inconclusive"),
        (-0.6, 0.3, "contradicted", "inconclusive"),
        (-0.9, -0.5, "contradicted", "inconclusive"),
        (-0.9, -0.6, "contradicted", "contradicted"),
        (-0.9, 0.9, "inconclusive", "inconclusive"),
        (-math.inf, math.inf, "inconclusive", "inconclusive"),
        (0.6, math.inf, "supported", "contradicted"),
    ],
)
def test_verdicts_by_truth_table(low, high, above, within):
    estimate = Estimate(min(max(0.0, low), high), low, high, 30)
    assert (ABOVE.verdict(estimate), WITHIN.verdict(estimate)) == (above, within)
    few = estimate._replace(n=29)
    assert (ABOVE.verdict(few), WITHIN.verdict(few)) == ("inconclusive", "inconclusive")


def test_a_verdict_speaks_of_the_interval_not_of_the_value():
    assert ABOVE.verdict(Estimate(0.9, 0.4, 0.95, 99)) == "inconclusive"
    assert WITHIN.verdict(Estimate(0.0, -0.9, 0.9, 99)) == "inconclusive"


@pytest.mark.parametrize("place", range(3))
def test_no_verdict_on_what_is_not_a_number(place):
    values = [0.8, 0.6, 0.9]
    values[place] = float("nan")
    with pytest.raises(ValueError, match="not a number"):
        Estimate(*values, 1)
    for claim in (ABOVE, WITHIN):
        with pytest.raises(ValueError, match=f"claim '{claim.id}'.*not a number"):
            claim.verdict(Estimate(*[float("nan")] * 3, 0))


@pytest.mark.parametrize("end", [math.inf, -math.inf])
@pytest.mark.kind("not-a-number", own=True)
def test_no_verdict_on_an_interval_that_lies_beyond_all_numbers(end):
    for claim in (ABOVE, WITHIN):
        with pytest.raises(ValueError, match=f"claim '{claim.id}'.*not a number with its interval"):
            claim.verdict(Estimate(0.8, end, end, 99))


def test_rules_in_words_name_threshold_and_n():
    assert ABOVE.rule == (
        "supported if the whole 95 % interval lies above 0.5, contradicted if it lies below 0.5, "
        "otherwise (or with n < 30) inconclusive"
    )
    assert "within ±0.5" in WITHIN.rule and "outside ±0.5, on one side" in WITHIN.rule


@pytest.mark.parametrize("name", CLAIMS)
def test_declared_claims_are_whole(name):
    claim = CLAIMS[name]
    assert claim.id == name and re.fullmatch(r"[a-z]+(-[a-z]+)*", name)
    assert re.fullmatch(r"0[1-9]|[1-9][0-9]", claim.chapter)
    assert claim.kind in ("above", "within")
    assert math.isfinite(claim.threshold) and claim.min_n >= 10
    assert claim.threshold > 0 if claim.kind == "within" else claim.threshold >= 0
    assert claim.statement.endswith(".") and claim.metric and claim.section


def test_claims_are_in_the_order_of_the_chapters_and_say_different_things():
    chapters = [claim.chapter for claim in CLAIMS.values()]
    assert chapters == sorted(chapters)
    for told in ("statement", "metric"):
        assert len({getattr(claim, told) for claim in CLAIMS.values()}) == len(CLAIMS)


# Records


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("KNCORE_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


def put(claim="fact-has-neurons", estimate=CLEAR, lm=LM, **parameters):
    return record(claim, lm, estimate, seed=0, source="own", **parameters)


def files(results):
    return sorted(str(path.relative_to(results)) for path in results.rglob("*") if path.is_file())


def test_a_record_says_what_was_found_by_what_rule_on_what(results):
    verdict = put(n=12, quadrature="gauss")
    assert verdict == Verdict(CLAIMS["fact-has-neurons"], CLEAR, "tiny-gpt2")
    assert files(results) == ["tiny-gpt2/fact-has-neurons.json"]
    told = json.loads((results / "tiny-gpt2" / "fact-has-neurons.json").read_text(encoding="utf-8"))
    claim = CLAIMS["fact-has-neurons"]
    want = {
        "claim": claim.id,
        "chapter": "01",
        "statement": claim.statement,
        "metric": claim.metric,
        "rule": claim.rule,
    }
    want |= {"verdict": "supported", "value": 0.8, "low": 0.6, "high": 0.9, "n": 40}
    want |= {"model": "tiny-gpt2", "revision": "seed0", "dtype": "float32", "source": "own", "seed": 0}
    want |= {"parameters": {"n": 12, "quadrature": "gauss"}}
    assert {name: told[name] for name in want} == want
    assert {"torch", "transformers", "numpy", "scipy", "kncore"} <= set(told["versions"])
    assert read(results) == [told]


def test_a_record_replaces_the_one_before(results):
    put()
    put(estimate=Estimate(0.2, 0.1, 0.3, 40))
    (told,) = read(results)
    assert (told["value"], told["verdict"]) == (0.2, "contradicted")


def test_a_hub_name_gives_one_folder(results):
    put(lm=replace(LM, name="owner/name@abc"))
    assert files(results) == ["owner--name@abc/fact-has-neurons.json"]
    assert read(results)[0]["model"] == "owner/name@abc"


@pytest.mark.parametrize("before", [False, True])
def test_a_record_that_cannot_be_written_leaves_what_was_there(before, results, monkeypatch):
    if before:
        put()

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(claims.os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        put(estimate=Estimate(0.1, 0.0, 0.2, 40))
    assert files(results) == (["tiny-gpt2/fact-has-neurons.json"] if before else [])
    if before:
        assert read(results)[0]["value"] == 0.8


def test_parameters_that_are_no_json_leave_nothing_behind(results):
    with pytest.raises(TypeError):
        put(lm_itself=LM)
    assert files(results) == []


def test_undeclared_claims_and_estimates_that_are_not_numbers_are_not_recorded(results):
    with pytest.raises(KeyError, match="no-such-claim"):
        put("no-such-claim")
    with pytest.raises(ValueError, match="not a number"):
        put(estimate=Estimate(float("nan"), 0.0, 1.0, 40))
    assert files(results) == []


def test_an_endless_interval_is_null_in_the_record_and_open_in_the_table(results):
    assert "Inconclusive" in str(put(estimate=Estimate(0.8, -math.inf, math.inf, 1)))
    text = (results / "tiny-gpt2" / "fact-has-neurons.json").read_text()
    told = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (told["low"], told["high"], told["verdict"]) == (None, None, "inconclusive")
    row = table(results).iloc[0]
    assert row["effect [95 % interval]"] == "0.80 [?, ?]" and row["verdict"] == "inconclusive"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda told: json.dumps(told | {"verdict": "proved"}),
        lambda told: json.dumps(told | {"claim": "no-such-claim"}),
        lambda told: json.dumps({name: value for name, value in told.items() if name != "low"}),
        lambda told: json.dumps({name: value for name, value in told.items() if name != "model"}),
        lambda told: json.dumps([told]),
        lambda told: json.dumps(told)[:-5],
        lambda told: "",
    ],
    ids=["verdict", "claim", "no-low", "no-model", "list", "cut", "empty"],
)
def test_a_spoiled_record_is_named(spoil, results):
    put()
    path = results / "tiny-gpt2" / "fact-has-neurons.json"
    path.write_text(spoil(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is not a record of a declared claim.*make notebooks"):
        read(results)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        table(results)


def test_a_record_in_the_place_of_another_is_named(results):
    put()
    shutil.copytree(results / "tiny-gpt2", results / "other")
    with pytest.raises(ValueError, match="its place is tiny-gpt2/fact-has-neurons.json"):
        read(results)


# Date and checksum


def test_the_date_is_the_day_of_the_record_whatever_the_epoch_of_the_build(results, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1714694400")
    before = datetime.now(UTC).date().isoformat()
    put()
    assert read(results)[0]["date"] in (before, datetime.now(UTC).date().isoformat())


def test_a_rerun_that_finds_the_same_keeps_the_date_and_the_file(results, monkeypatch):
    path = results / "tiny-gpt2" / "fact-has-neurons.json"
    on(monkeypatch, "2026-01-01")
    put(n=(1, 2))
    first = path.read_bytes()
    on(monkeypatch, "2026-02-02")
    assert put(n=(1, 2)) == Verdict(CLAIMS["fact-has-neurons"], CLEAR, "tiny-gpt2")
    assert path.read_bytes() == first
    put(estimate=CLEAR._replace(value=0.81), n=(1, 2))
    assert json.loads(path.read_text())["date"] == "2026-02-02"


@pytest.mark.parametrize("edit", [{"date": "2020-01-01"}, {"value": 0.9}, {"checksum": "0" * 16}, None])
def test_a_date_set_by_hand_is_not_kept(edit, results, monkeypatch):
    on(monkeypatch, "2026-01-01")
    put()
    path = results / "tiny-gpt2" / "fact-has-neurons.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit) if edit else "spoiled")
    on(monkeypatch, "2026-02-02")
    put()
    (told,) = read(results)
    assert (told["date"], told["value"], claims.stale(told)) == ("2026-02-02", 0.8, [])


def test_new_records_take_the_dates_of_earlier_ones_that_say_the_same(results, tmp_path, monkeypatch):
    on(monkeypatch, "2026-01-01")
    for claim in ("fact-has-neurons", "fact-owns-neuron", "equally-few"):
        put(claim)
    earlier = tmp_path / "earlier"
    results.rename(earlier)
    on(monkeypatch, "2026-02-02")
    put("fact-has-neurons")
    put("fact-owns-neuron", CLEAR._replace(n=41))
    put("same-blocks")
    claims.keep_dates(results, earlier)
    dates = {told["claim"]: told["date"] for told in read(results)}
    assert dates == {"fact-has-neurons": "2026-01-01", "fact-owns-neuron": "2026-02-02", "same-blocks": "2026-02-02"}
    assert not any(map(claims.stale, read(results)))


def on(monkeypatch, date):
    monkeypatch.setattr(claims, "_today", lambda: date)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(told=st.dictionaries(st.text(), values, min_size=1, max_size=8), data=st.data())
def test_any_change_of_one_field_breaks_the_checksum_and_nothing_else_does(told, data):
    told.pop("checksum", None)
    told["checksum"] = claims.checksum(told)
    stored = json.dumps(told, indent=1, ensure_ascii=False)
    assert claims.checksum(json.loads(stored)) == claims.checksum(dict(reversed(told.items()))) == told["checksum"]
    name = data.draw(st.sampled_from([name for name in told if name != "checksum"]) | st.text())
    if name == "checksum":
        return
    changed = {key: value for key, value in told.items() if key != name}
    if name not in told or data.draw(st.booleans(), label="replace rather than remove"):
        value = data.draw(values)
        if name in told and json.dumps(value, sort_keys=True) == json.dumps(told[name], sort_keys=True):
            return
        changed[name] = value
    assert claims.checksum(changed) != told["checksum"]


# Staleness


def test_a_fresh_record_is_not_stale(results):
    put()
    put("equally-few", Estimate(0.8, -math.inf, math.inf, 1), n=7, layers=(1, 2), share=1 / 3)
    put("number-separates", Estimate(1e-9, 2e-10, 0.123456789, 40))
    assert [claims.stale(told) for told in read(results)] == [[], [], []]


def test_a_record_edited_by_hand_is_stale_whatever_was_edited(results):
    put(n=7)
    (told,) = read(results)
    for name, value in told.items():
        other = {"no": "such"} if isinstance(value, dict) else value + 1 if isinstance(value, float | int) else "edited"
        assert claims.stale(told | {name: other}) == ["edited after it was recorded"], name
        less = {key: value for key, value in told.items() if key != name}
        assert claims.stale(less) == ["it has no checksum" if name == "checksum" else "edited after it was recorded"]
    assert claims.stale(told) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"code": "0" * 16}, "the code has changed since"),
        ({"rule": "supported if it looks good"}, "the rule has changed since"),
        ({"metric": "another"}, "the metric has changed since"),
        ({"verdict": "contradicted"}, "the rule now gives another verdict"),
        ({"statement": "Another."}, "the statement has changed since"),
        ({"dtype": "bfloat16"}, "recorded with dtype bfloat16, it is float32 now"),
        *(
            ({"versions": {**VERSIONS, name: "0.0.1"}}, f"recorded with {name} 0.0.1, this is {VERSIONS[name]}")
            for name in VERSIONS
        ),
        (
            {"model": "gpt2", "revision": "0" * 40},
            f"recorded with revision {'0' * 40}, it is {REGISTRY['gpt2'].revision} now",
        ),
    ],
)
def test_a_record_of_another_state_of_the_package_is_stale(change, reason, results):
    put()
    told = read(results)[0] | change
    assert claims.stale(told | {"checksum": claims.checksum(told)}) == [reason]


def test_a_claim_that_changed_makes_its_records_stale(results, monkeypatch):
    put()
    put("fact-owns-neuron")
    monkeypatch.setitem(CLAIMS, "fact-has-neurons", replace(CLAIMS["fact-has-neurons"], threshold=0.7))
    reasons = ["the rule has changed since", "the rule now gives another verdict"]
    assert [claims.stale(told) for told in read(results)] == [reasons, []]


def test_a_record_of_other_code_is_stale(results, monkeypatch):
    put()
    monkeypatch.setattr(stats, "share", lambda *x: None)
    assert list(map(claims.stale, read(results))) == [["the code has changed since"]]
    put()
    assert list(map(claims.stale, read(results))) == [[]]


def checkout(folder, *cells):
    """A checkout with one chapter of these cells after its parameters, and the notebook's path."""
    path = toy.make_checkout(folder, n01_toy=toy.notebook(*cells)) / "notebooks" / "01-toy.ipynb"
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].source = "model = 'tiny'\nn = 7\nseed = 0\nsource = 'own'"
    nbformat.write(nb, path)
    return path


CELLS = (
    "from kncore import claims, figures, stats",
    "shown = stats.share([True] * 40)",
    "figures.table([])",
    "claims.record('fact-has-neurons', lm, shown, seed=seed, source=source, n=n)",
    "claims.record('fact-owns-neuron', lm, stats.mean([1, 2]), seed=seed, source=source, n=n)",
)


@pytest.mark.kind("identity")
def test_a_record_carries_the_closure_of_its_notebook_up_to_its_cell(results, tmp_path, monkeypatch):
    path = checkout(tmp_path / "book", *CELLS)
    monkeypatch.chdir(path.parent.parent)
    put(n=7)
    put("fact-owns-neuron", n=7)

    def after(*cells):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        monkeypatch.chdir(checkout(tmp_path / "other", *cells).parent.parent)
        return [claims.stale(record) for record in read(results)]

    changed = ["the code has changed since"]
    assert after(*CELLS) == [[], []]
    assert after("# a remark", *CELLS[:2], "figures.table([1]); print(shown)", *CELLS[3:]) == [[], []]
    assert after(*CELLS[:3], CELLS[3], CELLS[4].replace("[1, 2]", "[1, 3]")) == [[], changed]
    assert after(CELLS[0], CELLS[1].replace("40", "41"), *CELLS[2:]) == [changed, changed]
    monkeypatch.setattr(stats, "mean", lambda *x: None)
    assert after(*CELLS) == [[], changed]


@pytest.mark.kind("identity", own=True)
def test_a_shell_that_has_run_nothing_is_no_notebook(results, monkeypatch):
    """As figures leave one behind in a script."""
    shell = SimpleNamespace(user_ns={"In": [""]})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    put()
    assert [claims.stale(record) for record in read(results)] == [[]]
    shell.user_ns["In"].append("x = 1")
    put()
    assert [claims.stale(record) for record in read(results)] == [["the code has changed since"]]


@pytest.mark.kind("identity")
def test_a_record_with_other_settings_than_its_chapter_has_is_stale(results, tmp_path, monkeypatch):
    monkeypatch.chdir(checkout(tmp_path / "book", *CELLS).parent.parent)
    record("fact-has-neurons", LM, CLEAR, seed=1, source="public", n=5)
    assert sorted(claims.stale(read(results)[0])) == [
        "recorded with seed = 1, it is 0 now",
        "recorded with source = public, it is own now",
    ]


@pytest.mark.kind("identity")
def test_a_record_names_the_data_that_was_read_and_is_stale_where_that_changed(results, monkeypatch):
    grammar.lexicon()
    tasks.describe("capital")
    put()
    (found,) = read(results)
    assert {"lexicon.toml", "relation capital"} <= found["data"].keys()
    assert claims.stale(found) == []
    now = claims._data
    monkeypatch.setattr(claims, "_data", lambda name: "other" if name == "relation capital" else now(name))
    assert claims.stale(found) == ["the data of relation capital have changed since"]


def test_a_record_of_an_earlier_version_is_read_and_stale(results):
    put()
    path = next(results.glob("*/*.json"))
    earlier = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("family", "data")}
    path.write_text(json.dumps(earlier | {"checksum": claims.checksum(earlier)}))
    assert claims.stale(read(results)[0]) == ["recorded by an earlier kncore, which did not say what data it read"]


@pytest.mark.kind("identity", own=True)
def test_an_unrelated_relation_makes_no_record_stale(results, tmp_path, monkeypatch):
    put()
    (found,) = read(results)
    assert claims._data("relation capital") == found["data"].get("relation capital", claims._data("relation capital"))
    changed = shutil.copytree(resources.DATA, tmp_path / "data")
    (changed / "facts" / "new.tsv").write_text("subject\tobject\na\tb\n", encoding="utf-8")
    with (changed / "relations.toml").open("a", encoding="utf-8") as stream:
        stream.write('\n[new]\ndescription = "new"\nwikidata = ""\ntemplates = ["{} is"]\n')
    for module in (resources, tasks, claims):
        monkeypatch.setattr(module, "DATA", changed)
    for function in (claims._data, tasks._tables, tasks.describe):
        function.cache_clear()
    try:
        assert "new" in tasks.relations() and claims.stale(found) == []
    finally:
        for function in (claims._data, tasks._tables, tasks.describe):
            function.cache_clear()


@pytest.mark.kind("identity")
def test_a_model_that_was_changed_is_not_recorded(results):
    lm = tiny.lm("llama")
    with kncore.suppress(lm, [(0, 1)]), pytest.raises(ValueError, match="not as it was loaded.*end the intervention"):
        put(lm=lm)
    assert read(results) == []
    put(lm=lm)


# Table


def test_the_table_has_a_row_for_every_claim_and_model(results):
    put("equally-few", Estimate(0.1, -0.2, 0.4, 50))
    put("equally-few", Estimate(1.9, 1.5, 2.5, 50), lm=tiny.lm("llama"))
    put("fact-has-neurons")
    shown = table(results)
    assert list(shown.columns) == ["chapter", "claim", "model", "effect [95 % interval]", "n", "verdict"]
    assert len(shown) == len(CLAIMS) + 1
    statements = [claim.statement for claim in CLAIMS.values()]
    assert list(dict.fromkeys(shown["claim"])) == statements
    rows = shown.set_index(["claim", "model"])["verdict"].to_dict()
    few = CLAIMS["equally-few"].statement
    want = {(few, "tiny-gpt2"): "supported", (few, "tiny-llama"): "contradicted"}
    want[CLAIMS["fact-has-neurons"].statement, "tiny-gpt2"] = "supported"
    want |= {(statement, ""): "not run" for statement in statements if statement not in [key[0] for key in want]}
    assert rows == want
    assert shown.set_index("model").loc["tiny-llama", "effect [95 % interval]"] == "1.90 [1.50, 2.50]"


def test_the_table_says_which_verdicts_are_stale(results):
    put()
    put("fact-owns-neuron")
    path = results / "tiny-gpt2" / "fact-has-neurons.json"
    path.write_text(path.read_text().replace('"n": 40', '"n": 400'))
    assert list(table(results)["verdict"][:2]) == ["supported (stale)", "supported"]


def test_without_records_nothing_has_been_run(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        assert set(table(folder)["verdict"]) == {"not run"}


def test_what_a_chapter_declares():
    shown = claims.declare("number-separates", "equally-few")
    assert list(shown["claim"]) == [CLAIMS["number-separates"].statement, CLAIMS["equally-few"].statement]
    assert list(shown["rule"]) == [CLAIMS["number-separates"].rule, CLAIMS["equally-few"].rule]
    with pytest.raises(KeyError):
        claims.declare("no-such-claim")


def test_published_figures_are_changes_of_determiners_as_their_number_demands():
    told = claims.published("bert-base-cased")
    assert tuple(told["neuron"]) == (9, 1094)
    change, groups = told["change"], number_words("masked")
    assert (change["a"], change["this"], change["those"]) == (5.11, 4.83, -1.26)  # shares: +511 %, +483 %, −126 %
    assert set(change) <= {word for group in groups.values() for word in group} and len(change) == 18
    for group, sign in (("plural", -1), ("singular", 1), ("neutral", 0)):
        found = {(change[word] > 0) - (change[word] < 0) for word in groups[group] if word in change}
        assert found == {sign}
    assert {name for name in REGISTRY if claims.published(name)} == {"bert-base-cased"}
    assert claims.published("./some/model") is None


# What a reader sees


def test_a_verdict_in_words_and_in_html():
    verdict = Verdict(ABOVE, CLEAR, "m1")
    assert str(verdict) == repr(verdict) == "Supported on m1: A. m: 0.80 [0.60, 0.90], n = 40"
    html = verdict._repr_html_()
    for said in ('class="verdict supported ', "A.", "0.80 [0.60, 0.90], n = 40", "lies above 0.5"):
        assert said in html
    assert 'class="verdict contradicted ' in Verdict(WITHIN, CLEAR, "m1")._repr_html_()


def test_html_of_a_verdict_escapes_what_it_shows():
    claim = replace(ABOVE, statement="<b>bold</b> & more", metric='"<i>"')
    html = Verdict(claim, CLEAR, "<script>alert(1)</script>")._repr_html_()
    assert "<script" not in html and "<b>" not in html and "<i>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "&amp; more" in html
    assert "n &lt; 30" in html


def test_records_go_to_the_book_that_the_notebook_is_in(tmp_path, monkeypatch):
    monkeypatch.delenv("KNCORE_RESULTS")
    (tmp_path / "book" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "book" / "notebooks")
    assert claims.results_folder() == tmp_path / "book" / "notebooks" / "results"
    (tmp_path / "book" / "_toc.yml").touch()
    assert claims.results_folder() == tmp_path / "book" / "results"
    monkeypatch.setenv("KNCORE_RESULTS", str(tmp_path / "elsewhere"))
    assert claims.results_folder() == tmp_path / "elsewhere"
