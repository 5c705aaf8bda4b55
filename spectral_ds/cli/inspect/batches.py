"""Texts as batches of tokens for a causal or a masked language model.

In:  texts and the model's tokenizer.
Out: batches of sequences of equal length; no two hold the same text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from spectral_ds.cli.errors import UserError
from spectral_ds.text import DataError, begin_of

# Keyword arguments of a model, each (batch size, sequence length), int64.
Batch = Mapping[str, torch.Tensor]

# Share of the tokens that a masked language model is to guess (Devlin et al., arXiv 1810.04805).
MASKED_SHARE = 0.15
NOT_GUESSED = -100  # by the convention of torch's cross-entropy

# Texts are encoded so many at a time, until there are tokens enough.
TEXTS_AT_ONCE = 256


def token_batches(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    batches: int,
    batch_size: int,
    sequence_length: int,
    seed: int,
) -> torch.Tensor:
    """Texts in random order, joined by the end token and cut into sequences of equal length.

    Every sequence has the begin token first, where the tokenizer puts it before a text.

    Returns:
        (batches, batch_size, sequence_length), int64.

    Raises:
        DataError: there is too little text for so many different batches.
        UserError: nothing marks the end of a text.
    """
    end = tokenizer.eos_token_id
    if end is None:
        end = tokenizer.sep_token_id
    if end is None:
        raise UserError(
            "--data: the model's tokenizer has no end-of-text or separator token to join texts by"
        )
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    begin = torch.tensor(begin_of(tokenizer), dtype=torch.long)
    room = sequence_length - len(begin)
    needed = batches * batch_size * room
    stream: list[int] = []
    for first in range(0, len(order), TEXTS_AT_ONCE):
        chosen = [texts[i] for i in order[first : first + TEXTS_AT_ONCE]]
        for ids in tokenizer(chosen, add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*ids, end]
        if len(stream) >= needed:
            cut = torch.tensor(stream[:needed]).view(batches, batch_size, room)
            return torch.cat((begin.expand(batches, batch_size, -1), cut), dim=2)
    raise DataError(
        f"has {len(stream):,} tokens, and {batches} batches of {batch_size} x "
        f"{sequence_length} need {needed:,}; lower --steps, --batch-size or --sequence-length"
    )


def causal(tokens: torch.Tensor) -> list[Batch]:
    """Batches on which a model guesses each next token.

    Args:
        tokens: (batches, batch size, sequence length), int64.
    """
    return [{"input_ids": batch, "labels": batch} for batch in tokens]


def masked(tokens: torch.Tensor, tokenizer: Any, seed: int) -> list[Batch]:
    """Batches on which a model guesses tokens that are masked at random.

    Args:
        tokens: (batches, batch size, sequence length), int64.

    Raises:
        UserError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise UserError(
            "--data needs a causal or a masked language model; this one's tokenizer has no mask"
        )
    generator = torch.Generator().manual_seed(seed)
    is_masked = torch.rand(tokens.shape, generator=generator) < MASKED_SHARE
    is_masked[:, 0, -1] = True  # a loss needs something to guess; the first may be a begin token
    inputs = tokens.masked_fill(is_masked, tokenizer.mask_token_id)
    labels = tokens.masked_fill(~is_masked, NOT_GUESSED)
    pairs = zip(inputs, labels, strict=True)
    return [{"input_ids": batch, "labels": wanted} for batch, wanted in pairs]
