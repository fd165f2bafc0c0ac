"""What a person reads of a run: tables on the console, `report.html` and pages in its style, figures.

It imports lora alone; analysis, training and commands call it. `table` is every table, `console` prints a run's
screens, `curves` charts the log, `classes` counts a classifier's mistakes, `html` makes pages, `figures` plots.
"""
