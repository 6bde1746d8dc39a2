"""2D shapes."""
