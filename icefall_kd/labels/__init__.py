"""Pseudo-labels: transcripts of a teacher, made, filtered and put into tokens.

``pseudo_label`` is the record and how a cut carries it. ``recipe``, ``whisper`` and
``program`` are teachers; ``whisper_model`` and ``assistant`` serve the second.
``labelling`` runs a teacher over a manifest. ``text`` rewrites texts by a file of
rules, ``filters`` judge a label, and ``sifting`` applies them to a manifest.
"""
