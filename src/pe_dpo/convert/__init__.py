"""From another tool's configuration to a recipe that means the same, line by line, with what it cannot say."""
