"""The machine: devices, the process, signals, system metrics, the limits of the hardware, and several ranks."""
