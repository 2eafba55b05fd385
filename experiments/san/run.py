"""Does it help that SAN's gains also reach the layer that reads them, compared with plain scaling of the same size?

python -m experiments.san.run --data-dir FOLDER            # everything; writes beside this file
python -m experiments.san.run --data-dir FOLDER --quick    # under a minute, into quick/; says nothing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import IA3Config

from bioadapt import SanConfig
from experiments import sentence_task
from experiments.ledger import Claim
from experiments.sentence_task import PROJECTIONS, ZERO_SHOT, Arms, differences

TASK = "searchsnippets"
RATES = (2e-3, 8e-3, 3.2e-2)
SAN, PLAIN = "SAN", "plain scaling (PEFT's IA3)"
ARMS: Arms = {
    SAN: lambda seed: SanConfig(target_modules=PROJECTIONS),
    # Without feedforward modules IA3 scales every layer's output, which is SAN's mode "nt".
    PLAIN: lambda seed: IA3Config(target_modules=PROJECTIONS, feedforward_modules=[]),
}


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    measure = "difference of V-measures, points"
    return [
        Claim("SAN is more accurate than plain scaling of the same size", measure, differences(rows, SAN, PLAIN)),
        Claim(
            "SAN improves on the model without an adapter",
            measure,
            differences(rows, SAN, ZERO_SHOT),
            note="a check that there is something to compare",
        ),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = sentence_task.parser(__doc__, seeds=4).parse_args(argv)
    sentence_task.experiment(Path(__file__).parent, options, TASK, ARMS, RATES, claims)


if __name__ == "__main__":
    main()
