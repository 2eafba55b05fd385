"""API search: find a function or class from the first sentence of its docstring.

The texts are those of the libraries that are installed anyway, read at run time; nothing is downloaded. The split goes
by library, so the library that is searched in the test is never trained on.

A *document* is a qualified name cut at underscores and capitals (``sklearn.svm.LinearSVC`` -> "sklearn svm linear
svc"), a *query* is the first sentence of a docstring. The documents of a library are all its public callables; the
queries are those whose sentence has `MIN_WORDS` to `MAX_WORDS` words and occurs once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import inspect
import io
import logging
import pkgutil
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

TRAIN_LIBRARIES = ("numpy", "scipy", "torch", "transformers")
# networkx is a dependency of torch, hence always there, and documents in the style of the test library.
VALIDATION_LIBRARIES = ("networkx",)
TEST_LIBRARIES = ("sklearn",)
MIN_WORDS, MAX_WORDS = 4, 15  # fewer words name nothing in particular, and nobody types more into a search box
VALIDATION_QUERIES = 400  # enough to choose by, and quick enough to be scored within an epoch

# Asking transformers for its whole list of names, or for its models, would import hundreds of architectures.
_NOT_READ = frozenset({"transformers", "transformers.models"})
_PRIVATE = ("_", "test", "conftest", "setup", "distutils", "externals")
_SIGNATURE = re.compile(r"[\w.]+\(")  # of the callable itself or of what it is an alias of
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


@dataclass(frozen=True)
class ApiEntry:
    """One public callable: its qualified ``name``, that name as text, and the first ``sentence`` of its docstring.

    ``sentence`` is empty where there is no docstring of its own.
    """

    name: str
    document: str
    sentence: str

    @property
    def key(self) -> str:
        """The last part of the name without case and underscores: what must not stand in two splits."""
        return self.name.rpartition(".")[2].replace("_", "").lower()


@dataclass(frozen=True)
class RankingProblem:
    """A ranking problem: for ``queries[i]`` the documents at the places ``answers[i]`` are right, and no other."""

    queries: tuple[str, ...]
    answers: tuple[frozenset[int], ...]
    documents: tuple[str, ...]


@dataclass(frozen=True)
class ApiCorpus:
    """Pairs (sentence, document) to train on, a ranking problem to choose by and one to report on."""

    train: tuple[tuple[str, str], ...]
    validation: RankingProblem
    test: RankingProblem
    versions: dict[str, str]

    def fingerprint(self) -> str:
        """SHA-256 over every text: two processes that agree in it were given the same task."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            digest.update(repr(part).encode())
        return digest.hexdigest()


def build_api_corpus(
    train: Iterable[str] = TRAIN_LIBRARIES,
    validation: Iterable[str] = VALIDATION_LIBRARIES,
    test: Iterable[str] = TEST_LIBRARIES,
    *,
    limit: int | None = None,
) -> ApiCorpus:
    """Read the libraries and cut the corpus; the same for the same versions of the libraries.

    Args:
        train, validation, test: import names of installed libraries, no library in two of them.
        limit: keep about so many training pairs and queries of each split, for a quick look.

    Raises:
        ValueError: a library in two splits, or one that is not installed.
    """
    splits = {"train": tuple(train), "validation": tuple(validation), "test": tuple(test)}
    libraries = [library for names in splits.values() for library in names]
    for library, count in Counter(libraries).items():
        if count > 1:
            raise ValueError(f"library {library!r} stands in two splits of the API search")
    with quiet():
        entries = {library: read_library(library) for library in libraries}
    held_out = [entry for split in ("validation", "test") for library in splits[split] for entry in entries[library]]
    return ApiCorpus(
        train=_thin(_pairs([entry for library in splits["train"] for entry in entries[library]], held_out), limit),
        validation=_ranking_problem(
            [entry for library in splits["validation"] for entry in entries[library]],
            VALIDATION_QUERIES if limit is None else min(limit, VALIDATION_QUERIES),
            thin_documents=limit is not None,
        ),
        test=_ranking_problem(
            [entry for library in splits["test"] for entry in entries[library]], limit, thin_documents=limit is not None
        ),
        versions={library: _version(library) for library in libraries},
    )


def read_library(library: str) -> list[ApiEntry]:
    """The public functions, classes and other callables of a library, each once, under its shortest public name.

    Public is what has a name without leading underscore in the package itself or in one of its direct submodules;
    what a library only imports from elsewhere is left out.
    """
    public: dict[int, tuple[str, Any]] = {}  # the object is kept, so that no id is used twice
    for module in _public_modules(library):
        for attribute in sorted(set(dir(module))):
            if attribute.startswith("_"):
                continue
            try:
                value = getattr(module, attribute)
            except Exception:  # a lazy name whose optional dependency is missing
                continue
            if callable(value) and _belongs_to(value, library):
                public.setdefault(id(value), (f"{module.__name__}.{attribute}", value))
    return [ApiEntry(name, as_words(name), first_sentence(value)) for name, value in public.values()]


