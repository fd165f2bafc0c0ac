"""Images and masks stay together; a mask that is none is named by its file."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lora_lightning import LoRAError
from lora_lightning.data.images.segmentation import SegmentationData
from lora_lightning.data.images.transforms import Augmentation
from tests.data.files import ALL, everything, ready, write


def make(root, count=8):
    """A white square on black, whose mask is 1 inside and 255 on its upper edge."""
    for name in ("images", "masks"):
        (root / name / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        image, mask = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)
        top, left = rng.integers(0, 8, 2)
        image[top : top + 8, left : left + 8], mask[top : top + 8, left : left + 8] = 255, 1
        mask[top, left : left + 8] = 255
        Image.fromarray(image).save(root / "images" / "deep" / f"{i}.png")
        Image.fromarray(mask).save(root / "masks" / "deep" / f"{i}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "set")


def data_of(path, **kwargs):
    plain = {"image_size": 16, "augment": None, "num_classes": 2, "split": ALL, "mean": [0.0] * 3, "std": [1.0] * 3}
    return ready(SegmentationData, path, **plain | {"interpolation": "nearest"} | kwargs)


def test_masks_are_those_of_their_images_and_a_palettes_indices_are_the_labels(folder):
    found = everything(data_of(folder))
    assert (found["labels"].shape, found["labels"].dtype) == ((8, 16, 16), torch.int64)
    known = found["labels"] != 255
    assert torch.equal(found["pixel_values"][:, 0][known].long(), found["labels"][known])
    assert int((~known).sum()) == 8 * 8
    file = folder / "masks" / "deep" / "0.png"
    coloured = Image.open(file).convert("L")
    coloured.putpalette([i for n in range(256) for i in (n, 255 - n, 7)])
    coloured.save(file)
    assert torch.equal(found["labels"], everything(data_of(folder))["labels"])
    reduced = everything(data_of(folder, reduce_labels=True, num_classes=1))["labels"]  # zero stands for no label
    assert torch.equal(reduced, torch.where(found["labels"] == 1, 0, 255))


def test_predicting_needs_no_masks(folder):
    data = data_of({"train": str(folder), "predict": str(folder / "images")})
    assert [set(batch) for batch in data.predict_dataloader()] == [{"pixel_values"}] * 2


def test_image_and_mask_are_augmented_together(folder):
    data = data_of(folder, augment=Augmentation(crop_scale=0.3, flip=0.5), image_size=[12, 8])
    loader = data.train_dataloader()
    seen = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            assert batch["labels"].shape[1:] == (12, 8)
            known = batch["labels"] != 255
            assert torch.equal(batch["pixel_values"][:, 0][known].long(), batch["labels"][known])
            seen.append(batch["labels"])
    assert not torch.equal(torch.stack(seen[:2]), torch.stack(seen[2:]))


def test_a_table_and_a_saved_set_give_the_folders_own_batches(folder, tmp_path):
    rows = {
        column: [str(f) for f in sorted((folder / name).glob("deep/*.png"))]
        for column, name in (("image", "images"), ("mask", "masks"))
    }
    write(tmp_path / "rows.csv", [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)])
    features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    first = everything(data_of(folder))
    for path in (tmp_path / "rows.csv", tmp_path / "saved"):
        other = everything(data_of(path))
        assert all(torch.equal(first[name], other[name]) for name in first)


def spoil(change):
    def do(folder):
        file = folder / "masks" / "deep" / "3.png"
        change(Image.open(file).copy()).save(file)

    return do


def with_a_7(mask):
    mask.putpixel((0, 0), 7)
    return mask


FAULTS = {
    "a value that is no label": (spoil(with_a_7), r"masks/deep/3\.png: expected labels from 0 to 1 or 255, got .* 7"),
    "another size": (spoil(lambda m: m.resize((8, 16))), r"3\.png: .* size of its image, 16 x 16, got 8 x 16"),
    "colours": (spoil(lambda m: m.convert("RGB")), r"3\.png: expected a mask that opens, got an image of mode RGB"),
    "no mask": (lambda f: (f / "masks/deep/3.png").unlink(), r"images without a mask of the same .*images/deep/3"),
    "no image": (lambda f: (f / "images/deep/3.png").unlink(), r"masks without an image of .*masks/deep/3"),
    "cut off": (lambda f: (f / "masks/deep/3.png").write_bytes(b""), r"masks/deep/3\.png: .*the file is empty"),
    "no count": (lambda f: {"num_classes": None}, "needs label_names, or num_classes"),
    "two counts": (lambda f: {"label_names": ["a", "b", "c"]}, "num_classes is 2 and label_names has 3"),
    "a label ignored": (lambda f: {"ignore_index": 1}, "ignore_index 1 is one of the labels"),
    "colours changed": (lambda f: {"augment": Augmentation(rand_augment=9)}, "rand_augment is for images alone"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_the_file(name, folder):
    breaks, said = FAULTS[name]
    options = breaks(folder) or {}
    with pytest.raises(LoRAError, match=said):
        list(data_of(folder, **options).train_dataloader())
    with pytest.raises(LoRAError, match=said):
        data_of(folder, verify="decode", **options)
    if name == "a value that is no label":
        rows = [{"image": f"images/deep/{i}.png", "mask": f"masks/deep/{i}.png"} for i in range(8)]
        with pytest.raises(LoRAError, match=r"rows\.csv, the train set, row 4, column 'mask': .*from 0 to 1.*values 7"):
            data_of(write(folder / "rows.csv", rows), verify="decode")
