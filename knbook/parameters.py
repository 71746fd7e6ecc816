"""Parameters of notebooks: read from the command line, and checked against a chapter before anything runs."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence

from knbook.checkout import Chapter, Scalar
from knbook.errors import UsageError
from kncore import models, quadrature
from knpaper import cases

WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,99})(?P<rest>(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)")
KNOWN = {  # the texts that a parameter of this name may have
    "subject": lambda: {case.request.subject for case in cases.bijective("capital")},
    "new": lambda: {case.request.target for case in cases.bijective("capital")},
    "scholar": cases.scholars,
    "field": cases.synonyms,
}


def parse_parameters(pairs: Sequence[str]) -> dict[str, Scalar]:
    """Return the values of `name=value` pairs, each a number, true, false, null or text, as it was typed.

    A number is decimal and written as in Python: 5, -0.25, 1e-3, without a plus sign, a leading zero or underscores.
    true, false and null may be written True, False and None. Everything else is text, which no parameter that is a
    number takes: systems read 010 and 1:30 differently. So is what stands in quotes, without these. Raises UsageError
    for quotes that do not pair off, and for a number so small that it would be 0.
    """
    parameters: dict[str, Scalar] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"-p {pair[:200]}: expected name=value")
        value = _value(text, f"-p {pair[:200]}")
        if name in parameters and (type(value), value) != (type(parameters[name]), parameters[name]):
            raise UsageError(f"-p {name} is given twice, as {parameters[name]!r} and as {value!r}; give it once")
        parameters[name] = value
    return parameters


def _value(text: str, pair: str) -> Scalar:
    if text in WORDS:
        return WORDS[text]
    if quoted := re.fullmatch(r"""(["'])((?:(?!\1)[^\\])*)\1""", text, re.DOTALL):
        return quoted[2]
    if text[:1] in ('"', "'"):
        raise UsageError(f"{pair}: expected the same quote at both ends, and neither it nor a backslash between them")
    if found := NUMBER.fullmatch(text):
        value = float(text) if found["rest"] else int(text)
        if not value and re.search("[1-9]", re.split("[eE]", text)[0]):
            raise UsageError(f"{pair}: expected a number of at least 5e-324 in size; this one would be 0")
        return value
    return text


def check_parameters(chapter: Chapter, parameters: Mapping[str, Scalar]) -> None:
    """Raise UsageError where a parameter is unknown to the chapter or not of the type of its default."""
    notebook, defaults = chapter.path.name, chapter.defaults
    for name, value in parameters.items():
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            known = ", ".join(defaults) or "none: it has no cell tagged 'parameters'"
            raise UsageError(f"{notebook} has no parameter {name!r}; {hint}its parameters: {known}")
        default = defaults[name]
        types = (int, float) if type(default) is float else (type(default),)
        if default is not None and value is not None and type(value) not in types:
            raise UsageError(
                f"{notebook}: parameter {name} is {type(default).__name__} (default {default!r}), "
                f"got {type(value).__name__} {value!r:.80}; a number is written as 5, -0.25 or 1e-3"
            )
        if value != default and (expected := _expected(name, value)):
            raise UsageError(f"{notebook}: parameter {name}: expected {expected}, got {value!r:.80}")


def _is_folder(value: str) -> bool:
    found = models.local(value)
    return found is not None and found.is_dir()


def _expected(name: str, value: Scalar) -> str:
    """Return what is expected of a parameter of that name where the value is not it; "" where it is."""
    if type(value) is int:
        least = 0 if name == "seed" else 1
        return "" if least <= value < 2**32 else f"a whole number from {least} to 2**32 - 1"
    if not isinstance(value, str):
        return "" if isinstance(value, bool) or (value is not None and math.isfinite(value)) else "a finite value"
    if name in ("model", "models"):
        names = value.split(",") if name == "models" else [value]
        return next(filter(None, (_refusal("a model", models.check, model) for model in names)), "")
    if name == "source":
        return "" if value in ("own", "public") or _is_folder(value) else "own, public, or a folder that exists"
    if name == "corpus":
        return "" if not value or _is_folder(value) else "nothing, or a folder that exists, with .txt files"
    if name == "quadrature":
        return _refusal("a quadrature", quadrature.rule, value, 2)
    if name == "sweep":
        return "" if re.fullmatch(r"\d{1,4}(,\d{1,4})*", value) else "whole numbers with commas between, e.g. 0,1,3"
    if name in KNOWN:
        known = sorted(KNOWN[name]())
        close = difflib.get_close_matches(value, known, 3) or known[:3]
        return "" if value in known else f"one of {len(known)} that are known, such as {', '.join(close)}"
    return ""


def _refusal(what: str, check: Callable[..., object], *arguments: object) -> str:
    try:
        check(*arguments)
    except ValueError as error:
        return f"{what} ({error})"
    return ""
