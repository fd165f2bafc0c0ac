"""Callbacks: `guards` of W0 and of gradients, `monitors` and figures of `steps`, samples, export at the end, report.

Imports `module`, `checkpoints`, `strategies.base`, export and reports.
"""
