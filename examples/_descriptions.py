"""What the examples with a language model share: descriptions of functions, and a small model that has read some.

No language model comes with a package, so that one is trained on the spot; another one is loaded in its place with
``AutoModelForCausalLM``.
"""

import tempfile

from bioadapt.evaluation import LanguageModellingTask
from bioadapt.evaluation.models import LanguageModel, load_model
from bioadapt.evaluation.tasks.api_search import quiet, read_library


def descriptions(library: str, count: int) -> list[tuple[str, str]]:
    """Names of a library's functions, as words, and the first sentence of what their docstrings say; evenly spread."""
    with quiet():
        found = [(entry.document, entry.sentence) for entry in read_library(library) if entry.sentence]
    return found[:: max(1, len(found) // count)][:count]


def small_language_model(quick: bool) -> LanguageModel:
    """A causal language model of a million parameters that has read what numpy, scipy and torch say."""
    texts = [
        f"{name}: {sentence}"
        for library in ("numpy", "scipy", "torch")
        for name, sentence in descriptions(library, 20 if quick else 800)
    ]
    task = LanguageModellingTask("descriptions", {"train": {"text": texts}})
    with tempfile.TemporaryDirectory() as folder:
        return load_model("small-lm", task, "cpu", folder, steps=3 if quick else 400)
