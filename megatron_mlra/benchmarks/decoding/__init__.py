"""Measures decoding steps of whole models."""
