"""What a round file may choose by name, and where each name leads."""
