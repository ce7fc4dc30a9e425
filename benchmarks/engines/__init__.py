"""Other programs that serve what we write, each in an environment of its own; README.md says how they are asked."""
