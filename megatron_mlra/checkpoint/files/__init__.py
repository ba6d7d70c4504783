"""Files of checkpoints: what they may hold and how large they may be, before anything is made."""
