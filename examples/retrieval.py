"""Retrieval with sentence-transformers' own verbs alone: add_adapter, its trainer and evaluator, save, load.

    python examples/retrieval.py [--quick]

Queries are first sentences of docstrings, documents are names: trained on scipy, tested on networkx.
"""

# %%
import sys
import tempfile

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from bioadapt import BioConfig, BioTrainerCallback
from bioadapt.evaluation.tasks.api_search import build_api_corpus
from bioadapt.evaluation.training import model_path

quick = "--quick" in sys.argv

# %%
corpus = build_api_corpus(train=["scipy"], validation=[], test=["networkx"], limit=20 if quick else 400)
queries = dict(enumerate(corpus.test.queries))
documents = {str(place): text for place, text in enumerate(corpus.test.documents)}
right = {number: {str(place) for place in places} for number, places in enumerate(corpus.test.answers)}
score = InformationRetrievalEvaluator(
    {str(number): query for number, query in queries.items()},
    documents,
    {str(number): places for number, places in right.items()},
    mrr_at_k=[10],
)

encoder = SentenceTransformer(model_path(), device="cpu")
before = score(encoder)["cosine_mrr@10"]
encoder.add_adapter(BioConfig(["lateral_inhibition", "predictive_coding"]))
with tempfile.TemporaryDirectory() as folder:
    pairs = Dataset.from_dict({"anchor": [p[0] for p in corpus.train], "positive": [p[1] for p in corpus.train]})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=folder,
        num_train_epochs=1 if quick else 2,
        per_device_train_batch_size=20 if quick else 32,
        learning_rate=4e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    loss = MultipleNegativesRankingLoss(encoder)
    SentenceTransformerTrainer(encoder, arguments, pairs, loss=loss, callbacks=[BioTrainerCallback()]).train()
    after = score(encoder)["cosine_mrr@10"]

    encoder.save_pretrained(f"{folder}/encoder")
    again = SentenceTransformer(f"{folder}/encoder", device="cpu")
    loaded = score(again)["cosine_mrr@10"]
print(f"MRR@10 on networkx: {before:.3f} -> {after:.3f}; saved and loaded: {loaded:.3f}")
scores = {"before": before, "after": after, "loaded": loaded}
