"""The demo: one process, local and synchronized batch norm train the same network, and the differences are shown."""
