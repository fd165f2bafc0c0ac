"""The method: adapted layers, injection, merge and the adapter's format, in plain torch."""
