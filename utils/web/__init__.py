"""What every HTTP server of the workbench shares: security headers, checks of requests, its start and its end."""
