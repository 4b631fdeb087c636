"""ChestX-ray14: from NIH's own folder to ArrayRecord shards, and from these to batches.

`build` makes the data set, `records.load_chestxray14` reads it. Labels, split lists and images are
the user's own: nothing of NIH's is shipped.
"""
