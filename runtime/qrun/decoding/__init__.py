"""How answers advance, token by token."""
