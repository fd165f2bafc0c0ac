"""Loggers that continue the run that a fit resumes (`csv_logger`, `wandb_logger`), and W&B's tables and artifacts.

Imports `checkpoints`, `module` and export.
"""
