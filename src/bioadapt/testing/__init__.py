"""The conformance suite: what every primitive keeps, as classes that a test module subclasses with one fixture.

```python
import pytest
from bioadapt.testing import AdapterConformance, PrimitiveConformance


class TestMyPrimitive(PrimitiveConformance):
    @pytest.fixture
    def primitive(self):
        return "my_primitive"  # or {"name": "my_primitive", "rank": 4}


class TestMyPrimitiveInModels(AdapterConformance):
    @pytest.fixture
    def primitive(self):
        return "my_primitive"
```

The module that registers the primitive has to be imported, or announced by the entry-point group
``bioadapt.primitives``. Needs the extra ``testing``, which is pytest: nothing else imports this package.
"""

from .._extras import require

pytest = require("pytest", "testing")
pytest.register_assert_rewrite(__name__)

from .adapter import AdapterConformance  # noqa: E402  (assertions are rewritten in modules imported from here on)
from .hosts import HOSTS, TinyHost  # noqa: E402
from .primitive import PrimitiveConformance  # noqa: E402

__all__ = ["HOSTS", "AdapterConformance", "PrimitiveConformance", "TinyHost"]
