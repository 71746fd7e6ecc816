"""All tokenisation: from a query to token ids, target ids and the position that predicts each target token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kncore.models import LM
from kncore.query import MASK, Query, subject_start


@dataclass(frozen=True)
class Encoded:
    """One query as token ids.

    `ids` are the tokens of the prompt (a masked prompt holds one mask per target token), `position` the index of the
    token whose state predicts the first target token, `target` the ids of the target.
    """

    ids: tuple[int, ...]
    position: int
    target: tuple[int, ...]


def expect_word(text: str, what: str) -> str:
    """Return a word. Raises TypeError for what is no text, ValueError for an empty one or white space around it."""
    if not isinstance(text, str):
        raise TypeError(f"a {what} must be text, got {type(text).__name__} {text!r:.80}")
    if not text or text != text.strip():
        raise ValueError(f"the {what} {text!r} is empty or has white space around it; give a word without")
    return text


def encode(lm: LM, query: Query, target: str | None = None) -> Encoded:
    """Return the token ids of a query, or of the same prompt with another `target` (a foil, a candidate).

    Causal models: the prompt keeps the special tokens that the tokenizer puts before it (BOS) and not those that it
    puts after it (EOS); the target is what the text `prompt + " " + target` adds, so it carries its leading space and
    no BOS. Masked models: `[MASK]` becomes one mask token per target token; a prompt without it gets " [MASK]."
    appended. A `joined` query has no space in these places; where the prompt has [MASK], it is as it stands there.

    Raises ValueError where the prompt has no tokens, begins with the special token that the tokenizer puts there or
    ends with the end of a text, or is longer than the model's context; where the target is empty, has white space
    around it or holds special tokens; where prompt and target share a token; and where a causal model is asked about a
    mask with text after it. A target outside the vocabulary is warned of: it is asked as the unknown token.
    """
    if not isinstance(query, Query):
        raise TypeError(f"expected a Query, got {type(query).__name__} {query!r:.80}; make one of prompt and target")
    word = expect_word(query.target if target is None else target, "target")
    ids, position, wanted, *_ = (_masked if lm.spec.masked else _causal)(lm, query, word)
    if not wanted:
        raise ValueError(f"target {word!r} has no tokens for {lm.name}; give a word that it can write")
    unknown, decode = lm.tokenizer.unk_token_id, lm.tokenizer.decode
    known = [token for token in wanted if token != unknown]
    if word == lm.tokenizer.unk_token or decode(known) != decode(known, skip_special_tokens=True):
        raise ValueError(f"the target {word!r} holds special tokens of {lm.name}, which are no words; give a word")
    if unknown in wanted:
        instead = f"{lm.tokenizer.unk_token}, any unknown word"
        warnings.warn(f"{word!r} is not in the vocabulary of {lm.name}: asked is {instead}", stacklevel=2)
    length = len(ids) + (0 if lm.spec.masked else len(wanted) - 1)
    check_length(lm, length, f"prompt {query.prompt[:40]!r}… with its target")
    return Encoded(tuple(ids), position, tuple(wanted))


def longest(lm: LM) -> int | None:
    """Return how many tokens the model can read at once; None where no limit is known."""
    limit = getattr(lm.model.config, "max_position_embeddings", None)
    if limit is not None and lm.spec.family == "roberta":
        limit -= lm.model.config.pad_token_id + 1  # its positions are counted from there
    return limit


def check_length(lm: LM, n_tokens: int, what: str) -> None:
    """Raise ValueError where `what` has more tokens than the model can read at once."""
    limit = longest(lm)
    if limit is not None and n_tokens > limit:
        raise ValueError(f"{what} has {n_tokens} tokens, the context of {lm.name} is {limit}; shorten it")


def read(lm: LM, text: str) -> list[int]:
    """Return the token ids of a text as the model reads it.

    What the tokenizer puts after the text (EOS) is cut for causal models, which would go on after the end of a text.

    Raises TypeError for what is no text, and ValueError for a text that begins or ends with the special token that the
    tokenizer itself puts there: the model would read two.
    """
    if not isinstance(text, str):
        raise TypeError(f"expected text, got {type(text).__name__} {text!r:.80}")
    encoding = lm.tokenizer(text)
    ids, eos = encoding["input_ids"], lm.tokenizer.eos_token_id
    own = [i for i, part in enumerate(encoding.sequence_ids(0)) if part is not None]
    if not own:
        return [token for token in ids if lm.spec.masked or token != eos or token == lm.tokenizer.bos_token_id]
    before, after = ids[: own[0]], ids[own[-1] + 1 :] if lm.spec.masked else []
    for verb, holds, added in (("begins", text.lstrip().startswith, before), ("ends", text.rstrip().endswith, after)):
        for word in map(lm.tokenizer.convert_ids_to_tokens, set(added) & {ids[i] for i in own}):
            if holds(word):
                twice = f"which the tokenizer of {lm.name} itself puts there; leave it out"
                raise ValueError(f"{text[:40]!r} {verb} with {word}, {twice}")
    return ids if lm.spec.masked else ids[: own[-1] + 1]


def read_prompt(lm: LM, prompt: str) -> list[int]:
    """Return the token ids of a prompt that a causal model is to go on with, read as `read` does.

    Raises ValueError also for a prompt without tokens, and for one that ends with the end of a text (EOS).
    """
    ids, tokenizer = read(lm, prompt), lm.tokenizer
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no tokens for {lm.name}; give a longer one")
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        raise ValueError(f"{prompt!r} ends with {tokenizer.eos_token}, the end of a text for {lm.name}; leave it out")
    return ids


def ending(query: Query) -> tuple[bool, str, str]:
    """Return what of a query decides how words are tokenised as its target: whether they are joined to what is before
    them, the last word there, and the letter after them."""
    before, mask, after = query.prompt.partition(MASK)
    return not before[-1:].isspace() if mask else query.joined, "".join(before.split()[-1:]), after[:1]


def _causal(lm: LM, query: Query, word: str) -> tuple[list[int], int, list[int]]:
    prompt, joined = _before(lm, query)
    ids = read_prompt(lm, prompt)
    joint = read(lm, f"{prompt}{'' if joined else ' '}{word}")
    if joint[: len(ids)] != ids:
        remedy = f"end the prompt with a whole word{', and do not join the target to it' if joined else ''}"
        why = f"the tokens of {prompt!r} change when {word!r} follows: its end is no token boundary for {lm.name}"
        raise ValueError(f"{why}; {remedy}")
    return ids, len(ids) - 1, joint[len(ids) :]


def _before(lm: LM, query: Query) -> tuple[str, bool]:
    """Return what a causal model reads of a prompt, and whether the target is joined to it."""
    before, mask, after = query.prompt.partition(MASK)
    if not mask:
        return before, query.joined
    if after.strip(" .。") or not before.strip():
        remedy = "the mask must come last; use the causal form of the task, or a masked model"
        raise ValueError(f"{lm.name} reads from left to right and cannot be asked {query.prompt!r}: {remedy}")
    return before.rstrip(), not before[-1].isspace()


def _masked(lm: LM, query: Query, word: str) -> tuple[list[int], int, list[int], str]:
    before, mark, after = query.prompt.partition(MASK)
    if not mark:
        before, after = before if query.joined else f"{before} ", "."
    spaced = " " if before.endswith(" ") else ""
    wanted = lm.tokenizer(spaced + word, add_special_tokens=False)["input_ids"]
    inside = before and not before[-1].isspace() or after[:1].isalnum()
    if inside:
        encoding = lm.tokenizer(before + word + after, return_offsets_mapping=True)
        whole = encoding["input_ids"]
        wanted = [whole[i] for i in _inside(encoding, len(before), len(before + word))]
    text = before + lm.tokenizer.mask_token * len(wanted) + after
    ids = read(lm, text)
    mask = lm.tokenizer.mask_token_id
    if ids.count(mask) != len(wanted):
        raise ValueError(f"prompt {query.prompt!r} holds mask tokens of its own; mark the one place with {MASK}")
    position = ids.index(mask) if wanted else 0
    if inside and [*ids[:position], *wanted, *ids[position + len(wanted) :]] != whole:
        remedy = f"it is no token of its own for {lm.name}; mark the place of a whole word"
        raise ValueError(f"the tokens around the mask of {query.prompt!r} change when {word!r} is there: {remedy}")
    return ids, position, wanted, text


def _inside(encoding, start: int, end: int) -> list[int]:
    """Return the positions of the tokens that hold letters of a part of a text, given its tokens with their offsets."""
    return [i for i, (low, high) in enumerate(encoding["offset_mapping"]) if low < end and high > start and low < high]


def span(lm: LM, query: Query, target: str | None = None) -> tuple[int, int]:
    """Return the positions of the first and the last token of a query's subject among the ids of `encode`.

    The subject is where `query.subject_start` finds it in the prompt. Raises ValueError for a query without a subject
    or with a template that does not give its prompt, and for a subject without tokens or after the mask of a causal
    model.
    """
    prompt, start = query.prompt, subject_start(query)
    end = start + len(query.subject)
    if lm.spec.masked:
        text = _masked(lm, query, query.target if target is None else target)[3]
        if MASK in prompt and start > prompt.index(MASK):
            start, end = (at - len(prompt) + len(text) for at in (start, end))
    else:
        text, _ = _before(lm, query)
        if end > len(text):
            remedy = f"and {lm.name} reads only what is before it; give a part of that"
            raise ValueError(f"the subject {query.subject!r} of {prompt!r} stands after the mask, {remedy}")
    positions = _inside(lm.tokenizer(text, return_offsets_mapping=True), start, end)
    if not positions:
        raise ValueError(f"the subject {query.subject!r} of {prompt!r} has no tokens for {lm.name}; give another part")
    return positions[0], positions[-1]


def steps(lm: LM, encoded: Encoded) -> list[Encoded]:
    """Return one query per target token: token k is predicted with the target's first k tokens in place."""
    ids, first = encoded.ids, encoded.position + (not lm.spec.masked)  # where the first token of the target goes
    return [
        Encoded(ids[:first] + encoded.target[:k] + ids[first + k :], encoded.position + k, (token,))
        for k, token in enumerate(encoded.target)
    ]


