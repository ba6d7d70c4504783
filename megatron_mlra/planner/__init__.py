"""Memory, time and traffic of a run before it is launched: arithmetic only, no torch."""
