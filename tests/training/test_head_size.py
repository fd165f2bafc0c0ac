"""A head of another size than the data want is found without a batch, and no other head is refused."""

from types import SimpleNamespace

import pytest
import torch
from jsonargparse import Namespace
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, SequenceClassification, inject
from lora_lightning.training.preflight import refuse_other_count, refuse_other_size
from tests import factories


@pytest.mark.parametrize("count", [2, 5])
def test_both_numbers_are_named(count):
    with pytest.raises(
        LoRAError, match=rf"head has 3 outputs \(num_labels\), and there must be {count}, one for each cla"
    ):
        refuse_other_size(factories.bert(), SequenceClassification(count))


def test_the_labels_are_named_where_the_data_have_names():
    with pytest.raises(LoRAError, match=r"one for each class \(bad, good\): leave num_labels out"):
        refuse_other_size(factories.bert(), SequenceClassification(2), SimpleNamespace(label_names=["bad", "good"]))


def test_a_head_that_fits_is_let_be_also_where_the_config_has_another_number():
    backbone = factories.bert()
    backbone.classifier = nn.Linear(backbone.classifier.in_features, 2)  # the config still says 3
    refuse_other_size(backbone, SequenceClassification(2))
    inject(backbone, LoRAConfig(r=2, modules_to_save=["classifier"]))
    refuse_other_size(backbone, SequenceClassification(2))


@pytest.mark.parametrize("backbone", [nn.Linear(4, 7), factories.bert().bert], ids=["no transformers", "a body"])
def test_of_what_has_no_head_to_read_the_first_batch_tells(backbone):
    refuse_other_size(backbone, SequenceClassification(2))


@pytest.mark.parametrize(("labels", "fits"), [([0, 1, -100], True), ([0, 2], False), ([-1, 1], False)])
def test_a_label_beyond_the_outputs_is_named_before_the_loss(labels, fits):
    task, batch = SequenceClassification(2), {"labels": torch.tensor(labels)}
    if fits:
        task.check(batch)
    else:
        with pytest.raises(LoRAError, match=r"a batch has the label (2|-1), and the task 2, numbered 0 to 1"):
            task.check(batch)


class Unread:
    """Data that know of their labels only once they are read."""

    @property
    def num_classes(self):
        raise TypeError("nothing is read")

    label_names = num_classes


def test_data_are_asked_for_labels_only_where_something_is_compared_with_them():
    own = Namespace(class_path="mine.Task", init_args=Namespace(num_classes=2))
    for task in (own, Namespace(class_path="lora_lightning.SequenceRegression")):
        refuse_other_count(Namespace(model=Namespace(task=task, backbone=own)), Unread())
    refuse_other_size(factories.bert(), SequenceClassification(3), Unread())


class Ordinal(SequenceClassification):
    """Thresholds between classes: an output less than there are classes."""

    def step(self, backbone, batch):
        raise NotImplementedError


def test_a_step_of_ones_own_may_mean_other_outputs_and_labels():
    task = Ordinal(4)
    refuse_other_size(factories.bert(), task)
    task.check({"labels": torch.tensor([4])})
