"""What W0 is once adapters were merged into it, or begun from it."""
