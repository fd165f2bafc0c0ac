"""Losses of the tasks, as functions of tensors."""
