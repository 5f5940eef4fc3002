"""The configuration: every setting, and the source of its value."""
