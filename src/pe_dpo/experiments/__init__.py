"""Many runs from one base, and what can be told apart between them."""
