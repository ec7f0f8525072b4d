def treat() -> None:
    """Placeholder."""
