"""The pages are made from the registry by running the primitives; the whole of them is built by ``make docs``."""

from __future__ import annotations

import csv
import re
import statistics
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bioadapt import list_primitives, primitive_info
from bioadapt.primitives.names import STAGES

DOCS = Path(__file__).resolve().parent.parent / "docs"
sys.path.insert(0, str(DOCS / "_ext"))
import capabilities  # noqa: E402
import catalogue  # noqa: E402
import equations  # noqa: E402

KEPT = {"causal": "yes", "cache": "yes", "compiles": "yes", "half": "yes", "quantised": "yes"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("lateral_inhibition", {"merges": "no", "mixes": "no", "convertible": "no", "learns": "no"}),
        ("short_term_depression", {"merges": "no", "mixes": "yes", "convertible": "no", "learns": "no"}),
        ("hebbian_trace", {"merges": "yes", "mixes": "no", "convertible": "yes", "learns": "yes"}),
    ],
)
def test_capabilities_are_found_out_by_running(name, found):
    pytest.importorskip("bitsandbytes")
    assert capabilities.probe(name) == {**KEPT, **found}


def test_a_broken_promise_fails_the_build():
    good = {"lateral_inhibition": dict.fromkeys(capabilities.COLUMNS, "yes") | {"merges": "no"}}
    catalogue.check(good)
    with pytest.raises(RuntimeError, match="lateral_inhibition: compiles"):
        catalogue.check({"lateral_inhibition": good["lateral_inhibition"] | {"compiles": "no"}})


def test_a_page_holds_all_that_is_known():
    info = primitive_info("predictive_coding")
    page = catalogue.page(info, dict.fromkeys(capabilities.COLUMNS, "yes"), None)
    for part in (info.summary, info.reference, "## Settings", "pictures/predictive_coding.png", "(1, 4, 32)"):
        assert part in page
    assert all(f"`{name}`" in page for name in info.settings)


@pytest.mark.parametrize("name", list_primitives())
def test_equations_are_set_as_mathml(name):
    equation = primitive_info(name).equation
    page = ElementTree.fromstring(f"<p>{equations.as_html(equation)}</p>")
    assert page.find(".//math") is not None and not [tag for tag in page.iter() if tag.text and "_{" in tag.text]
    assert re.findall(r"\d", "".join(page.itertext())) == re.findall(r"\d", equation)


def test_letters_signs_and_scripts_are_set_and_words_are_left():
    tree = ElementTree.fromstring(f"<p>{equations.as_html('delta_i = [x - theta]_+ a^2 where a cell rests')}</p>")
    assert "".join(tree.itertext()) == "δi=[x−θ]+a2 where a cell rests"
    assert [tag.tag for tag in tree.iter() if tag.tag in ("msub", "msup")] == ["msub", "msub", "msup"]


def test_what_is_dear_says_why():
    found = {name: dict.fromkeys(capabilities.COLUMNS, "yes") for name in ("kv_lif", "lateral_inhibition")}
    cost = dict.fromkeys(catalogue.COSTS, "1.0")
    dear = {**cost, "step_ratio": "1.56"}
    page = catalogue.matrix(found, {"kv_lif": dear, "lateral_inhibition": cost}, {})
    assert "`kv_lif`: every unit goes through six micro-steps" in page and "`lateral_inhibition`:" not in page
    with pytest.raises(RuntimeError, match="lateral_inhibition takes more"):
        catalogue.matrix(found, {"lateral_inhibition": dear}, {})


def test_the_overview_links_every_primitive_once_in_the_order_of_the_stages():
    overview = catalogue.overview()
    places = [overview.index(f"]({name}.md)") for stage in STAGES for name in list_primitives(stage=stage)]
    assert places == sorted(places) and all(overview.count(f"]({name}.md)") == 1 for name in list_primitives())


def test_hand_written_pages_name_public_things_that_exist():
    import bioadapt

    text = (DOCS / "api.md").read_text(encoding="utf-8")
    missing = [name for name in bioadapt.__all__ if f"bioadapt.{name}" not in text]
    assert not missing


@pytest.mark.parametrize(
    "start", ["import numpy", "import torch", "from bioadapt", "from peft", "from stable_baselines3"]
)
def test_the_examples_of_the_circuits_run(start, tmp_path, monkeypatch):
    """All but the last, which is a search."""
    for module in ("sklearn", "gymnasium", "stable_baselines3"):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "circuits.md").read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [code for code in blocks if code.startswith(start) and "genbais" not in code]
    names = {} if start != "from bioadapt" else {"torch": pytest.importorskip("torch")}
    exec(example, names)


@pytest.mark.parametrize("guide", ["choosing.md", "rates.md", "sites.md", "from_lora.md", "own_data.md", "sharing.md"])
def test_the_code_of_the_guides_runs_in_order(guide, tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / guide).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, guide, "exec"), names)


