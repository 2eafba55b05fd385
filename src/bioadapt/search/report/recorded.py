"""What a search records of itself in a study; what others keep there under the same names is not taken for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial

_NUMBER = (int, float)
# A shape is a type, or several; a list of one shape; or names with their shapes, those with a question mark optional.
_CONFIG = {"primitives": [{"name": str}]}
_SHAPES: dict[str, Any] = {
    "settings": {},
    "space": {"size": str, "slots": int, "primitives": [str], "places": [str]},
    "task": {"name?": str, "metrics?": [str]},
    "lora": {
        "study": (str, None),
        "trials": int,
        "params?": ({}, None),
        "validation?": (*_NUMBER, None),
        "parameters?": (int, None),
    },
    "confirmation": [{"number": int, "scores": [_NUMBER], "mean": _NUMBER}],
    "final": {
        "metric": str,
        "verdict": str,
        "contenders": [
            {
                "name": str,
                "scores": [_NUMBER],
                "parameters?": (int, None),
                "epochs?": (*_NUMBER, None),
                "seconds?": (*_NUMBER, None),
            }
        ],
        "differences": [{"name": str, "estimate": _NUMBER, "low": _NUMBER, "high": _NUMBER, "level?": _NUMBER}],
        "winner": {"number": int, "configs": [_CONFIG], "learning_rate?": (*_NUMBER, None)},
        "shrinkage?": {"observed": _NUMBER, "posterior?": (*_NUMBER, None), "sd?": (*_NUMBER, None)},
        "configurations_tried?": int,
        "test_accesses?": int,
        "script?": str,
    },
    "best": {"number": int, "script": str},
}
_OF_A_TRIAL: dict[str, Any] = {
    "configuration": {
        "slots": [{"primitive": str, "layers": str, "modules": str, "strength?": _NUMBER}],
        "composition?": str,
        "rank?": (int, None),
        "learning_rate?": _NUMBER,
    },
    "configs": [_CONFIG],
    "parameters": int,
    "seconds": _NUMBER,
    "failure": str,
}


def of_study(study: Study) -> dict[str, Any]:
    """The attributes of a study that have the shape in which a search records them."""
    return _fitting(study.user_attrs, _SHAPES)


def of_trial(trial: FrozenTrial) -> dict[str, Any]:
    """The attributes of a trial that have the shape in which a search records them."""
    return _fitting(trial.user_attrs, _OF_A_TRIAL)


def _fitting(attributes: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: attributes[name] for name, shape in shapes.items() if _fits(attributes.get(name), shape)}


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, tuple):
        return any(_fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(part, shape[0]) for part in value)
    if isinstance(shape, dict):
        return isinstance(value, Mapping) and all(
            _fits(value[name.rstrip("?")], part) if name.rstrip("?") in value else name.endswith("?")
            for name, part in shape.items()
        )
    if shape is None:
        return value is None
    return isinstance(value, shape) and not isinstance(value, bool)
