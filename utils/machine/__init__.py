"""The machine: devices, the process, signals, system metrics, and the limits of the hardware."""
