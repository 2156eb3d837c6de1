from exporting import speak  # noqa: F401
