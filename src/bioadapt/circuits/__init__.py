"""Whole systems built from the catalogue's primitives."""
