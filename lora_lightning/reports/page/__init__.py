"""A run as one static page: no network, no script, light or dark as the reader's browser is."""

from lora_lightning.reports.page.page import write_page

__all__ = ["write_page"]
