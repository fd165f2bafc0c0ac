"""One module or folder per command that LightningCLI does not have."""
