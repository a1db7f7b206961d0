"""Values that cross packages of the gateway: what one says and another reads. Few derivations, no behaviour.

Rules:
    1. Below all packages: nothing in here imports another package of the gateway.
    2. Frozen and slotted; one that changes is private state of its owner, unless its docstring says what
       changes, when, and why it may.
    3. Quantities end in their unit. Arrays say shape and dtype. Absence is None, never a sentinel.
    4. A module is named after what its values are about.
"""
