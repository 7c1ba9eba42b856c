"""The judge of every kernel here: a float64 oracle, one tolerance rule, test cases, memory."""
