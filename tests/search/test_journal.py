"""A journal file under faults: a full disk, a kill in mid-write, and what earlier ones have left."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")
pytest.importorskip("psutil")

import optuna

from bioadapt.search.study import open_storage

# A process whose files may not grow beyond a limit: the write that meets it is torn by the system, as on a full disk.
FILLS_THE_DISK = """
import resource, sys
from pathlib import Path
import optuna
from bioadapt.search.study import open_storage

path = Path(sys.argv[1])
storage = open_storage(str(path))
study = optuna.load_study(study_name="a", storage=storage)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 300, resource.RLIM_INFINITY))
for number in range(100):
    try:
        study.set_user_attr(f"n{number}", "x" * 100)
    except OSError:
        print(number)
        break
"""


def names(path):
    return sorted(optuna.get_all_study_names(open_storage(str(path))))


def make(path, name):
    return optuna.create_study(study_name=name, storage=open_storage(str(path)))


@pytest.mark.parametrize("kept", [1, 10, 0.5, -2])
def test_a_torn_last_line_is_cut_and_all_before_it_stays(tmp_path, kept):
    path = tmp_path / "s.journal"
    make(path, "a")
    whole = path.read_bytes()
    line = whole.splitlines()[-1]
    path.write_bytes(whole + line[: int(kept * len(line)) if kept == 0.5 else kept])
    open_storage(str(path))
    assert path.read_bytes() == whole
    make(path, "b")
    assert names(path) == ["a", "b"]


def test_who_has_the_file_open_goes_on_after_another_ones_torn_line(tmp_path):
    path = tmp_path / "s.journal"
    study = make(path, "a")
    with path.open("ab") as file:
        file.write(b'{"op_code":2,"worker_id":"somebo')
    study.set_user_attr("x", 1)
    assert optuna.load_study(study_name="a", storage=open_storage(str(path))).user_attrs == {"x": 1}


def test_a_last_line_that_lacks_its_end_alone_is_kept(tmp_path):
    path = tmp_path / "s.journal"
    make(path, "a").set_user_attr("x", 1)
    path.write_bytes(path.read_bytes()[:-1])
    study = optuna.load_study(study_name="a", storage=open_storage(str(path)))
    assert study.user_attrs == {"x": 1}
    study.set_user_attr("y", 2)
    assert optuna.load_study(study_name="a", storage=open_storage(str(path))).user_attrs == {"x": 1, "y": 2}


def test_a_write_that_the_disk_has_no_room_for_leaves_nothing(tmp_path):
    path = tmp_path / "s.journal"
    study = make(path, "a")
    done = subprocess.run([sys.executable, "-c", FILLS_THE_DISK, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = int(done.stdout)
    assert path.read_bytes().endswith(b"\n") and all(map(json.loads, path.read_text().splitlines()))
    study.set_user_attr("after", True)
    assert len(optuna.load_study(study_name="a", storage=open_storage(str(path))).user_attrs) == written + 1


def spoiled(path, more=True):
    """As an earlier version left it: the write after a torn one went on in the same line."""
    make(path, "a").set_user_attr("x", 1)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1][:20] + lines[-1]]) + "\n")
    if more:
        with path.open("a") as file:
            file.write(lines[-1] + "\n")
    return len(lines)


@pytest.mark.parametrize("more", [True, False], ids=["in the middle", "at the end"])
def test_a_line_that_is_no_record_is_named_and_the_remedy_works(tmp_path, more):
    path = tmp_path / "s.journal"
    number = spoiled(path, more)
    with pytest.raises(ValueError, match=rf"s\.journal, line {number} is no record.*the first 20 bytes") as error:
        open_storage(str(path))
    command = re.search(r"LC_ALL=C sed .*$", str(error.value))[0]
    subprocess.run(command, shell=True, check=True)
    assert optuna.load_study(study_name="a", storage=open_storage(str(path))).user_attrs == {"x": 1}


def test_a_line_of_which_nothing_is_left_is_named_with_what_is_lost(tmp_path):
    path = tmp_path / "s.journal"
    make(path, "a")
    whole = path.read_text()
    path.write_text(whole + "\0\0\0\n" + whole)
    with pytest.raises(ValueError, match="line 2 is no record.*backup.*loses all that came after") as error:
        open_storage(str(path))
    subprocess.run(re.search(r"sed .*$", str(error.value))[0], shell=True, check=True)
    assert names(path) == ["a"]
