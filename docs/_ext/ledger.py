"""Writes the pages of the claims ledger: a page for every experiment from its README, and one table of all claims.

Nothing on these pages is typed twice: an experiment that lacks its README, its claims or its picture fails the build.
"""

from __future__ import annotations

import csv
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from catalogue import table

README, CLAIMS, VALUES, PICTURE = "README.md", "claims.csv", "results.csv", "results.png"
APART = ("record", "evidence")  # comparisons with LoRAs, which claim nothing; each has a page of its own
NEEDED = (README, CLAIMS, VALUES, PICTURE)
COLUMNS = ("claim", "measure", "side", "bound", "estimate", "low", "high", "seeds", "verdict", "note")
VERDICTS = ("supported", "undecided", "not supported", "not testable here")
# Code goes through unread: brackets in it are no links.
LINK = re.compile(r"```.*?```|`[^`\n]*`|(?P<text>(?P<image>!?)\[[^\]]*\])\((?P<target>[^)\s]+)\)", re.DOTALL)
CLAIMS_TABLE = re.compile(r"^\| claim \|(?:.*\|\n)+", re.MULTILINE)

Claim = dict[str, str]


def setup(app: Any) -> dict[str, Any]:
    app.connect("builder-inited", lambda app: write(Path(app.srcdir), Path(app.srcdir).parent / "experiments"))
    app.add_css_file("ledger.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write(docs: Path, experiments: Path) -> None:
    """All pages of the ledger, made anew.

    Raises:
        RuntimeError: experiments are incomplete; each is named with what it lacks.
    """
    docs, experiments = docs.resolve(), experiments.resolve()
    folders = found_in(experiments)
    pages = docs / "ledger"
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir()
    claims = {folder: read_claims(folder / CLAIMS) for folder in folders}
    for folder in folders:
        (pages / f"{folder.name}.md").write_text(page(folder, docs), encoding="utf-8")
    intro = (docs / "ledger_intro.md").read_text(encoding="utf-8")
    (pages / "index.md").write_text(overview(intro, claims), encoding="utf-8")


def found_in(experiments: Path) -> list[Path]:
    """The folders of the experiments, by name.

    Raises:
        RuntimeError: there are none, or some lack files.
    """
    folders = sorted(
        p for p in experiments.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")) and p.name not in APART
    )
    lacking = {folder.name: [name for name in NEEDED if not (folder / name).is_file()] for folder in folders}
    broken = [f"{name} lacks {', '.join(files)}" for name, files in lacking.items() if files]
    if broken or not folders:
        raise RuntimeError(f"{experiments}: " + ("; ".join(broken) or "no experiment"))
    return folders


def read_claims(path: Path) -> list[Claim]:
    """The lines of a claims.csv.

    Raises:
        RuntimeError: a column is missing, there is no line, or a verdict is none.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        rows = list(reader)
    if missing or not rows:
        raise RuntimeError(f"{path} has no " + (f"column {', '.join(missing)}" if missing else "claim"))
    odd = sorted({row["verdict"] for row in rows} - set(VERDICTS))
    if odd:
        raise RuntimeError(f"{path}: verdict {', '.join(map(repr, odd))}; accepted: {', '.join(VERDICTS)}")
    return rows


def title_of(readme: Path) -> str:
    """The first heading.

    Raises:
        RuntimeError: the file does not begin with one.
    """
    first = readme.read_text(encoding="utf-8").partition("\n")[0]
    if not first.startswith("# "):
        raise RuntimeError(f"{readme} begins with {first!r} instead of '# ' and a title")
    return first.removeprefix("# ").strip()


def page(folder: Path, docs: Path) -> str:
    """The README with links that work in the documentation, the picture, and the files to take home."""
    readme = folder / README
    text = readme.read_text(encoding="utf-8").rstrip()
    if f"]({PICTURE})" not in text:
        text += f"\n\n![what was measured]({PICTURE})"
    text = CLAIMS_TABLE.sub(lambda match: _styled(match[0].strip(), "claims") + "\n", text)
    text += f"\n\nTo take home: [every value]({VALUES}), [what was judged]({CLAIMS})."
    return LINK.sub(lambda match: _link(match, readme, docs), text) + "\n"


def _link(match: re.Match[str], readme: Path, docs: Path) -> str:
    target = match["target"]
    if target is None or "://" in target or target.startswith(("#", "mailto:")):
        return match[0]
    path, mark, anchor = target.partition("#")
    place = _place(readme, (readme.parent / path).resolve(), docs)
    return f"{match['text']}({place}{mark}{anchor})" + ("{.portrait}" if match["image"] else "")


def _place(readme: Path, wanted: Path, docs: Path) -> str:
    """Where the pages of the ledger find a file; what is no page is copied to them.

    Raises:
        RuntimeError: there is no such file, or it is a text that has no page.
    """
    experiments = readme.parent.parent
    if wanted == experiments / README:
        return "index.md"
    if wanted.name == README and wanted.parent.parent == experiments and wanted.is_file():
        return f"{wanted.parent.name}.md"
    if wanted.is_relative_to(docs) and wanted.is_file():
        return f"../{wanted.relative_to(docs).as_posix()}"
    if wanted.suffix == ".md" or not wanted.is_file() or not wanted.is_relative_to(experiments.parent):
        raise RuntimeError(f"{readme} links to {wanted}, which is no page of the documentation and no file to show")
    place = Path("files") / wanted.relative_to(experiments.parent)
    copy = docs / "ledger" / place
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(wanted, copy)
    return place.as_posix()


def overview(intro: str, claims: dict[Path, list[Claim]]) -> str:
    """The hand-written introduction, how many claims came out how, and all claims in one table."""
    found = {folder: Counter(claim["verdict"] for claim in listed) for folder, listed in claims.items()}
    counts = [
        [f"[{title_of(folder / README)}]({folder.name}.md)", *(str(counter[verdict]) for verdict in VERDICTS)]
        for folder, counter in found.items()
    ]
    counts.append(["all", *(str(sum(counter[verdict] for counter in found.values())) for verdict in VERDICTS)])
    rows = [
        [f"[{folder.name}]({folder.name}.md)", _statement(claim), _interval(claim), claim["seeds"], claim["verdict"]]
        for folder, listed in claims.items()
        for claim in listed
    ]
    parts = [
        intro.strip(),
        "## Experiments",
        table(["experiment", *VERDICTS], counts),
        "## All claims",
        _styled(table(["experiment", "claim", "mean and 95 % interval", "seeds", "verdict"], rows), "all-claims"),
        "```{toctree}\n:hidden:\n\n" + "\n".join(folder.name for folder in claims) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _statement(claim: Claim) -> str:
    """The claim, and in small print what was measured and what it was held against."""
    bound = f"within ±{claim['bound']}" if claim["side"] == "within" else f"{claim['side']} {claim['bound']}"
    note = f" {claim['note']}" if claim["note"] else ""
    return f"{claim['claim']}<br><small>{claim['measure']}; holds if {bound}.{note}</small>"


def _interval(claim: Claim) -> str:
    estimate, low, high = (float(claim[name]) for name in ("estimate", "low", "high"))
    if math.isnan(estimate):
        return "-"
    return f"{estimate:+.3g}" + ("" if math.isnan(low) else f" [{low:+.3g},\u00a0{high:+.3g}]")


def _styled(rows: str, name: str) -> str:
    """A table with a class that the style sheet knows."""
    return f"```{{table}}\n:class: {name}\n\n{rows}\n```"
