"""What a script types: studies, rounds, trials. The command line is arguments and printing over it."""
