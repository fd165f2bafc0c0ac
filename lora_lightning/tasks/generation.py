"""Generation of texts, tasks that train on target tokens and compare generated texts, and the metrics of texts."""

from __future__ import annotations

import copy
import importlib.util
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import CHRFScore, SacreBLEUScore, TranslationEditRate
from transformers import GenerationConfig, LogitsProcessorList, NoRepeatNGramLogitsProcessor, PreTrainedTokenizerBase

from lora_lightning.lora.errors import LoRAError, did_you_mean, refuse_unknown
from lora_lightning.tasks.base import Stage, StepOutput, inputs_of, labels_of
from lora_lightning.tasks.language_model import TokenTask
from lora_lightning.tasks.losses.linear_cross_entropy import IGNORED, LinearCrossEntropy
from lora_lightning.tasks.losses.lm_head import aligned_loss, shifted_loss
from lora_lightning.tasks.positions import refuse_long_text

MAX_NEW_TOKENS = 64
"""Used where neither the task nor the model's generation config limits the length."""
OURS = frozenset({"num_return_sequences", "return_dict_in_generate", "transformers_version"})
"""Settings of a generation config that would change the form of the result."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h")
"""Settings without effect unless sampling; the configs of chat models have them."""


def check_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of `generate` by `GenerationConfig`'s names; one unknown, or of another form of result, is refused."""
    plain = vars(GenerationConfig())  # type: ignore[no-untyped-call]
    known = sorted(name for name in plain if not name.startswith("_") and name not in OURS)
    for name in options or {}:
        if name not in known:
            raise LoRAError(f"generation has no option '{name}'{did_you_mean(name, known)} (see GenerationConfig)")
    return dict(options or {})


