"""What is adapted: less, or more, than the config says."""
