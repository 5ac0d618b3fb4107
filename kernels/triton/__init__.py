"""Triton implementations: jit code and launchers, nothing else. Imported at the first launch on a GPU."""
