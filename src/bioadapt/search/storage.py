"""The documented place of what opens a storage and hands out its trials; see `bioadapt.search.study`."""

from .study.storage import open_storage
from .study.tickets import recover, settled, ticket

__all__ = ["open_storage", "recover", "settled", "ticket"]