@torch.no_grad()
def generate_texts(
    backbone: nn.Module, inputs: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> list[str]:
    """The generated text of each row, without special tokens and blanks at both ends.

    Args:
        backbone: encoder-decoder or decoder-only, with transformers' `generate`.
        inputs: `input_ids` (b, t) and `attention_mask`. For a decoder-only model they are prompts, padded on the left.
        options: settings of `GenerationConfig`, which override the model's. Without `do_sample: true` decoding does not
            sample, whatever the model's config says. `no_repeat_ngram_size` applies to the text alone, which may repeat
            the prompt; transformers would forbid that to a decoder-only model.
    """
    if not callable(getattr(backbone, "generate", None)) or not hasattr(backbone, "generation_config"):
        raise LoRAError(
            f"{type(backbone).__name__} has no `generate`: to write texts the backbone must be a transformers model"
            " with a language-model head, such as lora_lightning.huggingface with auto_class: AutoModelForCausalLM or"
            " AutoModelForSeq2SeqLM"
        )
    config = generation_config(backbone.generation_config, tokenizer, options)
    after = 0 if backbone.config.is_encoder_decoder else inputs["input_ids"].shape[1]  # type: ignore[union-attr]
    mask = inputs.get("attention_mask")
    refuse_long_text(backbone, int(mask.sum(1).max()) if after and mask is not None else after, after, config)
    processors = LogitsProcessorList()
    if after and config.no_repeat_ngram_size:
        processors.append(NoRepeatInText(config.no_repeat_ngram_size, after))
        config.no_repeat_ngram_size = None
    written = backbone.generate(**inputs, generation_config=config, logits_processor=processors)  # type: ignore[operator]
    written = written[:, after:]
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


class NoRepeatInText(NoRepeatNGramLogitsProcessor):
    """Forbids a repeated n-gram in the text behind a prompt, as fairseq and the LoRA paper's GPT-2 runs do.

    Args:
        size: n.
        after: number of tokens of the prompt, which do not count.
    """

    def __init__(self, size: int, after: int) -> None:
        super().__init__(size)
        self.after = after

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return super().__call__(input_ids[:, self.after :], scores)


def generation_config(
    model_config: Any, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> GenerationConfig:
    """The model's config with the options, and with the tokenizer's tokens for end and padding."""
    config: GenerationConfig = copy.deepcopy(model_config)
    config.update(**{"do_sample": False, **options})  # type: ignore[no-untyped-call]
    if not config.do_sample:
        for name in SAMPLING:
            if name not in options:
                setattr(config, name, None)
    if "max_length" not in options:
        config.max_length = None
        config.max_new_tokens = config.max_new_tokens or MAX_NEW_TOKENS
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if "eos_token_id" not in options:
        config.eos_token_id = list(dict.fromkeys(i for i in (*ends, tokenizer.eos_token_id) if i is not None)) or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


METRICS = ("bleu", "rouge1", "rouge2", "rougeL", "exact_match")


class GeneratingTask(TokenTask):
    """Teacher-forced cross-entropy; in validation and test also generated texts, compared with their references.

    Args:
        tokenizer: decodes the texts. The data's by default.
        generation: options of transformers' `generate` by name, such as num_beams, max_new_tokens, length_penalty and
            no_repeat_ngram_size. By default greedy, of at most 64 tokens.
        metrics: some of bleu, chrf, ter, rouge1, rouge2, rougeL, rougeLsum and exact_match. The first chooses the best
            checkpoint.
        label_smoothing: share of the target spread over the vocabulary, in training alone.
        generate_in_validation: whether validation generates texts; if not, the best checkpoint has the smallest loss,
            and only test and predict generate.
    """

    not_inputs = ("labels", "references")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        generation: dict[str, Any] | None = None,
        metrics: Sequence[str] = METRICS,
        label_smoothing: float = 0.0,
        generate_in_validation: bool = True,
    ) -> None:
        super().__init__(label_smoothing, generation_metrics(metrics))
        self.written, self.tokenizer = tuple(metrics), tokenizer
        self.generation = check_options(generation)
        self.generate_in_validation = generate_in_validation
        self._stage: Stage = "test"
        if metrics and generate_in_validation:
            self.monitor = f"val/{metrics[0]}"
            self.monitor_mode = "min" if metrics[0] in LESS_IS_BETTER else "max"

    @abstractmethod
    def sources(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inputs of `generate`, a row for each of the batch's."""

    def evaluate(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """The loss over all targets without smoothing, and a generated text for each row with references.

        `references` has a list of texts for each row. Where a source has several targets, one of its rows has all of
        them and the others none, so that a text is generated once. Without the entry each row has its target.
        """
        out = super().evaluate(backbone, batch)
        if not self.writes(self._stage):
            return out
        references = batch.get("references") or [[text] for text in self._targets(batch["labels"])]
        rows = [i for i, texts in enumerate(references) if texts]
        if rows:
            sources = {key: value[rows] for key, value in self.sources(batch).items()}
            texts = generate_texts(backbone, sources, self.tokenizer, self.generation)
            out.updates |= dict.fromkeys(self.written, (texts, [list(references[i]) for i in rows]))
        return out

    @torch.no_grad()
    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The generated text of each row."""
        return {"prediction": generate_texts(backbone, self.sources(batch), self.tokenizer, self.generation)}

    def writes(self, stage: Stage) -> bool:
        """Whether this stage, `test` or `val` or a further set of them, generates texts."""
        kind = stage.partition("_")[0]
        return kind == "test" or (kind == "val" and self.generate_in_validation)

    def reset(self, stage: Stage) -> None:
        """Reset the stage's metrics, and remember the stage, which decides whether `evaluate` generates."""
        super().reset(stage)
        self._stage = stage

    def logged(self, stage: Stage) -> list[str]:
        """Names of a stage's metrics, without those of texts where it does not generate."""
        silent = set() if self.writes(stage) else {f"{stage}/{name}" for name in self.written}
        return [name for name in super().logged(stage) if name not in silent]

    def _targets(self, labels: Tensor) -> list[str]:
        ids = [[token for token in row if token != IGNORED] for row in labels.tolist()]
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


PROMPT = "prompt_"
"""Prefix of the names of inputs with prompts alone."""


class TextGeneration(GeneratingTask):
    """Cross-entropy of each token of the completion given the prompt and the tokens before; metrics of the texts."""

    peft_task_type = "CAUSAL_LM"

    def inputs(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in super().inputs(backbone, batch).items() if not k.startswith(PROMPT)}

    def token_loss(self, backbone: nn.Module, batch: Mapping[str, Any], label_smoothing: float) -> LinearCrossEntropy:
        """`batch` has the backbone's keyword arguments and `labels` (b, t), -100 on the prompt and on padding."""
        labels = labels_of(batch)
        return shifted_loss(backbone, self.inputs(backbone, batch), labels, label_smoothing=label_smoothing)

    def sources(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The prompts, `prompt_input_ids` and `prompt_attention_mask`, padded on the left."""
        prompts = {key.removeprefix(PROMPT): value for key, value in batch.items() if key.startswith(PROMPT)}
        if "input_ids" not in prompts:
            raise LoRAError(
                "to write texts, the batch needs prompt_input_ids and prompt_attention_mask, padded on the left; it has"
                f" {', '.join(batch)}"
            )
        return prompts


DECODER = ("decoder_input_ids", "decoder_attention_mask")


class SequenceToSequence(GeneratingTask):
    """Cross-entropy of each target token given the source and the target before it; BLEU, ROUGE and exact match."""

    peft_task_type = "SEQ_2_SEQ_LM"

    def inputs(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The encoder's inputs, and the decoder's: the labels shifted by the model, unless the batch has them."""
        inputs = super().inputs(backbone, batch)
        if "decoder_input_ids" not in inputs:
            shift = getattr(backbone, "prepare_decoder_input_ids_from_labels", None)
            if shift is None:
                raise LoRAError(
                    f"{type(backbone).__name__} does not say what its decoder starts from"
                    " (prepare_decoder_input_ids_from_labels): take a transformers model for sequence to sequence"
                    " (auto_class: AutoModelForSeq2SeqLM), or put decoder_input_ids into the batch"
                )
            inputs["decoder_input_ids"] = shift(labels=batch["labels"])
        return inputs

    def token_loss(self, backbone: nn.Module, batch: Mapping[str, Any], label_smoothing: float) -> LinearCrossEntropy:
        """`batch` has the encoder's inputs and `labels` (b, t), -100 where nothing is trained on."""
        labels = labels_of(batch)
        return aligned_loss(backbone, self.inputs(backbone, batch), labels, label_smoothing=label_smoothing)

    def sources(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return inputs_of(batch, *self.not_inputs, *DECODER)


class Rouge(MeanMetric):
    """The mean over texts of ROUGE's F measure with the nearest reference (Lin 2004, aclanthology.org/W04-1013).

    Words are lower-cased runs of a-z and 0-9, not stemmed, as in Google's `rouge_score`. The state is a sum and a count
    in place of torchmetrics' list of scores, so that the mean over processes is exact and cheap.

    Args:
        key: `rouge1`, `rouge2`, ... by n-grams; `rougeL` by the longest common subsequence; `rougeLsum` by that of each
            sentence, which nltk finds.
    """

    higher_is_better = True  # type: ignore[assignment]

    def __init__(self, key: str) -> None:
        super().__init__()
        if key == "rougeLsum" and importlib.util.find_spec("nltk") is None:
            raise LoRAError("rougeLsum finds sentences with nltk: pip install 'lora_lightning[text-metrics]'")
        self.key = key

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:  # type: ignore[override]
        for text, targets in zip(texts, references, strict=True):
            super().update(rouge_score([text], [list(targets)], rouge_keys=self.key)[f"{self.key}_fmeasure"])


class ExactMatch(MeanMetric):
    """The share of texts that are one of their references, blanks at both ends aside."""

    higher_is_better = True  # type: ignore[assignment]

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:  # type: ignore[override]
        for text, targets in zip(texts, references, strict=True):
            super().update(float(text.strip() in {reference.strip() for reference in targets}))


TEXT_METRICS: dict[str, Callable[[], Metric]] = {
    "bleu": SacreBLEUScore,
    "chrf": CHRFScore,
    "ter": TranslationEditRate,
    "rouge1": lambda: Rouge("rouge1"),
    "rouge2": lambda: Rouge("rouge2"),
    "rougeL": lambda: Rouge("rougeL"),
    "rougeLsum": lambda: Rouge("rougeLsum"),
    "exact_match": ExactMatch,
}
"""By name: corpus BLEU with sacrebleu's 13a tokens (Post 2018), unsmoothed; chrF++; TER, where less is better; ROUGE;
and exact match."""
LESS_IS_BETTER = frozenset({"ter"})


def generation_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """The metrics with these names; an unknown name and a missing package raise a LoRAError."""
    for name in names:
        refuse_unknown("each of metrics", name, TEXT_METRICS)
    return {name: TEXT_METRICS[name]() for name in names}
