"""What a task cannot take is refused in words that say what it takes, and which entry is meant."""

import re
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torchmetrics import MeanSquaredError

from lora_lightning import LoRAError, SequenceClassification
from lora_lightning.tasks.classification import ImageClassification, MultiLabelClassification, SequenceRegression
from lora_lightning.tasks.contrastive import ContrastiveEmbedding
from lora_lightning.tasks.generation import SequenceToSequence, generate_texts, generation_metrics
from lora_lightning.tasks.language_model import CausalLM
from lora_lightning.tasks.preference import PreferenceTuning
from lora_lightning.tasks.segmentation import ImageSegmentation
from lora_lightning.tasks.supervised import Supervised
from lora_lightning.tasks.token_classification import TokenClassification
from tests.tasks.test_figures import IOB2, Says, Two
from tests.tiny_text import make_model


class Starred(nn.Module):
    def forward(self, *images):
        return images[0]


def says(task, output, *labels):
    return lambda: task.step(Says(output), {"x": 0} | ({"labels": labels[0]} if labels else {}))


def given(task, batch, model=None):
    return lambda: task.step(model or Says(0), batch)


def made(task, *args, **options):
    return lambda: task(*args, **options)


ONE, SEVERAL, IMAGES = SequenceClassification(2), MultiLabelClassification(3), ImageClassification(3)
MASKS, NUMBER = ImageSegmentation(3), SequenceRegression()
OWN, PAIRS = Supervised(nn.MSELoss()), ContrastiveEmbedding()
Z, X, L, PROMPT = torch.zeros, torch.randn(2, 3), torch.zeros(2).long(), {"input_ids": torch.ones(1, 9).long()}
TEXTS = {"anchor": {"x": torch.randn(7, 5)}, "positive": {"x": torch.randn(7, 5)}}
ANSWERS = torch.tensor([[1, 1], [1, 1], [1, 1], [1, -100]])


class Rows(nn.Module):
    def forward(self, x):
        return x


