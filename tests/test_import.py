"""Importing bioadapt is light, and PEFT knows the method whoever is imported first."""

from __future__ import annotations

import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import bioadapt
from bioadapt import registration
from bioadapt.tuner import bridge

HEAVY = ("torch", "numpy", "peft", "transformers", "typer", "optuna")
KNOWN = """
import bioadapt, peft, sys
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
assert PEFT_TYPE_TO_CONFIG_MAPPING["BIO"] is bioadapt.BioConfig
assert PEFT_TYPE_TO_TUNER_MAPPING["BIO"].__name__ == "BioModel"
assert not any("bioadapt" in type(finder).__module__ for finder in sys.meta_path)
assert "exec_module" not in vars(peft.__loader__)  # the loader is as it was
"""


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_loads_nothing_heavy():
    code = f"import bioadapt, sys; dir(bioadapt); print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code).strip() == "[]"


def test_the_registry_does_without_peft():
    code = "import bioadapt, sys; assert bioadapt.list_primitives(); print('peft' in sys.modules)"
    assert python(code).strip() == "False"


# Each in a process of its own. What takes long to import and is neither PEFT nor transformers is there already.
FORKED = """
import os, sys
import scipy.optimize, sklearn.metrics, torch._inductor.compile_fx
assert not {"peft", "transformers", "bioadapt"} & sys.modules.keys()
for code in sys.argv[1:]:
    if (child := os.fork()) == 0:
        exec(code, {})
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit("fails: " + code)
"""
WHOEVER_COMES_FIRST = (
    "import bioadapt, peft",
    "import peft, bioadapt",
    # Transformers imports PEFT while its callbacks are half there.
    "import bioadapt; from transformers import Trainer",
    "import bioadapt.checkpoint",
    "import bioadapt.tuner.layer",
)
# Whoever imports PEFT may be in the middle of anything else, which can then not be imported from.
REGISTERING_LOADS = """
import peft, sys
before = set(sys.modules)
import bioadapt
print({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each way of importing has a forked process")
def test_peft_knows_the_method_whoever_comes_first_and_registering_loads_nothing_else():
    pytest.importorskip("sklearn")
    printed = python(FORKED, *(first + KNOWN for first in WHOEVER_COMES_FIRST), REGISTERING_LOADS)
    assert printed.strip() == "{'bioadapt'}"


def test_a_peft_that_cannot_be_taught_is_imported_all_the_same(monkeypatch):
    def fails():
        raise ImportError("PEFT 9.9.9 cannot be taught the method")

    monkeypatch.setattr(bridge, "register", fails)
    with pytest.warns(UserWarning, match=r"9\.9\.9"):
        registration._register_or_warn()
    with pytest.raises(ImportError, match=r"9\.9\.9"):
        registration.register()


def test_the_public_names_are_there():
    for name in bioadapt.__all__:
        found = getattr(bioadapt, name)
        assert found.__name__ == name and found.__module__ == f"bioadapt.{bioadapt._HOMES[name]}"
        assert pickle.loads(pickle.dumps(found)) is found
    assert set(bioadapt.__all__) <= set(dir(bioadapt))
    assert bioadapt.tuner.bridge is bridge  # modules as well
    with pytest.raises(AttributeError, match="no attribute 'BioConfg'"):
        _ = bioadapt.BioConfg


def test_type_checkers_are_told_the_same_names():
    tree = ast.parse(Path(bioadapt.__file__).read_text(encoding="utf-8"))
    homes = {
        alias.name: node.module
        for block in ast.walk(tree)
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        for alias in node.names
        if alias.name == alias.asname
    }
    assert homes == bioadapt._HOMES
