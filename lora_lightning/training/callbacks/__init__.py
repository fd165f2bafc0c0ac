"""Callbacks: guards of W0 and of gradients, metrics of steps, samples, the export at the end, the report.

Each file has one callback. Imports `module`, `checkpoints`, `strategies.base`, export and reports.
"""
