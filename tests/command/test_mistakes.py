"""A mistake ends in one line that says what to do, and never in a traceback."""

import pytest

from lora_lightning.__main__ import main
from tests.command.process import run
from tests.tiny import make_bert

MISTAKES = {
    "a mistyped target": (
        ["fit", "--config", "{config}", "--model.lora.target_modules", "[qurey, value]"],
        "target_modules: no module matches 'qurey'; did you mean 'query'?",
    ),
    "a target as a bare word": (
        ["fit", "--config", "{config}", "--model.lora.target_modules", "query"],
        "for modules that end in it write [query]",
    ),
    "a head that is not there": (
        ["fit", "--config", "{config}", "--model.lora.modules_to_save", "[clasifier]"],
        "modules_to_save: no module matches 'clasifier'; did you mean 'classifier'",
    ),
    "a rank of zero": (
        ["fit", "--config", "{config}", "--model.lora.r", "0"],
        "r must be a whole number of at least 1",
    ),
    "a rank larger than the layer": (
        ["fit", "--config", "{config}", "--model.lora.r", "64"],
        "is larger than the layer 'bert.encoder.layer.0.attention.self.query' allows (32",
    ),
    "an unknown key": (["fit", "--config", "{config}", "--model.lora.alpa", "3"], "model.lora.alpa"),
    "a flag cut short": (["fit", "--config", "{config}", "--model.lora.rank", "4"], "model.lora.rank"),
    "an unknown flag": (["fit", "--config", "{config}", "--runs_dri", "x"], "did you mean '--runs_dir'"),
    "a config that is not there": (["fit", "--config", "none.yaml"], "none.yaml"),
    "a column that is not there": (
        ["fit", "--config", "{config}", "--data.init_args.text_column", "txt"],
        "no column 'txt'; did you mean 'text'?",
    ),
    "a model that is not there": (
        ["fit", "--config", "{config}", "--model.backbone.init_args.pretrained_model_name_or_path", "./nowhere"],
        "no model './nowhere'",
    ),
    "from_pretrained as a class path": (
        ["fit", "--config", "{config}", "--model.backbone", "transformers.AutoModelForMaskedLM.from_pretrained"],
        "write class_path: lora_lightning.huggingface, and the class as init_args.auto_class",
    ),
    "a checkpoint that is not there": (
        ["test", "--config", "{config}", "--ckpt_path", "runs/x"],
        "no checkpoint or run",
    ),
    "a test of nothing": (["test", "--config", "{config}"], "test needs --ckpt_path: best, last, a run folder or"),
    "a precision that is not there": (
        ["fit", "--config", "{config}", "--trainer.precision", "bf16-mix"],
        "got bf16-mix; did you mean 'bf16-mixed'",
    ),
    "a device that is not there": (["fit", "--config", "{config}", "--trainer.accelerator", "gpu"], "No supported gpu"),
    "best before any fit": (["export", "--config", "{config}", "--ckpt_path", "best"], "no checkpoint or run folder"),
    "a format that is not there": (
        ["export", "--ckpt_path", "{run}", "--formats", "merge"],
        "unknown export format 'merge'; did you mean 'merged'",
    ),
    "a format for the end of a fit that is not there": (
        ["fit", "--config", "{config}", "--trainer.callbacks+=ExportAtEnd", "--trainer.callbacks.formats", "merge"],
        "error: unknown export format 'merge'; did you mean 'merged'? (known: adapter, merged, onnx)",
    ),
    "a server without an adapter": (
        ["export", "--ckpt_path", "{run}", "--formats", "merged", "--serving", "vllm"],
        "is a form of the adapter, got the formats merged: add adapter to them",
    ),
    "a dtype that is not there": (
        ["export", "--ckpt_path", "{run}", "--dtype", "bf16"],
        "expected auto, float32, bfloat16, float16, got bf16; did you mean 'bfloat16'",
    ),
    "no data to train on": (
        ["fit", "--config", "{config}", "--data", "null", "--model.task.init_args.num_classes", "2"],
        "fit needs a data section in its config",
    ),
    "another base than the checkpoint's": (
        ["export", "--ckpt_path", "{run}", "--model.backbone.init_args.pretrained_model_name_or_path", "{other}"],
        "tensors differ, first bert.embeddings.word_embeddings.weight",
    ),
    "other settings than the checkpoint's": (
        ["export", "--config", "{config}", "--ckpt_path", "{run}", "--model.lora.r", "2"],
        "the checkpoint was trained with lora.",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, tiny, trained, monkeypatch, capsys, tmp_path):
    args, said = MISTAKES[name]
    if "{other}" in args:
        make_bert(tmp_path / "other", seed=1)
    filled = [arg.format(config=tiny.config, run=trained, other=tmp_path / "other") for arg in args]
    monkeypatch.setattr("sys.argv", ["lora-lightning", *filled])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if line.startswith("lora-lightning: error: ")]
    assert len(lines) == 1, shown
    assert said in lines[0]


def test_a_mistyped_target_in_a_users_shell(tiny, tmp_path):
    done = run("fit", "--config", tiny.config, "--model.lora.target_modules", "[qurey]", cwd=tmp_path, ok=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "lora-lightning: error: target_modules: no module matches 'qurey'; did you mean 'query'?"
    )
    assert not (tmp_path / "runs").exists(), "a mistake leaves no run behind"
