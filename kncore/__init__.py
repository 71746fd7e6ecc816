"""Attribution and editing kernels for asking whether knowledge is stored in neurons.

A model is loaded (`load`), asked (`Query`, `predict`) and attributed (`attribute`); its neurons are chosen
(`find_neurons`) and changed for a while (`suppress`, `enhance`, `set_neurons`, `edited`); its causes are traced
(`kncore.tracing`), and facts are written into it (`kncore.editors`). What to ask it, facts, minimal pairs, cases and
criteria, is in the package `knpaper`, which comes along. Names that stood here before are still found here.
"""

from importlib import import_module

from kncore.attribution import Attribution, attribute
from kncore.interventions import Delta, edited, enhance, set_neurons, suppress, value_update
from kncore.models import LM, load
from kncore.neurons import Neuron, find_neurons, similarity
from kncore.predictions import predict
from kncore.query import Query

# By name, so that nothing here depends on it.
STUDY = {
    **{name: f"knpaper.{name}" for name in ("cases", "claims", "criteria", "figures", "grammar", "stats", "tasks")},
    **{name: f"knpaper.tasks.{name}" for name in ("facts", "relations")},
    **{name: f"knpaper.grammar.{name}" for name in ("minimal_pairs", "phenomena")},
    **{name: f"knpaper.stimuli.{name}" for name in ("known_facts", "known_pairs")},
}

__all__ = [
    "LM",
    "Attribution",
    "Delta",
    "Neuron",
    "Query",
    "attribute",
    "edited",
    "enhance",
    "find_neurons",
    "load",
    "predict",
    "set_neurons",
    "similarity",
    "suppress",
    "value_update",
]


def __getattr__(name: str) -> object:
    """Return a name of the study that this package had before."""
    if name not in STUDY:
        raise AttributeError(f"module 'kncore' has no attribute {name!r}")
    module, _, attribute = STUDY[name].rpartition(".")
    return import_module(STUDY[name]) if module == "knpaper" else getattr(import_module(module), attribute)
