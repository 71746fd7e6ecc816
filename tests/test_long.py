"""Long sweeps: memory stays where it was, the model what it was, and scores do not depend on what was beside them."""

from __future__ import annotations

from pathlib import Path

import long
import pytest
import torch

from kncore import models


@pytest.fixture(scope="module")
def lm():
    return models.load("controlled-gpt2")


EXACT = Path("/proc/self/statm").is_file()  # elsewhere the system tells only the most that was ever held
LIMIT = 10 if EXACT else 300  # MiB; undisturbed it grows by less than 1


@pytest.mark.skipif(not EXACT, reason="the system tells only the most that was held")
def test_the_measure_sees_what_is_held_and_not_what_was_freed():
    before = long.memory()
    held = [torch.ones(2**18) for _ in range(2 * LIMIT)]  # 1 MiB each
    assert long.memory() - before == pytest.approx(2 * LIMIT, abs=LIMIT / 2)
    held.clear()
    assert long.memory() - before == pytest.approx(0, abs=LIMIT / 2)


def test_memory_stays_flat_over_many_prompts_whose_scores_depend_on_no_batch_and_no_order(lm):
    before = long.digest(lm)
    found = long.attributions(lm, long.prompts(lm, 250), again=30)
    assert found.memory[-1] - found.memory[1] < LIMIT, f"MiB on the way: {found.memory}"
    assert 0 <= found.apart < 2e-3
    assert long.digest(lm) == before and not lm.is_modified


def test_edits_stacked_and_undone_leave_every_bit_and_no_memory(lm):
    before = long.digest(lm)
    found = long.stacked(lm, long.prompts(lm, 1)[0], 40, rounds=4)
    assert found.apart == 0
    assert found.memory[-1] - found.memory[0] < LIMIT, f"MiB on the way: {found.memory}"
    assert long.digest(lm) == before and not lm.is_modified


def test_a_weight_that_did_not_come_back_would_be_seen(lm):
    before = long.digest(lm)
    weight = lm.model.transformer.h[1].mlp.c_proj.weight
    old = weight[3, 5].clone()
    weight[3, 5] = old.nextafter(old + 1)
    assert long.digest(lm) != before
    weight[3, 5] = old
    assert long.digest(lm) == before
