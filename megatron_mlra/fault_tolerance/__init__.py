"""Surviving faults: which checkpoint to continue from, which batch was bad, which rank hangs."""
