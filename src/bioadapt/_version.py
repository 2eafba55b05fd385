"""The version, which saved files carry as well."""

__version__ = "0.1.0"
