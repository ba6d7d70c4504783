"""Fault tolerance: complete checkpoints, bad batches, hanging ranks, stop signals, resumption.

Start with integrity.py and resume.py (checkpoints), heartbeat.py and hang.py (ranks), samples.py
(batches), saved_steps.py (the saved steps of a folder), stopping.py (signals).

May import:   checkpoint, description, command_line, launch.control; torch, Megatron's
              checkpointing
Imported by:  training, and by inference and benchmarks the meeting of ranks (handshake.py,
              fingerprint.py)
Never:        training: the entry hands in what a guard needs
Held by:      tests/unit/fault_tolerance, tests/e2e/test_faults.py, tests/e2e/test_hangs.py
"""
