"""What models know is measured as if they were called with one text at a time."""

import copy

import numpy as np
import pytest
import tiny
import torch
from merged import CONFIGS
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from spectral_ds.cli.knowledge import Beliefs, class_scores, loss_and_divergence, loss_on

TEXTS = [[5, 6, 7, 3, 2], [4, 8, 2], [9, 3, 5, 2]]


@pytest.mark.parametrize("pad", [0, 2, None])
@pytest.mark.parametrize(
    ("kind", "model"),
    [
        (LlamaConfig, LlamaForSequenceClassification),
        (BertConfig, BertForSequenceClassification),
    ],
)
def test_scores_of_a_batch_are_those_of_each_text_alone(kind, model, pad):
    """Decoders look for the last token that is not padding, which may be what ends a text."""
    own = CONFIGS["llama" if kind is LlamaConfig else "bert"].to_dict()
    torch.manual_seed(0)
    classifier = model(kind(**own | {"pad_token_id": pad, "num_labels": 3})).eval()
    with torch.no_grad():
        alone = torch.cat([classifier(input_ids=torch.tensor([ids])).logits for ids in TEXTS])
    torch.testing.assert_close(class_scores(classifier, TEXTS), alone, rtol=1e-5, atol=1e-6)


def test_loss_and_divergence_are_exact_whether_beliefs_are_kept_or_asked_anew():
    torch.manual_seed(0)
    before, now = models = [LlamaForCausalLM(tiny.llama_config()) for _ in range(2)]
    logs = [
        torch.cat(
            [
                model.double()(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                for ids in TEXTS
            ]
        ).detach()
        for model in copy.deepcopy(models)
    ]
    following = torch.tensor([token for ids in TEXTS for token in ids[1:]])
    loss = -float(logs[1].gather(1, following[:, None]).mean())
    divergence = float((logs[0].exp() * (logs[0] - logs[1])).sum(1).mean())
    assert divergence > 1e-3
    kept, asked = (loss_and_divergence(Beliefs(before, TEXTS, most), now) for most in (2**20, 0))
    assert kept == asked
    np.testing.assert_allclose(kept, (loss, divergence), rtol=1e-4)
    assert loss_on(now, TEXTS) == pytest.approx(loss, rel=1e-5)
