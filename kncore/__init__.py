"""Attribution and editing kernels for asking whether knowledge is stored in neurons."""

from kncore.attribution import Attribution, attribute
from kncore.grammar import minimal_pairs, phenomena
from kncore.models import LM, load
from kncore.neurons import Neuron, find_neurons, similarity
from kncore.predictions import known_facts, known_pairs, predict
from kncore.tasks import Query, facts, relations

__all__ = [
    "LM",
    "Attribution",
    "Neuron",
    "Query",
    "attribute",
    "facts",
    "find_neurons",
    "known_facts",
    "known_pairs",
    "load",
    "minimal_pairs",
    "phenomena",
    "predict",
    "relations",
    "similarity",
]
