"""`lora-lightning sweep`: many fits of one config, ranked by validation."""
