"""Attribution and editing kernels for asking whether knowledge is stored in neurons.

From the ground floor up; a module imports from the floors below its own only.

1. `arch` architecture as data · `checks` arguments that are numbers or lists · `resources` data files, and which were
   read · `stored` notebooks at rest · `disk` files written whole and sealed · `fingerprint` the code that decided a
   result · `state` of a model and of the process: content, settings from outside, one thread at a time · `bound` a
   process that ends with its parent
2. `checkpoint` folders of models, checked · `stats` estimates, intervals · `tasks` queries and facts · `runs` kept
   apart, and published whole
3. `models` names and loading · `grammar` minimal pairs · `words` nouns, plain prose, frequencies
4. `tokens` from query to token ids · `public` BLiMP, ParaRel, CounterFact, known_1000
5. `replay` the engine: capture and replay · `neurons` knowledge neurons · `cache` the store of scores ·
   `cases` what is asked after an edit · `editing` requests and settings of editors
6. `attribution` integrated gradients · `predictions` what the model says and knows · `interventions` in models ·
   `effects` of many edits · `covariance` of keys · `corpus` sentences whose every count is known
7. `tracing` of causes · `rome`, `memit`, `finetune`: what an edit of weights is
8. `editors` by name, and their store
9. `criteria` of an edit · `claims` rules, records, verdicts · `figures` plots and tables · `looking` into them
10. `pipeline` notebooks run and stored · `reference` the docstrings as a page
11. `pages` what the records say, as Markdown · `sweep` many prompts, in shards
12. `door` what stands at the end of each page and may be taken away
13. `book` rendered; the command line `python -m kncore`
"""

from kncore.attribution import Attribution, attribute
from kncore.grammar import minimal_pairs, phenomena
from kncore.interventions import Delta, edited, enhance, set_neurons, suppress, value_update
from kncore.models import LM, load
from kncore.neurons import Neuron, find_neurons, similarity
from kncore.predictions import known_facts, known_pairs, predict
from kncore.tasks import Query, facts, relations

__all__ = [
    "LM",
    "Attribution",
    "Delta",
    "Neuron",
    "Query",
    "attribute",
    "edited",
    "enhance",
    "facts",
    "find_neurons",
    "known_facts",
    "known_pairs",
    "load",
    "minimal_pairs",
    "phenomena",
    "predict",
    "relations",
    "set_neurons",
    "similarity",
    "suppress",
    "value_update",
]
