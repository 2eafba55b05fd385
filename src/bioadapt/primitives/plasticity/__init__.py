"""Stage 6, plasticity: global signals and laws of slow change."""
