"""What hub and device say of mirrored data: the task's name, its tensors, its bounds.

A mirror travels as the update of a task whose method is `MIRROR`: no other letter is needed.
"""

MIRROR = "mirror"
"""The method of a task that asks for the local samples themselves; no method of learning."""

X, Y = "mirror/x", "mirror/y"
"""The tensors of a mirror: the samples, and their labels as numbers."""

MOST_BYTES = 64 << 20
"""No device mirrors more."""
