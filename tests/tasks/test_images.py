"""Labels of images and of pixels: loss, metrics and predictions against plain arithmetic, over every way in and out."""

import pytest
import torch
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation, ViTConfig, ViTForImageClassification

from lora_lightning import LoRAError
from lora_lightning.tasks.classification import ImageClassification
from lora_lightning.tasks.segmentation import ImageSegmentation


class Says(nn.Module):
    """Returns what it was made with; takes its images under a name of its own."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        assert x.dim() == 4
        return self.output


class Starred(nn.Module):
    def forward(self, *images):
        return images[0]


def batch_of(n=4, side=16, labels=None):
    return {"pixel_values": torch.randn(n, 3, side, side), "labels": torch.arange(n) % 3 if labels is None else labels}


def vit(labels):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=labels))


def torchvision_net(labels):
    from torchvision.models import get_model

    return get_model("squeezenet1_1", num_classes=labels)


def timm_net(labels):
    import timm

    return timm.create_model("test_efficientnet", num_classes=labels)


NETS = {
    "transformers": (vit, 16),
    "torchvision": (torchvision_net, 32),
    "timm": (timm_net, 32),
    "own": (lambda labels: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, labels)), 16),
}


@pytest.mark.parametrize("name", NETS)
def test_any_backbone_takes_the_images_under_its_own_name(name):
    make, side = NETS[name]
    net, batch = make(3).eval(), batch_of(side=side)
    out = ImageClassification(3).step(net, batch)
    output = net(batch["pixel_values"])
    logits = getattr(output, "logits", output)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(logits, batch["labels"]))
    assert out.weight == 4


def test_a_backbone_that_names_no_argument_is_refused():
    with pytest.raises(LoRAError, match="the forward of Starred names no argument"):
        ImageClassification(3).step(Starred(), batch_of())


def test_label_smoothing_spreads_its_share():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    out = ImageClassification(3, label_smoothing=0.3).step(Says(logits), batch_of(labels=labels))
    log = logits.double().log_softmax(1)
    target = torch.full((4, 3), 0.1).double()
    target[range(4), labels] += 0.7
    assert float(out.loss) == pytest.approx(float(-(target * log).sum(1).mean()), rel=1e-6)


def test_metrics_are_those_of_the_whole_set_whatever_the_batches():
    task, logits, labels = ImageClassification(12), torch.randn(30, 12), torch.randint(0, 12, (30,))
    for part in (slice(0, 7), slice(7, 30)):
        out = task.step(Says(logits[part]), batch_of(len(labels[part]), labels=labels[part]))
        metrics = task.update("val", out)
    found = {name: float(metric.compute()) for name, metric in metrics.items()}
    top = logits.topk(5).indices
    f1 = []
    for c in range(12):
        said, true = logits.argmax(1) == c, labels == c
        f1.append(2 * int((said & true).sum()) / max(int(said.sum() + true.sum()), 1))
    present = [f for c, f in enumerate(f1) if (labels == c).any() or (logits.argmax(1) == c).any()]
    assert found["val/accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert found["val/accuracy_top5"] == pytest.approx(float((top == labels[:, None]).any(1).float().mean()))
    assert found["val/f1"] == pytest.approx(sum(present) / len(present))
    assert "val/accuracy_top5" not in ImageClassification(9).update(
        "val", ImageClassification(9).step(Says(torch.randn(4, 9)), batch_of())
    )


def test_predictions_are_probabilities_and_the_likeliest_label():
    out = ImageClassification(3).predict(
        Says(torch.tensor([[0.0, 2.0, 1.0]])), {"pixel_values": torch.zeros(1, 3, 4, 4)}
    )
    assert out["prediction"].tolist() == [1]
    torch.testing.assert_close(out["probabilities"], torch.tensor([[0.0, 2.0, 1.0]]).softmax(1))


@pytest.mark.parametrize(
    ("logits", "batch", "said"),
    [
        (torch.zeros(4, 2), batch_of(), "give its head 3 outputs"),
        (torch.zeros(4, 3, 2, 2), batch_of(), "one for each class"),
        (torch.zeros(4, 3), {"pixel_values": torch.zeros(4, 3, 8, 8)}, "no 'labels'"),
    ],
)
def test_a_misfit_is_named(logits, batch, said):
    with pytest.raises(LoRAError, match=said):
        ImageClassification(3).step(Says(logits), batch)


# Pixels.


def masks(n=2, side=8, classes=3, ignored=10):
    labels = torch.randint(0, classes, (n, side, side))
    labels.view(-1)[torch.randperm(labels.numel())[:ignored]] = 255
    return labels


def test_the_loss_is_the_mean_over_labelled_pixels_and_so_is_the_weight():
    logits, labels = torch.randn(2, 3, 8, 8), masks()
    out = ImageSegmentation(3).step(Says(logits), batch_of(2, labels=labels))
    log, known = logits.double().log_softmax(1), labels != 255
    picked = log.gather(1, labels.where(known, 0).unsqueeze(1)).squeeze(1)[known]
    assert out.weight == int(known.sum()) == 118
    assert float(out.loss) == pytest.approx(float(-picked.mean()), rel=1e-6)


def test_coarse_logits_are_upsampled_to_the_mask():
    logits, labels = torch.randn(2, 3, 4, 4), masks()
    fine = nn.functional.interpolate(logits, size=(8, 8), mode="bilinear", align_corners=False)
    coarse = ImageSegmentation(3).step(Says({"out": logits}), batch_of(2, labels=labels))
    torch.testing.assert_close(coarse.loss, ImageSegmentation(3).step(Says(fine), batch_of(2, labels=labels)).loss)


def test_mean_iou_and_accuracy_count_pixels_over_the_whole_set():
    task, logits, labels = ImageSegmentation(4), torch.randn(5, 4, 8, 8), masks(5, classes=3, ignored=40)
    logits[:, 3] = -9  # a class that is neither there nor said counts for nothing
    for part in (slice(0, 2), slice(2, 5)):
        metrics = task.update("test", task.step(Says(logits[part]), batch_of(labels=labels[part])))
    said, known = logits.argmax(1), labels != 255
    iou = []
    for c in range(3):
        a, b = (said == c) & known, (labels == c) & known
        iou.append(float((a & b).sum() / (a | b).sum()))
    assert float(metrics["test/miou"].compute()) == pytest.approx(sum(iou) / 3)
    assert float(metrics["test/pixel_accuracy"].compute()) == pytest.approx(
        float((said == labels)[known].float().mean())
    )


def test_a_batch_without_a_label_counts_for_nothing_and_has_a_gradient_of_zeros():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    out = ImageSegmentation(3).step(Says(logits), batch_of(1, labels=torch.full((1, 4, 4), 255)))
    out.loss.backward()
    assert (float(out.loss.detach()), out.weight, float(logits.grad.abs().sum())) == (0.0, 0, 0.0)


def test_segformer_and_its_own_loss_agree():
    net = SegformerForSemanticSegmentation(
        SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8], patch_sizes=[3, 3],
            strides=[2, 2], num_attention_heads=[1, 1], mlp_ratios=[1, 1], decoder_hidden_size=8, num_labels=3,
        )
    ).eval()  # fmt: skip
    batch = batch_of(2, side=16, labels=masks(2, 16))
    out = ImageSegmentation(3).step(net, batch)
    torch.testing.assert_close(out.loss, net(**batch).loss)
    assert ImageSegmentation(3).predict(net, batch)["prediction"].shape == (2, 16, 16)


@pytest.mark.parametrize(
    ("logits", "batch", "said"),
    [
        (torch.zeros(2, 2, 8, 8), batch_of(2, labels=masks()), "one map for each class"),
        (torch.zeros(2, 3, 8, 8), batch_of(2), r"labels must be masks \(n, height, width\), got \(2,\)"),
        (torch.zeros(2, 3, 8, 8), {"pixel_values": torch.zeros(2, 3, 8, 8)}, "no 'labels'"),
    ],
)
def test_a_misfit_of_masks_is_named(logits, batch, said):
    with pytest.raises(LoRAError, match=said):
        ImageSegmentation(3).step(Says(logits), batch)


def test_an_ignored_value_that_is_a_label_is_refused():
    with pytest.raises(LoRAError, match="ignore_index must not be one of the labels 0 to 2, got 1"):
        ImageSegmentation(3, ignore_index=1)