def pad(lm: LM, batch: Sequence[Encoded]) -> tuple[Int[Tensor, "query token"], Int[Tensor, " query"]]:
    """Return right-padded token ids and the lengths, on the model's device."""
    rows = [torch.tensor(e.ids, dtype=torch.long, device=lm.device) for e in batch]
    ids = pad_sequence(rows, batch_first=True, padding_value=lm.tokenizer.pad_token_id or 0)
    return ids, torch.tensor([len(row) for row in rows], device=lm.device)


def real_tokens(ids: Int[Tensor, "query token"], lengths: Int[Tensor, " query"]) -> Bool[Tensor, "query token"]:
    """Return which of the padded ids are tokens of a prompt, not filler."""
    return torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]


def pad_texts(lm: LM, texts: Sequence[str]) -> tuple[Int[Tensor, "text token"], Int[Tensor, " text"]]:
    """Return texts, as `read` reads them, padded as `pad` does.

    Raises ValueError for a text of fewer than two tokens or longer than the model's context.
    """
    ids, lengths = pad(lm, [Encoded(tuple(read(lm, text)), 0, ()) for text in texts])
    for text, length in zip(texts, lengths.tolist(), strict=True):
        if length < 2:
            raise ValueError(f"text {text[:40]!r} has fewer than two tokens for {lm.name}; give a longer one")
        check_length(lm, length, f"text {text[:40]!r}")
    return ids, lengths
