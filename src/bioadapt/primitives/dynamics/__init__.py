"""Stage 4, dynamics: mechanisms whose identity is a time course."""
