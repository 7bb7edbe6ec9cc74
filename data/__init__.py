"""From folders and sentences to batches: scan, read, check, split, augment, load."""
