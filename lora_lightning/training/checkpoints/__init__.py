"""Adapter checkpoints: state, files, resume, loop and random state, the run's folder."""
