"""A config of version 0.1 still means something: its names are there, or one line says what to take.

What is listed here is what 0.1 had, and stays as it is.
"""

import inspect
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

ARGUMENTS = """
huggingface: pretrained_model_name_or_path auto_class num_labels label_names pad_token_id dtype attn_implementation
  revision random_weights on_meta model_kwargs
ChatData: path tokenizer columns train_on system chat_template template_options max_length packing with_prompts
  batch_size name split eval_batch_size length_grouped num_workers num_proc seed
DatasetData: train validation test predict batch_size eval_batch_size collate_fn num_workers shuffle
  stream_shares_itself pin_memory drop_last seed
hub_dataset: path split name columns transform streaming shuffle_buffer seed revision
ImageTextData: path processor image_column text_column group_column image_root max_length padding name split
  batch_size eval_batch_size num_workers seed
ImageData: path image_column label_column label_names image_root reader preprocessing image_size mean std
  interpolation crop_share augment drop_duplicates max_train_rows verify name split batch_size eval_batch_size
  num_workers seed
LanguageModellingData: path tokenizer text_column text_by max_length packing end_of_text streaming shuffle_buffer
  name split batch_size eval_batch_size length_grouped num_workers num_proc seed
PairData: path tokenizer anchor_column positive_column negative_column group_column anchor_prefix positive_prefix
  max_length name split batch_size eval_batch_size length_grouped num_workers num_proc seed
PreferenceData: path tokenizer prompt_column chosen_column rejected_column as_chat max_length max_prompt_length
  batch_size name split eval_batch_size length_grouped num_workers num_proc seed
PromptCompletionData: path tokenizer prompt completion max_length name split batch_size eval_batch_size
  length_grouped num_workers num_proc seed
SegmentationData: path image_column mask_column image_folder mask_folder label_names num_classes ignore_index
  reduce_labels image_root preprocessing image_size mean std interpolation augment max_train_rows verify name split
  batch_size eval_batch_size num_workers seed
SequenceToSequenceData: path tokenizer source_column target_column prefix max_length max_target_length source_lang
  target_lang name split batch_size eval_batch_size length_grouped num_workers num_proc seed
TextClassificationData: path tokenizer text_column text_pair_column label_column label_names drop_labels
  drop_duplicates min_words max_length name split batch_size eval_batch_size length_grouped num_workers num_proc
  seed
MultiLabelTextData: path tokenizer text_column text_pair_column label_column separator label_columns label_names
  max_length name split batch_size eval_batch_size length_grouped num_workers num_proc seed
TextRegressionData: path tokenizer text_column text_pair_column number_column max_length name split batch_size
  eval_batch_size length_grouped num_workers num_proc seed
TokenClassificationData: path tokenizer words_column tags_column tag_field label_names label_all_pieces max_length
  name split batch_size eval_batch_size length_grouped num_workers num_proc seed
LoRAConfig: r alpha dropout target_modules exclude_modules layers_to_transform modules_to_save slices
  target_parameters trainable_token_indices rank_pattern alpha_pattern dropout_pattern use_rslora use_dora bias
  lora_bias init
CausalLM: label_smoothing
ContrastiveEmbedding: temperature pooling symmetric normalize gather
ImageClassification: num_classes label_smoothing metrics
ImageSegmentation: num_classes ignore_index
MultiLabelClassification: num_classes threshold over_labels
PreferenceTuning: loss beta label_smoothing gamma rpo_alpha
SequenceClassification: num_classes label_smoothing metrics
SequenceToSequence: tokenizer generation metrics label_smoothing generate_in_validation
Supervised: loss metrics target inputs output prediction monitor monitor_mode
TextGeneration: tokenizer generation metrics label_smoothing generate_in_validation
TokenClassification: label_names entities strict label_smoothing
Checkpoints: save_every monitor mode dirpath exit_code
ExportAtEnd: formats output_dir dtype max_shard_size serving
FreezeBase: show_table proves_at
Progress: refresh_rate leave theme console_kwargs
RankTelemetry: every_n_steps amplification
Samples: count max_new_tokens
Tracking: predictions artifacts
WandbLogger: offline
LoRAModule: backbone task lora optimizer lr_scheduler lr_interval b_lr_ratio backbone_mode allow_other_base
  prepare_weights recompute_inputs init_adapter activation_checkpointing offload_activations compile
WarmupDecay: optimizer warmup decay total_steps
FSDP2Strategy: data_parallel_size tensor_parallel_size tensor_parallel_plan save_distributed_checkpoint
  reshard_after_forward cpu_offload blocks process_group_backend timeout
timm_model: model_name pretrained num_classes checkpoint_path model_kwargs
torchvision_model: model_name weights num_classes checkpoint_path model_kwargs
"""

CONFIGS = """
.: debug demo-lm demo-vision-dinov2 demo-vision demo
embedding: clip-image-text e5-pairs minilm-pairs
glue: base
glue/roberta-base: cola mnli mrpc qnli qqp rte sst2 stsb
glue/roberta-large: cola mnli mrpc qnli qqp rte sst2 stsb
glue/tasks: cola mnli mrpc qnli qqp rte sst2 stsb
gpt2: base dart e2e large medium webnlg
lm: base qlora texts
lm/data: alpaca dolly own-jsonl ultrachat
lm/models: gemma-3-1b llama-3.1-8b llama-3.2-1b mistral-7b qwen3-4b
logger: wandb
precision: 16-mixed bf16-base bf16-mixed float32 nf4-base
preference: smollm2-dpo zephyr-7b-dpo
strategy: ddp-fork ddp deepspeed-zero2 deepspeed-zero3 fsdp1 fsdp2-folder fsdp2-tp fsdp2 multi-node single
sweeps: bayes matrices rank
vision: base convnext-folder resnet-folder segformer-folder vit-b16-folder
"""

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


def takes(name):
    """The arguments of a class, with those that go on to its base."""
    found = getattr(lora_lightning, name)
    taken = []
    for one in inspect.getmro(found) if inspect.isclass(found) else [found]:
        if not inspect.isclass(one) or "__init__" in vars(one):
            parameters = inspect.signature(one).parameters.values()
            taken += [parameter.name for parameter in parameters]
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                break
    return taken


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


@pytest.mark.parametrize(("name", "argument"), listed(ARGUMENTS))
def test_an_argument_is_taken_or_says_what_to_take(name, argument):
    assert argument in takes(name) or argument in REMOVED


@pytest.mark.parametrize("file", [f"{folder}/{name}.yaml" for folder, name in listed(CONFIGS)])
def test_a_config_is_there_or_says_what_to_take(file, monkeypatch, capsys):
    if file not in GONE:
        assert (REPOSITORY / "configs" / file).is_file()
        return
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
