"""The checks, the template's origin and the rendering of `lora-lightning new`."""
