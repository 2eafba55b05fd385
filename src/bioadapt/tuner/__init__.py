"""The bridge to PEFT: the only place that touches PEFT's internals."""

# PEFT is taught the method as soon as it is imported, which needs the modules of this package whole. So it is imported
# before the first of them is begun, whichever that is.
import peft  # noqa: F401
