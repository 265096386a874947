"""Whole studies on real parts, and what can go wrong with them; minutes each."""
