"""Values that cross rooms of the gateway: what one says and another hears. Small derivations, no behaviour.

Rules:
    1. Below all rooms: nothing in here imports a room of the gateway.
    2. Frozen and slotted; a value that changes is somebody's private state, unless its docstring says what
       changes, when, and why it may.
    3. Quantities end in their unit. Arrays say shape and dtype. Absence is None, never a sentinel.
    4. A module is named after what its values are about.
"""
