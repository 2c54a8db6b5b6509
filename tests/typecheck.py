"""The type checker that the tests put on every function of the package: an int counts as a float,
as Python's typing says.
"""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
