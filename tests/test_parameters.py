"""Parameters of notebooks: what is typed is what arrives, or is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knbook import checkout
from knbook.errors import UsageError
from knbook.parameters import check_parameters, parse_parameters

NUMBERS = checkout.Chapter(Path("01-toy.ipynb"), "01", {"seed": 0, "scale": 0.5})


def test_parameters_are_numbers_true_false_null_or_text():
    read = parse_parameters(["a=5", "b=0.2", "c=true", "d=null", "e=x=y", "f=2024-05-03", "g='5'"])
    assert read == {"a": 5, "b": 0.2, "c": True, "d": None, "e": "x=y", "f": "2024-05-03", "g": "5"}


@pytest.mark.kind("parameter-as-typed")
@pytest.mark.parametrize(
    "text",
    ["010", "1:30", "1_0", "0x10", "0b1", ".5", "1.", "+5", " 5", "inf", "nan", ".inf", "-.inf", ".NaN"],
)
def test_a_number_in_another_notation_is_refused(text):
    for name in ("seed", "scale"):
        with pytest.raises(UsageError, match="got str .*a number is written as 5, -0.25 or 1e-3"):
            check_parameters(NUMBERS, parse_parameters([f"{name}={text}"]))


@pytest.mark.kind("parameter-as-typed", own=True)
@pytest.mark.parametrize(
    "text",
    ["00", "-01", "0o7", "1__0", "1:30:20.5", "\u0663", "\uff15", "\u22125", "1e999", "1e-400", "Infinity", "5\t"]
    + ["9" * 5000, "'5", "\"a'", "'a''b'", "'a\\n'", "+1_0", "01.5", "1e1_0"],
)
def test_so_is_one_that_nobody_thought_of(text):
    with pytest.raises(UsageError, match="got (str|float) |expected (the same quote|a number of at least)"):
        check_parameters(NUMBERS, parse_parameters([f"seed={text}"]))


@pytest.mark.kind("parameter-as-typed")
@pytest.mark.parametrize(
    ("text", "value"),
    [("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("~", "~"), ("null", None), ("true", True)]
    + [("2024-01-01", "2024-01-01"), ("'5'", "5"), ('"5"', "5"), ("1e3", 1000.0), ("-5", -5), ("0.50", 0.5)],
)
def test_what_is_typed_is_what_arrives(text, value):
    found = parse_parameters([f"x={text}"])["x"]
    assert found == value and type(found) is type(value)


@pytest.mark.kind("parameter-as-typed", own=True)
@given(st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none())
def test_a_literal_of_python_is_that_value(value):
    found = parse_parameters([f"x={value!r}"])["x"]
    assert found == value and type(found) is type(value)


@pytest.mark.kind("parameter-as-typed", own=True)
@given(st.text())
def test_text_arrives_letter_for_letter_or_is_refused(text):
    with contextlib.suppress(UsageError):
        found = parse_parameters([f"x={text}"])["x"]
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        assert str(found) == (text[1:-1] if quoted else text) or not isinstance(found, str)
        assert isinstance(found, str) or found is None or text in ("true", "false") or float(text) == found


@pytest.mark.kind("parameter-as-typed", own=True)
@pytest.mark.parametrize("text", ["'5", "\"a'", "'a''b'", "'a\\n'", "'", "1e-400", "-0.1e-999"])
def test_quotes_that_do_not_pair_off_and_a_number_that_would_be_0_are_refused(text):
    with pytest.raises(UsageError, match="^-p scale=.*expected (the same quote at both ends|a number of at least)"):
        parse_parameters([f"scale={text}"])
    assert parse_parameters(["scale=0.0", "other=0e5", "least=5e-324"]) == {"scale": 0.0, "other": 0.0, "least": 5e-324}


@pytest.mark.kind("parameter-as-typed", own=True)
def test_a_parameter_that_is_given_twice_has_one_value():
    assert parse_parameters(["n=2", "n=2"]) == {"n": 2}
    for other in ("3", "'2'", "2.0"):
        with pytest.raises(UsageError, match="given twice"):
            parse_parameters(["n=2", f"n={other}"])
