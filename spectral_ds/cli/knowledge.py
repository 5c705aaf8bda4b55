"""What a model knows: its loss on texts, the classes it gives, which texts lie near one another.

Texts are sequences of token ids. Models are called in evaluation, on the device they are on.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectral_ds.coactivation import only_looking

Sequences = Sequence[Sequence[int]]

# Nearest neighbours of a text, by the cosine of mean hidden states.
NEIGHBOURS = 10
BATCH_TOKENS = 512
# What no loss is of.
IGNORED = -100


def loss_on(model: nn.Module, sequences: Sequences) -> float:
    """Nats a token, over all tokens but the first of each sequence."""
    total, count = 0.0, 0
    with only_looking(model):
        for ids, mask in padded(sequences, _device(model)):
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            labels = _next_tokens(ids, mask)
            total += float(
                functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            )
            count += int((labels != IGNORED).sum())
    return total / count


def log_probabilities(model: nn.Module, sequences: Sequences) -> list[Tensor]:
    """Of the tokens that may follow each of a sequence; (tokens - 1, vocabulary), float32, CPU."""
    found = []
    with only_looking(model):
        for ids, mask in padded(sequences, _device(model)):
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            found += [
                each[: int(own.sum())].log_softmax(-1).cpu()
                for each, own in zip(logits, mask[:, 1:], strict=True)
            ]
    return found


def loss_and_divergence(
    before: Sequence[Tensor], model: nn.Module, sequences: Sequences
) -> tuple[float, float]:
    """Means over tokens, in nats: as `loss_on`, and KL(before || model).

    Args:
        before: `log_probabilities` of the same sequences.
    """
    loss, total, count = 0.0, 0.0, 0
    with only_looking(model):
        first = 0
        for ids, mask in padded(sequences, _device(model)):
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            for each, own, labels, of_before in zip(
                logits, mask[:, 1:], ids[:, 1:], before[first:], strict=False
            ):
                tokens = int(own.sum())
                now, then = each[:tokens].log_softmax(-1), of_before.to(each.device)
                loss += float(functional.nll_loss(now, labels[:tokens], reduction="sum"))
                total += float(functional.kl_div(now, then, reduction="sum", log_target=True))
                count += tokens
            first += len(ids)
    return loss / count, total / count


def class_scores(model: nn.Module, sequences: Sequences) -> Tensor:
    """What a classifier gives; (sequences, classes), float32, CPU.

    Decoders find the last token of a text by the token for padding, and not by the mask; those that
    name none are called with one text at a time.
    """
    config: Any = model.config
    fill = config.get_text_config().pad_token_id
    device, most = _device(model), BATCH_TOKENS if fill is not None else 1
    with only_looking(model):
        return torch.cat(
            [
                model(input_ids=ids, attention_mask=mask).logits.float().cpu()
                for ids, mask in padded(sequences, device, most, fill or 0)
            ]
        )


def neighbours_of(model: nn.Module, sequences: Sequences) -> Tensor:
    """(sequences, NEIGHBOURS): numbers of those nearest to each, by mean last hidden states."""
    found = []
    with only_looking(model):
        for ids, mask in padded(sequences, _device(model)):
            output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            hidden = output.hidden_states[-1].double()
            weight = mask[:, :, None].double()
            found.append(((hidden * weight).sum(1) / weight.sum(1)).cpu())
    vectors = functional.normalize(torch.cat(found), dim=1)
    cosines = (vectors @ vectors.T).fill_diagonal_(-2)
    return cosines.topk(NEIGHBOURS, dim=1).indices


def share_kept(before: Tensor, after: Tensor) -> float:
    """The mean share of the neighbours before that still are after."""
    both = (before[:, :, None] == after[:, None, :]).any(2)
    return float(both.double().mean())


def padded(
    sequences: Sequences, device: torch.device, most: int = BATCH_TOKENS, fill: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and masks of some sequences at once, in order, padded at their ends.

    Args:
        most: tokens at once, if one sequence is not longer.
        fill: the token for padding.
    """
    at_once = max(1, most // max(map(len, sequences)))
    for first in range(0, len(sequences), at_once):
        held = sequences[first : first + at_once]
        ids = torch.full((len(held), max(map(len, held))), fill)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(held):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        yield ids.to(device), mask.to(device)


def _next_tokens(ids: Tensor, mask: Tensor) -> Tensor:
    return ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
