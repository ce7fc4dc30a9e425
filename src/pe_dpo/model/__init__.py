"""The base (4-bit or not), the adapters on it, and the reference that they define."""
