"""`lora-lightning plan`: counts, memory and operations of a fit before it starts."""
