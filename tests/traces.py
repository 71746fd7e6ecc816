"""Models, and prompts with a subject, that are traced."""

import pytest
import tiny

from kncore.query import Query

MODELS = {family: tiny.lm(family) for family in tiny.FAMILIES}
on_all_families = pytest.mark.parametrize("family", tiny.FAMILIES)


def ask(lm, subject: str = "France Spain", target: str = "Paris", foil: str = "Madrid", text: str = "") -> Query:
    """A query with text before and after its subject; a masked model reads on after the mask."""
    template = (text or "the capital of {} is in") + (" [MASK] ." if lm.spec.masked else "")
    return Query(template.replace("{}", subject), target, subject, foil, template=template)
