"""The published weight-space methods, one file each."""
