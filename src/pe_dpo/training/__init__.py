"""A run from recipe to adapter: its folder, its checkpoints, its optimizer step."""