def as_words(name: str) -> str:
    """A qualified name as text: ``torch.nn.Conv2d`` -> "torch nn conv2d", ``KMeans`` and ``k_means`` -> "k means"."""
    name = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1 \2", name)
    return " ".join(re.split(r"[._\s]+", name)).strip().lower()


def first_sentence(value: Any) -> str:
    """The first sentence of a callable's own docstring, without mark-up; empty if it has none.

    A signature on top, as compiled functions carry it, is skipped: it would give the name away.
    """
    for paragraph in re.split(r"\n\s*\n", _own_docstring(value).strip()):
        paragraph = paragraph.strip()
        if paragraph and not paragraph.startswith("..") and not _SIGNATURE.match(paragraph):
            text = " ".join(_without_markup(paragraph).split())
            return re.split(r"(?<=[.!?])\s+(?=[A-Z(\[])", text)[0]
    return ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that libraries print, log or warn about while they are imported reaches the user."""
    disabled, levels = logging.root.manager.disable, _logger_levels()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(disabled)
        for logger, level in levels.items():  # some modules make their library talkative as they are imported
            logger.setLevel(level)


def _logger_levels() -> dict[logging.Logger, int]:
    loggers = logging.root.manager.loggerDict.values()
    return {logger: logger.level for logger in loggers if isinstance(logger, logging.Logger)}


def _public_modules(library: str) -> Iterator[ModuleType]:
    root = _imported(library)
    if root is None:
        raise ValueError(f"library {library!r} of the API search is not installed")
    if library not in _NOT_READ:
        yield root
    for entry in sorted(pkgutil.iter_modules(root.__path__, f"{library}."), key=lambda entry: entry.name):
        if not entry.name.rpartition(".")[2].startswith(_PRIVATE) and entry.name not in _NOT_READ:
            module = _imported(entry.name)
            if module is not None:
                yield module


def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit):  # optional parts fail in many ways where their dependency is missing
        return None


def _belongs_to(value: Any, library: str) -> bool:
    home = getattr(value, "__module__", None)
    # Compiled functions often have no module; the library that shows them is then taken as their home.
    return not isinstance(home, str) or home.partition(".")[0] == library


def _own_docstring(value: Any) -> str:
    if inspect.isclass(value):
        text = vars(value).get("__doc__")
    else:
        text = getattr(value, "__doc__", None)
        if text is getattr(type(value), "__doc__", None):
            text = None  # an instance shows its class's docstring
    return inspect.cleandoc(text) if isinstance(text, str) else ""


def _without_markup(text: str) -> str:
    roles = r":[\w:]+:`~?(?:[^`<]*\.)?([^`<]*?)\s*(?:<[^>]*>)?`"  # :func:`~a.b.c` -> c
    return re.sub(roles, r"\1", text).replace("`", "").replace("*", "")


def _usable(entries: Iterable[ApiEntry]) -> list[ApiEntry]:
    """Entries whose sentence can be asked: long enough, and of one entry only."""
    entries = list(entries)
    counts = Counter(entry.sentence for entry in entries)
    return [
        entry
        for entry in entries
        if counts[entry.sentence] == 1 and MIN_WORDS <= len(entry.sentence.split()) <= MAX_WORDS
    ]


def _pairs(entries: list[ApiEntry], held_out: list[ApiEntry]) -> list[tuple[str, str]]:
    keys = {entry.key for entry in held_out}
    sentences = {entry.sentence for entry in held_out}
    return [
        (entry.sentence, entry.document)
        for entry in _usable(entries)
        if entry.key not in keys and entry.sentence not in sentences
    ]


def _ranking_problem(entries: list[ApiEntry], limit: int | None, *, thin_documents: bool) -> RankingProblem:
    asked = _thin([(entry.sentence, entry.document) for entry in _usable(entries)], limit)
    needed = {document for _, document in asked}
    documents = sorted({entry.document for entry in entries})
    if thin_documents:
        kept = {document for document, _ in _thin([(document, "") for document in documents], limit)}
        documents = [document for document in documents if document in needed | kept]
    place = {document: index for index, document in enumerate(documents)}
    return RankingProblem(tuple(q for q, _ in asked), tuple(frozenset({place[d]}) for _, d in asked), tuple(documents))


def _thin(pairs: list[tuple[str, str]], limit: int | None) -> tuple[tuple[str, str], ...]:
    """At most ``limit`` pairs, those whose first text has the smallest SHA-1: no random generator, the order kept."""
    if limit is None or len(pairs) <= limit:
        return tuple(pairs)
    chosen = set(sorted(pairs, key=lambda pair: hashlib.sha1(pair[0].encode()).digest())[:limit])
    return tuple(pair for pair in pairs if pair in chosen)


def _version(library: str) -> str:
    return importlib.metadata.version(_DISTRIBUTIONS.get(library, library))
