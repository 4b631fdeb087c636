"""ChestX-ray14: from NIH's files to ArrayRecord shards to batches.

`build` builds the data set and `records.load_chestxray14` reads it. Users provide NIH's labels,
split lists and images.
"""
