"""The claims ledger: from values to intervals and verdicts, the files of an experiment, its pages."""

import csv
import math
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from scipy import stats

from experiments import ledger as shared
from experiments.ledger import Claim

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "_ext"))
import ledger as pages

PAGE = "# Do they?\n\nThey do.\n\n## Results\n\n<!-- results -->\n<!-- end of results -->\n\n## What was found\n\nNo.\n"


def claim(values, side="above", bound=0.0, **more):
    return Claim("Ones beat zeros", "ones minus zeros, points", values, side, bound, **more)


# -- intervals and verdicts --


def test_the_interval_over_seeds_is_students():
    values = [1.0, 2.0, 4.0, 5.5]
    found = shared.over_seeds(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.estimate == 3.125


def test_a_single_seed_has_a_mean_and_decides_nothing():
    found = shared.over_seeds([3.0])
    assert found.estimate == 3.0
    assert math.isnan(found.low) and math.isnan(found.high)
    assert {claim([3.0], side, 1.0).verdict for side in ("above", "below", "within")} == {"undecided"}


@pytest.mark.parametrize(
    ("side", "bound", "verdict"),
    [
        ("above", 0.9, "supported"),
        ("above", 1.0, "undecided"),  # an end on the bound is not beyond it
        ("above", 2.0, "undecided"),
        ("above", 3.0, "undecided"),
        ("above", 3.1, "not supported"),
        ("below", 3.1, "supported"),
        ("below", 3.0, "undecided"),
        ("below", 1.0, "undecided"),
        ("below", 0.9, "not supported"),
        ("within", 3.1, "supported"),
        ("within", 3.0, "undecided"),
        ("within", 1.0, "undecided"),
        ("within", 0.9, "not supported"),
    ],
)
def test_the_verdict_is_where_the_whole_interval_lies(monkeypatch, side, bound, verdict):
    monkeypatch.setattr(shared, "over_seeds", lambda values: shared.Interval(2.0, 1.0, 3.0, 0.95))
    assert claim([1.0, 3.0], side, bound).verdict == verdict


@pytest.mark.parametrize("bound", [0.9, 1.0, 3.1])
def test_within_is_the_same_on_both_sides_of_zero(bound):
    values = [1.5, 2.0, 2.5, 1.0]
    assert claim(values, "within", bound).verdict == claim([-value for value in values], "within", bound).verdict


def test_equal_values_are_an_interval_without_width():
    assert claim([0.5] * 4, "above", 0.4).verdict == "supported"
    assert claim([0.0] * 4, "above", 0.0).verdict == "undecided"


def test_what_cannot_be_tested_says_so_and_why():
    found = claim([], note="needs a robot")
    assert found.verdict == "not testable here"
    record = found.record()
    assert (record["estimate"], record["seeds"], record["note"]) == ("nan", 0, "needs a robot")
    assert "| - | 0 | not testable here (needs a robot) |" in shared.claims_table([found])


def test_the_table_says_what_was_wanted_and_found():
    text = shared.claims_table([claim([1.0, 2.0, 3.0, 2.0], "within", 4.0)])
    assert "| within ±4 | +2 [+0.701, +3.3] | 4 | supported |" in text


# -- publishing --


def publish(folder, *, quick=False):
    rows = [{"seed": seed, "score": 1 / 3 + seed} for seed in range(3)]
    claims = [claim([1.0, 1.1, 0.9]), claim([])]
    shared.publish(folder, rows, claims, "| a |\n| --- |", Figure(), quick=quick)


@pytest.fixture
def experiment(tmp_path):
    folder = tmp_path / "experiments" / "ones"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(PAGE, encoding="utf-8")
    return folder


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_publishing_writes_values_claims_picture_and_the_results_part(experiment, capsys):
    publish(experiment)
    assert [row["score"] for row in read(experiment / "results.csv")] == ["0.333333", "1.33333", "2.33333"]
    verdicts = [(row["estimate"], row["seeds"], row["verdict"]) for row in read(experiment / "claims.csv")]
    assert verdicts == [("1", "3", "supported"), ("nan", "0", "not testable here")]
    assert (experiment / "results.png").read_bytes().startswith(b"\x89PNG")
    page = (experiment / "README.md").read_text(encoding="utf-8")
    before, results, after = page.partition("<!-- results -->\n")[0], page, page.partition("<!-- end of results -->")[2]
    assert before == PAGE.partition("<!-- results -->\n")[0]
    assert after == PAGE.partition("<!-- end of results -->")[2]
    assert "| a |" in results and "| Ones beat zeros |" in results and shared.hardware() in results
    assert "Ones beat zeros" in capsys.readouterr().out


def test_publishing_again_replaces_what_was_there(experiment):
    publish(experiment)
    once = (experiment / "README.md").read_text(encoding="utf-8")
    publish(experiment)
    assert (experiment / "README.md").read_text(encoding="utf-8") == once


def test_a_quick_run_leaves_the_experiment_alone(experiment):
    publish(experiment, quick=True)
    assert (experiment / "README.md").read_text(encoding="utf-8") == PAGE
    assert sorted(path.name for path in experiment.iterdir()) == ["README.md", "quick"]
    assert sorted(path.name for path in (experiment / "quick").iterdir()) == [
        "claims.csv",
        "results.csv",
        "results.png",
    ]


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="lacks"):
        shared.between_marks("# no marks", "text")


