"""The parts that all HTTP servers of the workbench share: security headers, checks of requests, start and end."""
