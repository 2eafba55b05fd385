"""Whether a model is being exported. torch tells from 2.7 on; of older ones it is not known, and the answer is no."""

from __future__ import annotations

from collections.abc import Callable

import torch

is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
