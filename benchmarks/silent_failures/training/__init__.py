"""What trains, and on what."""
