"""Adapting a deep model, saving the adapter and loading it, next to a LoRA.

    python benchmarks/adapting.py                      # writes results/adapting-<machine>.csv

A decoder of 24 blocks, and one of 48, so narrow that what is timed is the walk over its modules and not arithmetic;
adapters on all 7 linear layers of a block. Of each time the least of some rounds is taken, in which methods take turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from _measure import RESULTS, machine_name, render, write_csv
from launches import LORA, methods
from peft import PeftModel, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

NAMES = ("lateral_inhibition", "predictive_coding", "neuro_ada", "fly_lora")
SHALLOW, DEEP = 24, 48
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Row:
    """``adapt``, ``save``, ``load``: times as ratios to the LoRA's, in the deep model.

    ``growth``: time to adapt the deep model as a ratio to that of the shallow one; 2 where it grows with the model.
    """

    method: str
    adapt: float
    save: float
    load: float
    growth: float


def decoder(blocks: int) -> Qwen2ForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=blocks, vocab_size=50, **sizes))


def seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def handled(method: str, blocks: int) -> dict[str, float]:
    """Seconds of adapting, saving and loading."""
    model, again, adapted = decoder(blocks), decoder(blocks), []
    config = methods()[method](LAYERS)
    with tempfile.TemporaryDirectory() as folder:
        adapt = seconds(lambda: adapted.append(get_peft_model(model, config)))
        save = seconds(lambda: adapted[0].save_pretrained(folder))
        load = seconds(lambda: PeftModel.from_pretrained(again, folder))
    return {"adapt": adapt, "save": save, "load": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    least: dict[tuple[str, int], dict[str, float]] = {}
    for _ in range(1 + options.rounds):  # the first one warms up
        for key in ((method, blocks) for blocks in (SHALLOW, DEEP) for method in (LORA, *NAMES)):
            found = handled(*key)
            least[key] = {what: min(value, least.get(key, found)[what]) for what, value in found.items()}
    rows = []
    for method in (LORA, *NAMES):
        deep, lora = least[method, DEEP], least[LORA, DEEP]
        over_lora = {what: round(deep[what] / lora[what], 2) for what in deep}
        rows.append(Row(method, **over_lora, growth=round(deep["adapt"] / least[method, SHALLOW]["adapt"], 2)))
    print(render(rows))
    write_csv(RESULTS / f"adapting-{machine_name()}.csv", rows, {"rounds": options.rounds})


if __name__ == "__main__":
    main()
