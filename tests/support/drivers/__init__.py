"""Programs that run worlds of ranks on one import of Megatron: `python -m support.drivers.NAME`."""
