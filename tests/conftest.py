"""Set before anything imports the hub's client: no test reaches for the network."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_finish():
    """What imports and collection have left is there to stay: the garbage collector need not look through it again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """What a test stands for on the page of compatibility goes into the report of a run."""
    for item in items:
        for mark in item.iter_markers("compatible"):
            item.user_properties.append(("compatible", " | ".join(mark.args)))
