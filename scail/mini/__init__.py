"""Procedural bodies and motions: what the demo shows and what small models learn from. Nothing here is footage."""
