"""Words and tags become batches in which each word's label stands at its first piece; faults are named."""

import datasets
import pytest
from transformers import BertTokenizer, RobertaTokenizer

from lora_lightning import LoRAError
from lora_lightning.data.token_classification import TokenClassificationData
from tests.data import files
from tests.tiny import make_bert

SENTENCES = [
    (["Ann", "Lee", "saw", "Paris"], ["B-PER", "I-PER", "O", "B-LOC"]),
    (["she", "saw", "Ann"], ["O", "O", "B-PER"]),
    (["in", "Paris"], ["O", "B-LOC"]),
]
ROWS = [{"tokens": words, "ner_tags": tags} for words, tags in SENTENCES]
NAMES = ["O", "B-LOC", "B-PER", "I-PER"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ann", "lee", "saw", "par", "##is", "she", "in"]


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    folder = make_bert(tmp_path_factory.mktemp("pieces"))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    for left in folder.glob("tokenizer*"):
        left.unlink()
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def write(file, rows):
    if file.suffix in (".jsonl", ".parquet"):
        return files.write(file, rows)
    lines = ["-DOCSTART- -X- O\n"]
    for row in rows:
        lines += [f"{word} NN {tag}" for word, tag in zip(row["tokens"], row["ner_tags"], strict=True)] + [""]
    file.write_text("\n".join(lines))
    return file


def data_of(path, bert, **kwargs):
    options = {"split": files.ALL, "batch_size": 3, "length_grouped": False}
    return files.ready(TokenClassificationData, path, bert, **options | kwargs)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".conll", ".iob", ".txt"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, bert, suffix):
    data = data_of(write(tmp_path / f"train{suffix}", ROWS), bert)
    assert data.label_names == NAMES
    row = data.encoded_rows("train")[0]
    tokens = ["[CLS]", "ann", "lee", "saw", "par", "##is", "[SEP]"]
    assert data.tokenizer.convert_ids_to_tokens(row["input_ids"]) == tokens
    assert row["word_ids"] == [-1, 0, 1, 2, 3, -1, -1]
    assert row["labels"] == [-100, 2, 3, 0, 1, -100, -100]
    every = data_of(tmp_path / f"train{suffix}", bert, label_all_pieces=True).encoded_rows("train")[0]
    assert every == row | {"labels": [-100, 2, 3, 0, 1, 1, -100]}, "a word still begins once"


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_is_padded_on_the_tokenizers_side_in_every_entry(tmp_path, bert, side):
    data = data_of(write(tmp_path / "train.jsonl", ROWS), bert)
    data.tokenizer.padding_side = side
    batch = data.collate([data.encoded_rows("train")[i] for i in (0, 2)])
    real = batch["attention_mask"].bool()
    assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(batch, (2, 7))
    assert (batch["labels"][~real] == -100).all()
    assert (batch["word_ids"][~real] == -1).all()
    assert batch["word_ids"][1][real[1]].tolist() == [-1, 0, 1, -1, -1]
    assert batch["labels"][1][real[1]].tolist() == [-100, 0, 1, -100, -100]


def test_a_sets_own_names_keep_their_numbers(tmp_path, bert):
    features = datasets.Features(
        tokens=datasets.Sequence(datasets.Value("string")),
        ner_tags=datasets.Sequence(datasets.ClassLabel(names=sorted(NAMES))),
    )
    rows = [{"tokens": r["tokens"], "ner_tags": [sorted(NAMES).index(t) for t in r["ner_tags"]]} for r in ROWS]
    data = data_of(files.save(tmp_path / "saved", features, train=rows), bert)
    assert data.label_names == ["B-LOC", "B-PER", "I-PER", "O"]
    assert data.encoded_rows("train")[0]["labels"] == [-100, 1, 2, 3, 0, -100, -100]
    with pytest.raises(LoRAError):
        data_of(tmp_path / "saved", bert, label_names=NAMES)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [  # remarks stand above a sentence, a # in it is a word; words alone; tabs part fields where there are any
        ("# id 7 domain=en\nAnn _ _ B-PER\n# _ _ O\n\n# text = Lee x\nLee _ _ B-PER\n", [["Ann", "#"], ["Lee"]]),
        ("Lee\nsaw\n\nAnn\n", [["Lee", "saw"], ["Ann"]]),
        ("New York\tB-LOC\tx\r\nis\tO\ty\r\n", [["New York", "is"]]),
    ],
)
def test_rows_to_predict_keep_the_words_of_a_file(text, sentences, tmp_path, bert):
    (tmp_path / "x.conll").write_text(text)
    batch = next(iter(data_of({"predict": tmp_path / "x.conll"}, bert, label_names=NAMES).predict_dataloader()))
    assert batch["words"] == sentences
    assert batch["word_ids"].max(1).values.tolist() == [len(words) - 1 for words in sentences]


def test_the_tag_may_be_any_field(tmp_path, bert):
    (tmp_path / "x.iob").write_text("New York\tB-LOC\tx\r\nis\tO\ty\r\n")
    assert data_of(tmp_path / "x.iob", bert, tag_field=1).label_names == ["O", "B-LOC"]
    with pytest.raises(LoRAError, match="has 3 fields a line: the tag cannot be field 3"):
        data_of(tmp_path / "x.iob", bert, tag_field=3)


def test_words_that_no_metric_will_see_are_said(tmp_path, bert):
    paths = {split: write(tmp_path / f"{split}.jsonl", ROWS) for split in ("train", "validation")}
    with pytest.warns(UserWarning, match=r"validation.jsonl.*: 3 of 9 words are cut off by max_length=4 .* no metric"):
        data_of(paths, bert, max_length=4)
    rows = [{"tokens": ["Ann", "\u200b", "Lee"], "ner_tags": ["B-PER", "O", "I-PER"]}]
    with pytest.warns(UserWarning, match="1 of 3 words"):
        row = data_of(write(tmp_path / "train.jsonl", rows), bert).encoded_rows("train")[0]
    assert row["word_ids"] == [-1, 0, 2, -1], "the others stay in line"


def test_byte_level_tokenizers_see_words_as_in_running_text(tmp_path):
    """RoBERTa's and GPT-2's put a blank before each word, the first one too."""
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", "Ġ", "A", "n", "o", "ĠA"])}
    RobertaTokenizer(vocab=vocabulary, merges=[("Ġ", "A")]).save_pretrained(tmp_path / "roberta")
    rows = [{"tokens": ["An", "Ao", "on"], "ner_tags": ["B-PER", "I-PER", "O"]}]
    data = data_of(write(tmp_path / "train.jsonl", rows), str(tmp_path / "roberta"))
    row = data.encoded_rows("train")[0]
    tokens = data.tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert tokens == ["<s>", "ĠA", "n", "ĠA", "o", "Ġ", "o", "n", "</s>"]
    assert row["word_ids"] == [-1, 0, -1, 1, -1, 2, -1, -1, -1]
