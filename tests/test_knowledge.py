"""What models know is measured as if they were called with one text at a time."""

import pytest
import torch
from merged import CONFIGS
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from spectral_ds.cli.knowledge import class_scores

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