def test_every_experiment_has_the_same_options():
    given = shared.parser("What?\n\nMore.", seeds=7).parse_args(["--quick"])
    assert (given.seeds, given.quick) == (7, True)


# -- pages --


@pytest.fixture
def docs(tmp_path, experiment):
    """A documentation beside an experiment that was published."""
    publish(experiment)
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "ledger_intro.md").write_text("# The ledger\n\nWords.\n", encoding="utf-8")
    (folder / "methods.md").write_text("# Methods\n", encoding="utf-8")
    return folder


def write(docs):
    pages.write(docs, docs.parent / "experiments")
    return {path.name: path.read_text(encoding="utf-8") for path in (docs / "ledger").glob("*.md")}


def test_there_is_a_page_for_every_experiment_and_one_line_for_every_claim(docs, experiment):
    found = write(docs)
    assert sorted(found) == ["index.md", "ones.md"]
    assert found["index.md"].startswith("# The ledger\n\nWords.")
    counts = "| [Do they?](ones.md) | 1 | 0 | 0 | 1 |\n| all | 1 | 0 | 0 | 1 |\n"
    assert (
        f"supported | undecided | not supported | not testable here |\n{'| --- ' * 5}|\n{counts}" in found["index.md"]
    )
    lines = [line for line in found["index.md"].splitlines() if line.startswith("| [ones](ones.md) |")]
    assert [line.split(" | ")[2:] for line in lines] == [
        ["+1 [+0.752,\u00a0+1.25]", "3", "supported |"],
        ["-", "0", "not testable here |"],
    ]
    assert "```{toctree}\n:hidden:\n\nones\n```" in found["index.md"]
    assert found["ones.md"].startswith("# Do they?")


def test_a_claim_in_the_table_says_what_was_measured_and_what_was_wanted(docs, experiment):
    claims = [claim([1.0, 2.0], "within", 2.5, note="On |x| alone.")]
    shared.publish(experiment, [{"seed": 0}], claims, "", Figure())
    small = "<small>ones minus zeros, points; holds if within ±2.5. On \\|x\\| alone.</small>"
    assert f"| Ones beat zeros<br>{small} |" in write(docs)["index.md"]


def test_picture_and_values_come_along_even_where_the_readme_does_not_show_them(docs, experiment):
    page = write(docs)["ones.md"]
    copied = "files/experiments/ones"
    assert page.count(f"![what was measured]({copied}/results.png){{.portrait}}") == 1
    assert f"({copied}/results.csv)" in page and f"({copied}/claims.csv)" in page
    for name in ("results.png", "results.csv", "claims.csv"):
        assert (docs / "ledger" / copied / name).read_bytes() == (experiment / name).read_bytes()


