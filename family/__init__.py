"""The other off-policy methods of the field: one paper a file."""
