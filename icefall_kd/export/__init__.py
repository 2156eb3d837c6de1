"""Models as files for where they run, each step of the way compared with the last.

``graph`` makes a copy of a model whose parts a graph can hold, ``files`` writes its
forms, ``features`` finds what a recipe's features are, and ``folder`` keeps the files
of one model together with ``metadata.json``. ``plain`` writes the plain form for
chips, and ``timing`` times presets.
"""
