class _Logger:
    CRITICAL: int
    severity: int

G_LOGGER: _Logger
