"""End-to-end studies on real components, and their faults; minutes each."""
