"""What a primitive of your own imports, in one line: ``from bioadapt.primitives.base import Primitive, setting``."""

from .context import Context, Host
from .local_rule import LocalRule
from .on_weight import Blend, OnWeight
from .primitive import Fused, Primitive, Scaled
from .setting import Setting, setting

__all__ = ["Blend", "Context", "Fused", "Host", "LocalRule", "OnWeight", "Primitive", "Scaled", "Setting", "setting"]
