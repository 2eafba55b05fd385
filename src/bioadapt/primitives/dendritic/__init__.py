"""Stage 3, dendritic: the input-output law of one unit and its synapses."""
