"""Pairs of texts, and of images and texts, become batches; a fault is named by file, row and column."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPProcessor

from lora_lightning import LoRAError
from lora_lightning.data.images.texts import ImageTextData
from lora_lightning.data.pairs import PairData, groups_of
from tests.data.files import ALL, ready, rows_of, save, write
from tests.tiny_pairs import make_tokenizer

ROWS = [
    {"anchor": "what colour is the sky", "positive": "it is blue", "negative": "it is green", "film": "a"},
    {"anchor": "what colour is grass", "positive": "it is green", "negative": "it is blue", "film": "b"},
    {"anchor": "the sky is", "positive": "it is blue", "negative": "no idea", "film": "a"},
]


def pairs_of(folder, tokenizers, rows=ROWS, **options):
    path = rows if isinstance(rows, dict) else write(folder / "pairs.jsonl", rows)
    return ready(PairData, path, tokenizers.pairs, **{"split": ALL, "length_grouped": False} | options)


def captioned(path, processor, **options):
    return ready(ImageTextData, path, processor, split=ALL, **options)


def texts(data, part):
    words = data.tokenizer.batch_decode(part["input_ids"], skip_special_tokens=True)
    return [" ".join(text.split()) for text in words]


def test_each_part_is_padded_by_itself_and_equal_positives_are_a_group(tmp_path, tokenizers):
    data = pairs_of(tmp_path, tokenizers)
    batch = rows_of(data)
    assert set(batch) == {"anchor", "positive", "labels"}
    assert texts(data, batch["anchor"]) == [row["anchor"] for row in ROWS]
    assert texts(data, batch["positive"]) == [row["positive"] for row in ROWS]
    assert batch["anchor"]["input_ids"].shape == (3, 5)
    assert batch["positive"]["input_ids"].shape == (3, 3)
    assert batch["labels"].tolist() == [[0], [1], [0]]
    assert data.lengths(data.encoded_rows("train")) == [8, 7, 6]


def test_prefixes_and_hard_negatives(tmp_path, tokenizers):
    data = pairs_of(tmp_path, tokenizers, negative_column="negative", anchor_prefix="what ", positive_prefix="the ")
    batch = rows_of(data)
    assert texts(data, batch["anchor"])[2] == "what the sky is"
    assert texts(data, batch["positive"])[0] == "the it is blue"
    assert texts(data, batch["negative"]) == ["the it is green", "the it is blue", "the no idea"]
    assert batch["labels"].tolist() == [[0, 1], [1, 0], [0, 2]], "blue is no negative of blue"


def test_a_group_column_says_what_belongs_together(tmp_path, tokenizers):
    data = pairs_of(tmp_path, tokenizers, negative_column="negative", group_column="film")
    assert rows_of(data)["labels"].tolist() == [[0, -1], [1, -1], [0, -1]]
    assert groups_of(["x", "y"], None, None) == [[0], [1]]
    assert rows_of(pairs_of(tmp_path, tokenizers, max_length=2))["anchor"]["input_ids"].shape == (3, 2)
    files = {
        "train": write(tmp_path / "train.jsonl", ROWS),
        "predict": write(tmp_path / "new.jsonl", [{"anchor": "a"}]),
    }
    assert set(rows_of(pairs_of(tmp_path, tokenizers, files), "predict")) == {"anchor"}, "an anchor is enough"


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    size = {"shortest_edge": 8}
    images = CLIPImageProcessor(size=size, crop_size={"height": 8, "width": 8})
    CLIPProcessor(images, make_tokenizer(folder)).save_pretrained(folder)
    return str(folder)


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 10, 3), dtype=np.uint8))


def write_pictures(folder, count=3):
    (folder / "images").mkdir()
    for i in range(count):
        picture(i).save(folder / f"images/{i}.png")
    captions = ["the sky", "the grass", "the sky"]
    return [{"image": f"images/{i}.png", "text": captions[i % 3]} for i in range(count)]


def test_images_and_texts_go_through_the_processor(tmp_path, processor):
    file = write(tmp_path / "captions.jsonl", write_pictures(tmp_path))
    data = captioned(file, processor, num_workers=1)
    batch = rows_of(data)
    assert next(iter(data.train_dataloader()))["pixel_values"].shape == (3, 3, 8, 8), "workers open images too"
    own = data.processor(
        images=[picture(i) for i in range(3)], text=["the sky", "the grass", "the sky"], return_tensors="pt"
    )
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "labels"}
    torch.testing.assert_close(batch["pixel_values"], own["pixel_values"])
    assert torch.equal(batch["input_ids"], own["input_ids"])
    assert batch["labels"].tolist() == [[0], [1], [0]]


def test_paths_bytes_and_image_columns_give_the_same_batch(tmp_path, processor):
    rows = write_pictures(tmp_path)
    from_paths = rows_of(captioned(write(tmp_path / "captions.jsonl", rows), processor))
    held = []
    for i, row in enumerate(rows):
        buffer = io.BytesIO()
        picture(i).save(buffer, "PNG")
        held.append({**row, "image": {"bytes": buffer.getvalue(), "path": None}})
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    from_set = rows_of(captioned(save(tmp_path / "saved", features, train=held), processor))
    for name, value in from_paths.items():
        assert torch.equal(value, from_set[name]), name


def test_a_fault_in_an_image_is_named(tmp_path, processor):
    rows = write_pictures(tmp_path)
    (tmp_path / "images/1.png").write_bytes(b"no image")
    file = write(tmp_path / "captions.jsonl", rows)
    with pytest.raises(
        LoRAError, match=r"captions.jsonl, the train set, row 2, column 'image': expected an image that op"
    ):
        captioned(file, processor)
    (tmp_path / "images/1.png").unlink()
    with pytest.raises(LoRAError, match=r"row 2, column 'image': expected an image that opens, .*1.png': there is no"):
        captioned(file, processor)
    whole = (tmp_path / "images/0.png").read_bytes()
    (tmp_path / "images/0.png").write_bytes(whole[:150])  # the header is there, pixels are not
    data = captioned(write(file, [rows[0], rows[2]]), processor)
    with pytest.raises(LoRAError, match="row 1, column 'image': expected an image that opens"):
        rows_of(data)
    with pytest.raises(LoRAError, match=r"row 1, column 'image': expected the path of an image"):
        captioned(write(file, [{"image": 3, "text": "the sky"}]), processor)
    with pytest.raises(LoRAError, match="row 1, column 'text': expected a text with words"):
        captioned(write(file, [{**rows[2], "text": ""}]), processor)
