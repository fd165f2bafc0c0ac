"""What a person reads of a run: tables on the console, `report.html` and pages in its hand, figures.

It imports lora alone; analysis, training and commands call it. `table` is every table, `console` the run's screens,
`curves` the log as charts, `classes` a classifier's mistakes, `html` the pages, `figures` matplotlib in one style.
"""
