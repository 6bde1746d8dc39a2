"""Boxes, masks, cameras and radar drawn on images, and galleries of them."""
