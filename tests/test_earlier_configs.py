"""A config of version 0.1 still means something: its names are there, or one line says what to take.

What is listed here is what 0.1 had, and stays as it is.
"""

import re
import textwrap

import pytest

import lora_lightning
from lora_lightning.__main__ import main
from lora_lightning.cli.diagnostics import wrong_path
from lora_lightning.lora.errors import REMOVED
from tests.command.process import REPOSITORY

CLASSES = """
backbones: huggingface
cli: LoRACLI
data.chat: ChatData
data.dataset: DatasetData hub_dataset
data.image_texts: ImageTextData
data.images: ImageData
data.language_modelling: LanguageModellingData
data.loader: ResumableLoader
data.pairs: PairData
data.preference: PreferenceData
data.prompt_completion: PromptCompletionData
data.segmentation: SegmentationData
data.sequence_to_sequence: SequenceToSequenceData
data.text_classification: TextClassificationData
data.text_labels: MultiLabelTextData
data.text_regression: TextRegressionData
data.token_classification: TokenClassificationData
demos.animals: read_animals
demos.dinov2: dinov2_small
demos.efficientnet: efficientnet_lite0
disk_merge: merge_on_disk
lora.bank: AdapterBank
lora.config: LoRAConfig
lora.errors: AdapterWarning LoRAError
lora.fill: fill_from_files
lora.formats: load_adapter save_adapter
lora.inject: disabled inject remove
lora.loralib: load_loralib
lora.merge: merge
lora.meta_build: on_meta
lora.switches: prepare_weights recompute_inputs
tasks.causal_lm: CausalLM
tasks.contrastive: ContrastiveEmbedding
tasks.image_classification: ImageClassification
tasks.image_segmentation: ImageSegmentation
tasks.multi_label: MultiLabelClassification
tasks.preference: PreferenceTuning
tasks.sequence_classification: SequenceClassification
tasks.sequence_regression: SequenceRegression
tasks.sequence_to_sequence: SequenceToSequence
tasks.supervised: Supervised
tasks.text_generation: TextGeneration
tasks.token_classification: TokenClassification
training.callbacks.baselines: Baselines
training.callbacks.before: MeasureBefore
training.callbacks.checkpoints: Checkpoints
training.callbacks.export: ExportAtEnd
training.callbacks.finite: StopOnNonFinite
training.callbacks.freeze: FreezeBase
training.callbacks.progress: Progress
training.callbacks.rank_telemetry: RankTelemetry
training.callbacks.resume: Resume
training.callbacks.run_report: RunReport
training.callbacks.samples: Samples
training.callbacks.step_figures: StepFigures
training.callbacks.throughput: Throughput
training.callbacks.tracking: Tracking
training.fsdp1_strategy: FSDP1Strategy
training.loggers: WandbLogger
training.module: LoRAModule
training.optim: WarmupDecay
training.precision: HalfBase
training.strategies: FSDP2Strategy
training.trainer: LoRATrainer
training.zero2_strategy: ZeRO2Strategy
training.zero3_strategy: ZeRO3Strategy
vision_backbones: timm_model torchvision_model
"""
"""Public classes and functions, by the modules in which they were: a config might name them by either."""

GONE = {
    "strategy/deepspeed-zero2.yaml": "take configs/strategy/fsdp2.yaml",
    "strategy/deepspeed-zero3.yaml": "take configs/strategy/fsdp2.yaml",
    "strategy/fsdp1.yaml": "take configs/strategy/fsdp2.yaml",
    "strategy/fsdp2-folder.yaml": "take configs/strategy/fsdp2.yaml",
    "strategy/fsdp2-tp.yaml": "take configs/strategy/fsdp2.yaml",
}
"""Configs that are not there any more, with what the line says of each."""


def listed(text):
    """Pairs of what stands before a colon and each word after it."""
    lines = re.sub(r"\n  ", " ", text).strip().splitlines()
    return [(before, word) for before, _, words in (line.partition(": ") for line in lines) for word in words.split()]


def answer(monkeypatch, capsys, *args):
    """The line that a command ends with, and that it ends with 2."""
    monkeypatch.setattr("sys.argv", ["lora-lightning", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


@pytest.mark.parametrize("name", [name for _, name in listed(CLASSES)])
def test_a_public_name_is_there_or_says_what_to_take(name):
    gone = {**REMOVED, **lora_lightning.GONE}.get(name)
    said = wrong_path(f"lora_lightning.{name}")
    assert said == (None if gone is None else f"'lora_lightning.{name}': {gone}")


@pytest.mark.parametrize("path", [f"lora_lightning.{module}.{name}" for module, name in listed(CLASSES)])
def test_a_name_by_its_former_module_is_there_or_says_the_name_to_take(path):
    said, name = wrong_path(path), path.rpartition(".")[2]
    gone = {**REMOVED, **lora_lightning.GONE}.get(name)
    assert said is None or said.endswith(f": {gone}" if gone else f": take 'lora_lightning.{name}'")


@pytest.mark.parametrize("file", GONE)
def test_a_config_that_is_gone_says_what_to_take(file, monkeypatch, capsys):
    assert not (REPOSITORY / "configs" / file).exists()
    assert GONE[file] in answer(monkeypatch, capsys, "fit", "-c", f"configs/{file}")


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        (
            "trainer: {strategy: {class_path: lora_lightning.FSDP2Strategy, init_args: {tensor_parallel_size: 2}}}",
            "over.yaml, line 1: lora_lightning.FSDP2Strategy takes no 'tensor_parallel_size' any more: leave it out",
        ),
        (
            "trainer: {strategy: {class_path: lora_lightning.ZeRO3Strategy}}",
            "over.yaml, line 1: trainer.strategy: 'lora_lightning.ZeRO3Strategy': it is gone, since it saved nothing",
        ),
        (
            """
            model:
              task: {class_path: lora_lightning.tasks.sequence_classification.SequenceClassification}
            """,
            "over.yaml, line 2: model.task: there is no 'lora_lightning.tasks.sequence_classification': take"
            " 'lora_lightning.SequenceClassification'",
        ),
    ],
)
def test_a_copy_of_an_earlier_config_is_answered_with_file_and_line(overlay, said, tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "over.yaml").write_text(textwrap.dedent(overlay).lstrip())
    assert said in answer(monkeypatch, capsys, "fit", "-c", tiny.config, "-c", "over.yaml")
