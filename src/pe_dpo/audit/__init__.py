"""What the reference already knows before training, and the γ that this suggests."""
