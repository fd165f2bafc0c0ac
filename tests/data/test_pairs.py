"""Pairs of texts, and of images and texts, become batches; a fault is named by file, row and column."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lora_lightning import LoRAError
from lora_lightning.data.images.texts import ImageTextData
from lora_lightning.data.pairs import PairData, groups_of
from tests.data.files import ALL, ready, rows_of, save, write

ROWS = [
    {"anchor": "what colour is the sky", "positive": "it is blue", "negative": "it is green", "film": "a"},
    {"anchor": "what colour is grass", "positive": "it is green", "negative": "it is blue", "film": "b"},
    {"anchor": "the sky is", "positive": "it is blue", "negative": "no idea", "film": "a"},
]


def pairs_of(folder, tokenizers, **options):
    path = write(folder / "pairs.jsonl", ROWS)
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
    assert groups_of(["x", "x", "x"], None, [None, "a", None]) == [[-1], [0], [-1]], "a blank cell is no group"
    assert rows_of(pairs_of(tmp_path, tokenizers, max_length=2))["anchor"]["input_ids"].shape == (3, 2)


CAPTIONS = ["the sky", "the grass", "the sky"]


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 10, 3), dtype=np.uint8))


@pytest.fixture
def captions(tmp_path):
    rows, held = [], []
    for i, text in enumerate(CAPTIONS):
        picture(i).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": text})
        held.append({"image": {"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": None}, "text": text})
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    return write(tmp_path / "captions.jsonl", rows), save(tmp_path / "saved", features, train=held)


def test_images_by_path_and_in_a_set_go_through_the_processor_with_their_texts(captions, tokenizers):
    for path in captions:
        data = captioned(path, tokenizers.clip, num_workers=1)
        batch = rows_of(data)
        assert next(iter(data.train_dataloader()))["pixel_values"].shape == (3, 3, 8, 8), "workers open images too"
        own = data.processor(images=[picture(i) for i in range(3)], text=CAPTIONS, return_tensors="pt")
        assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "labels"}
        torch.testing.assert_close(batch["pixel_values"], own["pixel_values"])
        assert torch.equal(batch["input_ids"], own["input_ids"])
        assert batch["labels"].tolist() == [[0], [1], [0]]


def test_an_image_that_is_cut_off_is_named(captions, tokenizers, tmp_path):
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[:150])  # the header is there, pixels are not
    with pytest.raises(LoRAError, match="row 1, column 'image': expected an image that opens"):
        rows_of(captioned(captions[0], tokenizers.clip))
