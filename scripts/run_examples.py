"""Run examples in full and keep what they reach in ``examples/results.csv``: ``make examples``, or with names of some.

Each runs in a process of its own, in a folder that is thrown away.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from notebooks import EXAMPLES, scripts

RESULTS = EXAMPLES / "results.csv"
# Runs the script as Python would, then prints its numbers on a line of their own.
_CODE = "import json, runpy, sys; print(json.dumps(runpy.run_path(sys.argv[1], run_name='__main__')['scores']))"


def run(script: Path, *words: str) -> dict[str, float]:
    """The numbers of one example, by their names."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-c", _CODE, str(script), *words]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"{script.name} has failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    wanted = sys.argv[1:]
    rows = {}
    if RESULTS.is_file():
        with RESULTS.open(encoding="utf-8", newline="") as file:
            rows = {(row["example"], row["what"]): row for row in csv.DictReader(file)}
    for script in scripts():
        if wanted and script.stem not in wanted:
            continue
        started = time.perf_counter()
        reached = run(script)
        print(f"{script.stem}: {reached}, {time.perf_counter() - started:.0f} s", flush=True)
        rows = {key: row for key, row in rows.items() if key[0] != script.stem}
        for what, value in reached.items():
            rows[script.stem, what] = {"example": script.stem, "what": what, "value": f"{value:.6g}"}
        with RESULTS.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["example", "what", "value"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[key] for key in sorted(rows, key=lambda key: key[0]))
