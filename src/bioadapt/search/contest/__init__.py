"""The whole of a search: a LoRA is tuned, bio adapters are searched over it, the best confirmed, the winner tested."""

from .contest import Search, search

__all__ = ["Search", "search"]
