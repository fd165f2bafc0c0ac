"""Conversations: read, templated, masked to the answers."""
