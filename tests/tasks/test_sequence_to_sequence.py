"""Losses against transformers' own; texts and token means are the same whatever the batches and their padding."""

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from lora_lightning import LoRAConfig, inject
from lora_lightning.data.seq2seq import PromptCompletionData, SequenceToSequenceData
from lora_lightning.tasks.generation import SequenceToSequence, TextGeneration, generate_texts, generation_config
from tests.data.files import ALL, ready, write
from tests.factories import move
from tests.tiny_text import make_model, make_tokenizer, restaurants

KINDS = ["t5", "bart", "gpt2"]
BEAMS = {"num_beams": 3, "max_new_tokens": 6, "length_penalty": 0.8, "no_repeat_ngram_size": 4}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def data(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)
    make_tokenizer(folder, ends=kind != "gpt2")
    rows = restaurants(12)
    rows[3]["context"] = "name : Zizzi"  # of another length than the others
    rows[7]["completion"] = "a place ."
    path = write(folder / "rows.jsonl", rows)
    cls, columns = SequenceToSequenceData, {"source_column": "context", "target_column": "completion"}
    if kind == "gpt2":
        cls, columns = PromptCompletionData, {"prompt": "{context} </s>", "completion": "{completion}"}
    return ready(cls, {"train": path, "test": path}, folder, split=ALL, length_grouped=False, **columns)


def model_of(kind):
    """Adapted, with B not zero, so that texts are not those of the backbone."""
    model = make_model(kind)
    inject(model, LoRAConfig(r=2))
    return move(model, 1.0).double().eval()


def task_of(kind, data, **kwargs):
    made = TextGeneration if kind == "gpt2" else SequenceToSequence
    return made(data.tokenizer, **({"generation": BEAMS} | kwargs))


def batch_of(data, rows, split="test"):
    return data.collate([data.encoded_rows(split)[i] for i in rows])


def test_loss_is_transformers_own(kind, data):
    model, batch = model_of(kind), batch_of(data, range(12), "train")
    out = task_of(kind, data).step(model, batch)
    trained = (batch["labels"][:, 1:] if kind == "gpt2" else batch["labels"]) != -100
    assert out.weight == int(trained.sum())
    test = batch_of(data, range(3))
    del test["references"]  # a row's own target is the reference
    _, references = task_of(kind, data).evaluate(model, test).updates["bleu"]
    assert references == [[t] for t in data.tables["test"]["completion"][:3]]
    # Causal models take their logits to float32 first.
    assert float(out.loss) == pytest.approx(float(model(**batch).loss), rel=1e-6 if kind == "gpt2" else 1e-12)


def test_smoothing_is_for_training_alone(kind, data):
    model, batch = model_of(kind), batch_of(data, range(4), "train")
    plain, smooth = task_of(kind, data), task_of(kind, data, label_smoothing=0.1, generate_in_validation=False)
    smooth.reset("val")
    logits, labels = model(**batch).logits, batch["labels"]
    if kind == "gpt2":
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(smooth.step(model, batch).loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(smooth.evaluate(model, batch).loss, plain.step(model, batch).loss)


@pytest.mark.parametrize("options", [BEAMS, {"max_new_tokens": 6}], ids=["beams", "greedy"])
def test_figures_do_not_depend_on_batches_or_padding(kind, data, options):
    model = model_of(kind)
    found = {}
    for size in (1, 3, 8):
        task = task_of(kind, data, generation=options, metrics=["bleu", "chrf", "rouge1", "exact_match"])
        task.reset("test")
        texts = []
        for rows in torch.arange(8).split(size):
            out = task.evaluate(model, batch_of(data, rows.tolist()))
            texts += out.updates.get("bleu", [[]])[0]
            logged = task.update("test", out)
        found[size] = texts, {name: float(metric.compute()) for name, metric in logged.items()}
    logged = {"loss", "token_accuracy", "bleu", "chrf", "rouge1", "exact_match"}
    assert set(found[1][1]) == {f"test/{name}" for name in logged}
    assert any(found[1][0]), "a model that writes nothing would prove nothing"
    texts = task.predict(model, batch_of(data, range(4)))["prediction"]
    for row in range(4):  # transformers' own, of one row alone
        ids = task.sources(batch_of(data, [row]))["input_ids"]
        alone = model.generate(input_ids=ids, **options, do_sample=False)[0][ids.shape[1] if kind == "gpt2" else 0 :]
        assert texts[row] == data.tokenizer.decode(alone, skip_special_tokens=True).strip()
    for size in (3, 8):
        assert found[size][0] == found[1][0]
        assert found[size][1] == pytest.approx(found[1][1], rel=1e-6)


def test_training_and_a_validation_that_does_not_write_log_no_text_metrics(kind, data):
    model, batch = model_of(kind), batch_of(data, range(4))
    task = task_of(kind, data, generate_in_validation=False)
    assert (task.monitor, task.monitor_mode) == ("val/loss", "min")
    task.reset("val")
    assert set(task.update("train", task.step(model, batch))) == {"train/loss", "train/token_accuracy"}
    assert set(task.update("val", task.evaluate(model, batch))) == {"val/loss", "val/token_accuracy"}
    task.add_stage("test_unseen")
    for stage in task.stages("test"):
        task.reset(stage)
    assert "test_unseen/bleu" in task.update("test_unseen", task.evaluate(model, batch))
    assert int(task.metrics["test_"]["exact_match"].weight) == 0, "a further set is counted apart"
    ter = task_of(kind, data, metrics=["ter", "bleu"])
    assert (ter.monitor, ter.monitor_mode) == ("val/ter", "min")


def test_a_chat_models_own_sampling_is_switched_off(tmp_path):
    tokenizer, own = make_tokenizer(tmp_path, ends=False), make_model("gpt2").generation_config
    own.update(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[5])
    config = generation_config(own, tokenizer, {"num_beams": 2})
    assert (config.do_sample, config.temperature, config.top_p, config.num_beams) == (False, None, None, 2)
    assert config.eos_token_id == [5, 1], "the tokenizer's end ends a text too"
    assert config.max_new_tokens == 64
    assert own.do_sample, "the model's own config stays"
    sampled = generation_config(own, tokenizer, {"do_sample": True, "max_new_tokens": 3})
    assert (sampled.temperature, sampled.max_new_tokens) == (0.6, 3)


def test_a_text_may_say_what_its_prompt_says_but_not_twice(tmp_path):
    """A model that always goes on with the next number, over a prompt that has counted already."""
    tokenizer = make_tokenizer(tmp_path, ends=False)
    model = make_model("gpt2").eval()

    def count(input_ids, **kwargs):
        logits = torch.zeros(*input_ids.shape, model.config.vocab_size)
        return CausalLMOutput(logits=logits.scatter(-1, (3 + (input_ids - 2) % 4).unsqueeze(-1), 9.0))

    model.forward = count
    prompt = torch.tensor([[3, 4, 5, 6, 3, 4]])
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    options = {"max_new_tokens": 8, "use_cache": False}
    free = generate_texts(model, inputs, tokenizer, options)[0].split()
    assert free == tokenizer.decode([5, 6, 3, 4, 5, 6, 3, 4]).split()
    once = generate_texts(model, inputs, tokenizer, {**options, "no_repeat_ngram_size": 3})[0].split()
    assert once[:6] == free[:6], "what the prompt holds may be said"
    assert once[6] != free[6], "what the text holds may not be said again"
