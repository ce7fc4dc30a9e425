"""A run as one model on disk, and the proof that it is what was trained."""
