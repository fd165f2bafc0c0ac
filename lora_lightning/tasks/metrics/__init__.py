"""Metrics of the tasks, on torchmetrics."""
