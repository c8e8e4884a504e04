"""The type checker that jaxtyping runs on every call of dgrad under pytest: an int is as good as a float (PEP 484).

A file of its own: pytest imports it before dgrad, which `helpers.py` imports.
"""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
