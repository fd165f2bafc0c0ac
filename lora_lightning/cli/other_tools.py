"""Option names of PEFT, litgpt, torchtune, axolotl, LLaMA-Factory and the Hugging Face Trainer, and ours for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

HERE: Mapping[str, str] = {
    "model.lora.r": "lora_r lora_rank rank",
    "model.lora.alpha": "lora_alpha",
    "model.lora.dropout": "lora_dropout",
    "model.lora.init": "init_lora_weights",
    "model.lora.init loftq": "loftq_config",
    "model.lora.init eva": "eva_config",
    "model.lora.bias": "train_bias",
    "model.lora.target_modules": (
        "lora_target_modules lora_target lora_attn_modules apply_lora_to_mlp apply_lora_to_output lora_query lora_key"
        " lora_value lora_projection lora_mlp lora_head"
    ),
    "model.lora.modules_to_save": "lora_modules_to_save additional_target",
    "model.lora.use_rslora": "peft_use_rslora",
    "model.lora.use_dora": "peft_use_dora",
    "model.backbone.init_args.pretrained_model_name_or_path": "model_name_or_path model_name base_model model_id",
    "model.backbone.init_args.attn_implementation": "attn_implementation flash_attention flash_attn",
    "model.backbone.init_args.model_kwargs, as {trust_remote_code: true}": "trust_remote_code",
    "model.activation_checkpointing": "gradient_checkpointing enable_activation_checkpointing",
    "model.optimizer, such as torch.optim.AdamW": "optim optimizer_type",
    "model.optimizer.init_args.lr": "lr learning_rate",
    "model.optimizer.init_args.weight_decay": "weight_decay",
    "model.optimizer.init_args.betas": "adam_beta1 adam_beta2",
    "model.lr_scheduler, such as lora_lightning.WarmupDecay": "lr_scheduler_type scheduler",
    "model.lr_scheduler.init_args.warmup, a share of all steps or a number of them": (
        "warmup_ratio warmup_steps num_warmup_steps lr_warmup_steps"
    ),
    "model.b_lr_ratio": "loraplus_lr_ratio",
    "model.task.init_args.label_smoothing": "label_smoothing label_smoothing_factor",
    "model.task.init_args.metrics, of which the first chooses the best": "metric_for_best_model",
    "data.init_args.batch_size": (
        "batch_size bs batch micro_batch_size train_batch_size per_device_train_batch_size per_gpu_train_batch_size"
    ),
    "data.init_args.eval_batch_size": "eval_batch_size per_device_eval_batch_size",
    "data.init_args.batch_size, times trainer.accumulate_grad_batches and devices": "global_batch_size",
    "data.init_args.path": "train_file data_path dataset datasets dataset_dir",
    "data.init_args.tokenizer": "tokenizer tokenizer_name_or_path",
    "data.init_args.chat_template": "chat_template template",
    "data.init_args.text_column": "dataset_text_field",
    "data.init_args.max_length": "max_length max_seq_length max_seq_len sequence_len cutoff_len model_max_length",
    "data.init_args.packing": "packing sample_packing",
    "data.init_args.length_grouped": "group_by_length",
    "data.init_args.num_workers": "num_workers dataloader_num_workers",
    "data.init_args.split.validation": "val_size val_set_size validation_split",
    "data.init_args.seed": "data_seed",
    "trainer.max_epochs": "epochs num_train_epochs num_epochs",
    "trainer.devices": "gpus",
    "trainer.accelerator cpu": "use_cpu no_cuda",
    "trainer.gradient_clip_val": "max_grad_norm",
    "trainer.accumulate_grad_batches": "gradient_accumulation_steps grad_accum",
    "trainer.precision bf16-base (or bf16-mixed)": "bf16 amp",
    "trainer.precision 16-mixed": "fp16",
    "trainer.precision": "dtype torch_dtype",
    "trainer.precision nf4-base": "load_in_4bit quantize quantization_bit qlora",
    "trainer.log_every_n_steps": "logging_steps log_interval",
    "trainer.val_check_interval": "eval_steps eval_strategy evaluation_strategy eval_interval",
    "trainer.strategy, or an overlay of configs/strategy": "deepspeed fsdp",
    "trainer.logger, or -c configs/logger/wandb.yaml": "report_to wandb wandb_project",
    "trainer.callbacks+=EarlyStopping": "early_stopping_patience patience",
    "save_every": "save_steps save_interval",
    "runs_dir": "output_dir out_dir save_dir",
    "name": "run_name experiment_name",
    "seed_everything": "seed",
    "ckpt_path": "resume_from_checkpoint",
    "ckpt_path auto": "resume auto_resume auto_resume_from_checkpoints",
}
"""Our name, and the other tools' names."""

NOT_NEEDED: Mapping[str, str] = {
    "the class of model.task says what the task is": "task_type lora_task_type",
    "LoRA is the only one here": "peft_type finetuning_type use_peft use_lora adapter",
    "test, predict and export never train": "inference_mode",
    "a layer's class says how its weight lies": "fan_in_fan_out",
    "it is model.backbone.init_args.pretrained_model_name_or_path": "base_model_name_or_path",
    "all linear layers are adapted unless model.lora.target_modules says which": "lora_target_linear",
    "layers_to_transform counts the blocks itself": "layers_pattern",
    "further files are given by -c, and of what several say the last holds": "defaults hydra",
    "the command says it: fit, validate, test, predict": "do_train do_eval do_predict stage",
    "each fit has a folder of its own": "overwrite_output_dir",
    "the best and the newest are kept": "save_total_limit save_strategy",
    "--ckpt_path best is for test, predict and export": "load_best_model_at_end",
    "export writes a folder, and `hf upload NAME FOLDER` puts it there": "push_to_hub hub_model_id",
}
"""Why an option is not needed, and the other tools' names of it."""


GONE: Mapping[str, str] = {
    "directions": "the layers of one adapter are no longer compared; analyze compares two adapters that are named",
}
"""Options of earlier versions, and what to do instead."""


def instead_of(name: str, keys: Iterable[str], dashes: str) -> str | None:
    """Return what to write in place of another tool's name or of a removed option.

    None where the name is unknown, or our name belongs to another command.

    Args:
        name: without its groups.
        keys: the command's.
        dashes: before a flag; empty for a key of a file.
    """
    if name in GONE:
        return f": it is gone; {GONE[name]}"
    groups = {key.partition(".")[0] for key in keys}
    for reason, names in NOT_NEEDED.items():
        if name in names.split() and "model" in groups:
            return f": leave it out, {reason}"
    for here, names in HERE.items():
        if name in names.split() and here.partition(" ")[0].partition(".")[0].rstrip(",") in groups:
            return f": here it is {dashes}{here}"
    return None
