"""Real models and sets that arrive as packages, for trying things out: `requirements/`.

The packages are data: their files are read, nothing of them is imported.
"""
