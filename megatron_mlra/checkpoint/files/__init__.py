"""Readers and writers of checkpoint files, which check contents and sizes before they allocate."""
