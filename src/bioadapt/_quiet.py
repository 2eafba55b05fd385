"""Imported by processes that show nothing but bioadapt's own words: leaves out what nobody there can act upon."""

import logging
import warnings

# Loaded by PEFT where it is installed, it warns of an optional kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# PEFT still asks models by a name that transformers is about to give up.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
