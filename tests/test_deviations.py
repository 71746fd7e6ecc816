"""The measures of the table of deviations, on scores and models small enough to work out."""

import deviations
import tiny
import torch

import kncore
from kncore import tokens
from kncore.query import Query

LM = tiny.lm("gpt2")


def test_two_attributions_are_compared_by_hand():
    ours = torch.tensor([[[1.0, 0.5, 0.0, 0.0]], [[1.0, 0.0, 0.0, 0.0]]])
    theirs = torch.tensor([[[0.5, 1.0, 0.0, 0.3]], [[1.0, 0.0, 0.0, 0.0]]])
    # Cosines: 1 / √(1.25 · 1.34) = 0.773 and 1. In both coarse sets 2 of 3, and 1 of 1. The first neuron differs once.
    words = deviations.alike(theirs, ours)
    assert words.startswith("cosine of the scores 0.89 [") and "0.83 is common" in words and words.endswith("same in 1")


def test_scores_of_token_ids_are_those_of_the_query_and_guesses_go_on_from_it():
    query = Query("the cat saw the", "book")
    encoded = tokens.encode(LM, query)
    assert torch.allclose(deviations.scores(LM, [encoded])[0], kncore.attribute(LM, [query]).scores[0], atol=1e-7)
    guess = int(LM.model(torch.tensor([encoded.ids])).logits[0, -1].argmax())
    first, second = encoded.target[0], 7
    found = deviations.after_guess(LM, [tokens.Encoded(encoded.ids, encoded.position, (first, second))])
    later = tokens.Encoded((*encoded.ids, guess), len(encoded.ids), (second,))
    both = deviations.scores(LM, [encoded])[0] + deviations.scores(LM, [later])[0]
    assert torch.allclose(found[0], both / 2, atol=1e-7)
