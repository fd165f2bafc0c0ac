"""Training over several processes: FSDP2 with adapters, and what must hold across ranks."""
