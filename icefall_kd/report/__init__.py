"""Teacher, student and distilled student side by side, from icefall's own files."""
