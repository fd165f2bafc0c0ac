"""Real models and sets that arrive as packages, for trying things out: `requirements/`. `baselines` tells what an
accuracy on them has to be compared with.

The packages are data: their files are read, nothing of them is imported.
"""
