"""The words that sort the primitives. Nothing is imported for them, so that a wrong one is answered at once."""

from __future__ import annotations

from .._words import suggest

STAGES = ("sensory_gain", "competition", "dendritic", "dynamics", "memory", "plasticity")
ENTRY_POINT_GROUP = "bioadapt.primitives"  # by which packages announce primitives of their own
KINDS = ("pointwise", "causal", "weight", "global")


def check_filter(pattern: str = "*", stage: str | None = None, kind: str | None = None) -> None:
    """Refuse what no primitive can be found by.

    Raises:
        ValueError: an unknown stage or kind, or one of them as the pattern.
    """
    for field, value, accepted in (("stage", stage, STAGES), ("kind", kind, KINDS)):
        if value is not None and value not in accepted:
            raise ValueError(f"unknown {field} {value!r}; {suggest(value, accepted)}")
        if pattern in accepted:
            raise ValueError(f"no primitive is called {pattern!r}, which is a {field}: {field}={pattern!r}")
