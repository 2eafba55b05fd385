"""The bridge to PEFT: the only place that touches PEFT's internals."""
