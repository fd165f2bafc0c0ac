"""Texts: classification, regression, tokens, several labels."""
