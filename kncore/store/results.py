"""Results of kernels, from the store where they are there, computed and stored batch by batch where they are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from tqdm.auto import tqdm

from kncore.models import LM
from kncore.store import cache, disk, state

Result = dict[str, Tensor]


def stored(
    lm: LM,
    functions: Sequence[Callable],
    settings: Sequence[dict],
    compute: Callable[[list[int]], list[Result]],
    *,
    batch: int = 1,
    store: bool = True,
    progress: str = "",
) -> list[Result]:
    """Return one result for each of `settings`: all that it depends on besides the model and the code of `functions`.

    `compute` is given the places in `settings` of at most `batch` results that are not in the store, and what it
    returns is stored before the next batch, so that an interrupt loses one batch. `progress` names the bar, if any.
    Nothing is looked up or stored without `store`, and where it cannot be said what the model computes.

    Raises RuntimeError where the model was changed while it computed: then nothing of that batch is stored.
    """
    content = state.content(lm.model) if store else None
    files = cache.files(lm, content, functions, settings) if content else []
    results = list(map(disk.kept, files)) if content else [None] * len(settings)
    todo = [i for i, result in enumerate(results) if result is None]
    with tqdm(total=len(todo), desc=progress, unit="prompt", leave=False, disable=not progress) as bar:
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            for i, result in zip(part, compute(part), strict=True):
                results[i] = result
            if content:
                if state.content(lm.model) != content:
                    raise RuntimeError(
                        f"{lm.name} was changed while it computed (a weight, a module or a hook): the result mixes two "
                        "models and is not stored; ask again, and leave the model alone meanwhile"
                    )
                for i in part:
                    disk.keep(files[i], results[i])
            bar.update(len(part))
    return results
