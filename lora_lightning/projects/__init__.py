"""What `lora-lightning new` is made of: checks of what it is told, copier, and git. Nothing heavy is imported here."""