@pytest.mark.parametrize("page", sorted(page.name for page in DOCS.glob("*.md")))
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    made = ("catalogue/", "ledger/", "capabilities.md")
    links = [link for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", text) if not link.startswith(made)]
    assert [link for link in links if not (DOCS / link).exists()] == []


def test_every_page_is_in_the_contents():
    listed = set((DOCS / "index.md").read_text(encoding="utf-8").split())
    parts = {"index", "ledger_intro", "capabilities"}
    assert {page.stem for page in DOCS.glob("*.md")} - parts <= listed


def test_a_page_opens_with_when_to_use_it_the_evidence_and_the_rate():
    measured, unmeasured = primitive_info("lateral_inhibition"), primitive_info("predictive_coding")
    found = dict.fromkeys(capabilities.COLUMNS, "yes")
    page = catalogue.page(measured, found, None)
    assert (
        page.index("**Use it when**") < page.index("**Evidence**") < page.index("**Rate.**") < page.index("## Biology")
    )
    assert all(str(finding) in page for finding in measured.record)
    if not unmeasured.record:
        assert "Not measured beside a LoRA yet" in catalogue.page(unmeasured, found, None)
    assert set(catalogue.USES) == set(STAGES)


def test_the_ranking_has_every_mechanism_of_the_record_and_says_how_many_were_not_measured():
    from bioadapt.record import record

    names, ranking = {finding.primitive for finding in record()}, catalogue.ranking()
    assert all(f"](catalogue/{name}.md)" in ranking for name in names)
    assert f"{len(list_primitives()) - len(names)} mechanisms have not been measured" in ranking


def test_the_page_on_speed_says_what_was_measured():
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"benchmarks/results/amd[\w.-]+\.csv", page)
    with (DOCS.parent / table).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for kind in ("pointwise", "causal", "weight"):
        ratios = {row["method"]: float(row["step_ratio"]) for row in rows if row["kind"] == kind}
        most = max(ratios, key=ratios.__getitem__)
        middle = f"{statistics.median(ratios.values()):.2f}"
        assert f"| `{kind}` | {len(ratios)} | {middle} | {ratios[most]:.2f} (`{most}`) |" in page
    others = {row["method"]: float(row["step_ratio"]) for row in rows if row["family"] == "peft"}
    assert f"IA3 is at {others['ia3']:.2f} of the LoRA, C3A at {others['c3a']:.2f}" in page
    kept = statistics.median(float(row["saved_ratio"]) for row in rows if row["family"] == "primitive")
    assert f"are {kept:.2f} times a LoRA's" in page


def test_the_page_on_speed_says_what_is_launched_and_served():
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    results = {}
    for kind in ("launches", "serving", "adapting"):
        (table,) = re.findall(rf"benchmarks/results/{kind}-[\w.-]+\.csv", page)
        with (DOCS.parent / table).open(encoding="utf-8") as file:
            results[kind] = list(csv.DictReader(file))
    rows = [row for row in results["launches"] if row["kind"]]
    assert {row["method"] for row in rows} == set(list_primitives())
    causal, others = ([row for row in rows if (row["kind"] == "causal") is flag] for flag in (True, False))
    for name, column, these in (
        ("operations of a training step", "step_operations_ratio", rows),
        ("bytes that they move", "step_mib_ratio", rows),
        ("operations of a decoding step", "decode_operations_ratio", rows),
        ("time of a decoding step, `causal`", "decode_time", causal),
        ("time of a decoding step, the others", "decode_time", others),
    ):
        ratios = {row["method"]: float(row[column]) for row in these}
        most = max(ratios, key=ratios.__getitem__)
        assert f"| {name} | {statistics.median(ratios.values()):.2f} | {ratios[most]:.2f} (`{most}`) |" in page
    compiled = [row for row in rows if row["kernels"]]
    middle = statistics.median(int(row["kernels"]) for row in compiled)
    assert f"is {middle:g} kernels in the median of {len(compiled)} primitives" in page
    assert {row["graph_breaks"] for row in compiled} == {"0"} and {row["fullgraph"] for row in compiled} == {"True"}
    for row in results["serving"]:
        assert f"| `{row['method']}` | {row['threads']} | {row['mixed_batch']} | {row['static_cache']} |" in page
        assert row["compiled_again"] == "0"
    for row in results["adapting"][1:]:
        assert f"| `{row['method']}` | {row['adapt']} | {row['save']} | {row['load']} | {row['growth']} |" in page


def test_a_page_says_how_far_a_loras_rate_brings_it_and_why_not_further(monkeypatch):
    with catalogue.RATES.open(encoding="utf-8") as file:
        measured = {row["name"]: float(row["zero_scale"]) for row in csv.DictReader(file)}
    for name in list_primitives():
        assert "times as far as that of a LoRA r=8" in catalogue.learning(name)
        assert measured[name] == primitive_info(name).fresh_zero_scale, f"python benchmarks/rates.py --only {name}"
    assert "know nothing of the loss; it moves" in catalogue.learning("oja_subspace")
    monkeypatch.setattr(catalogue, "SLOW", {})
    with pytest.raises(KeyError, match="oja_subspace"):
        catalogue.learning("oja_subspace")
