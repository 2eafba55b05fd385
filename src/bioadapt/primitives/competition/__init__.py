"""Stage 2, competition: units that suppress, select and share at one moment."""