MISFITS = [
    # of what the backbone says, and of labels
    (says(ONE, Z(2, 3), L), "give its head 2 outputs"),
    (says(ONE, Z(2, 2)), "no 'labels'"),
    (given(ONE, [1, 2]), "must map names to tensors"),
    (says(ONE, "no tensor", L), "must return logits"),
    (given(IMAGES, {"pixel_values": Z(4, 3, 8, 8), "labels": L}, Starred()), "the forward of Starred names no"),
    (says(IMAGES, Z(4, 3, 2, 2), Z(4)), "one for each class"),
    (says(MASKS, Z(2, 2, 8, 8), Z(2, 8, 8)), "one map for each class"),
    (says(MASKS, Z(2, 3, 8, 8), L), "labels must be masks (n, height, width), got (2,)"),
    (says(SEVERAL, Z(2, 4), Z(2, 3)), "give its head 3 outputs"),
    (says(SEVERAL, Z(2, 3), Z(2)), "a 0 or 1 for each label, got (2,)"),
    (says(NUMBER, Z(4, 2), Z(4)), "got (4, 2): give its head 1 output"),
    (says(NUMBER, Z(4, 1), Z(4, 1)), "labels must be one number for each example, (4,), got (4, 1)"),
    (says(TokenClassification(IOB2), Z(1, 2, 3), Z(1, 2).long()), "must return logits (1, 2, 5)"),
    # of a loss and batches of one's own
    (given(OWN, {"x": X, "label": X}, Two()), "no target 'labels'; did you mean 'label'"),
    (given(OWN, (X, X, X), Two()), "must map names to tensors or be (inputs, target), got a tuple of 3"),
    (given(OWN, 3, Two()), "got a int"),
    (given(OWN, (Z(6, 1), Z(6, 2)), nn.Identity()), "must have the outputs' shape (6, 1), got (6, 2)"),
    (given(Supervised(nn.MSELoss(), inputs=["z"]), {"x": X, "labels": X}, Two()), "no 'z', which inputs"),
    (given(Supervised(nn.MSELoss(), output="othr"), (X, X), Two()), "returns no 'othr'; did you mean 'other'"),
    (given(OWN, (X, X), nn.LSTM(3, 2)), "must return a tensor, or a mapping with its output, got tuple"),
    (made(Supervised, nn.MSELoss(), {"loss": MeanSquaredError()}), "'loss' is logged anyway"),
    (made(Supervised, nn.MSELoss(), monitor="acc"), "monitor is one of loss, got 'acc'"),
    # of pairs
    (given(PAIRS, {"anchor": {"x": 0}}, Rows()), "a batch of pairs has an anchor and a posit"),
    (given(PAIRS, {"x": torch.ones(2, 2)}, Rows()), "must return image_embeds and text_embeds"),
    (given(ContrastiveEmbedding(None), TEXTS, Rows()), "Rows has no logit_scale of its own"),
    (given(PAIRS, {**TEXTS, "labels": Z(7)}, Rows()), "labels must be (7, 1), a group for each candidate"),
    (lambda: PAIRS.predict(Rows(), {"anchor": {"x": Z(2, 2, 2, 2)}}), "must return last_hidden_state"),
    (given(PreferenceTuning(), {"input_ids": Z(2, 4)}), "no 'labels'"),
    (given(PreferenceTuning(), {"input_ids": Z(2, 4), "labels": Z(3, 4).long()}), "must be (2n, t)"),
    (given(PreferenceTuning(), {"input_ids": Z(2, 4), "labels": ANSWERS}), "the rejected answer of pair 2"),
    # of texts
    (given(CausalLM(), {"input_ids": Z(1, 4).long()}), "no 'labels', only input_ids"),
    (lambda: generate_texts(nn.Linear(1, 1), {}, None, {}), "Linear has no `generate`"),
    (lambda: generate_texts(make_model("gpt2"), PROMPT, Mock(eos_token_id=1), {"max_new_tokens": 99}), "to 56 or less"),
    (given(SequenceToSequence(None), {"input_ids": L, "labels": L}, nn.Linear(1, 1)), "put decoder_input_ids into"),
    # of arguments
    (made(SequenceClassification, 1), "at least 2 classes, got 1"),
    (made(SequenceClassification, 2, metrics=[]), "name at least one of accuracy, f1, binary_f1, matthews"),
    (made(SequenceClassification, 2, metrics=["acuracy"]), "did you mean 'accuracy'"),
    (made(SequenceClassification, 3, metrics=["binary_f1"]), "binary_f1 is the F1 of class 1 of 2, and there are 3"),
    (made(MultiLabelClassification, 1), "at least 2 labels, got 1"),
    (made(MultiLabelClassification, 3, 1.5), "threshold must be a probability above 0 and below 1, got 1.5"),
    (made(MultiLabelClassification, 3, over_labels="max"), "over_labels is one of mean, sum, got 'max'"),
    (made(ImageSegmentation, 3, ignore_index=1), "ignore_index must not be one of the labels 0 to 2, got 1"),
    (made(TokenClassification, ["O", "B-PER", "MISC"]), "'MISC' has none"),
    (made(TokenClassification, ["O", "PER"], strict=True), "strict needs labels with prefixes, such as B-PER"),
    (made(ContrastiveEmbedding, 0), "temperature must be above 0"),
    (made(ContrastiveEmbedding, pooling="means"), "did you mean 'mean'"),
    (made(CausalLM, label_smoothing=1.0), "label_smoothing must be"),
    (made(SequenceToSequence, None, generation={"num_beam": 3}), "no option 'num_beam'; did you mean 'num_beams'"),
    (made(SequenceToSequence, None, generation={"num_return_sequences": 2}), "no option 'num_return_sequences'"),
    (made(SequenceToSequence, None, label_smoothing=1.0), "label_smoothing must be at least 0 and below 1"),
    (made(generation_metrics, ["rouge_l"]), "got 'rouge_l'; did you mean 'rougeL'"),
    (made(PreferenceTuning, loss="sigmoids"), "did you mean 'sigmoid'"),
    (made(PreferenceTuning, beta=0), "beta must be above 0, got 0"),
    (made(PreferenceTuning, label_smoothing=0.5), "below 0.5, got 0.5"),
    (made(PreferenceTuning, loss="hinge", label_smoothing=0.1), "no meaning in the loss hinge"),
    (made(PreferenceTuning, rpo_alpha=-1), "at least 0, got -1"),
    (made(PreferenceTuning, loss="orpo", rpo_alpha=1.0), "leave rpo_alpha at 0"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "said"), MISFITS, ids=[said[:40] for _, said in MISFITS])
def test_a_misfit_is_named(act, said):
    with pytest.raises(LoRAError, match=re.escape(said)):
        act()
