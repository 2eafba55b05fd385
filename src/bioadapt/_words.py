"""Wording that error messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(value: object, accepted: Iterable[str]) -> str:
    """The nearest accepted names in a clause, or all of them where they are few."""
    names = sorted(accepted)
    close = difflib.get_close_matches(str(value), names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
    if not names:
        return "there are none"
    return f"accepted: {', '.join(names[:12])}" + (", ..." if len(names) > 12 else "")
