"""The equations of the docstrings as MathML, which browsers set by themselves; words between formulas stay words.

A docstring writes ``e_{t-1}``, ``[x]_+``, ``q^2`` and the names of Greek letters. What is no such notation is prose.
"""

from __future__ import annotations

import re
from html import escape

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "eta": "η", "theta": "θ", "kappa": "κ",
    "lambda": "λ", "mu": "μ", "nu": "ν", "phi": "φ", "pi": "π", "psi": "ψ", "rho": "ρ", "sigma": "σ", "tau": "τ",
    "omega": "ω", "Xi": "Ξ",
}  # fmt: skip
FUNCTIONS = frozenset({
    "arg", "ceil", "clip", "cos", "cosh", "diag", "exp", "log", "logit", "max", "mean", "min", "mod", "offdiag", "rms",
    "sd", "sgn", "sigmoid", "sin", "sinh", "softmax", "softplus", "sqrt", "sum", "tanh", "vec", "Binomial", "Im", "Re",
})  # fmt: skip
SIGNS = {"<-": "←", "->": "→", "||": "‖", ">=": "≥", "<=": "≤", "..": "…", "-": "−", "*": "⊙", "~": "∼"} | {
    "<": "⟨",  # of a mean; where they compare they stand between spaces
    ">": "⟩",
}
_TOKEN = re.compile(r"\s+|\d+(?:\.\d+)?(?:e-?\d+)?|[A-Za-z]\w*?(?=_|\b)'?|<-|->|\|\||>=|<=|\.\.|[_^]|\S")
_COMPARES = re.compile(r"(?<=\s)[<>](?=\s)")
_ENDS, _BEGINS = re.compile(r"[\w)\]}'|+]"), re.compile(r"[\w(\[|<]")
_NAME = re.compile(r"[A-Za-z]\w*")


def as_html(equation: str) -> str:
    """An equation with its prose as HTML, each formula in a ``<math>`` of its own."""
    parts: list[str] = []
    run: list[str] = []

    def close() -> None:
        # A lone letter between words may be an article, and is no formula without anything around it.
        if run:
            text = " ".join(run)
            prose = text in ("a", "A", "I", "-") or text in FUNCTIONS
            parts.append(escape(text) if prose else _math(text))
            run.clear()

    for word in equation.split():
        bare = word.rstrip(",;.:") if not word.endswith("..") else word
        if _is_formula(bare):
            run.append(bare)
            if bare != word:
                close()
                parts[-1] += escape(word[len(bare) :])
        else:
            close()
            parts.append(escape(word.replace("``", "")))
    close()
    return " ".join(parts)


def _is_formula(word: str) -> bool:
    """Whether a word is notation: it has signs that prose has not, or its names are letters, Greek or functions."""
    if "`" in word or '"' in word:
        return False
    names = _NAME.findall(re.sub(r"_\{[^}]*\}|_\w+", "", word))
    return any(sign in word for sign in "|^_[]") or all(
        len(name) == 1 or name in GREEK or name in FUNCTIONS or re.fullmatch(r"[A-Za-z]{1,2}\d+", name)
        for name in names
    )


def _math(text: str) -> str:
    tokens = _TOKEN.findall(_COMPARES.sub(lambda sign: {"<": "‹", ">": "›"}[sign[0]], text))  # no brackets of a mean
    made, place = [], 0
    while place < len(tokens):
        if tokens[place].isspace():
            # A product is two things side by side.
            if _ENDS.match(tokens[place - 1][-1]) and _BEGINS.match(tokens[place + 1][0]):
                made.append('<mspace width="0.2em"></mspace>')
            place += 1
            continue
        node, place = _atom(tokens, place)
        scripts = {}
        while place + 1 < len(tokens) and tokens[place] in "_^" and tokens[place] not in scripts:
            sign = tokens[place]
            scripts[sign], place = _group(tokens, place + 1)
        if len(scripts) == 2:
            node = f"<msubsup>{node}{scripts['_']}{scripts['^']}</msubsup>"
        elif scripts:
            ((sign, script),) = scripts.items()
            node = f"<m{'sub' if sign == '_' else 'sup'}>{node}{script}</m{'sub' if sign == '_' else 'sup'}>"
        made.append(node)
    return f"<math><mrow>{''.join(made)}</mrow></math>"


def _group(tokens: list[str], place: int) -> tuple[str, int]:
    """What a sub- or superscript holds: a token, with its sign, or all between brackets."""
    pairs = {"{": "}", "(": ")"}
    if tokens[place] in pairs:
        depth, end = 1, place + 1
        while end < len(tokens) and depth:
            depth += (tokens[end] == tokens[place]) - (tokens[end] == pairs[tokens[place]])
            end += 1
        inner = "".join(
            _atom(tokens, i)[0] for i in range(place + 1, end - 1) if tokens[i] not in "_^" and not tokens[i].isspace()
        )
        return f"<mrow>{inner}</mrow>", end
    if tokens[place] == "-" and place + 1 < len(tokens):
        return f"<mrow><mo>−</mo>{_atom(tokens, place + 1)[0]}</mrow>", place + 2
    return _atom(tokens, place)


def _atom(tokens: list[str], place: int) -> tuple[str, int]:
    token = tokens[place]
    if token[0].isdigit():
        return f"<mn>{token}</mn>", place + 1
    if token[0].isalpha():
        name = token.rstrip("'")
        shown = {"sqrt": "√", "sum": "∑"}.get(name) or GREEK.get(name, name)
        tag = "mo" if shown in "√∑" else "mi"
        return f"<{tag}>{shown}{'′' * token.count(chr(39))}</{tag}>", place + 1
    sign = {"‹": "&lt;", "›": "&gt;"}.get(token) or escape(SIGNS.get(token, token))
    bar = ' lspace="0" rspace="0"' if token in ("|", "||") else ""
    return f'<mo stretchy="false"{bar}>{sign}</mo>', place + 1
