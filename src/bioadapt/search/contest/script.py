"""The winner as a script that trains it again and prints what was reported beside what it reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import indent
from typing import Any

from ..report.wording import config_call
from ..settings import AUTO, NO_LORA, SearchSettings
from .lora import USUAL


def winner_script(
    settings: SearchSettings,
    *,
    in_memory: bool,
    lora: Mapping[str, Any] | None,
    lora_targets: Mapping[str, list[str]],
    configs: Sequence[Mapping[str, Any]],
    learning_rate: float,
    reported: Mapping[int, float],
    metric: str,
) -> str:
    """Python that trains and tests the winner of a search on the seeds that it was tested on.

    Args:
        settings: of the search.
        in_memory: whether the rows lie in no file, and so have to be given.
        lora: what the study records of the LoRA below.
        lora_targets: the modules of each choice of a LoRA's targets.
        configs: records of the winner's adapters; empty if nothing over the LoRA was best.
        learning_rate: of the winner.
        reported: by seed, the score on the test rows.
        metric: of that score.
    """
    schedule = f"epochs={settings.epochs:g}, learning_rate={{:g}}, batch_size={settings.batch_size}, seed=seed"
    train = f"fit(model, task, Schedule({schedule}))\n"
    body = f"torch.manual_seed(seed)\nmodel = load_model({settings.model!r}, task)\n"
    if settings.lora == AUTO and lora is not None:
        # What a record of another version lacks has its usual value.
        chosen = {**USUAL, "targets": next(iter(lora_targets)), **lora["params"]}
        targets = lora_targets[chosen["targets"]]
        body += (
            "lora = LoraConfig(\n"
            f"    r={chosen['rank']}, lora_alpha={chosen['rank'] * chosen['alpha_per_rank']}, "
            f"lora_dropout={chosen['dropout']}, target_modules={targets!r},\n)\n"
            "adapt(model, lambda plain: get_peft_model(plain, lora))\n"
        )
        if not configs:
            body += train.format(chosen["learning_rate"])
    elif settings.lora != NO_LORA:
        body += f"load_adapted(model, [{settings.lora!r}])\n"
    if configs:
        calls = ",\n".join(config_call(config, seed="seed") for config in configs)
        # A LoRA that was tuned is trained along.
        body += "" if settings.lora == AUTO else "transformer_of(model).requires_grad_(False)\n"
        body += (
            f"configs = [\n{indent(calls, '    ')},\n]\n"
            "adapt(model, lambda below: add_adapters(below, configs))\n" + train.format(learning_rate)
        )
    body += f"score = task.evaluate(model).scores[{metric!r}]\n"
    body += f'print(f"seed {{seed}}: {metric} {{score:.4f}}, reported {{reported:.4f}}")\n'
    return (
        "import torch\n"
        "from peft import LoraConfig, get_peft_model\n\n"
        "from bioadapt import BioConfig\n"
        "from bioadapt.evaluation import load_task\n"
        "from bioadapt.evaluation.models import load_model\n"
        "from bioadapt.evaluation.tasks.cuts import with_validation\n"
        "from bioadapt.evaluation.training import Schedule, adapt, fit, load_adapted, transformer_of\n"
        "from bioadapt.search import add_adapters\n\n"
        + ("# rows: what was given to search(task=rows)\n" if in_memory else "")
        + f"task = with_validation({_load_call(settings, in_memory)})\n"
        f"for seed, reported in {dict(reported)}.items():\n{indent(body, '    ')}"
    )


def best_script(configs: Sequence[Mapping[str, Any]], learning_rate: float, seed: int, score: float) -> str:
    """Python that trains the best of a search with an objective again.

    Args:
        configs: records of its adapters.
        learning_rate: of the trial.
        seed: of its adapters, and of what the objective draws.
        score: what the objective has returned.
    """
    calls = ",\n".join(config_call(config, seed=str(seed)) for config in configs)
    adapted = f"add_adapters(model, [\n{indent(calls, '    ')},\n])" if configs else "model.requires_grad_(False)"
    return (
        "import torch\n\n"
        "from bioadapt import BioConfig\n"
        "from bioadapt.search import add_adapters\n\n"
        "# objective and model: what was given to search(objective=objective, model=model)\n"
        f"adapted = {adapted}\n"
        f"torch.manual_seed({seed})\n"
        f"score = objective(adapted, {learning_rate:g}, lambda step, score: None)\n"
        f'print(f"{{score:.4f}}, reported {score:.4f}")\n'
    )


def _load_call(settings: SearchSettings, in_memory: bool) -> str:
    parts = ["rows" if in_memory else repr(settings.task)]
    parts += [] if settings.data_dir is None or in_memory else [repr(str(settings.data_dir))]
    parts += [] if settings.limit is None else [f"limit={settings.limit}"]
    return f"load_task({', '.join(parts)})"
