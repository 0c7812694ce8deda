"""Repairs by name (`registry`): each published one is a function in `published`. They
are kept as files of a comparison (`cached`), or as folders that are plans (`folders`).
"""

from .cached import kept_repair as kept_repair
from .folders import (
    CLOSED_FORM as CLOSED_FORM,
    recover as recover,
    repair_into as repair_into,
)
from .registry import (
    METHODS as METHODS,
    Repair as Repair,
    RepairFunction as RepairFunction,
    method as method,
    refit as refit,
)

# The names of these two before `notall.plugins` had them.
Method, Repairing = Repair, RepairFunction
