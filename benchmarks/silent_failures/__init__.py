"""Real failures of the field that gave wrong numbers without an error, each run against three ways to train LoRA.

One module per failure, in four folders by the place where it strikes; `harness` runs and judges, `tiny` has the models
and the three fits. `python -m benchmarks.silent_failures` prints the table of docs/silent-failures.md.
"""
