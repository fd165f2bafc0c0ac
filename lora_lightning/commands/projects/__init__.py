"""What `lora-lightning new` asks, checks and renders."""
