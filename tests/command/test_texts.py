"""Fit, validate, test, predict and export through the command: a tagger, sequence to sequence, prompt to completion."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PeftModel

from lora_lightning.cli.main import LoRACLI
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.tiny_text import make_model, make_tagger, restaurants, sentences, write_rows

RUN = """
name: texts
seed_everything: 1
trainer: {{max_epochs: 2, accelerator: cpu, enable_progress_bar: false}}
model:
  backbone:
    class_path: lora_lightning.huggingface
    init_args: {{pretrained_model_name_or_path: {model}, auto_class: {auto_class}}}
  lora: {lora}
  task: {{class_path: lora_lightning.tasks.{task}}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.02}}}}
data:
  class_path: lora_lightning.data.{data}
  init_args:
    path: {{train: {train}, validation: {held_out}, test: {held_out}, predict: {predict}}}
    tokenizer: {model}
    batch_size: 8
{columns}
"""


WRITES = "{generation: {max_new_tokens: 8, num_beams: 2}}"


def tagger(folder):
    make_tagger(folder / "model")
    rows = sentences(48)
    return (
        {
            "auto_class": "AutoModelForTokenClassification",
            "task": "token_classification.TokenClassification",
            "data": "token_classification.TokenClassificationData",
            "lora": "{r: 4, modules_to_save: [classifier]}",
            "columns": "",
        },
        rows,
        "tokens",
    )


def pairs(folder):
    make_model("t5", folder / "model")
    return (
        {
            "auto_class": "AutoModelForSeq2SeqLM",
            "task": f"sequence_to_sequence.SequenceToSequence, init_args: {WRITES}",
            "data": "sequence_to_sequence.SequenceToSequenceData",
            "lora": "{r: 4}",
            "columns": "    source_column: context\n    target_column: completion",
        },
        restaurants(48),
        "context",
    )


def prompts(folder):
    make_model("gpt2", folder / "model")
    return (
        {
            "auto_class": "AutoModelForCausalLM",
            "task": f"text_generation.TextGeneration, init_args: {WRITES}",
            "data": "prompt_completion.PromptCompletionData",
            "lora": "{r: 4, target_modules: [c_attn], slices: {c_attn: [q, v]}}",
            "columns": '    prompt: "{context} </s>"',
        },
        restaurants(48),
        "context",
    )


KINDS = {"tagger": tagger, "pairs": pairs, "prompts": prompts}


@pytest.fixture(
    scope="module", params=["tagger", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("pairs", "prompts"))]
)
def fitted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    filled, rows, source = KINDS[request.param](folder)
    files = {
        "train": write_rows(folder / "train.jsonl", rows[:32]),
        "held_out": write_rows(folder / "held_out.jsonl", rows[32:]),
        "predict": write_rows(folder / "predict.jsonl", [{source: row[source]} for row in rows[32:]]),
    }
    config = folder / "run.yaml"
    config.write_text(RUN.format(model=folder / "model", **filled, **files))
    cli = LoRACLI(args=["fit", "--config", str(config), "--runs_dir", str(folder / "runs")])
    run = folder / "runs" / "texts" / "version_0"
    return SimpleNamespace(kind=request.param, folder=folder, run=run, cli=cli, rows=rows[32:], filled=filled)


def again(fitted, command, *args):
    return LoRACLI(args=[command, "--ckpt_path", str(fitted.run), *args])


def test_fit_keeps_the_checkpoint_that_is_best_by_the_tasks_metric(fitted):
    monitor = fitted.cli.model.task.monitor
    assert monitor == ("val/f1" if fitted.kind == "tagger" else "val/bleu")
    assert monitor in fitted.cli.trainer.callback_metrics
    assert fitted.cli.trainer.checkpoint_callback.monitor == monitor
    assert load_checkpoint(fitted.run / "checkpoints" / "best.ckpt")


def test_validate_and_test_give_one_set_of_figures(fitted):
    """Validation and test hold the same rows here."""
    val = again(fitted, "validate").trainer.callback_metrics
    test = again(fitted, "test").trainer.callback_metrics
    assert {name.removeprefix("val/") for name in val} == {name.removeprefix("test/") for name in test}
    for name, value in val.items():
        assert float(value) == pytest.approx(float(test[name.replace("val/", "test/")])), name


def test_predict_writes_a_line_for_each_row(fitted):
    again(fitted, "predict")
    file = next(fitted.run.rglob("predictions.jsonl"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(16))
    for line, row in zip(lines, fitted.rows, strict=True):
        if fitted.kind == "tagger":
            assert line["words"] == row["tokens"]
            assert len(line["labels"]) == len(row["tokens"])
            for entity in line["entities"]:
                assert entity["text"] == " ".join(row["tokens"][entity["start"] : entity["end"]])
        else:
            assert isinstance(line["prediction"], str)


def test_export_says_peft_what_the_task_is_and_the_merged_model_runs(fitted):
    again(fitted, "export", "--output_dir", str(fitted.folder / "out"))
    said = json.loads(next((fitted.folder / "out").rglob("adapter_config.json")).read_text())
    expected = {"tagger": "TOKEN_CLS", "pairs": "SEQ_2_SEQ_LM", "prompts": "CAUSAL_LM"}
    assert said["task_type"] == expected[fitted.kind]
    auto = getattr(transformers, fitted.filled["auto_class"])
    merged = auto.from_pretrained(fitted.folder / "out" / "merged").eval()
    options = {"num_labels": merged.config.num_labels} if fitted.kind == "tagger" else {}
    by_peft = PeftModel.from_pretrained(
        auto.from_pretrained(fitted.folder / "model", **options), fitted.folder / "out" / "adapter"
    ).eval()
    ids = {"input_ids": torch.tensor([[3, 7, 5, 1]])}
    if fitted.kind == "pairs":
        ids["decoder_input_ids"] = torch.tensor([[0, 4]])
    with torch.no_grad():
        torch.testing.assert_close(merged(**ids).logits, by_peft(**ids).logits, rtol=1e-4, atol=1e-5)
    if fitted.kind == "tagger":
        assert merged.config.id2label == {0: "O", 1: "B-AREA", 2: "B-FOOD", 3: "B-NAME", 4: "I-NAME"}
