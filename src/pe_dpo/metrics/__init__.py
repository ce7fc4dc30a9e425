"""What is computed of scored pairs and answers: one table, one list of metrics, intervals and tests."""
