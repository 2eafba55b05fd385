"""The mechanisms, one file each, in a folder per stage."""
