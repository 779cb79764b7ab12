"""The checker of annotations at run time; as PEP 484 has it, a whole number does for a float."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
