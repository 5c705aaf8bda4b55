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
# Bytes of probabilities that are kept of some sequences.
MOST_KEPT = 2**29


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


class Beliefs:
    """What a model takes to follow in some sequences: kept, or where that is much, asked anew.

    Args:
        model: which does not change from now on.
        sequences: of token ids.
        most: bytes that may be kept.
    """

    def __init__(self, model: nn.Module, sequences: Sequences, most: int = MOST_KEPT) -> None:
        self.sequences = sequences
        self._model, self._kept = model, list[list[Tensor]]()
        device, tokens = _device(model), sum(len(each) - 1 for each in sequences)
        with only_looking(model):
            for ids, mask in padded(sequences, device):
                found = _log_probabilities(model, ids, mask)
                if tokens * found[0].shape[-1] * found[0].element_size() > most:
                    return
                self._kept.append([each.cpu() for each in found])

    def of_batch(self, number: int, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Of each sequence of a batch of `padded`: (tokens - 1, vocabulary), log, float32."""
        if self._kept:
            return self._kept[number]
        with only_looking(self._model):
            return _log_probabilities(self._model, ids, mask)


def loss_and_divergence(before: Beliefs, model: nn.Module) -> tuple[float, float]:
    """Means over tokens, in nats: as `loss_on`, and KL(before || model), of the same sequences."""
    loss, total, count = 0.0, 0.0, 0
    with only_looking(model):
        for number, (ids, mask) in enumerate(padded(before.sequences, _device(model))):
            both = zip(
                _log_probabilities(model, ids, mask),
                before.of_batch(number, ids, mask),
                ids[:, 1:],
                strict=True,
            )
            for now, then, labels in both:
                loss += float(functional.nll_loss(now, labels[: len(now)], reduction="sum"))
                total += float(
                    functional.kl_div(now, then.to(now.device), reduction="sum", log_target=True)
                )
                count += len(now)
    return loss / count, total / count


def _log_probabilities(model: nn.Module, ids: Tensor, mask: Tensor) -> list[Tensor]:
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    lengths = mask[:, 1:].sum(1).tolist()
    return [each[:own].log_softmax(-1) for each, own in zip(logits, lengths, strict=True)]


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
