"""How a tensor is packed, and found again in a graph."""
