"""Records of claims, as tests write them."""

import tiny
from hypothesis import strategies as st

from knpaper import claims
from knpaper.claims import record
from knpaper.rules import Claim
from knpaper.stats import Estimate

LM = tiny.lm("gpt2")
ABOVE = Claim("a", "01", "A.", "2", "m", "above", 0.5, 30)
WITHIN = Claim("w", "01", "W.", "2", "m", "within", 0.5, 30)
CLEAR = Estimate(0.8, 0.6, 0.9, 40)


def put(claim="fact-search", estimate=CLEAR, lm=LM, **parameters):
    return record(claim, lm, estimate, seed=0, source="own", **parameters)


def files(results):
    return sorted(str(path.relative_to(results)) for path in results.rglob("*") if path.is_file())


def on(monkeypatch, date):
    monkeypatch.setattr(claims, "_today", lambda: date)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
