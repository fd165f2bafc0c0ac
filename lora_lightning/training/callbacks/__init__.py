"""What watches a run: W0's guard, guards of gradients, figures of steps, samples, the export at the end, the report.

Each file is one callback with all it needs. Imports `module`, `checkpoints`, `strategies.base`, export and reports.
"""
