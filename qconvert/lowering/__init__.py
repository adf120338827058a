"""One decoder, lowered to each runtime's operators."""
