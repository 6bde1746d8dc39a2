"""A street seen by cameras and radars."""
