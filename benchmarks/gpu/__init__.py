"""The proof on a card: one command, a process and a time limit for each check, results written as they come; see README.md."""
