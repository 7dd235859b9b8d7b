"""`python -m diffulm`."""

from .cli import entry

entry()
