"""Lightning: the module, its callbacks, the trainer with `export`."""
