"""Stage 1, sensory gain: laws that set the operating point of a signal."""
