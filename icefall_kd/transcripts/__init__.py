"""Decodes cuts with a model, and writes icefall's result files and what it cost.

``cuts`` and ``audio`` give a model its input, ``recognizer`` runs encoder and search,
``journal`` keeps each batch's result as soon as it is there, ``decoding`` is the loop
over batches, ``scores`` writes icefall's files, ``costs`` sums up time and memory, and
``outcome`` makes a table of all. ``cascade`` chooses what a student leaves to its
teacher, and ``first_answers`` are the student's where that is applied.
"""
