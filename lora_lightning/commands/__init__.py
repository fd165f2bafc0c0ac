"""One module or folder per command that is not one of LightningCLI's own."""
