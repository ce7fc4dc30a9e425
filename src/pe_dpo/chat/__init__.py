"""Base and tuned answers side by side, from one loaded base."""