def test_links_lead_to_the_same_things(docs, experiment):
    (experiment / "run.py").write_text("print()\n", encoding="utf-8")
    (experiment.parent / "README.md").write_text("# Experiments\n", encoding="utf-8")
    text = PAGE.replace(
        "They do.",
        "[a](../ones/README.md#results) [b](../../docs/methods.md) [c](https://x.org/y.md) [d](#results) [e](run.py)\n"
        "![f](results.png) [g](../README.md) `x[1](no.md)`\n\n```\ny[2](no.md)\n```",
    )
    (experiment / "README.md").write_text(text, encoding="utf-8")
    page = write(docs)["ones.md"]
    links = "[a](ones.md#results) [b](../methods.md) [c](https://x.org/y.md) [d](#results) "
    links += "[e](files/experiments/ones/run.py)\n![f](files/experiments/ones/results.png){.portrait} [g](index.md) "
    assert links + "`x[1](no.md)`\n\n```\ny[2](no.md)\n```" in page
    assert page.count("results.png") == 1


def test_the_table_of_claims_gets_its_style_and_other_tables_do_not(docs):
    page = write(docs)["ones.md"]
    (table,) = page.split("```{table}\n:class: claims\n\n")[1:]
    table, _, rest = table.partition("\n```\n")
    assert table.splitlines()[0].startswith("| claim | measure |") and len(table.splitlines()) == 4
    assert rest.startswith("\nIntervals")


@pytest.mark.parametrize("name", ["README.md", "claims.csv", "results.csv", "results.png"])
def test_an_experiment_that_lacks_a_file_fails_the_build_by_name(docs, experiment, name):
    (experiment / name).unlink()
    (experiment.parent / "empty").mkdir()
    (experiment.parent / "__pycache__").mkdir()
    with pytest.raises(RuntimeError, match=f"empty lacks README.md, .*; ones lacks {name}$"):
        write(docs)


@pytest.mark.parametrize("target", ["gone.csv", "../../CHANGELOG.md", "../../../outside.txt", "../ones"])
def test_a_link_that_leads_nowhere_fails_the_build(docs, experiment, target):
    (docs.parent / "CHANGELOG.md").write_text("# Changes\n", encoding="utf-8")
    (experiment / "README.md").write_text(f"{PAGE}\n[x]({target})\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="ones/README.md links to .*no page of the documentation"):
        write(docs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("claim,measure\nx,y\n", "no column side, bound"),
        (",".join(pages.COLUMNS), "has no claim"),
        (f"{','.join(pages.COLUMNS)}\na,b,above,0,1,0,2,3,perhaps,\n", "verdict 'perhaps'; accepted: supported"),
    ],
)
def test_claims_that_cannot_be_read_fail_the_build(docs, experiment, text, message):
    (experiment / "claims.csv").write_text(text, encoding="utf-8")
    with pytest.raises(RuntimeError, match=f"claims.csv.*{message}"):
        write(docs)


def test_a_readme_without_a_title_fails_the_build(docs, experiment):
    (experiment / "README.md").write_text("No title\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="begins with 'No title'"):
        write(docs)


def test_pages_of_experiments_that_are_gone_go_too(docs, experiment):
    write(docs)
    experiment.rename(experiment.with_name("twos"))
    assert sorted(write(docs)) == ["index.md", "twos.md"]
    assert not (docs / "ledger" / "files" / "experiments" / "ones").exists()


def test_columns_and_verdicts_are_those_that_claims_are_written_with():
    assert tuple(claim([1.0]).record()) == pages.COLUMNS
    named = {shared.SUPPORTED, shared.UNDECIDED, shared.NOT_SUPPORTED, shared.UNTESTABLE}
    assert named == set(pages.VERDICTS)
