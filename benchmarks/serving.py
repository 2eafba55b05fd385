"""Serving under load: tokens a second of a bio adapter next to a LoRA's, and whether compiled decoding compiles again.

    python benchmarks/serving.py                       # writes results/serving-<machine>.csv
    python benchmarks/serving.py --only short_term_depression --rounds 3

The decoder of `launches.py`, adapters on o_proj and down_proj, greedy decoding with a cache. Three set-ups, each as a
ratio to the LoRA's speed, whose turns come before and after each other one's, the median over the rounds:

- `threads`: eight threads, each with a request of its own, of one text of 16 tokens and 16 new ones;
- `mixed_batch`: one batch of 32 texts, each with the adapter that `adapter_names` names, of two;
- `static_cache`: one text at a time in one static cache, the adapters compiled; `compiled_again` counts the graphs that
  requests of other lengths needed after the first two requests.

Time is that of the whole process, whatever its threads do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import peft
import torch
from _measure import RESULTS, machine_name, render, write_csv
from launches import DECODER_TARGETS, LORA, decoder, methods
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

from bioadapt import compile_adapters

NAMES = ("lateral_inhibition", "fly_lora", "short_term_depression")
THREADS, TEXTS, TOKENS, NEW = 8, 32, 16, 16


@dataclass(frozen=True)
class Row:
    """Ratios are to LoRA r=8: above 1 more tokens a second than it."""

    method: str
    threads: float
    mixed_batch: float
    static_cache: float
    compiled_again: int


def served(name: str) -> nn.Module:
    """A model with the adapters ``a`` and ``b`` of a method."""
    config = methods()[name](DECODER_TARGETS)
    model = peft.get_peft_model(decoder(), config, adapter_name="a")
    model.add_adapter("b", methods()[name](DECODER_TARGETS))
    return model.eval()


def texts(rows: int, length: int = TOKENS) -> Tensor:
    return torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def decoded(model: nn.Module, ids: Tensor, cache: StaticCache | None = None, **options: object) -> Tensor:
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        **options,
    )


def by_threads(model: nn.Module) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda _: decoded(model, texts(1)), range(THREADS)))


def by_mixed_batch(model: nn.Module) -> None:
    decoded(model, texts(TEXTS), adapter_names=["a", "b"] * (TEXTS // 2))


def compiled_requests(model: nn.Module, name: str) -> tuple[Callable[[], None], Callable[[], int]]:
    """A function that answers a request in the model's static cache, and one that counts graphs."""
    counter = CompileCounterWithBackend("eager")
    if name != LORA:
        compile_adapters(model, backend=counter)
    config = model.get_base_model().config
    cache = StaticCache(config=config, max_cache_len=4 * TOKENS)

    def answer(length: int = TOKENS) -> None:
        cache.reset()
        decoded(model, texts(1, length), cache)

    return answer, lambda: counter.frame_count


def ratios(models: dict[str, nn.Module], run: Callable[[str], object], rounds: int) -> dict[str, float]:
    """What a run takes of the LoRA's time, the other way round."""

    def spent(name: str) -> float:
        begun = time.process_time()
        run(name)
        return time.process_time() - begun

    found: dict[str, list[float]] = {name: [] for name in models}
    for name in models:
        run(name)
    before = spent(LORA)
    for _ in range(rounds):
        for name in models:
            if name == LORA:
                continue
            own, after = spent(name), spent(LORA)
            found[name].append((before + after) / (2 * own))
            before = after
    return {name: round(statistics.median(values), 2) if values else 1.0 for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a primitive; may be given several times")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = {name: served(name) for name in (LORA, *(options.only or NAMES))}
    threads = ratios(models, lambda name: by_threads(models[name]), options.rounds)
    mixed = ratios(models, lambda name: by_mixed_batch(models[name]), options.rounds)
    requests = {name: compiled_requests(model, name) for name, model in models.items()}
    again = {}
    for name, (answer, graphs) in requests.items():
        answer(TOKENS)
        answer(TOKENS + 3)
        before = graphs()
        for length in (TOKENS - 5, TOKENS + 8, TOKENS):
            answer(length)
        again[name] = graphs() - before
    static = ratios(models, lambda name: requests[name][0](), options.rounds)
    rows = [Row(name, threads[name], mixed[name], static[name], again[name]) for name in models]
    print(render(rows))
    if not options.only:
        write_csv(RESULTS / f"serving-{machine_name()}.csv", rows, {"rounds": options.rounds})


if __name__ == "__main__":
    main()
