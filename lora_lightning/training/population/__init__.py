"""A population: several fits over one frozen W0, which take turns on each batch.

Each is an ordinary fit with its own Trainer and run folder. Imports `training` and `lora`; nothing imports this folder
but the sweep's command, and `heap` the program's entry.
"""
