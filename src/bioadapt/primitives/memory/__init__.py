"""Stage 5, memory: expectations and stored items that the present is compared with."""
