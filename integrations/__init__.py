"""Bridges to programs of others; they stand above everything, and nothing imports them."""
