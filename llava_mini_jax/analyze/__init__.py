"""What a model costs, what a compiled step will do, and where a model looks."""
