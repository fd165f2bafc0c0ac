"""Images from folders, tables, sets and arrays become the same batches; a fault is named by file, row and column."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lora_lightning import LoRAError
from lora_lightning.data.images.data import ImageData
from lora_lightning.data.images.rows import BadImageError, read_rgb
from lora_lightning.data.images.transforms import Augmentation, Preprocessing, preprocessing_of
from lora_lightning.data.io.splits import SplitConfig
from tests.data.files import ALL, everything, ready, save, sizes, write
from tests.pictures import COLOURS, class_folders

SPLIT = SplitConfig(validation=0.25, test=0.25)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("pictures") / "set")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "set")


def data_of(path, **kwargs):
    return ready(ImageData, path, **{"image_size": 16, "split": SPLIT, "augment": None} | kwargs)


def same(a, b):
    return all(torch.equal(everything(a)[name], everything(b)[name]) for name in ("pixel_values", "labels"))


def test_a_folder_for_each_class_is_split_the_same_each_time(folder):
    data = data_of(folder, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
    assert sizes(data) == {"train": 18, "validation": 9, "test": 9}
    assert (data.label_names, data.num_classes) == (sorted(COLOURS), 3)
    assert same(data_of(folder), data_of(folder))
    batch = next(iter(data.train_dataloader()))
    assert (batch["pixel_values"].shape, batch["pixel_values"].dtype) == ((4, 3, 16, 16), torch.float32)
    found = everything(data)
    channel = torch.tensor([2, 1, 0])  # of blue, green and red: labels are those of the images' own folders
    assert torch.equal(found["pixel_values"].mean((2, 3)).argmax(1), channel[found["labels"]])


def test_splits_nested_folders_and_duplicates_are_taken_and_hidden_files_are_not(folder, tmp_path):
    root = tmp_path / "by_split"
    for split in ("train", "val"):
        shutil.copytree(folder, root / split)
    (root / "train" / "red" / "more" / "deeper").mkdir(parents=True)
    shutil.copy(folder / "red" / "00.png", root / "train" / "red" / "more" / "deeper" / "x.JPG")
    (root / "train" / "red" / ".hidden.png").write_bytes(b"no image")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "red" / "notes.txt").write_text("no image")
    data = data_of(root, split=ALL)
    assert sizes(data) == {"train": 37, "validation": 36}
    assert data.label_names == sorted(COLOURS)
    assert sizes(data_of(root, split=ALL, drop_duplicates=True)) == {"train": 36, "validation": 36}
    assert sizes(data_of(root, split=ALL, max_train_rows=5)) == {"train": 5, "validation": 36}


def files_of(folder):
    return sorted(folder.glob("*/*.png"))


def table_of(folder, file):
    rows = [{"image": str(f.relative_to(folder)), "label": f.parent.name} for f in files_of(folder)]
    return write(file, rows)


def arrays(path):
    files = files_of(Path(path))
    return np.stack([np.array(Image.open(f)) for f in files]), [f.parent.name for f in files]


def saved(folder, to, image):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=sorted(COLOURS)))
    return save(to, features, train=[{"image": image(f), "label": f.parent.name} for f in files_of(folder)])


def with_metadata(folder, to):
    to.mkdir()
    rows = [{"file_name": f"{f.parent.name}-{f.name}", "label": f.parent.name} for f in files_of(folder)]
    for file, row in zip(files_of(folder), rows, strict=True):
        shutil.copy(file, to / row["file_name"])
    write(to / "metadata.csv", rows)
    return to


FORMS = {
    "CSV": lambda f, to: (table_of(f, f / "rows.csv"), {}),
    "a table elsewhere": lambda f, to: (table_of(f, to.with_suffix(".csv")), {"image_root": str(f)}),
    "a saved set of paths": lambda f, to: (saved(f, to, str), {}),
    "a saved set of bytes": lambda f, to: (saved(f, to, Image.open), {}),
    "metadata": lambda f, to: (with_metadata(f, to), {}),
    "a reader": lambda f, to: (f, {"reader": arrays}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_folders_own_batches(form, folder, tmp_path):
    path, options = FORMS[form](folder, tmp_path / "other")
    data = data_of(path, **options)
    assert data.label_names == sorted(COLOURS)
    assert same(data_of(folder), data)


def epochs(folder, *, workers=0, world=1, **options):
    """Pixels of every training example by (epoch, row), over all processes."""
    augment = Augmentation(crop_scale=0.5, flip=0.5, rand_augment=9)
    data = data_of(folder, augment=augment, num_workers=workers, **options)
    seen = {}
    for rank in range(world):
        loader = data.train_dataloader()
        if world > 1:
            loader.sampler.num_replicas, loader.sampler.rank = world, rank
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            order = [row for _, row in loader.sampler]
            pixels = torch.cat([batch["pixel_values"] for batch in loader])
            seen |= {(epoch, row): x for row, x in zip(order, pixels, strict=True)}
    before = torch.get_rng_state()
    _ = data.encoded_rows("train")[(0, 0)]
    assert torch.equal(before, torch.get_rng_state()), "torch's own generator is let be"
    return seen


def test_augmentation_is_a_function_of_seed_epoch_and_row_alone(folder):
    one = epochs(folder)
    assert any(not torch.equal(x, one[1, row]) for (_, row), x in one.items()), "each epoch draws anew"
    torch.manual_seed(99)
    for options in ({"batch_size": 7}, {"workers": 2}, {"world": 2}):
        other = epochs(folder, **options)
        assert other.keys() == one.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    reseeded = epochs(folder, seed=1)
    assert any(not torch.equal(one[key], reseeded[key]) for key in one)
    assert same(data_of(folder, augment=Augmentation()), data_of(folder)), "evaluation is not augmented"


def test_every_mode_becomes_rgb(tmp_path):
    grey = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))
    colour = np.stack([grey] * 3, 2)
    palette = Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    alpha = np.dstack([colour, np.full((16, 16), 128, np.uint8)])
    plain, deep = Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257)
    for image in (plain, plain.convert("LA"), palette, Image.fromarray(alpha), deep):
        image.save(tmp_path / "x.png")
        found = read_rgb(str(tmp_path / "x.png"))
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(found), colour), image.mode
    image, exif = Image.new("RGB", (8, 4), (200, 0, 0)), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read_rgb(str(tmp_path / "x.jpg")).size == (4, 8)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ValueError, match="floats, whose range is not known"):
        read_rgb(str(tmp_path / "f.tiff"))


def test_a_saved_processor_gives_the_pixels_of_evaluation(folder):
    for options in ({}, {"crop_share": 1}, {"interpolation": "bicubic"}):
        data = data_of(folder, image_size=12, **options)
        files = [str(f) for f in data.tables["train"]["image"]]
        theirs = data.image_processor(images=[Image.open(f) for f in files], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(everything(data)["pixel_values"], theirs, rtol=0, atol=1e-5)


def test_preprocessing_is_read_off_timm_torchvision_and_transformers_and_a_wrong_name_is_named(tmp_path):
    assert Preprocessing(size=(224, 224), resize=256).at(112) == Preprocessing(size=(112, 112), resize=128)
    assert Preprocessing(size=(224, 224), resize=(224, 224)).at([8, 12]).resize == (8, 12)
    from transformers import ConvNextImageProcessor, MobileViTImageProcessor, ViTImageProcessor

    lite = preprocessing_of("timm:tf_efficientnet_lite0")
    assert (lite.size, lite.resize, lite.mean, lite.interpolation) == ((224, 224), 256, (0.5, 0.5, 0.5), "bicubic")
    resnet = preprocessing_of("torchvision:ResNet18_Weights.DEFAULT")
    assert (resnet.size, resnet.resize, resnet.mean) == ((224, 224), 256, (0.485, 0.456, 0.406))
    ViTImageProcessor(size={"height": 32, "width": 24}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "vit")
    vit = preprocessing_of(str(tmp_path / "vit"))
    assert (vit.size, vit.resize, vit.mean) == ((32, 24), (32, 24), (0.1, 0.2, 0.3))
    ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875).save_pretrained(tmp_path / "convnext")
    assert (preprocessing_of(str(tmp_path / "convnext")).resize, vit.std) == (256, (0.5, 0.5, 0.5))
    MobileViTImageProcessor().save_pretrained(tmp_path / "blue before red")
    for name, said in (
        (str(tmp_path / "blue before red"), "MobileViTImageProcessor.* does more than to resize"),
        ("timm:tf_efficientnet_lit0", "timm has no model '.*_lit0'; did you mean 'tf_efficientnet_lite0'"),
        ("torchvision:ResNet18_Weights.IMAGENET", "torchvision has no weights"),
        ("./nowhere", "no image processor './nowhere': there is no such folder"),
    ):
        with pytest.raises(LoRAError, match=said):
            preprocessing_of(name)


def unknown_class(folder):
    both = folder.with_name("both")
    for split in ("train", "val"):
        shutil.copytree(folder, both / split)
    (both / "val" / "red").rename(both / "val" / "rad")
    shutil.rmtree(folder)
    both.rename(folder)


FAULTS = {
    "no image": (lambda f: (f / "red/03.png").write_text("hello"), r"red/03\.png: expected an image that opens, got"),
    "empty file": (lambda f: (f / "red/03.png").write_bytes(b""), r"red/03\.png: .* got the file is empty"),
    "empty class": (lambda f: (f / "violet").mkdir(), "has folders without an image .*violet"),
    "no classes": (lambda f: [shutil.move(f / n, f.parent) for n in COLOURS], "holds no folders: expected one for"),
    "two of one split": (lambda f: [(f / n).mkdir() for n in ("train", "val", "dev")], "are both the validation set"),
    "an unknown class": (unknown_class, r"val/rad/00\.png: expected one of the labels .*'rad'.*mean 'red'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_folder_names_the_file_before_training(name, folder):
    breaks, said = FAULTS[name]
    breaks(folder)
    with pytest.raises(LoRAError, match=said):
        data_of(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_cut_off_is_named_when_it_is_read_also_by_a_worker(folder, workers):
    file = folder / "red" / "03.png"
    file.write_bytes(file.read_bytes()[:-200])
    data = data_of(folder, num_workers=workers, split=ALL)
    with pytest.raises(BadImageError) as raised:
        list(data.train_dataloader())
    (said,) = str(raised.value).splitlines()
    assert said.startswith(f"{folder}/red/03.png: expected an image that opens, got")
    with pytest.raises(LoRAError, match=r"red/03\.png"):
        data_of(folder, verify="decode")


def test_rows_to_predict_need_no_folders(folder):
    data = data_of({"predict": str(folder / "red")}, label_names=sorted(COLOURS))
    assert [set(batch) for batch in data.predict_dataloader()] == [{"pixel_values"}] * 3
