"""Whether a model is being exported. torch tells from 2.7 on; what older ones export is as they would compile it."""

from __future__ import annotations

from collections.abc import Callable

import torch

is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
