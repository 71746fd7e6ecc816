"""Results that are computed once, batch by batch, and read from the store afterwards."""

import pytest
import tiny
import torch

from kncore.store.results import stored


def double(x: int) -> torch.Tensor:
    return torch.tensor([2.0 * x])


def ask(numbers, batch=2, **options):
    """Doubles of numbers, and the batches that were computed for them."""
    batches = []

    def compute(part):
        batches.append([numbers[i] for i in part])
        if None in batches[-1]:
            raise KeyboardInterrupt
        return [{"double": double(numbers[i])} for i in part]

    results = stored(LM, (double,), [{"number": x} for x in numbers], compute, batch=batch, **options)
    return [float(result["double"]) for result in results], batches


LM = tiny.lm("gpt2")


def test_results_are_computed_in_batches_and_found_again_in_any_order():
    assert ask([1, 2, 3]) == ([2.0, 4.0, 6.0], [[1, 2], [3]])
    assert ask([3, 4, 1]) == ([6.0, 8.0, 2.0], [[4]])


def test_without_the_store_everything_is_computed_and_nothing_kept():
    ask([1])
    for _ in range(2):
        assert ask([1, 5], store=False) == ([2.0, 10.0], [[1, 5]])
    assert ask([5]) == ([10.0], [[5]])


def test_an_interrupt_loses_one_batch():
    with pytest.raises(KeyboardInterrupt):
        ask([1, 2, 3, None])
    assert ask([1, 2, 3]) == ([2.0, 4.0, 6.0], [[3]])
