"""Thin entry points: parse, then one call of the library."""
