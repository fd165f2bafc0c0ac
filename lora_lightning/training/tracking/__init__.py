"""Loggers that continue the run that a fit resumes (`loggers`), and W&B's tables and artifacts.

Imports `checkpoints`, `module` and export.
"""
