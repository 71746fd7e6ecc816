"""Attribution and editing kernels for asking whether knowledge is stored in neurons."""

from kncore.attribution import Attribution, attribute
from kncore.models import LM, load
from kncore.tasks import Query

__all__ = ["LM", "Attribution", "Query", "attribute", "load"]
