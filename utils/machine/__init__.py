"""The machine: devices, processes, signals, and what they can do."""
