"""The type checker that executes every annotation of the package in tests: beartype, with int taken for float.

That is how type checkers read annotations (PEP 484's numeric tower), and what a user of `temperature=0` expects.
"""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
