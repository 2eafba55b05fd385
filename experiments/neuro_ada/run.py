"""Is NeuroAda as accurate as a LoRA that trains as many numbers, and does it matter which synapses it picks?

python -m experiments.neuro_ada.run --data-dir FOLDER            # everything; writes beside this file
python -m experiments.neuro_ada.run --data-dir FOLDER --quick    # under a minute, into quick/; says nothing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig

from bioadapt import NeuroAdaConfig
from experiments import sentence_task
from experiments.ledger import Claim
from experiments.sentence_task import PROJECTIONS, ZERO_SHOT, Arms, differences

TASK = "searchsnippets"
RATES = (2e-3, 8e-3, 3.2e-2)
MAGNITUDE, RANDOM, LORA = "NeuroAda k=1, strongest", "NeuroAda k=1, random", "LoRA r=1"
# A LoRA of rank 1 on these trains 6 (384 + 384 + 384 + 384 + 384 + 1536), exactly as much as one value per neuron.
MATCHED = ["query", "value", "intermediate.dense"]
ARMS: Arms = {
    MAGNITUDE: lambda seed: NeuroAdaConfig(k=1, target_modules=PROJECTIONS, seed=seed),
    RANDOM: lambda seed: NeuroAdaConfig(k=1, target_modules=PROJECTIONS, seed=seed, selection="random"),
    LORA: lambda seed: LoraConfig(r=1, lora_alpha=2, target_modules=MATCHED),
}


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    measure = "difference of V-measures, points"
    return [
        Claim("NeuroAda is at least as accurate as LoRA of the same size", measure, differences(rows, MAGNITUDE, LORA)),
        Claim(
            "The strongest synapses of a neuron are worth more than random ones",
            measure,
            differences(rows, MAGNITUDE, RANDOM),
        ),
        Claim(
            "NeuroAda improves on the model without an adapter",
            measure,
            differences(rows, MAGNITUDE, ZERO_SHOT),
            note="a check that there is something to compare",
        ),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = sentence_task.parser(__doc__, seeds=4).parse_args(argv)
    sentence_task.experiment(Path(__file__).parent, options, TASK, ARMS, RATES, claims)


if __name__ == "__main__":
    main()
