"""Decoding steps of whole models, measured."""
