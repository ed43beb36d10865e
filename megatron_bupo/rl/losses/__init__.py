"""The built-in losses, one file each: NAME, Flags and loss(inputs, flags)."""
