"""Loads a saved adapter with what people use, and nothing here imports bioadapt; run by ``test_environment.py``.

Each way runs in a process of its own, so that none profits from what another has imported; what takes long and does not
import PEFT is imported once for all.
"""

import os
import sys
from pathlib import Path


def expected_of(folder):
    import torch
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), torch.load(Path(folder, "expected.pt"))


def auto_peft(folder):
    from peft import AutoPeftModelForFeatureExtraction

    return AutoPeftModelForFeatureExtraction.from_pretrained(folder)


def peft_model(folder):
    import json

    from peft import PeftModel
    from transformers import AutoModel

    base = json.loads(Path(folder, "adapter_config.json").read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)


def auto_model(folder):
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder)


def of_pipeline(folder):
    from transformers import pipeline

    return pipeline("feature-extraction", model=folder, tokenizer=folder).model


def sentence_transformer(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device="cpu")[0].auto_model


def check(load, folder):
    import torch

    tokenizer, expected = expected_of(folder)
    model = load(folder).eval()
    with torch.no_grad():
        found = model(**tokenizer("The brain adapts.", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    print(load.__name__, "works")


if __name__ == "__main__":
    assert "bioadapt" in sys.modules and "torch" not in sys.modules
    import sklearn.metrics  # noqa: F401
    import torch  # noqa: F401
    from transformers import BertModel, pipeline  # noqa: F401

    assert "peft" not in sys.modules
    for load in (auto_peft, peft_model, auto_model, of_pipeline, sentence_transformer):
        child = os.fork()
        if child == 0:
            check(load, sys.argv[1])
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            sys.exit(f"{load.__name__} does not work")
