"""`lora-lightning sweep`: many fits of one config with other values of some flags, ranked by what validation says."""
